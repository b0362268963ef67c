"""Skellam noise: integer noise that clients of a secure sum (secure aggregation) add together.

A Skellam number of variance v is the difference of two Poisson numbers of mean v/2. The sum of n
Skellam numbers of variance v is a Skellam number of variance n v. So each client can add a part of
the noise. Vectors are scaled and rounded to integers first; one step of this grid is a grid unit.
Agarwal, Kairouz & Liu 2021 (arXiv:2110.04995) bound the Renyi divergence of a sum with this noise.
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

# numpy and torch are imported only where noise is drawn: the accountant must run without them.

MAX_VARIANCE = 2.0**36
"""Largest variance of one draw: its table of probabilities then has 2.5 million rows."""

RETRY_BETA = math.exp(-0.5)
"""Limit of the probability with which a rounded vector exceeds its bound and is rounded again
(Kairouz, Liu & Steinke 2021)."""

BLOCK = 1 << 17
"""Number of values drawn at a time, to stay in the processor's cache."""


def rdp(alpha: int, *, l2: float, l1: float, variance: float) -> float:
    """Returns a bound on the Renyi divergence between a sum with Skellam noise and its neighbour.

    Agarwal, Kairouz & Liu 2021 (arXiv:2110.04995), for vectors of whole numbers.

    Args:
        alpha: order, a whole number >= 2; the theorem is proven only for such orders.
        l2: L2 norm by which the sum moves, in grid units.
        l1: L1 norm by which the sum moves, in grid units.
        variance: variance of the noise on each value, in grid units squared.

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

    # The formula is proven for integer orders only; between them it may be too small.
    if bool((orders != np.floor(orders)).any()) or bool((orders < 2).any()):
        raise ValueError(f"orders: got {orders}, expected whole numbers >= 2")
    if variance <= 0:
        return np.full(orders.shape, math.inf if l2 > 0 else 0.0)
    gaussian = orders * l2**2 / (2 * variance)
    extra = ((2 * orders - 1) * l2**2 + 6 * l1) / (4 * variance**2)
    # The theorem gives two bounds. Which one is smaller depends on the variance.
    return gaussian + np.minimum(extra, 3 * l1 / (2 * variance))


def rounded_sensitivity(l2: float, size: int, beta: float = RETRY_BETA) -> float:
    """Returns a bound on the L2 norm of a vector after stochastic rounding.

    Each value is rounded up or down to an integer at random, without bias. With probability
    1 - `beta` the squared norm is at most l2^2 + d/4 + sqrt(2 ln(1/beta)) (l2 + sqrt(d)/2)
    (Kairouz, Liu & Steinke 2021, arXiv:2102.06387, "conditional rounding"). The squared norm is
    never above (l2 + sqrt(d))^2.

    Args:
        l2: norm before rounding, in grid units.
        size: number of values d.
        beta: probability with which the bound may be exceeded.

    >>> round(rounded_sensitivity(100.0, 4), 2), round(rounded_sensitivity(0.0, 4), 2)
    (100.51, 1.41)
    """
    root = math.sqrt(size)
    usual = l2**2 + size / 4 + math.sqrt(2 * math.log(1 / beta)) * (l2 + root / 2)
    return min(math.sqrt(usual), l2 + root)


def l1_sensitivity(l2: float, size: int) -> float:
    """Returns the largest L1 norm of a vector [size] of whole numbers with L2 norm `l2`."""
    # The second bound holds because |k| <= k^2 for integers.
    return min(math.sqrt(size) * l2, l2**2)


def tail(size: int, variance: float, probability: float) -> float:
    """Returns a bound t on the absolute values of `size` Skellam numbers.

    The probability that at least one of the numbers has an absolute value above t is at most
    `probability`. This is Chernoff's bound with E exp(sX) = exp(v (cosh s - 1)) for variance v, as
    a union bound over both signs and all numbers.

    >>> 5 < tail(1, 1.0, 1e-6) < 8
    True
    """
    if variance <= 0:
        return 0.0
    needed = math.log(2 * size / probability)

    def excess(t: float) -> float:
        return needed - chernoff_exponent(t, variance)

    # The first guess adds the tails of a Gaussian (large variance) and a Poisson (small variance).
    ends = bracket(excess, math.sqrt(2 * variance * needed) + needed)
    assert ends is not None, "the bound falls without end"
    return safe_root(excess, unsafe=ends[0], safe=ends[1])


def chernoff_exponent(t: float, variance: float) -> float:
    """Returns -log of Chernoff's bound on P(X >= t) for a Skellam number X of this variance."""
    root = math.hypot(t, variance)
    # The last term is root - variance, written without cancellation.
    return t * math.asinh(t / variance) - t**2 / (root + variance)


def sample(size: int, variance: float, source: RandomSource) -> Tensor:
    """Returns Skellam noise, int64 [size].

    Each value takes a random sign and 63 random bits, which are looked up in a table of tail
    probabilities. Only integers are used, so the noise has no floating-point artefacts, and each
    probability is exact to about 2^-60. There is no rejection loop, whose duration would depend on
    the noise (Jin et al. 2022, arXiv:2112.05307).

    Args:
        size: number of values.
        variance: variance of each value.
        source: where the random bits come from.

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
        for at in range(0, size, BLOCK):
            end = min(at + BLOCK, size)
            out[at:end] = _look_up(table, source.words(end - at))
    return torch.from_numpy(out)


class _Table(NamedTuple):
    """Tail probabilities of |X|, and an index for fast lookup.

    Attributes:
        tails: P(|X| >= K), ..., P(|X| >= 1) in units of 2^-63, increasing, uint64 [K].
        guide: for each value of the high bits of a random word, the number of tails at or below it.
        shift: number of low bits of a random word that the guide ignores.
    """

    tails: np.ndarray
    guide: np.ndarray
    shift: np.uint64


def _look_up(table: _Table, words: np.ndarray) -> np.ndarray:
    """Returns the Skellam number of each random word, int64 [words]."""
    import numpy as np

    bits = words >> np.uint64(1)
    sign = (words & np.uint64(1)).astype(np.int64)
    bucket = (bits >> table.shift).astype(np.int64)
    found = table.guide[bucket]
    # Most buckets have no tail inside, so the guide gives the answer; others need a search.
    undecided = np.flatnonzero(table.guide[bucket + 1] != found)
    found[undecided] = np.searchsorted(table.tails, bits[undecided], side="right")
    # |X| is the number of tails above the random bits.
    magnitude = len(table.tails) - found.astype(np.int64)
    return magnitude * (1 - 2 * sign)


@lru_cache(maxsize=4)
def _table(variance: float) -> _Table:
    import numpy as np

    each = probabilities(variance)
    # Summed from the smallest tail, to lose no precision. X has two signs, hence the factor 2.
    tails = np.cumsum(2 * each[:0:-1])
    whole = tails[-1] + each[0]
    # In units of 2^-63, because one of the 64 random bits is the sign.
    rising = np.rint(tails / whole * np.longdouble(2) ** 63).astype(np.uint64)
    # About eight buckets for each tail, in a guide of at most 8 MB.
    guide_bits = min(max(len(rising).bit_length() + 3, 10), 21)
    shift = np.uint64(63 - guide_bits)
    starts = np.arange((1 << guide_bits) + 1, dtype=np.uint64) << shift
    guide = np.searchsorted(rising, starts, side="right").astype(np.int32)
    return _Table(rising, guide, shift)


def probabilities(variance: float) -> np.ndarray:
    """Returns exp(-v) I_k(v) for k = 0, 1, ... up to a common factor, as longdouble.

    `scipy.special.ive` loses a digit whenever the variance grows tenfold. This function uses the
    recurrence of Bessel functions (variance below 1e4) or their uniform expansion (Digital Library
    of Mathematical Functions, 10.41.3). It gives 18 digits on machines with 80-bit floats.
    """
    import numpy as np

    # Beyond this, probabilities are below 2^-64, even for a small variance (Poisson tails).
    last = math.ceil(9.5 * math.sqrt(variance)) + 40
    v = np.longdouble(variance)
    if variance < 1e4:
        ratio = np.longdouble(0)
        ratios = []
        # The ratio I_k / I_(k-1), from large k downwards, where the recurrence is stable: the error
        # of its start decays by exp(-2 k/v) in every step.
        for order in range(last + 40 + int(25 * variance / last), 0, -1):
            ratio = 1 / (2 * order / v + ratio)
            ratios.append(ratio)
        return np.cumprod(np.array([1, *ratios[::-1]], np.longdouble))[: last + 1]

    k = np.arange(last + 1, dtype=np.longdouble)
    s = 1 / np.sqrt(k * k + v * v)
    t2 = (k * s) ** 2
    series = 1 + s * ((3 - 5 * t2) / 24)
    series += s**2 * ((81 + t2 * (-462 + 385 * t2)) / 1152)
    series += s**3 * ((30375 + t2 * (-369603 + t2 * (765765 - 425425 * t2))) / 414720)
    fourth = 4465125 + t2 * (-94121676 + t2 * (349922430 + t2 * (-446185740 + 185910725 * t2)))
    series += s**4 * (fourth / np.longdouble(39813120))
    # sqrt(k^2 + v^2) - v is written as k^2 / (root + v), without cancellation.
    leading = np.exp(k * k / (1 / s + v) - k * np.arcsinh(k / v)) * np.sqrt(s)
    values: np.ndarray = leading * series
    return values
