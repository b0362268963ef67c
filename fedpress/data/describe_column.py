"""Describes one column of a table: its type, missing values, words, numbers or dates.

Whoever calls it chooses the rows: the owner of a file may look at all of them.
"""

from __future__ import annotations

from dataclasses import replace
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


def describe_column(column: Column, settings: DataSettings) -> ColumnFacts:
    """Describes a column.

    Args:
        column: the column; if the recipe says its type, with that type.
        settings: the `[data]` table, for the types that a recipe gives and for lines in notes.
    """
    return replace(_facts(column, settings), rows=len(column.values))


def _facts(column: Column, settings: DataSettings) -> ColumnFacts:
    values, note = _typed(column, settings)
    kind = values.type
    missing = int(pc.sum(pc.is_null(column.values, nan_is_null=True)).as_py() or 0)
    if types.is_struct(kind):
        return ColumnFacts(column.name, "image", missing, 0)
    if types.is_nested(kind):
        return ColumnFacts(column.name, "list", missing, 0)
    distinct = len(values.drop_null().unique())
    if is_date(kind):
        # Of a CSV file dates are learned from only if the recipe says so.
        return _of_dates(column, values, missing, "date" if column.text else "")
    if is_word(kind) or types.is_boolean(kind):
        return _of_words(column, values, missing, settings)
    if not (is_number(kind) or types.is_null(kind)):
        return ColumnFacts(column.name, "text", missing, distinct, note=f"it holds {kind}")
    if column.text and _has_leading_zeros(column.values):
        return replace(
            _of_words(column, column.values, missing, settings),
            type="integer id",
            declare="integer id",
        )
    return _of_numbers(column.name, values, missing, note)


def _of_words(column: Column, values: Any, missing: int, settings: DataSettings) -> ColumnFacts:
    asked = settings.type_of(column.name)
    if column.text and (form := likely_form(values)):
        dates = dates_of_text(values, form)
        if dates.null_count == values.null_count:
            return _of_dates(column, dates, missing, f"date {form}")
    distinct = len(values.drop_null().unique())
    kind: Type = "integer id" if asked is not None and asked.name == "integer id" else "word"
    if distinct > MOST_WORDS:
        return ColumnFacts(column.name, "text" if kind == "word" else kind, missing, distinct)
    return ColumnFacts(column.name, kind, missing, distinct, _counts(values))


def _of_dates(column: Column, values: Any, missing: int, declare: str) -> ColumnFacts:
    found = local(values).drop_null().to_numpy().astype("datetime64[s]")
    if not len(found):
        # `typed` understands times of day as dates and converts none of them.
        note = "it holds times of day" if missing < len(values) else ""
        return ColumnFacts(column.name, "text", missing, 0, note=note)
    whole_days = bool((found == found.astype("datetime64[D]")).all())
    ends = np.array([found.min(), found.max()]).astype("datetime64[D]" if whole_days else None)
    seconds = found.astype(np.int64)
    distinct = len(np.unique(seconds))
    return ColumnFacts(
        column.name,
        "date",
        missing,
        distinct,
        dates=tuple(str(end).replace("T", " ") for end in ends),
        histogram=_histogram(seconds.astype(np.float64), distinct),
        declare=declare,
    )


def _histogram(found: np.ndarray, distinct: int) -> tuple[int, ...]:
    counts: list[int] = np.histogram(found, bins=min(BARS, max(1, distinct)))[0].tolist()
    return tuple(counts)


def _has_leading_zeros(texts: Any) -> bool:
    """Whether whole numbers are written as 01067: then they are codes."""
    zeros = pc.match_substring_regex(texts.drop_null(), r"^\s*0\d+\s*$")
    return bool(pc.any(zeros).as_py())


def _typed(column: Column, settings: DataSettings) -> tuple[Any, str]:
    """Returns the values with their type, and a note if a column of numbers has other text."""
    values = column.typed()
    if not (column.text and is_word(values.type)):
        return values, ""
    count, first = column.stray_texts()
    if not 0 < count <= MOST_STRAY * (len(values) - values.null_count):
        return values, ""
    word = str(column.values[first].as_py())[:40]
    note = f"{count:,} of its cells are no numbers, such as '{word}' in {place_of(first, settings)}"
    return column.cast(pa.float64()), note


def _of_numbers(name: str, values: Any, missing: int, note: str) -> ColumnFacts:
    distinct = len(values.drop_null().unique())
    found = values.cast(pa.float64()).drop_null().to_numpy()
    found = found[np.isfinite(found)]
    spread: tuple[float, ...] = ()
    histogram: tuple[int, ...] = ()
    if len(found):
        spread = (float(found.min()), float(np.median(found)), float(found.max()))
        histogram = _histogram(found, distinct)
    kind: Type = "integer id" if _is_id(name, found, distinct) else "number"
    return ColumnFacts(
        name, kind, missing, distinct, numbers=spread, histogram=histogram, note=note
    )


def _is_id(name: str, found: np.ndarray, distinct: int) -> bool:
    """Whether whole numbers only tell rows apart: every row has another one."""
    if distinct < len(found) or len(found) < 2 or not (found == np.round(found)).all():
        return False
    lower = name.lower()
    named = lower in ("id", "index", "row", "nr", "no") or lower.endswith(("_id", " id"))
    return named or bool((np.diff(found) == 1).all())


def _counts(values: Any) -> tuple[tuple[str, int], ...]:
    counted = [
        (str(one["values"]), int(one["counts"])) for one in values.value_counts().to_pylist()
    ]
    known = [pair for pair in counted if pair[0] != "None"]
    return tuple(sorted(known, key=lambda pair: (-pair[1], pair[0])))
