"""Says what may be meant by a path that does not exist, or by a file of another kind."""

from __future__ import annotations

from pathlib import Path

from fedpress.errors import DataError, suggestion

TABLES = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
"""Suffix of a table -> its source in a recipe."""


def cure_of_unreadable(path: Path, source: str) -> str:
    """Returns the cure for a file that the source cannot read: another source, by its suffix."""
    other = TABLES.get(path.suffix.lower(), source)
    return f'set source = "{other}"' if other != source else "copy it again"


def similar_path(path: Path) -> str:
    """Returns the cure for a path that does not exist: a similar name beside it, if there is one."""
    there: list[str] = []
    if path.parent.is_dir():
        there = sorted(other.name for other in path.parent.iterdir())
    return suggestion(path.name, there, "check the path")


def refuse_no_path(path: Path, place: str) -> None:
    """Checks that a file or folder exists; of a name with `*` only the folder is checked.

    Raises:
        DataError: if there is none; the error names a file with a similar name.
    """
    if path.exists() or ("*" in path.name and path.parent.is_dir()):
        return
    raise DataError(f"no such path '{path}'", place=place, cure=similar_path(path))
