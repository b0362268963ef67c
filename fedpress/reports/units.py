"""Formats numbers: 3.35 M, 168 MMAC, 13.4 MB, 3.7 ms, 1 h 32 min; a missing number is a dash."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Any, TypeVar

Line = TypeVar("Line", bound=Mapping[str, Any])
LARGEST = 1e150  # the square of a larger number overflows
DASH = "–"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: Any) -> float | None:
    """Returns `value` as a float; None if it is missing, a text, a bool, NaN, infinite or huge."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Only a damaged file has a larger number, and drawing it would overflow. NaN fails the
    # comparison too, so it gives None.
    if not -LARGEST < value < LARGEST:
        return None
    return float(value)


def numbers(lines: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Returns the number that each record has under `key`; records without a number are left out.

    >>> numbers([{"loss": 0.5}, {}, {"loss": "damaged"}, {"loss": 0.25}], "loss")
    [0.5, 0.25]
    """
    found = []
    for line in lines:
        value = number(line.get(key))
        if value is not None:
            found.append(value)
    return found


def lines_with(lines: Iterable[Line], key: str) -> list[Line]:
    """Returns the records that have a number under `key`.

    >>> lines_with([{"loss": 0.5}, {}, {"loss": "damaged"}], "loss")
    [{'loss': 0.5}]
    """
    return [line for line in lines if number(line.get(key)) is not None]


def count(value: Any, unit: str = "") -> str:
    """Returns a count with its `unit`; from 1,000 on with three digits and a decimal prefix.

    >>> count(11_173_962), count(168_000_000, "MAC"), count(None)
    ('11.2 M', '168 MMAC', '–')
    >>> count(13_400_000, "B"), count(640, "B")
    ('13.4 MB', '640 B')
    """
    x = number(value)
    if x is None:
        return DASH
    for size, prefix in PREFIXES:
        if abs(x) >= size * 0.9995:  # 999.7 k would be rounded to 1000 k, so it is 1.00 M
            return f"{_three_digits(x / size)} {prefix}{unit}"
    return f"{x:.0f} {unit}".rstrip()


def size(value: Any) -> str:
    """Returns a number of bytes with a decimal prefix.

    >>> size(13_400_000), size(None)
    ('13.4 MB', '–')
    """
    return count(value, "B")


def scale(largest: float) -> tuple[str, float]:
    """Returns the decimal prefix, and its factor, for an axis that reaches to `largest`.

    >>> scale(13_400_000), scale(12)
    (('M', 1000000.0), ('', 1.0))
    """
    return next(((prefix, size) for size, prefix in PREFIXES if largest >= size), ("", 1.0))


def _three_digits(x: float) -> str:
    # The limits are where rounding would give a fourth digit: 9.996 becomes 10.0, not 10.00.
    if abs(x) < 9.995:
        return f"{x:.2f}"
    return f"{x:.1f}" if abs(x) < 99.95 else f"{x:.0f}"


def percent(value: Any, digits: int = 2) -> str:
    """Returns a fraction as percent.

    >>> percent(0.9241), percent(0.3, 1)
    ('92.41%', '30.0%')
    """
    x = number(value)
    return DASH if x is None else f"{100 * x:.{digits}f}%"


def points(value: Any, reference: Any) -> str:
    """Returns the change of a fraction against a `reference`, in percentage points with its sign.

    If one of the two numbers is missing, the text is empty.

    >>> points(0.9241, 0.9253), points(0.9, 0.8), points(0.9, None)
    ('-0.12', '+10.00', '')
    """
    x, r = number(value), number(reference)
    return "" if x is None or r is None else f"{100 * (x - r):+.2f}"


def milliseconds(value: Any) -> str:
    """Returns a latency with about two or three digits, and at most three decimals.

    >>> milliseconds(3.71), milliseconds(0.0287), milliseconds(0.4234), milliseconds(12.94)
    ('3.7 ms', '0.029 ms', '0.42 ms', '12.9 ms')
    """
    x = number(value)
    if x is None:
        return DASH
    # The limits are where rounding would give one digit more: 0.0997 becomes 0.10, not 0.100.
    for below, digits in ((0.0995, 3), (0.995, 2), (99.95, 1)):
        if x < below:
            return f"{x:.{digits}f} ms"
    return f"{x:.0f} ms"


def seconds(value: Any) -> str:
    """Returns a time span in seconds, minutes or hours, with at most one decimal.

    >>> seconds(0.42), seconds(54.2), seconds(150), seconds(750), seconds(5_540)
    ('0.4 s', '54 s', '2 min 30 s', '13 min', '1 h 32 min')
    """
    x = number(value)
    if x is None:
        return DASH
    if x < 59.5:
        return f"{x:.1f} s" if x < 9.95 else f"{x:.0f} s"
    if round(x) < 600:
        return f"{round(x) // 60} min {round(x) % 60} s"
    # Not `round`, which rounds 0.5 to the even number: 12.5 minutes would become 12.
    minutes = int(x / 60 + 0.5)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def epsilon(value: Any) -> str:
    """Returns an epsilon rounded up: the guarantee must not look stronger than it is.

    >>> epsilon(7.981), epsilon(8.0), epsilon(None)
    ('7.99', '8.00', '–')
    """
    x = number(value)
    # 1e-6, because 0.07 * 100 is slightly above 7 in floating point, but must give 0.07.
    return DASH if x is None else f"{math.ceil(x * 100 - 1e-6) / 100:.2f}"


def rounded_up(value: float, digits: int = 4) -> str:
    """Returns a number rounded up, with at most `digits` significant digits.

    Epsilon and the noise multiplier are rounded up, because the guarantee would not hold with a
    smaller epsilon or with less noise.

    >>> rounded_up(3.39432), rounded_up(8.0), rounded_up(1.23e-7, 2)
    ('3.395', '8', '1.3e-07')
    >>> rounded_up(123456.0), rounded_up(math.inf)
    ('1.235e+05', 'inf')
    """
    if not math.isfinite(value):
        return f"{value}"
    # Decimal, because a float product such as 3.39432 * 1000 is rounded itself, perhaps down.
    exact = Decimal(value)
    if value:
        last_digit = Decimal((0, (1,), exact.adjusted() - digits + 1))
        exact = exact.quantize(last_digit, ROUND_CEILING)
    return f"{float(exact):.{digits}g}"


def compact(value: Any) -> str:
    """Returns a number, such as a delta or a setting, with as few digits as possible, at most six.

    >>> compact(1e-5), compact(0.5)
    ('1e-5', '0.5')
    """
    x = number(value)
    return DASH if x is None else f"{x:g}".replace("e-0", "e-")
