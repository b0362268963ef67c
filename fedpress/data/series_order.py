"""Reads the order of the rows of a series: numbers, dates, or columns of years, months, days."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fedpress.data.cells import is_number, is_word
from fedpress.data.columns import Column
from fedpress.data.dates import dates_of_text, is_date, local
from fedpress.errors import DataError

PLACE = "series.order_column"
PlaceOfRow = Callable[[int], str]
"""Returns where a row is, such as "line 7 of 'new.csv'"."""
MICROSECONDS = 1_000_000
# Least and greatest value of each part of a date; the days of a month are checked on their own.
RANGES = {
    "year": (1, 9999),
    "month": (1, 12),
    "day": (1, 31),
    "hour": (0, 23),
    "minute": (0, 59),
    "second": (0, 59),
}


@dataclass(frozen=True)
class RowOrder:
    """Where each row stands in time.

    Attributes:
        values: numbers [n], in seconds for dates.
        dates: `datetime64[us]` [n], in local time; None if the column holds numbers.
    """

    values: np.ndarray
    dates: np.ndarray | None = None


def row_order(columns: list[Column], place: PlaceOfRow | None = None) -> RowOrder:
    """Reads one column of numbers or dates, or the columns year, month, day, ...

    Args:
        columns: the columns.
        place: returns where a row is, for errors of rows that are to be predicted; None: the rows
            are for training.

    Raises:
        DataError: if a row has no value, or no date.
    """
    if len(columns) > 1:
        return _of_dates(_assembled(columns, place))
    (column,) = columns
    values = column.values
    _refuse_missing(values, column.name, place)
    if is_number(values.type):
        return RowOrder(values.cast(pa.float64()).to_numpy(zero_copy_only=False))
    if is_word(values.type):
        text = Column(column.name, values.cast(pa.string()), text=True, decimal=column.decimal)
        numbers = text.cast(pa.float64())
        if not numbers.null_count:
            return RowOrder(numbers.to_numpy(zero_copy_only=False))
        values = _dates_of_text(text, numbers, place)
    if not is_date(values.type):
        raise DataError(
            f"column '{column.name}' holds {values.type}",
            place=PLACE,
            cure="name a column of dates or numbers",
        )
    return _of_dates(local(values).to_numpy())


def _of_dates(dates: np.ndarray) -> RowOrder:
    dates = dates.astype("datetime64[us]")
    return RowOrder(dates.astype(np.int64) / MICROSECONDS, dates)


def _refuse_missing(values: Any, name: str, place: PlaceOfRow | None) -> None:
    gaps = pc.is_null(values, nan_is_null=bool(types.is_floating(values.type)))
    if pc.any(gaps).as_py():
        row = pc.index(gaps, True).as_py()
        cure = "fill it, or leave the row out of the file"
        raise _wrong_row(row, f"column '{name}' has no value", cure, place)


def _dates_of_text(text: Column, numbers: Any, place: PlaceOfRow | None) -> Any:
    """Returns the dates of a column, whose text is not all numbers.

    Args:
        text: the column.
        numbers: the column as numbers, null where the text is none.
        place: see `row_order`.
    """
    dates = dates_of_text(text.values)
    if numbers.null_count < dates.null_count:
        row = pc.index(numbers.is_null(), True).as_py()
        problem = f"column '{text.name}' is no number, as it is in other rows"
        raise _wrong_row(row, problem, "correct it, or leave the row out of the file", place)
    if dates.null_count:
        row = pc.index(dates.is_null(), True).as_py()
        cure = "write dates as 2024-05-01 or 2024-05-01 12:30:00"
        # Rows that are to be predicted are read as the training read its own, without a recipe.
        if place is None:
            cure += f', or say how: types = {{ "{text.name}" = "date %d.%m.%Y" }}'
        raise _wrong_row(row, f"column '{text.name}' is no date", cure, place)
    return dates


def _wrong_row(row: int, problem: str, cure: str, place: PlaceOfRow | None) -> DataError:
    if place is None:
        return DataError(f"row {row} of {problem}", place=PLACE, cure=cure)
    return DataError(problem, place=place(row), cure=cure)


def _assembled(columns: list[Column], place: PlaceOfRow | None) -> np.ndarray:
    """Returns the dates `datetime64[s]` of columns of years, months, days, ..."""
    parts = {name: np.full(len(columns[0].values), RANGES[name][0]) for name in RANGES}
    for column in columns:
        typed = column.cast(pa.float64()) if column.text else column.values
        if not is_number(typed.type):
            raise DataError(
                f"column '{column.name}' holds {typed.type}",
                place=PLACE,
                cure="expected whole numbers",
            )
        numbers = typed.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
        low, high = RANGES[column.name]
        # NaN, for a missing number, fails this comparison too.
        wrong = ~((numbers >= low) & (numbers <= high) & (numbers == np.floor(numbers)))
        if wrong.any():
            raise _no_date(int(wrong.argmax()), column.name, place)
        parts[column.name] = numbers.astype(np.int64)
    months = (parts["year"] - 1970).astype("datetime64[Y]").astype("datetime64[M]")
    months = months + (parts["month"] - 1)
    days = months.astype("datetime64[D]") + (parts["day"] - 1)
    wrong = days.astype("datetime64[M]") != months
    if wrong.any():
        raise _no_date(int(wrong.argmax()), "day", place)
    seconds = (parts["hour"] * 60 + parts["minute"]) * 60 + parts["second"]
    dates: np.ndarray = days.astype("datetime64[s]") + seconds
    return dates


def _no_date(row: int, name: str, place: PlaceOfRow | None) -> DataError:
    return DataError(
        f"{'it' if place else f'row {row}'} is no date, by its column '{name}'",
        place=place(row) if place else PLACE,
        cure="correct it, or leave the row out of the file",
    )
