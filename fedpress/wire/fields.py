"""Kinds of fields: what a value in a header may be, in words and as a test, so that it is checked in one place.

JSON knows `true`, `1`, `1.0` and `"1"`, and in Python the first three are equal and the same key of a dictionary. So a
whole number is an int and nothing else, here and wherever a field is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fedpress.errors import WireError

MAX_WHOLE = 1 << 40
"""Most that is counted: of rounds, steps and examples."""
MAX_SIZE = 1 << 62


@dataclass(frozen=True)
class Kind:
    """What a field may hold, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def whole(low: int, high: int = MAX_WHOLE) -> Kind:
    """A whole number from `low` to `high`."""
    return Kind(
        f"a whole number from {low} to {high}",
        lambda value: _is_whole(value) and low <= value <= high,
    )


NUMBER = Kind("a finite number", _is_number)
POSITIVE = Kind(
    "a finite number above 0", lambda value: type(value) is float and isfinite(value) and value > 0
)
TEXT = Kind("text", lambda value: type(value) is str)
FLAG = Kind("true or false", lambda value: type(value) is bool)
NAMES = Kind(
    "a list of names",
    lambda value: type(value) is list and all(type(name) is str for name in value),
)
TABLE = Kind("a table", lambda value: type(value) is dict)
COUNTS = Kind(
    f"two numbers from -{MAX_WHOLE} to {MAX_WHOLE}",
    lambda value: (
        type(value) is list
        and len(value) == 2
        and all(_is_number(v) and abs(v) <= MAX_WHOLE for v in value)
    ),
)


def check_field(place: str, name: str, value: Any, kind: Kind) -> None:
    """Raises WireError unless `value` is what a field of this `kind` may hold."""
    if not kind.holds(value):
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise WireError(
            f"got {shown}, expected {kind.expected}",
            place=f"{place}.{name}",
            cure="use the same fedpress on both sides",
        )


def check_fields(place: str, fields: Mapping[str, Kind], header: Mapping[str, Any]) -> None:
    """Raises WireError unless every known field that `header` holds is of its kind; unknown ones are read by nobody."""
    for name, kind in fields.items():
        if name in header:
            check_field(place, name, header[name], kind)
