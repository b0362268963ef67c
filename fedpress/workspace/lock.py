"""One process at a time works in a folder: a lock that a dead process gives back by itself, and who holds it."""

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
ASKED = 3
_mine: dict[tuple[str, int], int] = {}  # folder and thread -> how often it has been taken


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, a file `lock` in it, while the block lasts.

    The operating system holds it (flock), so a process that dies gives it back; the file says who has it. Where a file
    system knows no such locks, the file alone is the lock, and is taken over from a process that is dead. The thread
    that holds it may take it again.

    Raises:
        RunError: if another process holds it, naming that; if the folder cannot be written.
    """
    key = (str(folder.resolve()), threading.get_ident())
    if key in _mine:
        _mine[key] += 1
        try:
            yield
        finally:
            _mine[key] -= 1
        return
    handle = _take(folder)
    _mine[key] = 1
    try:
        yield
    finally:
        del _mine[key]
        with suppress(OSError):
            (folder / NAME).unlink(
                missing_ok=True
            )  # while it is held: nobody else's file is removed
        os.close(handle)


def holder(folder: Path) -> str | None:
    """Returns who works in `folder` at this moment, in words; None if nobody does, or it is this thread."""
    path = folder / NAME
    if (
        (str(folder.resolve()), threading.get_ident()) in _mine
        or path.is_symlink()
        or not path.is_file()
    ):
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        kind = _try(handle)
        return (
            None
            if kind == "taken" or (kind == "unknown" and _dead(_who(path)))
            else _words(_who(path))
        )
    finally:
        os.close(handle)  # gives back what the question took


def refuse(folder: Path) -> None:
    """Raises if another process works in `folder`.

    Raises:
        RunError: naming it.
    """
    if found := holder(folder):
        raise _held(folder, found)


def _held(folder: Path, found: str) -> RunError:
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


def _take(folder: Path) -> int:
    path = folder / NAME
    asked = 0
    while True:
        try:
            # A link that somebody has put there would have another file emptied and written.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            if path.is_symlink():
                raise RunError(
                    "a lock is no symbolic link", place=path, cure="delete that link"
                ) from error
            reason = os.strerror(error.errno or 0)
            raise RunError(
                f"cannot be written ({reason})",
                place=path,
                cure=("choose another place with ", Argument("out")),
            ) from error
        kind = _try(handle)
        if kind == "held" and asked < ASKED:  # somebody may only be asking who holds it
            os.close(handle)
            asked += 1
            time.sleep(0.05)
            continue
        who = _who(path)
        if kind == "held" or (kind == "unknown" and who and not _dead(who)):
            os.close(handle)
            raise _held(folder, _words(who))
        with suppress(OSError):
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        os.close(
            handle
        )  # its holder has removed the file in the meantime: the lock of a file that is gone is none
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps(own_note()).encode(), 0)
    return handle


def _try(handle: int) -> str:
    """Asks for the lock: "taken", "held" by somebody else, or "unknown" where the file system has none."""
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
    """Returns what the file `lock` says of this process while it works in a folder."""
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


def _who(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _words(who: dict[str, Any]) -> str:
    if not who:  # it has the lock, and has not yet said who it is
        return "another process"
    command = str(who.get("command", ""))[:200]
    return f"process {who.get('pid')} on {who.get('host')}, since {who.get('since')} ({command})"


def _dead(who: dict[str, Any]) -> bool:
    """Whether the process of this note is known to be gone: only where it ran on this machine can that be told."""
    pid = who.get("pid")
    if who.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is there, and somebody else's
        pass
    return who.get("started") != process_start(pid)  # the number was given to another process since


def process_start(pid: int) -> str | None:
    """When a process began, in ticks of the system's clock; None where it cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
