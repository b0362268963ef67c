"""Reads and writes the files of a run atomically, with checksums and helpful errors.

Atomically: if the process is killed, the old or the new file is there, but never half of a file. A
cure is the part of an error that says what the user can do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from fedpress.core import checksums, files
from fedpress.errors import Argument, RunError, Shell, Words

Json = Mapping[str, JsonValue]
"""A JSON object."""


def writing(path: Path) -> AbstractContextManager[None]:
    """Converts an OSError in the block, which writes `path`, to a RunError with a cure.

    Raises:
        RunError: if the disk is full, or `path` cannot be written.
    """
    kept = " (finished stages are kept)"
    return files.writing(
        path,
        full=(f"free some space{kept}", Shell(", then go on with --resume")),
        other=("choose another place with ", Argument("out"), kept),
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path. At the end of the block, the file at this path replaces `path`.

    If the block fails, the temporary file is removed and the old file stays.

    Raises:
        RunError: if `path` cannot be written.
    """
    with writing(path), files.replacing(path) as temporary:
        yield temporary


@contextmanager
def replacing_with_checksum(path: Path, run: Path) -> Iterator[Path]:
    """Does the same as `replacing`, and adds the new file's checksum to the list of the run.

    Args:
        path: the file.
        run: folder of the run.

    Raises:
        RunError: if `path` cannot be written. Then the old file stays.
    """
    with replacing(path) as temporary:
        yield temporary
        # The checksum is added before the rename. If the process is killed between the two, the
        # list has the checksums of both files.
        checksums.add_line(path, temporary, folder=run)


def check_undamaged(path: Path, cure: Words, *, grows: bool = False, what: str = "corrupt") -> None:
    """Compares a file with its checksum. No file or no checksum is no error.

    Args:
        path: the file.
        cure: the error's advice.
        grows: whether lines may have been appended since the checksum was computed.
        what: first words of the error.

    Raises:
        RunError: if the file differs from its checksum, or cannot be read.
    """
    if not path.exists():
        return
    try:
        found = checksums.fault(path, grows=grows)
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror})", place=path, cure=cure) from error
    if found:
        damaged = RunError(f"{what} ({found})", place=path, cure=cure)
        # An intended change differs from the checksum as well.
        damaged.add_cure(
            f", or if you have changed it yourself, delete '{checksums.list_of(path)}'"
        )
        raise damaged


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically. NaN and infinity become null, since JSON lacks them."""
    with replacing(path) as temporary:
        temporary.write_text(_as_json(value), "utf-8")


def write_json_with_checksum(path: Path, value: Any, run: Path) -> None:
    """Does the same as `write_json`, and adds the file's checksum to the list of the run.

    Args:
        path: the file.
        value: the value to write.
        run: folder of the run.
    """
    with replacing_with_checksum(path, run) as temporary:
        temporary.write_text(_as_json(value), "utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Returns `value` with None in place of NaN and infinity, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_json(path: Path, *, cure: Words = "delete the folder and run again") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file.
        cure: the error's advice if the file is damaged.

    Raises:
        RunError: if the file is missing, differs from its checksum, or is not a JSON object.
    """
    # The checksum is checked first: that it differs is a clearer reason than a JSON error.
    check_undamaged(path, cure)
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RunError("no such file", place=path, cure="is this the folder of a run?") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"not valid JSON ({error})", place=path, cure=cure) from error
    if not isinstance(value, dict):
        raise RunError(
            f"expected a JSON object, got {type(value).__name__}",
            place=path,
            cure=cure,
        )
    return value
