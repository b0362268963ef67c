"""Checks the values of header fields, such as `round`, by their kind.

A header is the JSON dictionary of a message. JSON distinguishes `true`, `1`, `1.0` and `"1"`, but
in Python the first three are equal and the same dictionary key. A client that stores answered
rounds in a dictionary would confuse `round = true` with round 1. Therefore a whole number must be
an `int` here, and not a `bool`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fedpress.errors import WireError

MAX_WHOLE = 1 << 40
"""Largest number of rounds, steps or examples."""

MAX_SIZE = 1 << 62
"""Largest number of values in a vector."""


@dataclass(frozen=True)
class FieldKind:
    """The type and limits of a header field. Example: `whole(0, 9)`.

    Attributes:
        expected: description for errors, such as "a finite number".
        holds: function that returns whether a value is of this kind.
    """

    expected: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    # `isinstance` would accept a bool.
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def whole(low: int, high: int = MAX_WHOLE) -> FieldKind:
    """Returns the kind of whole numbers from `low` to `high`."""

    def holds(value: Any) -> bool:
        return _is_whole(value) and low <= value <= high

    return FieldKind(f"a whole number from {low} to {high}", holds)


def _is_positive(value: Any) -> bool:
    return type(value) is float and isfinite(value) and value > 0


def _is_list_of_names(value: Any) -> bool:
    return type(value) is list and all(type(name) is str for name in value)


def _is_pair_of_counts(value: Any) -> bool:
    if type(value) is not list or len(value) != 2:
        return False
    return all(_is_number(count) and abs(count) <= MAX_WHOLE for count in value)


NUMBER = FieldKind("a finite number", _is_number)
POSITIVE = FieldKind("a finite number above 0", _is_positive)
"""A float above 0, such as 1.0; the int 1 is refused."""
TEXT = FieldKind("text", lambda value: type(value) is str)
FLAG = FieldKind("true or false", lambda value: type(value) is bool)
NAMES = FieldKind("a list of names", _is_list_of_names)
TABLE = FieldKind("a table", lambda value: type(value) is dict)
COUNTS = FieldKind(f"two numbers from -{MAX_WHOLE} to {MAX_WHOLE}", _is_pair_of_counts)
"""Two counts; noise may make them negative or fractions."""


def check_field(place: str, name: str, value: Any, kind: FieldKind) -> None:
    """Checks one header field.

    Args:
        place: name of the message in errors, such as "fit".
        name: name of the field.
        value: the field's value.
        kind: its expected kind.

    Raises:
        WireError: if `value` is not of this kind.
    """
    if not kind.holds(value):
        shown = repr(value)
        # Cut, because the sender decides how long it is.
        if len(shown) > 80:
            shown = f"{shown[:77]}..."
        raise WireError(
            f"got {shown}, expected {kind.expected}",
            place=f"{place}.{name}",
            cure="use the same fedpress on both sides",
        )


def check_fields(place: str, fields: Mapping[str, FieldKind], header: Mapping[str, Any]) -> None:
    """Checks every field of `header` that is in `fields`; ignores other and missing fields.

    Raises:
        WireError: if a field is not of its kind.
    """
    for name, kind in fields.items():
        if name in header:
            check_field(place, name, header[name], kind)
