"""Reads rows that are to be predicted: a table's file, dictionaries, a data frame or Arrow table.

They need no labels. Columns may be in any order, and further columns are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedpress.data import csv, tables
from fedpress.data.lines import line_of
from fedpress.data.new_rows import Strictness, raw_columns, raw_inputs, refuse_rows_without
from fedpress.data.paths import TABLES
from fedpress.data.preparation import Preparation
from fedpress.data.raw_inputs import RawInputs, UnknownWords
from fedpress.data.raw_table import refuse_equal_names
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError


@dataclass(frozen=True, eq=False)
class GivenTable:
    """A table as it was given, before its cells are checked.

    Attributes:
        columns: name of each column -> its cells.
        place: returns where a row is, such as "line 7 of 'new.csv'".
        where: name of the table in errors.
    """

    columns: dict[str, list[Any]]
    place: Callable[[int], str]
    where: str

    def refuse_missing(self, needed: Sequence[str]) -> None:
        """Checks that the table has these columns, and a row.

        Raises:
            DataError: if a column is missing, or there are no rows.
        """
        missing = [name for name in needed if name not in self.columns]
        _refuse_missing(missing, list(self.columns), self.where)
        if not self.columns[needed[0]]:
            raise DataError("there are no rows", place=self.where, cure="give at least one")

    def others(self, known: Sequence[str]) -> tuple[str, ...]:
        """Returns the names of all columns but those in `known`."""
        return tuple(name for name in self.columns if name not in known)


def is_table(rows: object) -> bool:
    """Returns whether `rows` are raw rows, and not prepared arrays."""
    if isinstance(rows, str | Path):
        return Path(rows).suffix in TABLES
    if isinstance(rows, pa.Table) or _is_data_frame(rows):
        return True
    return isinstance(rows, list | tuple) and len(rows) > 0 and isinstance(rows[0], Mapping)


def read_rows(rows: Any, about: Preparation, unknown: UnknownWords) -> RawInputs:
    """Prepares raw rows, for which `is_table` is true, as the training prepared its own.

    Args:
        rows: path of a .csv or .parquet file, a list of dictionaries, a pandas data frame, or a
            pyarrow table.
        about: the preparation of the model.
        unknown: what a word without an input does.

    Raises:
        DataError: if a column is missing, a cell is no number, a word is unknown, or there is no
            row. The error names the row (for a CSV file by its line), the column, and a cure.
    """
    table = read_table(rows, about)
    needed = [column.name for column in about.columns]
    table.refuse_missing(needed)
    cells = {name: table.columns[name] for name in needed}
    strictness = Strictness(texts=True, words=unknown == "error", place=table.place)
    return RawInputs(
        raw_inputs(cells, about, strictness),
        table.others([*needed, *about.labels]),
        columns=lambda: raw_columns(cells, about),
    )


def read_table(rows: Any, about: Preparation) -> GivenTable:
    """Reads a table, for which `is_table` is true; its cells are not checked.

    Raises:
        DataError: if a file cannot be read, or two columns have the same name.
    """
    if isinstance(rows, str | Path):
        return GivenTable(*_of_file(Path(rows), about), f"'{rows}'")
    return GivenTable(_in_memory(rows, about), "rows[{}]".format, "rows")


def _refuse_missing(missing: list[str], there: Sequence[str], where: str) -> None:
    if not missing:
        return
    listed = ", ".join(f"'{name}'" for name in missing)
    word = "column" if len(missing) == 1 else "columns"
    has = ", ".join(there[:12]) + (", ..." if len(there) > 12 else "")
    meant = tables.similar_columns(missing, there)
    raise DataError(
        f"it lacks the {word} {listed} (it has {has})",
        place=where,
        cure=meant or "add what is missing; cells without a value may be empty",
    )


def _of_file(path: Path, about: Preparation) -> tuple[dict[str, list[Any]], Callable[[int], str]]:
    """Returns the columns of a file, and a function that says where a row is."""
    source = TABLES[path.suffix]
    if source != "csv":
        settings = DataSettings.model_validate({"source": source, "path": path})
        table = tables.READERS_OF_FILES[source](path, settings)
        return _columns(table), lambda row: f"row {row + 1} of '{path}'"
    settings = DataSettings.model_validate(
        {
            "source": "csv",
            "path": path,
            "delimiter": csv.delimiter_of(path, about.delimiter, about.encoding),
            "encoding": about.encoding,
        }
    )
    table = csv.read_csv(path, settings)
    return _columns(table), lambda row: f"line {line_of(path, row, settings)} of '{path}'"


def _columns(table: Any) -> dict[str, list[Any]]:
    """Returns the cells of each column of a pyarrow table."""
    refuse_equal_names(table.column_names, "rows")
    return {name: table[name].to_pylist() for name in table.column_names}


def _in_memory(rows: Any, about: Preparation) -> dict[str, list[Any]]:
    if isinstance(rows, pa.Table):
        return _columns(rows)
    if _is_data_frame(rows):
        # `notna` knows all of pandas' marks of a missing cell.
        return {
            str(name): rows[name].astype(object).where(rows[name].notna(), None).tolist()
            for name in rows.columns
        }
    names = list(dict.fromkeys(name for row in rows for name in row))
    found: dict[str, list[Any]] = {}
    for name in names:
        found[name] = [row.get(name) for row in rows]
    # A missing key is most likely a mistake, even where the training would fill an empty cell.
    for column in about.columns:
        if column.name in found:
            refuse_rows_without(rows, column.name, "rows[{}]".format)
    return found


def _is_data_frame(rows: object) -> bool:
    # pandas is no dependency of fedpress, so its class is recognised by its name.
    return type(rows).__name__ == "DataFrame" and hasattr(rows, "columns")
