"""Reads the files of a table in batches of rows, so that a table may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from fedpress.data import csv
from fedpress.data.arrow import FILE_START
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError, first_line

# Cells of a batch: as float32 they take 16 MB, and some times as much while they are converted.
CELLS = 1 << 22
FILE = "file"
"""With `client_column = "file"` each file is a client with the name of the file, unless the table
has a column of this name."""


@dataclass(frozen=True)
class TableFiles:
    """The files of one table: CSV, parquet or Arrow.

    Attributes:
        files: the files, in the order of their rows.
        settings: the `[data]` table of the recipe.
    """

    files: Sequence[Path]
    settings: DataSettings

    def first(self) -> Any:
        """Returns the first batch, a `pyarrow.Table`."""
        return next(self.batches())

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Yields a `pyarrow.Table` for each batch of rows, in order.

        Args:
            columns: the columns to read; None: all.

        Raises:
            DataError: if a file cannot be read, or lacks a column.
        """
        for file in self.files:
            try:
                for batch in BATCHES[self.settings.source](file, self.settings, columns):
                    whole = with_file(batch, file, self.settings)
                    yield whole if columns is None else whole.select(columns)
            except (OSError, UnicodeError, KeyError, pa.ArrowException) as error:
                raise DataError(
                    f"not a readable {self.settings.source} file ({first_line(error)})",
                    place=f"'{file}'",
                    cure="make it like the other files, or set stream = false, whose errors say more",
                ) from error


def with_file(table: Any, path: Path, settings: DataSettings) -> Any:
    """Returns a table with the column "file", if the recipe asks for it and the file lacks it."""
    if settings.client_column != FILE or FILE in table.column_names:
        return table
    return table.append_column(FILE, pa.array([path.stem] * table.num_rows, pa.string()))


def _parquet(path: Path, settings: DataSettings, columns: Sequence[str] | None) -> Iterator[Any]:
    # Without `pre_buffer=False` pyarrow keeps what it has read until the end of the file.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        there = file.schema_arrow.names
        # Of parquet columns that are not named here nothing is read.
        wanted = None if columns is None else [name for name in columns if name in there]
        rows = max(CELLS // len(there), 1)
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(rows, row_groups=[group], columns=wanted):
                yield pa.Table.from_batches([batch])


def _arrow(path: Path, settings: DataSettings, columns: Sequence[str] | None) -> Iterator[Any]:
    with pa.OSFile(str(path)) as source:
        is_file = source.read(len(FILE_START)) == FILE_START
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source))
        for batch in batches:
            whole = pa.Table.from_batches([batch])
            # A file may be a single batch.
            rows = max(CELLS // max(whole.num_columns, 1), 1)
            for start in range(0, whole.num_rows, rows):
                yield whole.slice(start, rows)


def _csv(path: Path, settings: DataSettings, columns: Sequence[str] | None) -> Iterator[Any]:
    with csv.open_csv(path, settings) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


BATCHES = {"parquet": _parquet, "arrow": _arrow, "csv": _csv}
"""Source -> the function that reads a file in batches."""
