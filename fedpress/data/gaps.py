"""Finds cells of a table that have no value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fedpress.data.lines import place_of
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError


def complete(table: Any, names: Sequence[str]) -> Any:
    """Returns a pyarrow mask [n] of the rows that have a value in every column of `names`."""
    mask = pa.array([True] * table.num_rows)
    for name in names:
        mask = pc.and_(mask, pc.invert(_is_missing(table[name])))
    return mask


def refuse_gaps(
    table: Any, names: Sequence[str], settings: DataSettings, first_row: int = 0
) -> None:
    """Checks that every row has a value in every column of `names`.

    Args:
        table: a `pyarrow.Table`.
        names: the columns to look at.
        settings: the `[data]` table of the recipe.
        first_row: number of the first row of `table` among all rows, for the error.

    Raises:
        DataError: if a cell has none; it names the column and the first such row.
    """
    for name in names:
        gaps = _is_missing(table[name])
        count = pc.sum(gaps).as_py()
        if count:
            where = place_of(first_row + pc.index(gaps, True).as_py(), settings)
            raise DataError(
                f"{count} of {table.num_rows} rows have no value (first: {where})",
                place=f"feature column '{name}'",
                cure="set missing = 'drop' or 'mean', or name it in drop_columns",
            )


def _is_missing(column: Any) -> Any:
    # pyarrow can compare with NaN only in columns of floats.
    return pc.is_null(column, nan_is_null=bool(types.is_floating(column.type)))
