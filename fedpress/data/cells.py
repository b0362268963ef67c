"""Converts the cells of a column: text to numbers or dates, values to words, words to positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

GROUPS = r"^[+-]?\d{1,3}(\.\d{3})+(,\d*)?$"
"""A number with a decimal comma whose thousands are separated by points, such as 1.234,5."""


def cast_text(text: Any, kind: Any, decimal: str = ".") -> Any:
    """Converts texts to the pyarrow type `kind`; text of another type becomes null.

    Args:
        text: a `pyarrow.ChunkedArray` of strings.
        kind: the type.
        decimal: decimal separator of numbers.
    """
    text = plain_text(text, kind, decimal)
    try:
        return text.cast(kind)
    # Some cell has another type. A cast of pyarrow fails for such a cell, so each distinct text is
    # converted separately.
    except pa.ArrowInvalid:
        words = text.unique()
        read = [_cast_or_none(word, kind) for word in words.to_pylist()]
        return pa.chunked_array([pa.array(read, kind)]).take(pc.index_in(text, words))


def plain_text(text: Any, kind: Any, decimal: str = ".") -> Any:
    """Returns text as pyarrow reads it: without spaces around, and with a decimal point."""
    text = pc.utf8_trim_whitespace(text)
    if decimal == "," and types.is_floating(kind):
        # With a decimal comma a point separates thousands: 1.234,5 is 1234.5. A point elsewhere
        # makes no number: 02.07.2019 is a date, and 12.50 may be 12,50 or 1250. A letter in its
        # place keeps such a text from being read as a number.
        grouped = pc.match_substring_regex(text, GROUPS)
        whole = pc.replace_substring(text, ".", "")
        text = pc.if_else(grouped, whole, pc.replace_substring(text, ".", "p"))
        text = pc.replace_substring(text, ",", ".")
    return text


def _cast_or_none(word: str | None, kind: Any) -> Any:
    try:
        return pa.scalar(word, pa.string()).cast(kind).as_py()
    except pa.ArrowInvalid:
        return None


def as_text(column: Any) -> Any:
    """Returns the values as names of classes: `3`, `True`, `ill`; null stays null."""
    # pyarrow would write true and false; numpy and Python write True and False.
    if types.is_boolean(column.type):
        return pc.if_else(column, "True", "False")
    if is_word(column.type):
        return column
    if types.is_floating(column.type):
        # pandas marks missing cells by NaN.
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column.cast(pa.string())


def positions_in(words: Any, names: Sequence[str]) -> np.ndarray:
    """Returns int64 [n]: the position of each word in `names`; -1 if it is not there."""
    found = pc.index_in(words, pa.array(list(names), words.type), skip_nulls=True)
    places: np.ndarray = found.fill_null(-1).to_numpy()
    return places.astype(np.int64)


def is_number(kind: Any) -> bool:
    """Returns whether a pyarrow type is an integer, a float or a decimal number."""
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def is_word(kind: Any) -> bool:
    """Returns whether a pyarrow type is text."""
    return bool(types.is_string(kind) or types.is_large_string(kind))
