"""Writes files atomically, and turns disk errors into errors of fedpress with place and cure."""

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

# Errors of a full disk, an exceeded quota, and a file that is too large for the file system.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is renamed to `path` at the end of the block.

    If the block fails, the temporary file is removed and the old file at `path` stays.

    Args:
        path: the file; its folder must exist.
        durable: whether to wait until the content is on the disk before the rename. True: even
            after a power failure there is the old file or the complete new one. False: writing is
            faster, but a power failure may damage the file; a killed process still does not.
        shared: whether several processes may write `path` at the same time. True: each uses a
            temporary name of its own. False: all use one name, so the next process overwrites the
            temporary file that a killed process has left.
    """
    if shared:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        part = Path(name)
    else:
        part = path.with_name(f".{path.name}.part")
        # Writing to a symbolic link would overwrite the file that it points to.
        if part.is_symlink():
            part.unlink()
    try:
        yield part
        take_place(part, path, durable=durable)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def take_place(part: Path, path: Path, *, durable: bool = True) -> None:
    """Renames the complete file `part` to `path`, atomically."""
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
    """Turns an OSError or an error of safetensors in the block into one with place and cure.

    Args:
        path: the file that is written.
        raises: the type of the error.
        full: the cure if the disk is full.
        other: the cure if the file cannot be written for another reason.

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
    """Returns the errno of an error; None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    # An error of safetensors has the number only in its text.
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    if not found:
        return None
    return int(found[1] or found[2])


def sync(path: Path) -> None:
    """Waits until the content of `path` is on the disk."""
    # Opening for reading is enough: fsync waits for what any process has written to the file.
    with open(path, "rb") as file:
        os.fsync(file.fileno())
