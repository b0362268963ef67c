"""Downloads a file; resumes after an interruption, and checks the checksum at the end."""

from __future__ import annotations

import hashlib
import http.client
import time
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from fedpress.core.files import take_place, writing
from fedpress.data.examples import Progress
from fedpress.errors import DataError

# Largest number of bytes that are read at once.
BLOCK = 1 << 18
# The download fails after this many attempts in a row that bring no new bytes.
ATTEMPTS = 3
TIMEOUT_SECONDS = 30.0


class _BrokenOff(Exception):
    """The connection or the server failed; the bytes so far are kept, and it is tried again."""


def fetch(
    url: str, target: Path, *, md5: str | None, progress: Progress | None = None, wait: float = 1.0
) -> Path:
    """Downloads `url` to the file `target`, and returns the path.

    The bytes go to a partial file, `target.part`, which a later call continues. When it is
    complete and its checksum is right, it is renamed to `target`.

    Args:
        url: http or https address.
        target: path of the complete file; its folders are made.
        md5: hexadecimal checksum of the complete file; None if its source publishes none. Then
            only the length is checked, if the server tells it.
        progress: called with the number of bytes so far, and with the total if it is known.
        wait: seconds before the next attempt; twice as many after two attempts in a row without
            new bytes.

    Raises:
        DataError: if there is no network, the server refuses, the disk is full, or the checksum
            differs.
    """
    part = target.with_name(target.name + ".part")
    cure = "free some space or set FEDPRESS_CACHE"
    with writing(part, raises=DataError, full=cure, other=cure):
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch_all(url, part, progress, wait)
        got = md5_of(part)
        if md5 is not None and got != md5:
            # Deleted, because the next attempt must not append to a wrong file.
            part.unlink()
            raise DataError(
                f"the download has md5 {got}, expected {md5}",
                place=f"'{url}'",
                cure="try again, or set path to a copy",
            )
        take_place(part, target)
    return target


def md5_of(path: Path) -> str:
    """Returns the MD5 checksum of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch_all(url: str, part: Path, progress: Progress | None, wait: float) -> None:
    """Downloads until the file is complete, or `ATTEMPTS` attempts in a row bring no new bytes."""
    fruitless = 0
    while True:
        before = _size(part)
        try:
            return _fetch_rest(url, part, progress)
        except _BrokenOff as error:
            fruitless = 0 if _size(part) > before else fruitless + 1
            if fruitless == ATTEMPTS:
                raise DataError(
                    f"cannot be downloaded ({error})",
                    place=f"'{url}'",
                    cure="check the network, or set path to a copy of the file",
                ) from error
            time.sleep(wait * 2 ** max(fruitless - 1, 0))


def _fetch_rest(url: str, part: Path, progress: Progress | None) -> None:
    """Requests the bytes that `part` lacks, and appends them."""
    start = _size(part)
    headers = {"User-Agent": "fedpress"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except HTTPError as error:
        # "Range not satisfiable": `part` seems complete. The checksum will verify this.
        if error.code == 416:
            return
        # 5xx errors are often temporary, so the download is tried again. 4xx errors are final.
        if error.code >= 500:
            raise _BrokenOff(f"the server says {error.code} {error.reason}") from error
        raise DataError(
            f"cannot be downloaded (the server says {error.code} {error.reason})",
            place=f"'{url}'",
            cure="set path to a copy of the file",
        ) from error
    except (URLError, http.client.HTTPException, OSError) as error:
        raise _BrokenOff(str(getattr(error, "reason", error))) from error
    with response:
        # A server that ignores the range sends the whole file with status 200: start again.
        resumed = response.status == 206
        done = start if resumed else 0
        # A server may send no length. Then only the checksum detects an incomplete download.
        length = response.headers.get("Content-Length")
        total = None
        if length and length.isdigit():
            total = done + int(length)
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, done, total, f"downloading {part.stem}", progress)


def _copy(
    response: http.client.HTTPResponse,
    file: BinaryIO,
    done: int,
    total: int | None,
    what: str,
    progress: Progress | None,
) -> None:
    while block := _read(response):
        file.write(block)
        done += len(block)
        if progress:
            progress(what, done, total)
    if total is not None and done < total:
        raise _BrokenOff(f"the connection ended after {done} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    # `read1` returns what has arrived; `read` would wait for a whole block.
    try:
        return response.read1(BLOCK)
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenOff(str(error) or type(error).__name__) from error


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
