"""The distribution of the privacy loss of one Gaussian step, rounded to a grid.

The privacy loss is log p(output) / q(output), where p and q are the output densities for two
neighbouring data sets. Rounding can only raise epsilon: the rounded step dominates the real one
("connect the dots", Doroshenko et al. 2022, arXiv:2207.04380), so its delta is at least as large at
every epsilon. The losses may be tilted: each probability is weighted by e^(tilt * loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from fedpress.privacy.accounting.events import GaussianEvent
from fedpress.privacy.roots import safe_root

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Direction = Literal["remove", "add"]
"""Which of two neighbouring data sets contains the unit: the first ("remove") or the second
("add"). Either direction may have the larger epsilon, so both are computed."""

ADDED_VARIANCE = 2e-4
"""Share by which the grid may raise the variance of the losses; epsilon then rises by about half
this share."""

TAIL_SHARE = 1e-4
"""Share of delta for each truncation: of the tails of all steps, and of each tail of their sum."""

LARGE_LOSS = 600.0
"""Larger losses are rounded up to the end of their interval: their exponential may overflow."""

MAX_EXPONENT = 700.0
"""Limit of exponents: e^700 is near the largest double."""

ROUNDING = 4e-16
"""Bound on the relative error of one operation; in double precision the error is up to 1.1e-16."""


@dataclass(frozen=True)
class LossDistribution:
    """The distribution of one step's privacy loss on a grid.

    Attributes:
        first: the smallest loss in grid units; loss number i is (first + i) * grid.
        logs: logarithm of the probability of each loss, float64 [losses].
        infinite: probability of an infinite loss.
    """

    first: int
    logs: Array
    infinite: float

    def log_moment(self, tilt: float, grid: float) -> float:
        """Returns log E[e^(tilt * loss)] over the finite losses."""
        exponents, top = self._tilted(tilt, grid)
        return top + math.log(float(exponents.sum()))

    def transform(self, tilt: float, grid: float, size: int) -> tuple[Array, int]:
        """Returns the logarithm of the Fourier transform of the tilted losses.

        Args:
            tilt: each probability is weighted by e^(tilt * loss).
            grid: distance of two losses.
            size: length of the transform; losses wrap around modulo this.

        Returns:
            First, the logarithm of the transform, complex [size // 2 + 1], of the losses shifted so
            that their mean is at point 0. Second, the mean in grid units, rounded down. The phases
            are later multiplied by the number of steps. The shift keeps the phases small, so that
            their rounding errors stay small too.
        """
        import numpy as np
        from scipy import fft

        tilted, _ = self._tilted(tilt, grid)
        tilted /= tilted.sum()
        mean = int(np.dot(tilted, np.arange(len(tilted), dtype=float)))
        start = -mean % size
        # Losses beyond the end wrap around to the beginning, as in a circular convolution.
        turns = -(-(start + len(tilted)) // size)
        padded = np.zeros(turns * size)
        padded[start : start + len(tilted)] = tilted
        circle = padded.reshape(-1, size).sum(axis=0)
        # The transform may be exactly 0; exp of its logarithm -inf is 0 too.
        with np.errstate(divide="ignore"):
            return np.log(fft.rfft(circle)), self.first + mean

    def _tilted(self, tilt: float, grid: float) -> tuple[Array, float]:
        """Returns the tilted probabilities / the largest one, and the logarithm of the largest."""
        import numpy as np

        exponents = np.arange(self.first, self.first + len(self.logs), dtype=float)
        exponents *= tilt * grid
        exponents += self.logs
        top = float(exponents.max())
        exponents -= top
        return np.exp(exponents, out=exponents), top


def choose_grid(events: Sequence[GaussianEvent], delta: float, points: int) -> tuple[float, float]:
    """Returns the grid, and the share by which it raises the variance of the losses.

    `points` is the largest number of grid points for the ranges of losses of all events together.
    The share is at most `ADDED_VARIANCE`, unless so few points need a wider grid. Rounding a loss
    to its two neighbours adds (loss - lower) * (upper - loss) to the variance: grid^2 / 6 on
    average, and at most |loss| * grid, because 0 is a grid point.
    """
    import numpy as np

    # Variances are integrals over the noised sum. They reach 12 standard deviations to both sides
    # of each of its two means: 0 without the unit, 1 with the unit.
    nodes = np.linspace(-12, 12, 4001)
    density = np.exp(-(nodes**2) / 2)
    density /= density.sum()
    sizes = []
    weights = []
    for event in events:
        q = event.sampling_prob
        z = event.noise_multiplier
        for mean, probability in ((0.0, 1 - q), (1.0, q)):
            sizes.append(np.abs(_loss_at(mean + z * nodes, q, z)))
            weights.append(event.steps * probability * density)
    size = np.concatenate(sizes)
    weight = np.concatenate(weights)
    variance = float(np.sum(weight * size**2))

    def added(grid: float) -> float:
        return float(np.sum(weight * np.minimum(size * grid, grid**2 / 6))) / variance

    low = 1e-3 * math.sqrt(variance / float(weight.sum()))
    high = float(size.max())
    least = sum(loss_span(event, delta) for event in events) / points
    widest = _widest(lambda grid: math.log(added(grid) / ADDED_VARIANCE), low, high)
    grid = max(least, widest)
    return grid, added(grid)


def _widest(excess: Callable[[float], float], low: float, high: float) -> float:
    """Returns the largest grid from `low` to `high` with `excess` at most 0, else `low`."""
    if excess(high) <= 0:
        return high
    if excess(low) > 0:
        return low
    return safe_root(excess, unsafe=high, safe=low, rtol=1e-9)


def loss_span(event: GaussianEvent, delta: float = 1e-15) -> float:
    """Returns the largest minus the smallest finite loss of a step.

    Tails that are negligible at `delta` are left out; see `_loss_range`.
    """
    bottom, top = _loss_range(event, delta)
    return top - bottom


def _loss_range(event: GaussianEvent, delta: float) -> tuple[float, float]:
    """Returns the smallest and the largest finite loss on the grid.

    Losses outside this range have probability at most `TAIL_SHARE` * delta in all steps together.
    """
    from scipy.special import ndtri

    q = event.sampling_prob
    z = event.noise_multiplier
    deviations = max(6.0, -float(ndtri(TAIL_SHARE * delta / event.steps / 4)))
    return float(_loss_at(-z * deviations, q, z)), float(_loss_at(1 + z * deviations, q, z))


def _loss_at(x: Any, q: float, z: float) -> Array:
    """Returns the privacy loss where the noised sum is `x`, for a clip norm of 1.

    `q` is the sampling probability, and `z` the noise multiplier. The loss is
    log(1 - q + q e^((2x - 1) / (2 z^2))), the logarithm of the ratio of the densities with and
    without the unit.
    """
    import numpy as np

    exponent = (2 * np.asarray(x, float) - 1) / (2 * z * z)
    if q == 1:
        return exponent
    # The exact form overflows for large exponents, where 1 - q is negligible.
    near = np.log1p(q * np.expm1(np.minimum(exponent, 500.0)))
    return np.where(exponent < 500, near, math.log(q) + exponent)


def _sum_at(loss: Array, q: float, z: float) -> Array:
    """Returns the noised sum at which the loss is `loss`; -inf if all sums have a larger loss.

    The inverse of `_loss_at`.
    """
    import numpy as np

    if q == 1:
        return loss * z * z + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.log1p(np.expm1(np.minimum(loss, 40.0)) / q)
        exponent = np.where(loss < 40, near, loss - math.log(q))
    # NaN: a loss below log(1 - q) is not possible.
    return np.where(np.isnan(exponent), -np.inf, exponent * z * z + 0.5)


# Two entries: both directions of the same step.
@lru_cache(maxsize=2)
def losses_of_step(
    event: GaussianEvent, direction: Direction, grid: float, delta: float
) -> LossDistribution:
    """Returns the losses of one step on the grid.

    The losses between two grid points belong to an interval of noised sums. Each of the two data
    sets gives this interval a probability. "Connect the dots" divides the probability of the first
    data set between the two grid points such that the probability of the second data set is
    preserved too. Possible rounding errors are added to the upper point, which can only raise
    epsilon.
    """
    import numpy as np

    q = event.sampling_prob
    z = event.noise_multiplier
    bottom, top = _loss_range(event, delta)
    points = np.arange(math.floor(bottom / grid), math.ceil(top / grid) + 1)
    edges = _sum_at(points * grid, q, z)
    if direction == "remove":
        probabilities, infinite = _probabilities_remove(points * grid, edges, q, z, grid)
        first = int(points[0])
    else:
        # The loss has the opposite sign here, so the order of the points is reversed.
        probabilities, infinite = _probabilities_add(points * grid, edges, q, z, grid)
        probabilities = probabilities[::-1]
        first = -int(points[-1])
    with np.errstate(divide="ignore"):
        return LossDistribution(first, np.log(probabilities), infinite)


def _probabilities_remove(
    losses: Array, edges: Array, q: float, z: float, grid: float
) -> tuple[Array, float]:
    """Returns the probability of each of `losses`, and of an infinite loss; direction "remove".

    The sums have density (1 - q) N(0, z^2) + q N(1, z^2).
    """
    import numpy as np
    from scipy.special import ndtr

    without, without_error = _between(edges / z)
    with_unit, with_error = _between((edges - 1) / z)
    at = losses[:-1]
    lower = np.expm1(np.clip(at, -LARGE_LOSS, LARGE_LOSS))
    probability = (1 - q) * without + q * with_unit
    # The probability minus e^loss times the probability under the other data set. The two terms
    # nearly cancel, so their common part is subtracted analytically.
    excess = q * (with_unit - without) - without * lower
    error = q * (with_error + without_error) + without_error * np.abs(lower)
    up = _upper_part(probability, excess + error, grid, small=np.abs(at) < LARGE_LOSS)

    probabilities = np.zeros(len(losses))
    probabilities[1:] += up
    probabilities[:-1] += probability - up
    # Losses below the first one are rounded up to it.
    first = float(edges[0])
    probabilities[0] += (1 - q) * ndtr(first / z) + q * ndtr((first - 1) / z)
    # Losses above the last one count as infinite.
    last = float(edges[-1])
    infinite = (1 - q) * ndtr(-last / z) + q * ndtr((1 - last) / z)
    return probabilities, float(infinite)


def _probabilities_add(
    losses: Array, edges: Array, q: float, z: float, grid: float
) -> tuple[Array, float]:
    """Returns the probability of -loss for each of `losses`, and of infinity; direction "add".

    The sums have density N(0, z^2), and the loss has the opposite sign.
    """
    import numpy as np
    from scipy.special import ndtr

    without, without_error = _between(edges / z)
    with_unit, with_error = _between((edges - 1) / z)
    # With the opposite sign, the upper point of an interval belongs to its smaller sums.
    at = losses[1:]
    lower = -np.expm1(np.clip(-at, -LARGE_LOSS, LARGE_LOSS))
    excess = without * lower - q * (with_unit - without) * (1 - lower)
    error = without_error * np.abs(lower) + q * (with_error + without_error) * (1 - lower)
    up = _upper_part(without, excess + error, grid, small=np.abs(at) < LARGE_LOSS)

    probabilities = np.zeros(len(losses))
    probabilities[:-1] += up
    probabilities[1:] += without - up
    probabilities[-1] += ndtr(-float(edges[-1]) / z)
    return probabilities, float(ndtr(float(edges[0]) / z))


def _between(edges: Array) -> tuple[Array, Array]:
    """Returns the standard normal probability between edges, and a bound on its error."""
    import numpy as np
    from scipy.special import ndtr

    # Differences are computed in the nearer tail. Both numbers are small there, and so is the
    # rounding error.
    upper = edges[:-1] > 0
    low = ndtr(np.where(upper, -edges[1:], edges[:-1]))
    high = ndtr(np.where(upper, -edges[:-1], edges[1:]))
    return np.maximum(high - low, 0.0), 8 * ROUNDING * high


def _upper_part(probability: Array, excess: Array, grid: float, *, small: Array) -> Array:
    """Returns the part of each interval's probability that is assigned to its upper grid point.

    If a loss is not `small`, its exponential would overflow, so the whole probability is assigned.
    """
    import numpy as np

    part = np.clip(excess / -math.expm1(-grid), 0.0, probability)
    return np.where(small, part, probability)


def dominating_losses(guarantee: tuple[float, float], grid: float) -> LossDistribution:
    """Returns the losses of the mechanism that dominates all mechanisms with this (epsilon, delta).

    The dominating mechanism is randomized response that fails with probability delta (Kairouz, Oh &
    Viswanath 2015, arXiv:1311.0776). `guarantee` is the pair (epsilon, delta).
    """
    import numpy as np

    bound, failing = guarantee
    # Both losses are rounded up, which can only raise epsilon.
    high = math.ceil(bound / grid)
    low = math.ceil(-bound / grid)
    probabilities = np.zeros(high - low + 1)
    if bound < MAX_EXPONENT:
        probabilities[0] += (1 - failing) / (1 + math.exp(bound))
    probabilities[-1] += (1 - failing) / (1 + math.exp(-bound))
    with np.errstate(divide="ignore"):
        return LossDistribution(low, np.log(probabilities), failing)
