"""Files of a run: replaced in one step, listed with their checksum, and read back only if undamaged."""

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


def writing(path: Path) -> AbstractContextManager[None]:
    """Turns what can go wrong while `path` of a run is written into an error that names the place and the cure.

    Raises:
        RunError: if the disk is full, or the place cannot be written.
    """
    kept = "what was finished is kept: "
    return files.writing(
        path,
        full=(f"{kept}free some space", Shell(", then go on with --resume")),
        other=(f"{kept}choose another place with ", Argument("out")),
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it takes `path`'s place in one step, on failure it is removed.

    Raises:
        RunError: if it cannot be written; what was at `path` is still there.
    """
    with writing(path), files.replacing(path) as temporary:
        yield temporary


@contextmanager
def listed(path: Path, run: Path) -> Iterator[Path]:
    """As `replacing`, and puts the checksum of what takes `path`'s place into the list of the folder `run`.

    Raises:
        RunError: if it cannot be written; what was at `path` is still there.
    """
    with replacing(path) as temporary:
        yield temporary
        checksums.note(path, temporary, folder=run)


def check_whole(path: Path, cure: Words, *, grows: bool = False, what: str = "corrupt") -> None:
    """Compares a file with its checksum, if it has one; `what` begins the complaint.

    Raises:
        RunError: if it was damaged, with the cure.
    """
    if not path.exists():
        return
    try:
        found = checksums.fault(path, grows=grows)
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror})", place=path, cure=cure) from error
    if found:
        damaged = RunError(f"{what} ({found})", place=path, cure=cure)
        own = f", or if you have changed it yourself, delete '{checksums.list_of(path)}'"
        damaged.add_cure(own)
        raise damaged


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically; NaN and infinity, which JSON does not know, become null."""
    with replacing(path) as temporary:
        temporary.write_text(_as_json(value), "utf-8")


def list_json(path: Path, value: Any, run: Path) -> None:
    """As `write_json`, and puts the checksum of the file into the list of the folder `run`."""
    with listed(path, run) as temporary:
        temporary.write_text(_as_json(value), "utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Returns `value` with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path, *, cure: Words = "delete the folder and run again") -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        RunError: if the file is missing, differs from its checksum, or holds something else.
    """
    check_whole(path, cure)
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
