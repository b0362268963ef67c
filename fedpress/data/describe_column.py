"""Describes one column of a table: its type, missing values, words, numbers or dates.

Whoever calls it chooses the rows: the owner of a file may look at all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fedpress.data.cells import is_number, is_word
from fedpress.data.column_facts import ColumnFacts, Type
from fedpress.data.columns import Column
from fedpress.data.dates import dates_of_text, is_date, likely_form, local
from fedpress.data.features import MOST_STRAY, MOST_WORDS
from fedpress.data.lines import place_of
from fedpress.data.settings import DataSettings

# Number of bars of a histogram.
BARS = 12
# Last words, and their endings, of the names of columns that number rows or people.
ID_WORDS = ("id", "index", "row", "nr", "nbr", "no")
ID_ENDINGS = ("nr", "nummer")
# A column of such a name counts people if there is another number at least in every fifth row: then
# a patient or customer has five rows on average.
SHARE_OF_IDS = 0.2


@dataclass(frozen=True)
class Cells:
    """The different values of a column, and how often each occurs.

    Attributes:
        column: the values as they are in the file, in the order of their first cells; none for
            images and lists, and without missing cells.
        counts: float64 [k]: number of cells with each value.
        rows: number of all cells.
        missing: number of cells without a value.
        row_of: returns the row of the first cell with a value, from the value's position.
        weight: number of cells that one cell of a sample stands for; 0 if no cell is left out.
    """

    column: Column
    counts: np.ndarray
    rows: int
    missing: int
    row_of: Callable[[int], int]
    weight: float = 0.0

    @classmethod
    def of(cls, column: Column) -> Cells:
        """Returns the cells of a column in memory."""
        values = column.values
        known = known_cells(values)
        found = known.value_counts()
        different = pa.chunked_array([found.field("values")])
        return cls(
            replace(column, values=different),
            found.field("counts").to_numpy().astype(np.float64),
            len(values),
            missing_cells(values),
            lambda at: int(pc.index(values, different[at]).as_py()),
        )

    def distinct(self, values: Any) -> int:
        """Returns the number of different values; of a sample about as many, or fewer.

        Args:
            values: the values with their type, in which two texts may be the same number.
        """
        if not self.weight:
            return len(values.drop_null().unique())
        # How many values the sample has not seen: the estimator of Chao (1984), "Nonparametric
        # estimation of the number of classes in a population", corrected for bias.
        once, twice = (int((self.counts == seen * self.weight).sum()) for seen in (1, 2))
        unseen = once * (once - 1) // (2 * (twice + 1))
        return min(len(self.counts) + unseen, self.rows - self.missing)


def missing_cells(values: Any) -> int:
    """Returns how many cells have no value; NaN is none."""
    return int(pc.sum(pc.is_null(values, nan_is_null=True)).as_py() or 0)


def known_cells(values: Any) -> Any:
    """Returns the cells with a value; none for images and lists, whose values are not compared."""
    if types.is_nested(values.type):
        return pa.chunked_array([pa.array([], pa.null())])
    known = values.drop_null()
    return known.filter(pc.invert(pc.is_nan(known))) if types.is_floating(known.type) else known


def describe_column(column: Column, settings: DataSettings) -> ColumnFacts:
    """Describes a column.

    Args:
        column: the column; if the recipe says its type, with that type.
        settings: the `[data]` table, for the types that a recipe gives and for lines in notes.
    """
    kind = column.values.type
    if types.is_nested(kind):
        what: Type = "image" if types.is_struct(kind) else "list"
        rows = len(column.values)
        return ColumnFacts(column.name, what, missing_cells(column.values), 0, rows=rows)
    return describe_cells(Cells.of(column), settings)


def describe_cells(cells: Cells, settings: DataSettings) -> ColumnFacts:
    """Describes a column by its different values; see `describe_column`."""
    return replace(_facts(cells, settings), rows=cells.rows, sampled=cells.weight > 0)


def _facts(cells: Cells, settings: DataSettings) -> ColumnFacts:
    values, note = _typed(cells, settings)
    name, kind = cells.column.name, values.type
    if is_date(kind):
        # Of a CSV file dates are learned from only if the recipe says so.
        return _of_dates(cells, values, "date" if cells.column.text else "")
    if is_word(kind) or types.is_boolean(kind):
        return _of_words(cells, values, settings)
    if not (is_number(kind) or types.is_null(kind)):
        return ColumnFacts(
            name, "text", cells.missing, cells.distinct(values), note=f"it holds {kind}"
        )
    if cells.column.text and _has_leading_zeros(cells.column.values):
        return replace(
            _of_words(cells, cells.column.values, settings),
            type="integer id",
            declare="integer id",
        )
    return _of_numbers(cells, values, note)


def _of_words(cells: Cells, values: Any, settings: DataSettings) -> ColumnFacts:
    name, missing = cells.column.name, cells.missing
    asked = settings.type_of(name)
    if cells.column.text and is_word(values.type):
        form = likely_form(values)
        # Without a form these are dates of ISO 8601 with an offset from UTC, or with fractions.
        dates = dates_of_text(values, form)
        if dates.null_count == values.null_count < len(values):
            return _of_dates(cells, dates, f"date {form}" if form else "date")
    distinct = cells.distinct(values)
    kind: Type = "integer id" if asked is not None and asked.name == "integer id" else "word"
    if distinct > MOST_WORDS:
        return ColumnFacts(name, "text" if kind == "word" else kind, missing, distinct)
    return ColumnFacts(name, kind, missing, distinct, _counts(values, cells.counts))


def _of_dates(cells: Cells, values: Any, declare: str) -> ColumnFacts:
    name, missing = cells.column.name, cells.missing
    dates = local(values)
    counts = cells.counts[dates.is_valid().to_numpy()]
    found = dates.drop_null().to_numpy().astype("datetime64[s]")
    if not len(found):
        # `typed` understands times of day as dates and converts none of them.
        note = "it holds times of day" if missing < cells.rows else ""
        return ColumnFacts(name, "text", missing, 0, note=note)
    whole_days = bool((found == found.astype("datetime64[D]")).all())
    ends = np.array([found.min(), found.max()]).astype(
        "datetime64[D]" if whole_days else "datetime64[s]"
    )
    seconds = found.astype(np.int64)
    distinct = cells.distinct(pa.array(seconds))
    return ColumnFacts(
        name,
        "date",
        missing,
        distinct,
        dates=tuple(str(end).replace("T", " ") for end in ends),
        histogram=_histogram(seconds.astype(np.float64), counts, distinct),
        declare=declare,
    )


def _histogram(found: np.ndarray, counts: np.ndarray, distinct: int) -> tuple[int, ...]:
    bins = min(BARS, max(1, distinct))
    return tuple(np.histogram(found, bins=bins, weights=counts)[0].round().astype(int).tolist())


def _has_leading_zeros(texts: Any) -> bool:
    """Whether whole numbers are written as 01067: then they are codes."""
    return bool(pc.any(leading_zeros(texts)).as_py())


def leading_zeros(texts: Any) -> Any:
    """Returns which texts are whole numbers with a zero in front, such as 01067."""
    return pc.match_substring_regex(texts, r"^\s*0\d+\s*$")


def _typed(cells: Cells, settings: DataSettings) -> tuple[Any, str]:
    """Returns the values with their type, and a note if a column of numbers has other text."""
    column, values = cells.column, cells.column.typed()
    if not (column.text and is_word(values.type)):
        return values, ""
    stray = column.stray_texts()
    count = round(cells.counts[stray].sum())
    if not 0 < count <= MOST_STRAY * (cells.rows - cells.missing):
        return values, ""
    first = int(stray.argmax())
    word = str(column.values[first].as_py())[:40]
    where = place_of(cells.row_of(first), settings)
    note = f"{count:,} of its cells are no numbers, such as '{word}' in {where}"
    return column.cast(pa.float64()), note


def _of_numbers(cells: Cells, values: Any, note: str) -> ColumnFacts:
    name = cells.column.name
    distinct = cells.distinct(values)
    found = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    finite = np.isfinite(found)
    found, counts = found[finite], cells.counts[finite]
    spread: tuple[float, ...] = ()
    histogram: tuple[int, ...] = ()
    if len(found):
        spread = (float(found.min()), _median(found, counts), float(found.max()))
        histogram = _histogram(found, counts, distinct)
    return ColumnFacts(
        name,
        "integer id" if _is_id(cells, found, distinct) else "number",
        cells.missing,
        distinct,
        numbers=spread,
        histogram=histogram,
        note=note,
    )


def _median(found: np.ndarray, counts: np.ndarray) -> float:
    """Returns the median of numbers that occur several times."""
    order = found.argsort()
    upto = counts[order].cumsum()
    # The cells in the middle: of an odd number of cells twice the same one.
    half = (upto[-1] - 1) / 2
    places = np.searchsorted(upto, [np.floor(half), np.ceil(half)], side="right")
    return float(found[order][np.minimum(places, len(found) - 1)].mean())


def _is_id(cells: Cells, found: np.ndarray, distinct: int) -> bool:
    """Whether whole numbers only tell rows, or people with a few rows each, apart."""
    known = cells.rows - cells.missing
    if len(found) < 2 or not (found == np.round(found)).all():
        return False
    last = (re.findall(r"[^\W_]+", cells.column.name.lower()) or [""])[-1]
    named = last in ID_WORDS or last.endswith(ID_ENDINGS)
    if named and distinct >= SHARE_OF_IDS * known:
        return True
    # Growing numbers that take as much room as there are rows follow each other.
    grows = distinct >= known and bool((np.diff(found) > 0).all())
    return grows and float(found[-1] - found[0]) == known - 1


def _counts(values: Any, counts: np.ndarray) -> tuple[tuple[str, int], ...]:
    found: dict[str, int] = {}
    for value, count in zip(values.to_pylist(), counts.tolist(), strict=True):
        if value is not None:
            found[str(value)] = found.get(str(value), 0) + round(count)
    return tuple(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))
