"""Where a monotone function crosses zero, by Brent's method, and always on the side that keeps the promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

FAR = 700.0
"""Values beyond this count as this: Brent's method draws lines through values, and infinity has none."""
NEAREST = 1e-15
"""The relative distance that Brent's method can reach in double precision, about."""


def safe_root(
    excess: Callable[[float], float],
    *,
    unsafe: float,
    safe: float,
    rtol: float = 1e-14,
    margin: float = 0.0,
) -> float:
    """Returns the crossing of `excess`, from the side of `safe`: there it is at most 0.

    Brent's method (scipy.optimize.brentq) finds the crossing from either side, but a noise or an epsilon may be
    rounded to one side only. So the answer is asked again, and moved on until the promise is kept.

    Args:
        excess: above 0 where the promise is broken, at most 0 where it is kept; monotone between the ends. It may be
            asked twice for one number: where that takes long, give it a cache.
        unsafe: an end where it is broken, a number above 0.
        safe: an end where it is kept, a number above 0.
        rtol: relative distance from the crossing, about.
        margin: what is aimed at is -`margin` and not 0, so that the first answer is seldom on the wrong side.

    Returns:
        A number between both ends where `excess` is at most 0; `safe` itself if nothing nearer keeps the promise.

    >>> root = safe_root(lambda x: 2 - x * x, unsafe=1.0, safe=2.0)
    >>> root * root >= 2, abs(root - 2**0.5) < 1e-13
    (True, True)
    """
    if unsafe == safe:
        return safe
    from scipy.optimize import brentq

    def near(x: float) -> float:
        return min(max(excess(x) + margin, -FAR), FAR)

    low, high = min(unsafe, safe), max(unsafe, safe)
    if near(safe) > 0:  # it keeps the promise, but by less than the margin
        return safe
    found = float(brentq(near, low, high, xtol=rtol * low, rtol=max(rtol, NEAREST)))
    step = rtol
    while excess(found) > 0:
        found += math.copysign(step * found, safe - unsafe)
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
    """Returns (unsafe, safe) around the crossing of a function that falls, looking from `start` on.

    Args:
        excess: above 0 below the crossing, at most 0 from there on.
        start: where to look first, a number above 0.
        strides: factors of the first steps; those after them are 2.
        least: nothing below it is asked: where `excess` is at most 0 there, both ends are `least`.
        most: nothing above it is asked: where `excess` is above 0 there, there is no bracket.

    >>> bracket(lambda x: 5 - x, 1.0), bracket(lambda x: 5 - x, 64.0)
    ((4.0, 8.0), (4.0, 8.0))
    >>> bracket(lambda x: 5 - x, 1.0, most=4.0) is None, bracket(lambda x: 5 - x, 9.0, least=6.0)
    (True, (6.0, 6.0))
    """
    left = iter(strides)
    safe = min(max(start, least), most)
    if excess(safe) > 0:
        while True:
            if safe >= most:
                return None
            unsafe, safe = safe, min(safe * next(left, 2.0), most)
            if excess(safe) <= 0:
                return unsafe, safe
    while safe > least:
        unsafe = max(safe / next(left, 2.0), least)
        if excess(unsafe) > 0:
            return unsafe, safe
        safe = unsafe
    return safe, safe
