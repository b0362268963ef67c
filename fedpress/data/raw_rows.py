"""Reads rows that are to be predicted: a table's file, dictionaries, a data frame or Arrow table.

They need no labels. Columns may be in any order, and further columns are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from torch import Tensor

from fedpress.data import csv, tables
from fedpress.data.labelled_rows import TABLES
from fedpress.data.lines import line_of
from fedpress.data.new_rows import Strictness, raw_inputs, refuse_rows_without
from fedpress.data.preparation import Preparation
from fedpress.data.raw_table import refuse_equal_names
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

UnknownWords = Literal["error", "zeros"]
"""What an unknown word does: it is an error, or it becomes zeros as in the training."""


@dataclass(frozen=True, eq=False)
class RawRows:
    """Prepared rows.

    Attributes:
        x: the inputs before standardisation, float32 [n, d].
        ignored: columns that were given, and are neither inputs nor labels.
    """

    x: Tensor
    ignored: tuple[str, ...]


def is_table(rows: object) -> bool:
    """Returns whether `rows` are raw rows, and not prepared arrays."""
    if isinstance(rows, str | Path):
        return Path(rows).suffix in TABLES
    if isinstance(rows, pa.Table) or _is_data_frame(rows):
        return True
    return isinstance(rows, list | tuple) and len(rows) > 0 and isinstance(rows[0], Mapping)


def read_rows(rows: Any, about: Preparation, unknown: UnknownWords = "error") -> RawRows:
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
    if unknown not in ("error", "zeros"):
        raise DataError(f"got '{unknown}'", place="unknown", cure="give error or zeros")
    if isinstance(rows, str | Path):
        table, place = _of_file(Path(rows), about)
    else:
        table, place = _in_memory(rows, about), "rows[{}]".format
    names = list(table)
    needed = [column.name for column in about.columns]
    where = f"'{rows}'" if isinstance(rows, str | Path) else "rows"
    _refuse_missing([name for name in needed if name not in table], names, where)
    if not table[needed[0]]:
        raise DataError("there are no rows", place=where, cure="give at least one")
    strictness = Strictness(texts=True, words=unknown == "error", place=place)
    known = {*needed, *about.labels}
    return RawRows(
        raw_inputs(table, about, strictness), tuple(name for name in names if name not in known)
    )


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
