"""Finds out whether a table is a series: rows at regular times, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpress.data.column_facts import ColumnFacts
from fedpress.data.columns import Column
from fedpress.data.series_order import row_order
from fedpress.data.series_settings import DATE_COLUMNS
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

# A shorter table has too few rows for windows in every part of the data.
FEWEST_ROWS = 60
# Share of the steps from row to row that must be equal; the others are gaps.
REGULAR = 0.8
# More series than that are rather numbers of rows.
MOST_SERIES = 10_000


@dataclass(frozen=True)
class SeriesFacts:
    """How the rows of a table follow each other in time.

    Attributes:
        order: the column of dates, or the columns year, month, day, ...
        by: the column that tells series apart, such as a station; "" if all rows are one series.
        step: usual number of seconds from one row to the next.
        rows: number of rows of the shortest series.
        seconds: time from the first to the last row.
    """

    order: tuple[str, ...]
    by: str
    step: float
    rows: int
    seconds: float


def series_of(
    table: Any, columns: Sequence[ColumnFacts], clients: Sequence[str], settings: DataSettings
) -> SeriesFacts | None:
    """Returns how rows follow each other; None if they are no series.

    Args:
        table: the table, a `pyarrow.Table`.
        columns: its columns, described.
        clients: columns that may name the client of a row; one of them may tell series apart.
        settings: how the table is read.
    """
    others = [c.name for c in columns if c.type == "word" and c.name not in clients]
    for order in _orders(columns):
        seconds = _seconds(table, order, columns, settings)
        if seconds is None:
            continue
        # All rows as one series first: a column that tells series apart must be needed.
        for by in ("", *clients, *others):
            found = _facts(table, seconds, order, by)
            if found is not None:
                return found
    return None


def _orders(columns: Sequence[ColumnFacts]) -> Iterator[tuple[str, ...]]:
    """Yields columns that may give the order: columns of dates, or year, month, day, ..."""
    numbers = {column.name for column in columns if column.type == "number"}
    parts: tuple[str, ...] = ()
    for name in DATE_COLUMNS:
        if name not in numbers:
            break
        parts += (name,)
    if len(parts) >= 2:
        yield parts
    for column in columns:
        if column.type == "date":
            yield (column.name,)


def _seconds(
    table: Any, order: Sequence[str], columns: Sequence[ColumnFacts], settings: DataSettings
) -> np.ndarray | None:
    """Returns the time of each row in seconds; None if a row has none."""
    declared = {c.name: c.declare for c in columns if c.name in order and c.declare}
    typed = settings.model_copy(update={"types": {**settings.types, **declared}})
    try:
        return row_order([Column.of(table, name, typed) for name in order]).values
    except DataError:  # a gap, or a date that is none
        return None


def _facts(table: Any, seconds: np.ndarray, order: tuple[str, ...], by: str) -> SeriesFacts | None:
    number = np.zeros(len(seconds), dtype=np.int64)
    if by:
        number = np.unique(table[by].to_numpy().astype(str), return_inverse=True)[1]
    counts = np.bincount(number)
    if len(counts) > MOST_SERIES or counts.min() < FEWEST_ROWS:
        return None
    place = np.lexsort((seconds, number))
    steps = np.diff(seconds[place])[np.diff(number[place]) == 0]
    step = float(np.median(steps))
    # Two rows of one series at one time have no order. Months are of 28 to 31 days.
    if (steps <= 0).any() or np.mean(np.abs(steps - step) <= 0.1 * step) < REGULAR:
        return None
    length = float(seconds.max() - seconds.min())
    return SeriesFacts(order, by, step, int(counts.min()), length)
