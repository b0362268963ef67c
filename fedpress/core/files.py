"""Files that are written whole or not at all: the one atomic writer."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fedpress.errors import FedpressError, RunError, Words

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""


@contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it takes `path`'s place in one step, on failure it is removed.

    Args:
        path: the file; its folder must exist.
        durable: wait until the content is on the disk before the file takes its place, so that even a power cut
            leaves the old file or the whole new one. Without it a killed process does, and writing is quicker.
        shared: several processes may write `path` at the same time, so that each needs a temporary path of its own.
            Otherwise there is one name for it, and what a killed process leaves is written over.
    """
    if shared:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        part = Path(name)
    else:
        part = path.with_name(f".{path.name}.part")
        if part.is_symlink():  # writing would go through it, into somebody's other file
            part.unlink()
    try:
        yield part
        take_place(part, path, durable=durable)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def take_place(part: Path, path: Path, *, durable: bool = True) -> None:
    """Puts the whole file `part` in the place of `path`, in one step."""
    if durable:
        sync(part)
    os.replace(part, path)


@contextmanager
def writing(
    path: Path,
    *,
    raises: type[FedpressError] = RunError,
    full: Words = "free some space",
    other: Words = "choose another place",
) -> Iterator[None]:
    """Turns what can go wrong while `path` is written into an error that names the place and the cure.

    Args:
        path: what is written.
        raises: the type of the error.
        full: the cure where the disk is full.
        other: the cure where the place cannot be written.

    Raises:
        FedpressError: of the type `raises`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        reason = os.strerror(number) if number else str(error)
        cure = full if number in FULL else other
        raise raises(f"cannot be written ({reason})", place=path, cure=cure) from error


def _number(error: OSError | SafetensorError) -> int | None:
    """The number of an error of the system; safetensors tells it in words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return int(found[1] or found[2]) if found else None


def sync(path: Path) -> None:
    """Waits until what was written to `path` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
