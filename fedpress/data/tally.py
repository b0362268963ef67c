"""Describes the columns of a table that is read in batches, in one pass and in bounded memory.

Missing cells, words, the least and the largest value, and texts that are no numbers are counted over
all rows. Of a column with many different values some rows are kept, for its median and histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fedpress.data.batches import TableFiles
from fedpress.data.cells import cast_text, is_number, is_word
from fedpress.data.column_facts import ColumnFacts
from fedpress.data.columns import Column
from fedpress.data.dates import dates_of_text, is_date, likely_form, local
from fedpress.data.describe_column import (
    Cells,
    describe_cells,
    describe_column,
    known_cells,
    leading_zeros,
    missing_cells,
)
from fedpress.data.examples import Progress
from fedpress.data.features import MOST_STRAY
from fedpress.data.settings import DataSettings

# Different values that are counted one by one. Above MOST_WORDS, so that words always are.
KEPT = 1 << 12
# Rows that are kept: at least this many of a longer table, at most twice as many.
SAMPLE = 1 << 14


def describe_batches(
    files: TableFiles,
    names: Sequence[str],
    settings: DataSettings,
    progress: Progress | None = None,
) -> tuple[ColumnFacts, ...]:
    """Describes columns by all rows, as `describe_column` does for a table in memory.

    Args:
        files: the files of the table.
        names: the columns.
        settings: the `[data]` table of the recipe.
        progress: called with the number of rows that were read.

    Raises:
        DataError: if a file cannot be read, or a value is not of the type of the recipe.
    """
    # Without a path a note counts rows, not lines of a file.
    settings = settings.model_copy(update={"path": None})
    tallies = [Tally(name, settings) for name in names]
    sample = RowSample(files.columns.select(names))
    first = 0
    for batch in files.batches(names):
        sample.add_(batch, first)
        for tally in tallies:
            tally.add_(Column.of(batch, tally.name, settings, first), first)
        first += len(batch)
        if progress:
            progress("describing columns", first, None)
    table, rows = sample.rows()
    return tuple(tally.facts(Column.of(table, tally.name, settings), rows) for tally in tallies)


class RowSample:
    """Rows of a table that are chosen as if at random; all rows of a short table.

    A regular choice, such as each hundredth row, could meet a table of 24 rows a day always at the
    same hour.
    """

    def __init__(self, columns: Any) -> None:
        """Begins with no row; `columns` is a `pyarrow.Table` without rows."""
        self.parts = [columns]
        self.numbers = [np.zeros(0, dtype=np.int64)]
        # One of 2**level rows is kept.
        self.level = 0

    def add_(self, batch: Any, first: int) -> None:
        """Adds the chosen rows of a batch, whose first row has the number `first`."""
        numbers = np.arange(first, first + len(batch), dtype=np.int64)
        chosen = self._chosen(numbers)
        # Empty columns of thousands of batches would fill the memory.
        if not chosen.any():
            return
        self.parts.append(batch.filter(pa.array(chosen)))
        self.numbers.append(numbers[chosen])
        if len(self.parts) > 64 or sum(map(len, self.numbers)) > 2 * SAMPLE:
            self._thin_()

    def rows(self) -> tuple[Any, np.ndarray]:
        """Returns a `pyarrow.Table` of the kept rows, and their numbers int64 [k]."""
        self._thin_()
        return self.parts[0], self.numbers[0]

    def _chosen(self, numbers: np.ndarray) -> np.ndarray:
        if not self.level:
            return np.ones(len(numbers), dtype=bool)
        chosen: np.ndarray = _hash(numbers) >> np.uint64(64 - self.level) == 0
        return chosen

    def _thin_(self) -> None:
        """Joins the parts, and keeps fewer rows if there are too many."""
        table, numbers = pa.concat_tables(self.parts), np.concatenate(self.numbers)
        while len(numbers) > 2 * SAMPLE:
            self.level += 1
            chosen = self._chosen(numbers)
            table, numbers = table.filter(pa.array(chosen)), numbers[chosen]
        self.parts, self.numbers = [table.combine_chunks()], [numbers]


class Tally:
    """What is known of a column after some of its batches.

    The different values are counted one by one until there are too many. From then on only those
    are kept that decide what the column is: the least and the largest, texts that cannot be read as
    the others are, and a code such as 007. The rest is taken from a sample.
    """

    def __init__(self, name: str, settings: DataSettings) -> None:
        """Begins with no row."""
        self.name = name
        self.settings = settings
        self.rows = self.missing = 0
        self.is_long = False
        # Value -> number of cells and first row. Of a long column: texts that are read in no other
        # way than as text.
        self.counts: dict[Any, tuple[float, int]] = {}
        # Of a long column: the least and largest value and a code, each with its first row.
        self.ends: dict[str, tuple[Any, Any, int]] = {}
        self.read: Callable[[Any], Any] | None = None

    def add_(self, column: Column, first: int) -> None:
        """Adds a batch, whose first row has the number `first`."""
        column = _plain(column)
        values = column.values
        self.rows += len(values)
        self.missing += missing_cells(values)
        known = known_cells(values)
        if not len(known):
            return
        if self.is_long:
            self._watch_(column, known, _rows_of_known(values, first))
        else:
            self._count_(column, known, first)

    def facts(self, sample: Column, rows: np.ndarray) -> ColumnFacts:
        """Returns what the column holds.

        Args:
            sample: some rows of the column, or none.
            rows: their numbers.
        """
        if types.is_nested(sample.values.type):
            found = describe_column(sample, self.settings)
            return replace(found, rows=self.rows, missing=self.missing)
        sample = _plain(sample)
        cells = self._sampled(sample, rows) if self.is_long else self._counted(sample)
        return describe_cells(cells, self.settings)

    def _count_(self, column: Column, known: Any, first: int) -> None:
        """Counts the different values of a batch."""
        found = known.value_counts()
        if len(found) > KEPT:
            self._turn_long_(column, known)
            self._watch_(column, known, _rows_of_known(column.values, first))
            return
        values = found.field("values")
        for value, count in zip(values.to_pylist(), found.field("counts").to_pylist(), strict=True):
            before = self.counts.get(value)
            if before is None:
                before = (0, first + pc.index(column.values, value).as_py())
            self.counts[value] = (before[0] + count, before[1])
        if len(self.counts) > KEPT:
            self._turn_long_(column, known)

    def _turn_long_(self, column: Column, known: Any) -> None:
        """Goes on with a column of too many values to count; `known` are cells of its last batch."""
        counted, self.counts = self.counts, {}
        self.is_long = True
        values = pa.array(list(counted), known.type)
        seen = pa.chunked_array([values, *known.chunks])
        self.read = _reading(replace(column, values=seen))
        rows = np.array([row for _, row in counted.values()], dtype=np.int64)
        self._watch_(column, pa.chunked_array([values]), rows)
        # Of each value all cells count.
        for value in self.counts:
            self.counts[value] = counted[value]

    def _watch_(self, column: Column, known: Any, rows: np.ndarray) -> None:
        """Keeps the cells of a long column that decide what it is.

        Args:
            column: the column, for its kind.
            known: cells with a value.
            rows: the row of each.
        """
        if self.read is None:
            return
        typed = self.read(known)
        if typed.null_count:
            for at in np.flatnonzero(typed.is_null().to_numpy()).tolist():
                count, row = self.counts.get(known[at].as_py(), (0, int(rows[at])))
                self.counts[known[at].as_py()] = (count + 1, row)
        # Too many for mistakes: the column holds text.
        if len(self.counts) > KEPT:
            self.counts, self.ends, self.read = {}, {}, None
            return
        if column.text and "code" not in self.ends:
            at = pc.index(leading_zeros(known), True).as_py()
            if at >= 0:
                self.ends["code"] = (None, known[at].as_py(), int(rows[at]))
        ordered = _finite(typed)
        for end, found in pc.min_max(ordered).as_py().items():
            before = self.ends.get(end)
            is_new = before is None or (found < before[0] if end == "min" else found > before[0])
            if found is not None and is_new:
                at = pc.index(ordered, pa.scalar(found, ordered.type)).as_py()
                self.ends[end] = (found, known[at].as_py(), int(rows[at]))

    def _counted(self, sample: Column) -> Cells:
        """Returns all values of a column with few of them."""
        found = sorted((row, value, count) for value, (count, row) in self.counts.items())
        return self._cells(sample, found, 0.0)

    def _sampled(self, sample: Column, rows: np.ndarray) -> Cells:
        """Returns the kept values of a long column, and those of the sample."""
        known = known_cells(sample.values)
        rows = rows[_rows_of_known(sample.values, 0)]
        special = pa.array(list(self.counts), known.type)
        usual = pc.invert(pc.is_in(known, special))
        codes = known.filter(usual).combine_chunks().dictionary_encode()
        rows = rows[usual.to_numpy()]
        _, firsts, counts = np.unique(codes.indices, return_index=True, return_counts=True)
        left = self.rows - self.missing - sum(count for count, _ in self.counts.values())
        weight = left / max(len(rows), 1)
        values = zip(codes.dictionary.to_pylist(), counts * weight, rows[firsts], strict=True)
        kept = {value: (count, int(row)) for value, count, row in values}
        for _, value, row in self.ends.values():
            kept.setdefault(value, (1.0, row))
        kept |= self.counts
        ordered = sorted((row, value, count) for value, (count, row) in kept.items())
        # Of a short table the sample has all rows.
        return self._cells(sample, ordered, weight if left > len(rows) else 0.0)

    def _cells(self, sample: Column, found: list[tuple[int, Any, float]], weight: float) -> Cells:
        values = pa.array([value for _, value, _ in found], sample.values.type)
        rows = [row for row, _, _ in found]
        return Cells(
            replace(sample, values=pa.chunked_array([values])),
            np.array([count for _, _, count in found], dtype=np.float64),
            self.rows,
            self.missing,
            rows.__getitem__,
            weight,
        )


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Returns uint64 for int64 numbers: SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def _plain(column: Column) -> Column:
    """Returns the column with dates as timestamp("us"), which Python can hold."""
    if is_date(column.values.type):
        return replace(column, values=local(column.values))
    return column


def _rows_of_known(values: Any, first: int) -> np.ndarray:
    """Returns the rows of the cells with a value, as `known_cells` returns these."""
    known = pc.invert(pc.is_null(values, nan_is_null=True)).to_numpy()
    rows: np.ndarray = first + np.flatnonzero(known)
    return rows


def _finite(values: Any) -> Any:
    """Returns numbers with null where they are infinite; other values unchanged."""
    if not types.is_floating(values.type):
        return values
    return pc.if_else(pc.is_finite(values), values, None)


def _reading(column: Column) -> Callable[[Any], Any] | None:
    """Returns how the cells of a long column are read, by its first ones; None: as text."""
    if not column.text:
        kind = column.values.type
        return (lambda values: values) if is_number(kind) or is_date(kind) else None
    kind = column.typed().type
    if is_word(kind):
        if column.stray_texts().mean() <= MOST_STRAY:
            kind = pa.float64()
        elif form := likely_form(column.values):
            return lambda texts: dates_of_text(texts, form)
        else:
            return None
    # Later cells may have decimals.
    kind = pa.float64() if types.is_integer(kind) else kind
    return lambda texts: cast_text(texts, kind, column.decimal)
