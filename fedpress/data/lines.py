"""Says in which line of a CSV file a row is, as an editor counts: the header is line 1."""

from __future__ import annotations

import csv
from pathlib import Path

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


def _encoding_of(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(2)
    return "utf-16" if head in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
