"""Root finding that rounds to the safe side, so that a privacy guarantee always holds.

Example: the smallest noise multiplier with epsilon at most 8. The root is where epsilon is exactly
8; numbers on its safe side have a smaller epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

MAX_EXCESS = 700.0
"""Function values are clipped to +- this number, because Brent's method needs finite values."""

BEST_RTOL = 1e-15
"""About the smallest relative distance that Brent's method can reach in double precision."""


def safe_root(
    excess: Callable[[float], float],
    *,
    unsafe: float,
    safe: float,
    rtol: float = 1e-14,
    margin: float = 0.0,
) -> float:
    """Returns a point close to the root of `excess`, on the side where `excess` is at most 0.

    Brent's method (scipy.optimize.brentq) may end on either side of the root. Therefore its answer
    is checked, and moved towards `safe` until `excess` is at most 0.

    Args:
        excess: above 0 where the guarantee does not hold, at most 0 where it holds; monotone
            between `unsafe` and `safe`. The function may be called twice with the same number, so
            cache a slow function.
        unsafe: one end of the interval, where the guarantee does not hold; above 0.
        safe: the other end, where the guarantee holds; above 0.
        rtol: approximate relative distance from the root.
        margin: Brent's method searches for -`margin` instead of 0, so that its answer is rarely on
            the unsafe side.

    Returns:
        A number between both ends where `excess` is at most 0; `safe` if no number closer to the
        root was found.

    >>> root = safe_root(lambda x: 2 - x * x, unsafe=1.0, safe=2.0)
    >>> root * root >= 2, abs(root - 2**0.5) < 1e-13
    (True, True)
    """
    if unsafe == safe:
        return safe
    from scipy.optimize import brentq

    def shifted(x: float) -> float:
        return min(max(excess(x) + margin, -MAX_EXCESS), MAX_EXCESS)

    low = min(unsafe, safe)
    high = max(unsafe, safe)
    # At `safe` the guarantee holds by less than the margin, so there is no root to search for.
    if shifted(safe) > 0:
        return safe
    # brentq also needs an absolute tolerance. At the lower end, it is the strictest.
    found = float(brentq(shifted, low, high, xtol=rtol * low, rtol=max(rtol, BEST_RTOL)))

    # Steps start at the requested tolerance; mostly one step is enough.
    step = rtol
    while excess(found) > 0:
        found += math.copysign(step * found, safe - unsafe)
        # Steps double, so that the loop ends soon even where `excess` is flat.
        step *= 2
        if not low < found < high:
            return safe
    return found


def bracket(
    excess: Callable[[float], float],
    start: float,
    *,
    strides: Iterable[float] = (),
    least: float = 1e-12,
    most: float = math.inf,
) -> tuple[float, float] | None:
    """Returns (unsafe, safe): an interval that contains the root of a decreasing function.

    Args:
        excess: above 0 below the root, at most 0 from the root on.
        start: where the search starts, above 0.
        strides: factors of the first steps; later steps double or halve the number.
        least: lower end of the search; if `excess` is at most 0 there, both results are `least`.
        most: upper end of the search; if `excess` is above 0 there, the result is None.

    >>> bracket(lambda x: 5 - x, 1.0), bracket(lambda x: 5 - x, 64.0)
    ((4.0, 8.0), (4.0, 8.0))
    >>> bracket(lambda x: 5 - x, 1.0, most=4.0) is None
    True
    >>> bracket(lambda x: 5 - x, 9.0, least=6.0)
    (6.0, 6.0)
    """
    factors = iter(strides)
    safe = min(max(start, least), most)
    if excess(safe) > 0:
        return _bracket_above(excess, safe, factors, most)
    while safe > least:
        unsafe = max(safe / next(factors, 2.0), least)
        if excess(unsafe) > 0:
            return unsafe, safe
        safe = unsafe
    return safe, safe


def _bracket_above(
    excess: Callable[[float], float], unsafe: float, factors: Iterable[float], most: float
) -> tuple[float, float] | None:
    """Increases `unsafe` until `excess` is at most 0; None if it stays above 0 up to `most`."""
    left = iter(factors)
    while unsafe < most:
        safe = min(unsafe * next(left, 2.0), most)
        if excess(safe) <= 0:
            return unsafe, safe
        unsafe = safe
    return None
