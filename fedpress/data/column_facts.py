"""What one column of a table holds: its type, missing values, words, numbers or dates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MARKS = " ▁▂▃▄▅▆▇█"
Rows = Literal["public", "all"]
"""Rows that are looked at: the public ones, or private ones too."""
Type = Literal["number", "integer id", "word", "text", "date", "image", "list"]
"""Type of a column, as fedpress understands it."""


@dataclass(frozen=True)
class ColumnFacts:
    """What a column holds.

    Attributes:
        name: name of the column.
        type: its type.
        missing: number of cells without a value.
        distinct: number of different values.
        words: the most frequent words with their counts; empty for numbers.
        numbers: least, median and largest number; empty for words.
        dates: first and last date; empty for other types.
        histogram: counts of numbers or dates in intervals of equal width between least and largest.
        declare: what `types` of a recipe must say so that the column is understood like this;
            empty if it need not say anything.
        note: what is unusual, such as a text in a column of numbers; "" if nothing is.
        rows: number of cells.
        part: the rows that were looked at. Only facts of public rows may be written down where
            others read them.
        sampled: whether `distinct`, the median and the histogram are estimates from some rows. The
            least and the largest value, and what else is said, are always those of all rows.
    """

    name: str
    type: Type
    missing: int
    distinct: int
    words: tuple[tuple[str, int], ...] = ()
    numbers: tuple[float, ...] = ()
    dates: tuple[str, ...] = ()
    histogram: tuple[int, ...] = ()
    declare: str = ""
    note: str = ""
    rows: int = 0
    part: Rows = "all"
    sampled: bool = False


def bar(share: float) -> str:
    """Draws a share as one character.

    >>> bar(0.0), bar(0.001), bar(0.5), bar(1.0)
    (' ', '▁', '▄', '█')
    """
    return MARKS[math.ceil(8 * share)]


def bars(counts: Sequence[int]) -> str:
    """Draws counts as one line of text.

    >>> bars([0, 1, 4, 8])
    ' ▁▄█'
    """
    most = max(counts, default=0) or 1
    # Rounded up, so that only an empty interval has no bar.
    return "".join(MARKS[-(-count * 8 // most)] for count in counts)
