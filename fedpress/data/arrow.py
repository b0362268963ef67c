"""Reads Arrow IPC files: Feather, the Arrow file format and the Arrow stream format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather

from fedpress.data.paths import cure_of_unreadable
from fedpress.errors import DataError, first_line

FILE_START = b"ARROW1"
"""First bytes of the Arrow file format, which Feather version 2 is too."""
OLD_FEATHER = b"FEA1"
"""First bytes of Feather version 1."""


def read_arrow(path: Path) -> Any:
    """Returns the `pyarrow.Table` of an Arrow or Feather file.

    It is read as a whole and not mapped into memory: if somebody shortened a mapped file, the
    operating system would end this process.

    Raises:
        DataError: if the file is missing or corrupt.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(FILE_START))
        if start.startswith(OLD_FEATHER):
            return pyarrow.feather.read_table(path)
        with pa.OSFile(str(path)) as source:
            if start == FILE_START:
                return pa.ipc.open_file(source).read_all()
            # The stream format has no such start. Hugging Face `datasets` writes it.
            return pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"not a readable Arrow file ({first_line(error)})",
            place=f"'{path}'",
            cure=cure_of_unreadable(path, "arrow"),
        ) from error
