"""Says where a row is, as a person counts: lines of a CSV file with the header as line 1."""

from __future__ import annotations

import csv
from pathlib import Path

from fedpress.data.csv import declared_encoding
from fedpress.data.settings import DataSettings


def line_of(path: Path, row: int, settings: DataSettings) -> int:
    """Returns the first line of a row. Used for errors only, because it reads the file again.

    Args:
        path: the CSV file.
        row: number of the row below the header, from 0. Blank lines are no rows.
        settings: delimiter and encoding of the file.
    """
    encoding = settings.encoding or _encoding_of(path)
    seen = -1
    with open(path, encoding=encoding, errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=settings.delimiter)
        before = 0
        # Cells may contain line breaks, so rows and lines differ.
        for cells in reader:
            if cells:
                if seen == row:
                    return before + 1
                seen += 1
            before = reader.line_num
    # The file has changed since it was read.
    return row + 2


def place_of(row: int, settings: DataSettings | None = None) -> str:
    """Returns "line 7" for a row of a single CSV file, else "row 6", counted from 1.

    Args:
        row: number of the row among all rows that were read, from 0.
        settings: the `[data]` table of the recipe; None: the row is of no file.
    """
    # Of several files the number within its file is not known here, nor after rows were dropped.
    if settings is None or settings.source != "csv" or settings.missing == "drop":
        return f"row {row + 1}"
    if settings.path is None or not settings.path.is_file():
        return f"row {row + 1}"
    return f"line {line_of(settings.path, row, settings)}"


def _encoding_of(path: Path) -> str:
    with open(path, "rb") as file:
        encoding = declared_encoding(file.read(2))
    # A mark before the first cell would hide its quotation marks.
    return "utf-8-sig" if encoding == "utf-8" else encoding
