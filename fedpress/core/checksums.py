"""Damage on a disk is noticed: a list `checksums` in a run folder says what the files in and below it hold.

A line is the BLAKE2b digest of a stretch of bytes with a checksum of the line itself, where the stretch begins and
ends, and the name of the file. Without the second a flipped letter in a name would leave a file without its line.

A file that is replaced in one step has a line for the whole of it, written before the step: a process that is killed in
between leaves a line too many, so a file is whole if any of its lines fits. A file that grows has a line for each
stretch, written after it: what lies behind the last line was appended by a process that was killed, and is not
judged. A file without a line, such as one of an older fedpress, is not judged either. A digest finds damage; it is no
signature.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedpress.core.files import replacing

NAME = "checksums"
ABOVE = 3  # folders above a file that may have the list: RUN/stages/0-train/model.safetensors
CHUNK = 1 << 20
DIGITS = 32  # of a digest in hex


class DamagedList(ValueError):
    """A line of a list is none: the list itself was damaged."""


@dataclass(frozen=True)
class Line:
    """One line of the list: `digest` of the bytes `start` to `end` of the file `name`."""

    digest: str
    start: int
    end: int
    name: str

    @classmethod
    def of(cls, content: Path, name: str, start: int = 0) -> Line:
        """Returns the line for what `content` holds from `start` on."""
        end = content.stat().st_size
        return cls(digest(content, start, end), start, end, name)

    @property
    def own(self) -> str:
        """The checksum of the line itself."""
        return f"{zlib.crc32(f'{self.digest} {self.start} {self.end} {self.name}'.encode()):08x}"

    def __str__(self) -> str:
        return f"{self.digest}-{self.own} {self.start} {self.end} {self.name}\n"


def digest(path: Path, start: int, end: int) -> str:
    """Returns the digest of some bytes of a file, in hex.

    Raises:
        OSError: if it cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        file.seek(start)
        left = end - start
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            found.update(chunk)
            left -= len(chunk)
    return found.hexdigest()


def note(
    path: Path, content: Path | None = None, *, folder: Path | None = None, sync: bool = True
) -> None:
    """Lists what `path` holds, or is about to hold: the bytes of `content`, which takes its place next.

    Args:
        path: of the file.
        content: the finished temporary file, before it is moved to `path`.
        folder: whose list it is; by default that of the file.
        sync: wait until the line is on the disk, as it must be before the file is replaced.
    """
    folder = folder or path.parent
    _append(folder / NAME, Line.of(content or path, _name(path, folder)), sync)


def note_growth(path: Path, start: int) -> None:
    """Lists what was appended to `path` from byte `start` on."""
    _append(path.parent / NAME, Line.of(path, path.name, start), sync=True)


def _name(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def list_of(path: Path) -> Path:
    """Returns the nearest list that may say what `path` holds; one beside it if there is none."""
    folders = list(path.absolute().parents)[:ABOVE]
    return next(
        (folder / NAME for folder in folders if (folder / NAME).is_file()), path.parent / NAME
    )


def knows(path: Path) -> bool:
    """Whether the nearest list has a line for `path`.

    Raises:
        DamagedList: see `read`.
    """
    folder = list_of(path).parent
    return any(line.name == _name(path, folder) for line in read(folder))


def fault(path: Path, *, grows: bool = False) -> str | None:
    """Says in words how `path` differs from what the nearest list says; None if it does not, or is not listed.

    Args:
        path: of a file that is there.
        grows: it is one that is appended to.
    """
    log = list_of(path)
    folder, name = log.parent, _name(path, log.parent)
    for _ in range(
        3
    ):  # a run that goes on may change file and list while they are read: then they are read again
        try:
            lines = [line for line in read(folder) if line.name == name]
        except DamagedList as error:
            return f"the list of checksums '{log}' is damaged ({error})"
        if not lines or (_grown(path, lines) if grows else _whole(path, lines)):
            return None
    size = path.stat().st_size
    end = lines[-1].end
    what = (
        f"it holds {size:,} of {end:,} bytes"
        if size < end
        else "what it holds is not what was written"
    )
    return f"{what}, by its checksum in '{log}'"


def read(folder: Path) -> list[Line]:
    """Returns the lines of the list in `folder`, the oldest first; none if there is no list.

    Raises:
        DamagedList: if a line is none; the last one may be torn by a kill.
    """
    try:
        raw = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(raw.split(b"\n")[:-1], start=1):
        parts = line.decode("utf-8", "replace").split(" ", 3)
        if len(parts) != 4 or not all(
            part.isascii() and part.isdecimal() and len(part) < 20 for part in parts[1:3]
        ):
            raise DamagedList(f"line {number}")
        made = Line(parts[0][:DIGITS], int(parts[1]), int(parts[2]), parts[3])
        # Lists of an older fedpress have no checksum of the line.
        if parts[0] not in (made.digest, f"{made.digest}-{made.own}") or len(made.digest) != DIGITS:
            raise DamagedList(f"line {number}")
        found.append(made)
    return found


def tidy(folder: Path) -> None:
    """Leaves one line for each file that is there and whole; those that are neither keep theirs."""
    lines = read(folder)
    kept = {}
    for name in dict.fromkeys(line.name for line in lines):
        own = [line for line in lines if line.name == name]
        path = folder / name
        if path.is_file():
            whole = _whole(path, own)
            kept[name] = [whole] if whole else own
    if sum(map(len, kept.values())) < len(lines):
        with replacing(folder / NAME) as part:
            part.write_text("".join(str(line) for own in kept.values() for line in own), "utf-8")


def _append(log: Path, line: Line, sync: bool) -> None:
    text = str(line).encode()
    with open(log, "ab+", opener=_no_link) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if (
                file.read(1) != b"\n"
            ):  # a kill has torn the last line: what it was about never happened
                file.truncate(_last_newline(log))
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _no_link(path: str, flags: int) -> int:
    """Opens a file, but nothing that a symbolic link in its place leads to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _last_newline(log: Path) -> int:
    return log.read_bytes().rfind(b"\n") + 1


def _whole(path: Path, lines: Iterable[Line]) -> Line | None:
    """The line that says what the file is from its first byte to its last; None if there is none."""
    size = path.stat().st_size
    fitting = [line for line in lines if line.start == 0 and line.end == size]
    if not fitting:
        return None
    found = digest(path, 0, size)
    return next((line for line in reversed(fitting) if line.digest == found), None)


def _grown(path: Path, lines: list[Line]) -> bool:
    """Whether every stretch since the file was last written as a whole is what it was."""
    since = max((at for at, line in enumerate(lines) if line.start == 0), default=0)
    size = path.stat().st_size
    return all(
        line.end <= size and digest(path, line.start, line.end) == line.digest
        for line in lines[since:]
    )
