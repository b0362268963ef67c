"""Reads the files of a table in batches of rows, so that a table may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from fedpress.data import csv
from fedpress.data.arrow import FILE_START
from fedpress.data.raw_table import refuse_equal_names
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

    @cached_property
    def columns(self) -> Any:
        """A `pyarrow.Table` without rows that has the columns and types of all files.

        Raises:
            DataError: if a file cannot be read, or columns of two files differ in type.
        """
        _ = self._began
        return concatenated([next(self._of_file(file)) for file in self.files], self.files)

    @cached_property
    def _began(self) -> dict[Path, tuple[int, int]]:
        """Size and time of each file before it is read for the first time."""
        return {file: _size_and_time(file) for file in self.files}

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yields a `pyarrow.Table` for each batch of rows, in order.

        Args:
            columns: the columns to read.

        Raises:
            DataError: if a file cannot be read, or lacks a column.
        """
        schema = self.columns.select(columns).schema
        for file in self.files:
            for batch in self._of_file(file, columns):
                if len(batch):
                    # One file may have integers where another has decimals.
                    yield batch if batch.schema.equals(schema) else batch.cast(schema)
            # Labels, public rows and inputs are read one after the other, and must fit each other.
            if _size_and_time(file) != self._began[file]:
                raise DataError(
                    "it has changed while it was read",
                    place=f"'{file}'",
                    cure="start again when nothing writes to it, or give a copy of it",
                )

    def _of_file(self, file: Path, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Yields the batches of a file, the first without rows."""
        try:
            for batch in BATCHES[self.settings.source](file, self.settings, columns):
                whole = with_file(batch, file, self.settings)
                yield whole if columns is None else whole.select(columns)
        except KeyError as error:
            raise DataError(
                f"not like the other files ({first_line(error)})",
                place=f"'{file}'",
                cure="give all files the same columns",
            ) from error
        except (OSError, UnicodeError, pa.ArrowException) as error:
            # An error of pyarrow quotes the row of a CSV file, which may be private.
            reason = csv.brief(error) if self.settings.source == "csv" else first_line(error)
            raise DataError(
                f"not a readable {self.settings.source} file ({reason})",
                place=f"'{file}'",
                cure="correct it, or copy it again",
            ) from error


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        about = file.stat()
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", place=f"'{file}'", cure="check the path"
        ) from error
    return about.st_size, about.st_mtime_ns


def concatenated(tables: Sequence[Any], files: Sequence[Path]) -> Any:
    """Returns the rows of all tables, one of each file.

    Raises:
        DataError: if a table has two columns of one name, or columns of two differ in type.
    """
    for table, file in zip(tables, files, strict=True):
        refuse_equal_names(table.column_names, f"'{file}'")
    # "permissive", because one file may have integers where another file has decimals.
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            (f"the {len(files)} files have columns of different types ({first_line(error)})"),
            place=f"'{files[0]}'",
            cure="make them alike",
        ) from error


def with_file(table: Any, path: Path, settings: DataSettings) -> Any:
    """Returns a table with the column "file", if the recipe asks for it and the file lacks it."""
    if settings.client_column != FILE or FILE in table.column_names:
        return table
    return table.append_column(FILE, pa.array([path.stem] * table.num_rows, pa.string()))


def _parquet(path: Path, settings: DataSettings, columns: Sequence[str] | None) -> Iterator[Any]:
    # Without `pre_buffer=False` pyarrow keeps what it has read until the end of the file.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        yield file.schema_arrow.empty_table()
        there = file.schema_arrow.names
        # Of parquet columns that are not named here nothing is read.
        wanted = None if columns is None else [name for name in columns if name in there]
        width = len(there) if wanted is None else max(len(wanted), 1)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            # Equal batches: a short one takes nearly as long as a full one.
            parts = max(-(-count * width // CELLS), 1)
            rows = max(-(-count // parts), 1)
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
            reader = batches = pa.ipc.open_stream(source)
        yield reader.schema.empty_table()
        for batch in batches:
            whole = pa.Table.from_batches([batch])
            # A file may be a single batch.
            rows = max(CELLS // max(whole.num_columns, 1), 1)
            for start in range(0, whole.num_rows, rows):
                yield whole.slice(start, rows)


def _csv(path: Path, settings: DataSettings, columns: Sequence[str] | None) -> Iterator[Any]:
    with csv.open_csv(path, settings, columns) as reader:
        yield reader.schema.empty_table()
        for batch in reader:
            yield pa.Table.from_batches([batch])


BATCHES = {"parquet": _parquet, "arrow": _arrow, "csv": _csv}
"""Source -> the function that reads a file in batches, the first without rows."""
