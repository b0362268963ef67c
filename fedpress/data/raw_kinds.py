"""The table of raw inputs that can be predicted: rows, windows, texts, recordings and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.data import audio, folders, raw_texts
from fedpress.data.paths import TABLES
from fedpress.data.preparation import TABLE, Preparation
from fedpress.data.raw_files import read_images, read_recordings
from fedpress.data.raw_inputs import RawInputs, UnknownWords
from fedpress.data.raw_rows import is_table, read_rows
from fedpress.data.raw_texts import read_texts
from fedpress.data.raw_windows import read_windows
from fedpress.errors import DataError

Read = Callable[[Any, Preparation, UnknownWords], RawInputs]


@dataclass(frozen=True)
class RawKind:
    """One kind of raw inputs.

    Attributes:
        name: what the model was trained on, for errors.
        takes: what can be given, for errors.
        read: makes examples of it.
        endings: endings of files of this kind.
        tables: whether tables in memory are of this kind.
        files: whether a folder, or a list of texts or paths, is of this kind.
    """

    name: str
    takes: str
    read: Read
    endings: frozenset[str]
    tables: bool = False
    files: bool = False

    def fits(self, given: Any) -> bool:
        """Returns whether `given` is of this kind."""
        if isinstance(given, str | Path):
            path = Path(given)
            return path.suffix.lower() in self.endings or (self.files and path.is_dir())
        if is_table(given):
            return self.tables
        return self.files and _is_list(given)


_ROWS = "rows: a .csv, .parquet or Arrow file, a list of dictionaries or a data frame"
KINDS: dict[str, RawKind] = {
    TABLE: RawKind("rows of a table", _ROWS, read_rows, frozenset(TABLES), tables=True),
    "series": RawKind("windows over a series", _ROWS, read_windows, frozenset(TABLES), tables=True),
    "text": RawKind(
        "texts",
        "a .txt file, a folder of them, a list of texts or a table with a column 'text'",
        read_texts,
        raw_texts.ENDINGS | frozenset(TABLES),
        tables=True,
        files=True,
    ),
    "audio": RawKind(
        "recordings",
        "a .wav file, a folder of them or a list of files",
        read_recordings,
        audio.ENDINGS,
        files=True,
    ),
    "image": RawKind(
        "images",
        "an image such as a .png file, a folder of them or a list of files",
        read_images,
        folders.ENDINGS,
        files=True,
    ),
}
"""Kind of a preparation (`Preparation.kind`) -> what it takes."""


def is_raw(given: Any) -> bool:
    """Returns whether `given` is raw data of any kind, and not prepared arrays."""
    return any(kind.fits(given) for kind in KINDS.values())


def read_raw(given: Any, about: Preparation, unknown: UnknownWords = "error") -> RawInputs:
    """Makes examples of raw data, for which `is_raw` is true, as the training made its own.

    Args:
        given: what `KINDS[about.kind].takes` says.
        about: the preparation of the model.
        unknown: what a word or token does that the training did not know.

    Raises:
        DataError: if it is of another kind, or cannot be prepared. The error says where, such as a
            line of a file, and a cure.
    """
    if unknown not in ("error", "zeros"):
        raise DataError(f"got '{unknown}'", place="unknown", cure="give error or zeros")
    kind = KINDS[about.kind]
    if not kind.fits(given):
        raise DataError(
            f"the model was trained on {kind.name}, and this is something else",
            place=f"'{given}'" if isinstance(given, str | Path) else "inputs",
            cure=f"give {kind.takes}",
        )
    return kind.read(given, about, unknown)


def _is_list(given: Any) -> bool:
    if not isinstance(given, list | tuple) or not given:
        return False
    return all(isinstance(one, str | Path) for one in given)
