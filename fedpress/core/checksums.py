"""Detects damaged files by a list of checksums: the file `checksums` of a run folder.

Each line has the BLAKE2b digest of a range of bytes, a CRC of the line itself, the range and the
name of the file. The CRC protects the name: if a flipped bit changed the name, no line would be
found for the file, and the file would not be checked.

- A file that is replaced atomically has a line for all of its bytes, which is written before the
  replacement. A process that is killed in between leaves one line too many. So a file counts as
  undamaged if any of its lines fits.
- A file that grows has a line for each range that was appended, written after it. Bytes after the
  last line were appended by a process that was killed, and are not checked.
- A file without a line, such as one of an older fedpress, is not checked.

The digests find accidental damage. They do not protect against somebody who changes file and list.
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
# Number of parent folders that are searched for the list. RUN/checksums also lists files such as
# RUN/stages/0-train/model.safetensors.
PARENTS = 3
# Bytes that are read at a time.
CHUNK = 1 << 20
# Length of a digest in hex.
DIGITS = 32


class DamagedList(ValueError):
    """The list of checksums itself is damaged."""


@dataclass(frozen=True)
class Line:
    """One line of the list: the digest of the bytes `start` to `end` of the file `name`."""

    digest: str
    start: int
    end: int
    name: str

    @classmethod
    def of(cls, content: Path, name: str, start: int = 0) -> Line:
        """Returns the line for the bytes of `content` from `start` on."""
        end = content.stat().st_size
        return cls(digest(content, start, end), start, end, name)

    @property
    def crc(self) -> str:
        """The CRC of the line itself, in hex."""
        text = f"{self.digest} {self.start} {self.end} {self.name}"
        return f"{zlib.crc32(text.encode()):08x}"

    def __str__(self) -> str:
        return f"{self.digest}-{self.crc} {self.start} {self.end} {self.name}\n"


def digest(path: Path, start: int, end: int) -> str:
    """Returns the digest of the bytes `start` to `end` (exclusive) of a file, in hex.

    Raises:
        OSError: if the file cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        file.seek(start)
        left = end - start
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            found.update(chunk)
            left -= len(chunk)
    return found.hexdigest()


def add_line(
    path: Path, content: Path | None = None, *, folder: Path | None = None, sync: bool = True
) -> None:
    """Adds a line for all bytes of a file to the list.

    Args:
        path: the file.
        content: the finished temporary file that will be renamed to `path`; None: `path` itself.
        folder: the folder with the list; None: the folder of the file.
        sync: whether to wait until the line is on the disk. After a power failure a replaced file
            without its new line would count as damaged.
    """
    # The digest is of the temporary file, the name that of the file it will become.
    folder = folder or path.parent
    _append(folder / NAME, Line.of(content or path, _name(path, folder)), sync)


def add_growth(path: Path, start: int) -> None:
    """Adds a line for the bytes that were appended to `path` from `start` on."""
    _append(path.parent / NAME, Line.of(path, path.name, start), sync=True)


def _name(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def list_of(path: Path) -> Path:
    """Returns the path of the list in the nearest of three parent folders that has a list.

    If none of them has a list, it is the path that a list in the folder of the file would have.
    """
    for folder in list(path.absolute().parents)[:PARENTS]:
        if (folder / NAME).is_file():
            return folder / NAME
    return path.parent / NAME


def has_line(path: Path) -> bool:
    """Returns whether the nearest list has a line for `path`.

    Raises:
        DamagedList: see `read_lines`.
    """
    folder = list_of(path).parent
    return any(line.name == _name(path, folder) for line in read_lines(folder))


def fault(path: Path, *, grows: bool = False) -> str | None:
    """Describes the damage of an existing file; None if its checksums fit or it has none.

    Args:
        path: the file.
        grows: whether the file grows by appending, like `records.jsonl`.
    """
    log = list_of(path)
    folder, name = log.parent, _name(path, log.parent)
    # Another process may replace file and list between the two reads, so up to three attempts.
    for _ in range(3):
        try:
            lines = [line for line in read_lines(folder) if line.name == name]
        except DamagedList as error:
            return f"the list of checksums '{log}' is damaged ({error})"
        if not lines or (_grown(path, lines) if grows else _whole(path, lines)):
            return None
    size = path.stat().st_size
    end = lines[-1].end
    what = "its content is not what was written"
    if size < end:
        what = f"it has {size:,} of {end:,} bytes"
    return f"{what}, according to its checksum in '{log}'"


def read_lines(folder: Path) -> list[Line]:
    """Returns the lines of the list in `folder`, the oldest first; empty if there is no list.

    An incomplete last line, which a kill may leave, is ignored.

    Raises:
        DamagedList: if a line is invalid.
    """
    try:
        raw = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(raw.split(b"\n")[:-1], start=1):
        parsed = _parsed(line.decode("utf-8", "replace"))
        if parsed is None:
            raise DamagedList(f"line {number}")
        found.append(parsed)
    return found


def _parsed(text: str) -> Line | None:
    """Returns the line of the list with this text; None if the text is invalid."""
    parts = text.split(" ", 3)
    if len(parts) != 4:
        return None
    for number in parts[1:3]:
        # At most 19 digits, as many as a 64-bit size has: int() of a damaged, long one is slow.
        if not (number.isascii() and number.isdecimal() and len(number) < 20):
            return None
    line = Line(parts[0][:DIGITS], int(parts[1]), int(parts[2]), parts[3])
    if len(line.digest) != DIGITS:
        return None
    # Lists of an older fedpress have no CRC of the line.
    if parts[0] in (line.digest, f"{line.digest}-{line.crc}"):
        return line
    return None


def compact(folder: Path) -> None:
    """Shortens the list in `folder`: drops lines of replaced contents and of missing files.

    Raises:
        DamagedList: if a line is invalid.
    """
    lines = read_lines(folder)
    kept: list[Line] = []
    for name in dict.fromkeys(line.name for line in lines):
        own = [line for line in lines if line.name == name]
        path = folder / name
        if path.is_file():
            whole = _whole(path, own)
            # No single line fits a damaged file or one that grows: all its lines are kept. Without
            # them the damage would not be noticed.
            kept += [whole] if whole else own
    if len(kept) < len(lines):
        with replacing(folder / NAME) as part:
            part.write_text("".join(map(str, kept)), "utf-8")


def _append(log: Path, line: Line, sync: bool) -> None:
    text = str(line).encode()
    with open(log, "ab+", opener=_no_link) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            # Half a line: the process was killed before it replaced its file, so the line is not
            # needed.
            if file.read(1) != b"\n":
                file.truncate(_last_newline(log))
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _no_link(path: str, flags: int) -> int:
    """Opens a file, but follows no symbolic link: a copied folder may contain a malicious one."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _last_newline(log: Path) -> int:
    return log.read_bytes().rfind(b"\n") + 1


def _whole(path: Path, lines: Iterable[Line]) -> Line | None:
    """Returns the line whose range is the whole file and whose digest fits; None if none fits."""
    size = path.stat().st_size
    fitting = [line for line in lines if line.start == 0 and line.end == size]
    if not fitting:
        return None
    found = digest(path, 0, size)
    return next((line for line in reversed(fitting) if line.digest == found), None)


def _grown(path: Path, lines: list[Line]) -> bool:
    """Returns whether all ranges that were appended to the current file are undamaged."""
    # A line that starts at byte 0 is the first of a new file; the lines before it belong to the old
    # file.
    since = 0
    for at, line in enumerate(lines):
        if line.start == 0:
            since = at
    size = path.stat().st_size

    def fits(line: Line) -> bool:
        return line.end <= size and digest(path, line.start, line.end) == line.digest

    return all(map(fits, lines[since:]))
