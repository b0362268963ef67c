"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it takes `path`'s place in one step, on failure it is removed.

    The temporary path has one name, so what a killed process leaves is written over.
    """
    part = path.with_name(f".{path.name}.part")
    if part.is_symlink():  # writing would go through it, into somebody's other file
        part.unlink()
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until what was written to `path` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
