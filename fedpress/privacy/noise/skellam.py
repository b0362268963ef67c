"""Skellam noise: whole numbers whose sums are Skellam again, so that clients can make the noise of a secret sum.

The difference of two Poisson numbers of mean v/2 has variance v; n such draws add up to one of variance n v. Agarwal,
Kairouz & Liu 2021 (arXiv:2110.04995) bound what a sum with such noise gives away.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fedpress.errors import PrivacyError
from fedpress.privacy.roots import bracket, safe_root

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fedpress.core.random_source import RandomSource

# numpy and torch are imported where noise is drawn: the accountant must answer without them.

MAX_VARIANCE = 2.0**36
"""Largest variance of one draw: the table of its distribution then has two and a half million rows."""

RETRY_BETA = math.exp(-0.5)
"""Chance with which rounding may be longer than its bound and is drawn again (Kairouz, Liu & Steinke 2021)."""


def rdp(alpha: int, *, l2: float, l1: float, variance: float) -> float:
    """Returns the Renyi divergence of order `alpha` that a change of L2 norm `l2` and L1 norm `l1` makes.

    Agarwal, Kairouz & Liu 2021 (arXiv:2110.04995), for vectors of whole numbers and noise of `variance` on each value.
    Their proof needs whole orders above 1.

    Raises:
        ValueError: if `alpha` is not a whole number >= 2.

    >>> round(rdp(2, l2=1.0, l1=1.0, variance=1e6) * 1e6, 3)
    1.0
    """
    import numpy as np

    return float(rdps(np.array([alpha]), l2=l2, l1=l1, variance=variance)[0])


def rdps(orders: np.ndarray, *, l2: float, l1: float, variance: float) -> np.ndarray:
    """Returns `rdp` at each of `orders` [k], float64 [k].

    Raises:
        ValueError: if an order is not a whole number >= 2.
    """
    import numpy as np

    if bool((orders != np.floor(orders)).any()) or bool((orders < 2).any()):
        raise ValueError(f"orders: got {orders}, expected whole numbers >= 2")
    if variance <= 0:
        return np.full(orders.shape, math.inf if l2 > 0 else 0.0)
    gaussian = orders * l2**2 / (2 * variance)
    extra = ((2 * orders - 1) * l2**2 + 6 * l1) / (4 * variance**2)
    return gaussian + np.minimum(extra, 3 * l1 / (2 * variance))


def rounded_sensitivity(l2: float, size: int, beta: float = RETRY_BETA) -> float:
    """Returns the L2 norm that a vector [size] of norm `l2` has after stochastic rounding, but with chance `beta`.

    Each value goes up or down to a whole number so that its mean stays. Kairouz, Liu & Steinke 2021
    (arXiv:2102.06387, "conditional rounding"): at most l2^2 + d/4 + sqrt(2 ln(1/beta)) (l2 + sqrt(d)/2) squared, and
    never above (l2 + sqrt(d))^2.

    >>> round(rounded_sensitivity(100.0, 4), 2), round(rounded_sensitivity(0.0, 4), 2)
    (100.51, 1.41)
    """
    root = math.sqrt(size)
    usual = l2**2 + size / 4 + math.sqrt(2 * math.log(1 / beta)) * (l2 + root / 2)
    return min(math.sqrt(usual), l2 + root)


def l1_sensitivity(l2: float, size: int) -> float:
    """Returns the largest L1 norm of whole numbers [size] of L2 norm `l2`: each is at most its own square."""
    return min(math.sqrt(size) * l2, l2**2)


def tail(size: int, variance: float, chance: float) -> float:
    """Returns t so that any of `size` Skellam numbers passes +-t with probability at most `chance`.

    Chernoff's bound of the Skellam tail, E exp(sX) = exp(v (cosh s - 1)), over both sides and all numbers.

    >>> 5 < tail(1, 1.0, 1e-6) < 8
    True
    """
    if variance <= 0:
        return 0.0
    needed = math.log(2 * size / chance)

    def excess(t: float) -> float:
        return needed - chernoff_exponent(t, variance)

    ends = bracket(excess, math.sqrt(2 * variance * needed) + needed)
    assert ends is not None, "the bound falls without end"
    return safe_root(excess, unsafe=ends[0], safe=ends[1])


def chernoff_exponent(t: float, variance: float) -> float:
    """Returns -log of the bound on P(X >= t)."""
    root = math.hypot(t, variance)
    return t * math.asinh(t / variance) - t**2 / (
        root + variance
    )  # root - variance, without cancellation


def sample(size: int, variance: float, chance: RandomSource) -> Tensor:
    """Returns int64 Skellam noise [size] of `variance`, drawn from whole numbers alone.

    A sign and 63 random bits per value are looked up in a table of tail probabilities: no rounding of a random number
    takes part, and each probability of the table is right to about 2^-60 of the whole.

    Raises:
        PrivacyError: if `variance` is not between 0 and 2^36.
    """
    import numpy as np
    import torch

    if not 0 <= variance <= MAX_VARIANCE:
        raise PrivacyError(
            f"got {variance:g}, expected 0 to 2^36",
            place="Skellam variance",
            cure="take fewer bits",
        )
    out = np.zeros(size, np.int64)
    if variance > 0:
        table = _table(float(variance))
        for at in range(0, size, 1 << 17):  # a block stays in the processor's cache
            end = min(at + (1 << 17), size)
            out[at:end] = _look_up(table, chance.words(end - at))
    return torch.from_numpy(out)


class _Table(NamedTuple):
    """Tails P(|X| >= K), ..., P(|X| >= 1) in units of 2^-63, rising, and where to begin to search in them."""

    tails: np.ndarray
    guide: np.ndarray
    shift: np.uint64


def _look_up(table: _Table, words: np.ndarray) -> np.ndarray:
    import numpy as np

    bits, sign = words >> np.uint64(1), (words & np.uint64(1)).astype(np.int64)
    bucket = (bits >> table.shift).astype(np.int64)
    found = table.guide[bucket]
    open_ = np.flatnonzero(table.guide[bucket + 1] != found)  # a tail lies inside these buckets
    found[open_] = np.searchsorted(table.tails, bits[open_], side="right")
    magnitude = len(table.tails) - found.astype(np.int64)  # how many tails are larger
    return magnitude * (1 - 2 * sign)


@lru_cache(maxsize=4)
def _table(variance: float) -> _Table:
    import numpy as np

    each = probabilities(variance)
    # Both sides, summed from the outside in, so that small tails are not lost beside large ones.
    tails = np.cumsum(2 * each[:0:-1])
    whole = tails[-1] + each[0]
    rising = np.rint(tails / whole * np.longdouble(2) ** 63).astype(np.uint64)
    guide_bits = min(max(len(rising).bit_length() + 3, 10), 21)
    shift = np.uint64(63 - guide_bits)
    starts = np.arange((1 << guide_bits) + 1, dtype=np.uint64) << shift
    return _Table(rising, np.searchsorted(rising, starts, side="right").astype(np.int32), shift)


def probabilities(variance: float) -> np.ndarray:
    """Returns the probabilities of 0, 1, ... up to a common factor: exp(-v) I_k(v), in extended precision.

    `scipy.special.ive` loses a digit for every tenfold variance; below the recurrence of Bessel functions, and above
    their uniform expansion (Digital Library of Mathematical Functions, 10.41.3), keep 18 digits where the machine has
    80-bit numbers.
    """
    import numpy as np

    last = (
        math.ceil(9.5 * math.sqrt(variance)) + 40
    )  # past 2^-64, also where the tails are those of a Poisson
    if variance < 1e4:
        v, ratio, ratios = np.longdouble(variance), np.longdouble(0), []
        # I_k / I_(k-1), downwards, where the recurrence is stable; it forgets its start by exp(-2 k/v) a step.
        for order in range(last + 40 + int(25 * variance / last), 0, -1):
            ratio = 1 / (2 * order / v + ratio)
            ratios.append(ratio)
        return np.cumprod(np.array([1, *ratios[::-1]], np.longdouble))[: last + 1]
    k, v = np.arange(last + 1, dtype=np.longdouble), np.longdouble(variance)
    s = 1 / np.sqrt(k * k + v * v)
    t2 = (k * s) ** 2
    series = 1 + s * ((3 - 5 * t2) / 24)
    series += s**2 * ((81 + t2 * (-462 + 385 * t2)) / 1152)
    series += s**3 * ((30375 + t2 * (-369603 + t2 * (765765 - 425425 * t2))) / 414720)
    series += s**4 * (
        (4465125 + t2 * (-94121676 + t2 * (349922430 + t2 * (-446185740 + 185910725 * t2))))
        / np.longdouble(39813120)
    )
    front = np.exp(k * k / (1 / s + v) - k * np.arcsinh(k / v)) * np.sqrt(s)
    values: np.ndarray = front * series
    return values
