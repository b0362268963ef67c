"""A lock for a folder, so that only one process at a time works in it.

The operating system releases the lock of a process that dies.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedpress.errors import Argument, RunError, Shell

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
# `holder` takes the lock for an instant to see whether it is free. Another process is then refused
# although nobody works in the folder, so `_acquire` tries again so many times.
RETRIES = 3
# Folder and thread -> how many `with locked(folder)` blocks the thread is in.
_held_here: dict[tuple[str, int], int] = {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder` during the block: an flock on the file `lock` in the folder.

    The text of the file names the process that has the lock. On file systems without flock, the
    folder is locked as long as the file exists, names a process, and this process is not known to
    be dead. A thread that has the lock may take it a second time.

    Raises:
        RunError: if another process has the lock (the error names it), or if the folder cannot be
            written.
    """
    key = (str(folder.resolve()), threading.get_ident())
    if key in _held_here:
        _held_here[key] += 1
        try:
            yield
        finally:
            _held_here[key] -= 1
        return
    handle = _acquire(folder)
    _held_here[key] = 1
    try:
        yield
    finally:
        del _held_here[key]
        # The file is removed while the lock is still held. Once the lock is released, another
        # process may lock the same file, which must not be removed then.
        with suppress(OSError):
            (folder / NAME).unlink(missing_ok=True)
        os.close(handle)


def holder(folder: Path) -> str | None:
    """Describes the process that works in `folder`.

    Returns:
        A description for errors; None if no process works there, if only this thread does, or if
        the lock file cannot be read.
    """
    path = folder / NAME
    if (str(folder.resolve()), threading.get_ident()) in _held_here:
        return None
    if path.is_symlink() or not path.is_file():
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        result = _try_flock(handle)
        if result == "taken":
            return None
        owner = _read_owner(path)
        # `_acquire` takes the lock in these cases too. A process may have died before it wrote its
        # name.
        if result == "unknown" and (not owner or _is_dead(owner)):
            return None
        return _describe(owner)
    finally:
        # Closing also releases the lock if `_try_flock` has taken it.
        os.close(handle)


def check_unlocked(folder: Path) -> None:
    """Checks that no other process works in `folder`.

    Raises:
        RunError: if another process works there; the error names it.
    """
    found = holder(folder)
    if found is not None:
        raise _locked_error(folder, found)


def _locked_error(folder: Path, found: str) -> RunError:
    return RunError(
        f"{found} works in this folder",
        place=folder,
        cure=(
            "wait for its end, or ",
            Shell("stop it and go on with --resume, or "),
            "give another ",
            Argument("out"),
        ),
    )


def _acquire(folder: Path) -> int:
    """Takes the lock, writes this process into the file, and returns the handle of the open file.

    Closing the handle releases the lock.
    """
    path = folder / NAME
    retries = 0
    while True:
        handle = _open(path)
        result = _try_flock(handle)
        if result == "held" and retries < RETRIES:
            os.close(handle)
            retries += 1
            time.sleep(0.05)
            continue
        owner = _read_owner(path)
        if result == "held" or (result == "unknown" and owner and not _is_dead(owner)):
            os.close(handle)
            raise _locked_error(folder, _describe(owner))
        # Between open and flock, the previous process may have removed the file. Then the lock is
        # on a file that no other process can open: start again.
        with suppress(OSError):
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        os.close(handle)
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps(own_note()).encode(), 0)
    return handle


def _open(path: Path) -> int:
    try:
        # O_NOFOLLOW: a symbolic link would make this process overwrite another file.
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if path.is_symlink():
            raise RunError(
                "the lock file is a symbolic link", place=path, cure="delete that link"
            ) from error
        reason = os.strerror(error.errno or 0)
        raise RunError(
            f"cannot be written ({reason})",
            place=path,
            cure=("choose another place with ", Argument("out")),
        ) from error


def _try_flock(handle: int) -> str:
    """Tries to take the lock.

    Returns:
        "taken", "held" by another process, or "unknown" if the file system has no such locks.
    """
    if fcntl is None:
        return "unknown"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError:
        return "unknown"
    return "taken"


def own_note() -> dict[str, Any]:
    """Returns the content of the file `lock` for this process: id, host, start, command."""
    pid = os.getpid()
    command = shlex.join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "since": since,
        "started": process_start(pid),
        "command": command,
    }


def _read_owner(path: Path) -> dict[str, Any]:
    """Returns the content of the file `lock` of another process; {} if it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    # A process that has just taken the lock has not written its name yet.
    if not owner:
        return "another process"
    command = str(owner.get("command", ""))[:200]
    pid, host, since = (owner.get(key) for key in ("pid", "host", "since"))
    return f"process {pid} on {host}, since {since} ({command})"


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the process is known to be dead. For a process on another machine this is unknown."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        # Signal 0 does nothing but check that the process exists.
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # The process exists, but belongs to another user.
    except OSError:
        pass
    # Process ids are reused: another start time means another process.
    return owner.get("started") != process_start(pid)


def process_start(pid: int) -> str | None:
    """Returns when a process was started, in clock ticks since boot.

    None if this is unknown, because the process does not exist or the system is not Linux.
    """
    try:
        # The start time is field 22. Field 2 is the command in brackets, which may contain spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
