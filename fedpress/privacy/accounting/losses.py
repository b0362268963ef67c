"""An upper bound on the epsilon of Gaussian events in bounded time, however rare the samples are.

Each step's privacy loss is rounded to a grid such that the rounded step dominates the real one
("connect the dots", Doroshenko et al. 2022, arXiv:2207.04380). All steps are composed by one
Fourier transform of tilted losses: each probability is first weighted by e^(tilt * loss), so that
rounding errors are relative to delta and not to 1 (the idea of saddle-point accounting, Alghamdi et
al. 2023, arXiv:2208.09595). A coarser grid makes the answer larger, never too small.
"""

from __future__ import annotations

import math
from bisect import bisect_left
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
"""Which of the two data sets has the unit: `remove`, the first; `add`, the second. Either may have
the larger epsilon, so both are computed."""

POINTS = 1 << 20
"""Points of all grids together: an answer takes about a second and 200 MB."""

ADDED_VARIANCE = 2e-4
"""Share by which the grid may raise the variance of the losses; epsilon rises by half of that."""

FINE = 0.01
"""If the grid raises the variance by more than this share, the answer is marked as not fine."""

TAIL_SHARE = 1e-4
"""Share of delta that each tail left out may cost."""

HIGHER_TILTS = (1.1, 1.3, 1.7, 2.5, 4.0)
"""Multiples of the tilt at which Chernoff's bound on the upper tail is tried."""

LARGE_LOSS = 600.0
"""The exponential of a larger loss might overflow: it goes to the upper end of its interval."""

MAX_EXPONENT = 700.0
"""e^700 is near the largest double."""

ROUNDING = 4e-16
"""Relative error of one operation in double precision, doubled."""


@dataclass(frozen=True)
class EpsilonBound:
    """An upper bound on an epsilon.

    Attributes:
        epsilon: never below the true one.
        fine: whether the grid was fine enough that the bound is tight.
    """

    epsilon: float
    fine: bool


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
            tilt: weight of the losses, see the module's docstring.
            grid: distance of two losses.
            size: points of the circle that the losses are wrapped around.

        Returns:
            The transform, complex [size // 2 + 1], of the losses shifted such that their mean is at
            point 0 of the circle, and that mean in grid units. Shifted, the arguments of the
            complex numbers stay small, and so do the rounding errors when they are multiplied by
            the number of steps.
        """
        import numpy as np
        from scipy import fft

        tilted, _ = self._tilted(tilt, grid)
        tilted /= tilted.sum()
        mean = int(np.dot(tilted, np.arange(len(tilted), dtype=float)))
        start = -mean % size
        # Losses beyond the circle's end are added to its beginning, as the transform would do.
        turns = -(-(start + len(tilted)) // size)
        padded = np.zeros(turns * size)
        padded[start : start + len(tilted)] = tilted
        circle = padded.reshape(-1, size).sum(axis=0)
        # The transform may be exactly 0 at a frequency; its logarithm -inf gives 0 again.
        with np.errstate(divide="ignore"):
            return np.log(fft.rfft(circle)), self.first + mean

    def _tilted(self, tilt: float, grid: float) -> tuple[Array, float]:
        """Returns the weighted probabilities over the largest one, and the logarithm of that."""
        import numpy as np

        exponents = np.arange(self.first, self.first + len(self.logs), dtype=float)
        exponents *= tilt * grid
        exponents += self.logs
        top = float(exponents.max())
        exponents -= top
        return np.exp(exponents, out=exponents), top


Steps = Sequence[tuple[LossDistribution, int]]
"""Losses of one step, and the number of such steps."""


def epsilon_bound(
    events: Sequence[GaussianEvent],
    *,
    delta: float,
    guarantee: tuple[float, float] | None = None,
    points: int = POINTS,
) -> EpsilonBound:
    """Returns an upper bound on what Gaussian `events` spend together at `delta`.

    Args:
        events: at least one, each with steps and with finite noise above 0.
        delta: probability with which the guarantee may fail.
        guarantee: (epsilon, delta) of one more mechanism, of which nothing else is known.
        points: points of all grids together; more take more time and give a smaller bound where
            samples are rare and noise is low.

    >>> round(epsilon_bound([GaussianEvent(0.01, 1.0, 100)], delta=1e-5).epsilon, 2)
    0.72
    """
    # Every event is transformed by itself, so many events share the time of a few.
    points = max(1 << 12, 4 * points // max(4, len(events)))
    grid, added = _grid(events, delta, points)
    while True:
        if guarantee is not None and guarantee[0] > points * grid:
            return EpsilonBound(math.inf, fine=False)
        try:
            found = max(
                _epsilon_in_direction("remove", events, guarantee, grid, delta, 2 * points),
                _epsilon_in_direction("add", events, guarantee, grid, delta, 2 * points),
            )
        except _TooLong:
            # The variance that rounding adds grows with the square of the grid.
            grid *= 2
            added *= 4
            continue
        return EpsilonBound(found, fine=added <= FINE)


class _TooLong(Exception):
    """The composed losses reach over too many points of the grid."""


def _epsilon_in_direction(
    direction: Direction,
    events: Sequence[GaussianEvent],
    guarantee: tuple[float, float] | None,
    grid: float,
    delta: float,
    most: int,
) -> float:
    steps = []
    for event in events:
        steps.append((_step_losses(event, direction, grid, delta), event.steps))
    if guarantee is not None:
        steps.append((_dominating_losses(guarantee, grid), 1))
    return _composed_epsilon(steps, grid, delta, most)


# The grid -----------------------------------------------------------------------------------------


def _grid(events: Sequence[GaussianEvent], delta: float, points: int) -> tuple[float, float]:
    """Returns the grid, and by what share it raises the variance of the losses.

    The share is `ADDED_VARIANCE`, or more where `points` do not suffice for it. Rounding a loss to
    its two neighbours adds (loss - lower) * (upper - loss) to the variance: grid^2 / 6 on average,
    and at most |loss| * grid, since 0 lies on the grid.
    """
    import numpy as np

    # The losses are integrated over sums within 12 standard deviations of each of the two means.
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
    """Returns the largest grid from `low` to `high` with an `excess` of at most 0, else `low`."""
    if excess(high) <= 0:
        return high
    if excess(low) > 0:
        return low
    return safe_root(excess, unsafe=high, safe=low, rtol=1e-9)


def loss_span(event: GaussianEvent, delta: float = 1e-15) -> float:
    """Returns the length of the range that the losses of a step take on a grid for `delta`."""
    bottom, top = _loss_range(event, delta)
    return top - bottom


def _loss_range(event: GaussianEvent, delta: float) -> tuple[float, float]:
    """Returns the smallest and the largest finite loss on the grid.

    Losses beyond them cost `TAIL_SHARE` of delta in all steps together.
    """
    from scipy.special import ndtri

    q = event.sampling_prob
    z = event.noise_multiplier
    deviations = max(6.0, -float(ndtri(TAIL_SHARE * delta / event.steps / 4)))
    return float(_loss_at(-z * deviations, q, z)), float(_loss_at(1 + z * deviations, q, z))


def _loss_at(x: Any, q: float, z: float) -> Array:
    """Returns the privacy loss where the noised sum is `x`, for a clip norm of 1.

    It is log(1 - q + q e^((2x - 1) / (2 z^2))), the logarithm of the ratio of both densities.
    """
    import numpy as np

    exponent = (2 * np.asarray(x, float) - 1) / (2 * z * z)
    if q == 1:
        return exponent
    # The exact form overflows for large exponents, where 1 - q is too small to matter.
    near = np.log1p(q * np.expm1(np.minimum(exponent, 500.0)))
    return np.where(exponent < 500, near, math.log(q) + exponent)


def _sum_at(loss: Array, q: float, z: float) -> Array:
    """Returns the noised sum at which the loss is `loss`; -inf where every sum has a larger loss.

    The inverse of `_loss_at`.
    """
    import numpy as np

    if q == 1:
        return loss * z * z + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.log1p(np.expm1(np.minimum(loss, 40.0)) / q)
        exponent = np.where(loss < 40, near, loss - math.log(q))
    # A loss is never below log(1 - q): there the logarithm is that of a negative number.
    return np.where(np.isnan(exponent), -np.inf, exponent * z * z + 0.5)


# One step -----------------------------------------------------------------------------------------


# Two entries: both directions of the same step.
@lru_cache(maxsize=2)
def _step_losses(
    event: GaussianEvent, direction: Direction, grid: float, delta: float
) -> LossDistribution:
    """Returns the losses of one step on the grid.

    The losses between two grid points are those of an interval of noised sums, which has a
    probability under each data set. "Connect the dots" moves the first data set's probability to
    the two grid points such that the second one's stays the same as well. What rounding makes
    uncertain goes to the upper point, which can only raise epsilon.
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
    """Returns the probability of each of `losses`, and of an infinite one, if the unit is there.

    The sums have density (1 - q) N(0, z^2) + q N(1, z^2).
    """
    import numpy as np
    from scipy.special import ndtr

    without, without_error = _between(edges / z)
    with_unit, with_error = _between((edges - 1) / z)
    at = losses[:-1]
    lower = np.expm1(np.clip(at, -LARGE_LOSS, LARGE_LOSS))
    probability = (1 - q) * without + q * with_unit
    # The probability less the other data set's times e^loss. Both nearly cancel, so the common term
    # is subtracted explicitly.
    excess = q * (with_unit - without) - without * lower
    error = q * (with_error + without_error) + without_error * np.abs(lower)
    up = _upper_part(probability, excess + error, grid, small=np.abs(at) < LARGE_LOSS)

    probabilities = np.zeros(len(losses))
    probabilities[1:] += up
    probabilities[:-1] += probability - up
    # Smaller losses than the first one are counted as the first one.
    first = float(edges[0])
    probabilities[0] += (1 - q) * ndtr(first / z) + q * ndtr((first - 1) / z)
    # Larger losses than the last one are counted as infinite.
    last = float(edges[-1])
    infinite = (1 - q) * ndtr(-last / z) + q * ndtr((1 - last) / z)
    return probabilities, float(infinite)


def _probabilities_add(
    losses: Array, edges: Array, q: float, z: float, grid: float
) -> tuple[Array, float]:
    """Returns the probability of minus each of `losses`, and of an infinite one, if it is not.

    The sums have density N(0, z^2), and the loss has the opposite sign.
    """
    import numpy as np
    from scipy.special import ndtr

    without, without_error = _between(edges / z)
    with_unit, with_error = _between((edges - 1) / z)
    # The upper point of an interval is that of its smaller sums.
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

    # Each difference is taken in the nearer tail: there both numbers are small, and so is the
    # rounding error of their difference.
    upper = edges[:-1] > 0
    low = ndtr(np.where(upper, -edges[1:], edges[:-1]))
    high = ndtr(np.where(upper, -edges[:-1], edges[1:]))
    return np.maximum(high - low, 0.0), 8 * ROUNDING * high


def _upper_part(probability: Array, excess: Array, grid: float, *, small: Array) -> Array:
    """Returns what part of each interval's probability goes to its upper grid point.

    All of it where a loss is not `small`, since its exponential would overflow.
    """
    import numpy as np

    part = np.clip(excess / -math.expm1(-grid), 0.0, probability)
    return np.where(small, part, probability)


def _dominating_losses(guarantee: tuple[float, float], grid: float) -> LossDistribution:
    """Returns the losses that dominate all mechanisms with this (epsilon, delta).

    Kairouz, Oh & Viswanath 2015 (arXiv:1311.0776): randomized response that fails with probability
    delta.
    """
    import numpy as np

    bound, failing = guarantee
    # Both losses are rounded up, which dominates.
    high = math.ceil(bound / grid)
    low = math.ceil(-bound / grid)
    probabilities = np.zeros(high - low + 1)
    if bound < MAX_EXPONENT:
        probabilities[0] += (1 - failing) / (1 + math.exp(bound))
    probabilities[-1] += (1 - failing) / (1 + math.exp(-bound))
    with np.errstate(divide="ignore"):
        return LossDistribution(low, np.log(probabilities), failing)


# All steps ----------------------------------------------------------------------------------------


def _composed_epsilon(steps: Steps, grid: float, delta: float, most: int) -> float:
    """Returns the epsilon of all `steps`, in one direction.

    Raises:
        _TooLong: if that would take more than `most` points of the grid.
    """
    log_finite = 0.0
    for losses, times in steps:
        log_finite += times * math.log1p(-losses.infinite)
    infinite = -math.expm1(log_finite)
    remaining = (1 - 2 * TAIL_SHARE) * delta - infinite
    if remaining <= 0:
        return math.inf

    def log_moment(tilt: float) -> float:
        return sum(times * losses.log_moment(tilt, grid) for losses, times in steps)

    # By Chernoff's bound, the sum of losses is above (log_moment + log_tail) / tilt with a
    # probability of at most TAIL_SHARE * delta. The best tilt makes that point smallest.
    log_tail = math.log(1 / (TAIL_SHARE * delta))
    tilt = _minimize(lambda t: (log_moment(t) + log_tail) / t, 1 / grid, most=30 / grid)
    composition = _Composition(steps, log_moment, grid, log_tail, remaining, most)
    found, inexact = composition.epsilon(tilt)
    if not inexact:
        return found

    # The answer lies so far below the tilted losses that rounding errors are larger than delta
    # there. A smaller tilt keeps all rounding errors small.
    allowed = math.log(1e-3 * remaining / _rounding_error(steps))
    if allowed > 0:
        while log_moment(tilt) > allowed:
            tilt /= 2
    else:
        tilt = _minimize(lambda t: log_moment(t) - t * found / 2, tilt, most=30 / grid)
    try:
        again, _ = composition.epsilon(tilt)
    except _TooLong:
        # The first answer is an upper bound, with its rounding errors counted.
        return found
    return min(found, again)


def _rounding_error(steps: Steps) -> float:
    """Returns how far rounding can move a tilted probability.

    Each step multiplies the error of the transform; 32 covers the transform itself.
    """
    return ROUNDING * (sum(times for _, times in steps) + 32)


@dataclass(frozen=True)
class _Composition:
    """The sum of the losses of all steps, computed on a circle of grid points.

    Attributes:
        steps: losses of each step, and how many such steps there are.
        log_moment: tilt -> log E[e^(tilt * sum of losses)].
        grid: distance of two losses.
        log_tail: minus the logarithm of the probability that a tail may have.
        remaining: delta that is left for the finite losses.
        most: most points of the circle.
    """

    steps: Steps
    log_moment: Callable[[float], float]
    grid: float
    log_tail: float
    remaining: float
    most: int

    def epsilon(self, tilt: float) -> tuple[float, bool]:
        """Returns the smallest epsilon whose delta is at most `remaining`.

        The second value says whether rounding errors are more than 0.1% of that delta.

        Raises:
            _TooLong: if that would take more than `most` points.
        """
        moment = self.log_moment(tilt)
        last = math.ceil((moment + self.log_tail) / tilt / self.grid)
        size = self._size(tilt, moment, max(0.0, (moment - 3) / tilt))
        while size <= self.most:
            answer = self._epsilon_on_circle(tilt, moment, last, size)
            if answer is None:
                size *= 2
                continue
            # The size was chosen for a guess at epsilon: check it with the epsilon found.
            needed = self._size(tilt, moment, answer[0])
            if needed <= 1.05 * size:
                return answer
            size = min(needed, 4 * size)
        raise _TooLong

    def _size(self, tilt: float, moment: float, lowest: float) -> int:
        """Returns the points of a circle on which wrapped sums cost next to nothing.

        Sums below the circle wrap around to its upper end, where they are weighted
        e^(-tilt * length): a length of log_tail / tilt is enough, and so is one that no sum falls
        below except with a probability of `TAIL_SHARE` * delta (Chernoff). Sums above the circle
        wrap around to its lower end with a weight of e^(tilt * length), and matter from the loss
        `lowest` on.
        """
        from scipy import fft

        high = (moment + self.log_tail) / tilt
        below = self.log_tail / tilt
        for downward in (1.0, 10.0, 100.0, 1e3, 1e4, 1e5):
            tail = max(0.0, self.log_moment(-downward) + self.log_tail) / downward
            below = min(below, high + tail)
        above = math.inf
        for factor in HIGHER_TILTS:
            tail = self.log_moment(factor * tilt) - factor * tilt * lowest + self.log_tail
            above = min(above, tail / ((factor - 1) * tilt))
        length = max(below, above, high - lowest)
        # 64 points more than needed: grid points are rounded several times.
        return int(fft.next_fast_len(math.ceil(length / self.grid) + 64, real=True))

    def _epsilon_on_circle(
        self, tilt: float, moment: float, last: int, size: int
    ) -> tuple[float, bool] | None:
        """Returns `epsilon` from a circle of `size` points that ends at the grid point `last`.

        None if epsilon lies below the circle.
        """
        import numpy as np

        first = last - size + 1
        at = np.arange(first, last + 1) * self.grid
        tilted = self._tilted_sum(tilt, first, size)
        weights = tilted * np.exp(np.minimum(moment - tilt * at, MAX_EXPONENT))
        rounding = _rounding_error(self.steps)

        def error(epsilon: float) -> float:
            return rounding * math.exp(min(moment - tilt * epsilon, MAX_EXPONENT))

        def delta_at(index: int) -> float:
            above = slice(index + 1, None)
            exact = float(np.dot(weights[above], -np.expm1(at[index] - at[above])))
            return exact + error(at[index])

        low = max(0, -first)
        high = size - 1
        if low >= high:
            return 0.0, False
        if delta_at(low) <= self.remaining:
            return (0.0, False) if first <= 0 else None
        inner = range(low + 1, high)
        high = low + 1 + bisect_left(inner, True, key=lambda i: delta_at(i) <= self.remaining)
        low = high - 1

        # Between two grid points, delta falls as a line in e^epsilon.
        above = delta_at(low)
        below = delta_at(high)
        share = (above - self.remaining) / (above - below) if above > below else 1.0
        # On a grid of 1 or more the exponential might overflow: the upper point is safe.
        inside = math.log1p(share * math.expm1(self.grid)) if self.grid < 1 else self.grid
        return float(at[low]) + inside, error(at[low]) > 1e-3 * self.remaining

    def _tilted_sum(self, tilt: float, first: int, size: int) -> Array:
        """Returns the tilted probabilities of the sum of losses, from grid point `first` on."""
        import numpy as np
        from scipy import fft

        log_transform = np.zeros(size // 2 + 1, complex)
        mean = 0
        for losses, times in self.steps:
            spectrum, step_mean = losses.transform(tilt, self.grid, size)
            log_transform += times * spectrum
            mean += times * step_mean
        centred = fft.irfft(np.exp(log_transform), size)
        # Rounding gives tiny negative probabilities.
        probabilities: Array = np.maximum(np.roll(centred, mean - first), 0.0)
        return probabilities


def _minimize(value: Callable[[float], float], start: float, *, most: float) -> float:
    """Returns about where a function on (0, `most`] with one minimum is least.

    Golden-section search in the logarithm. The tilt need not be exact: any gives an upper bound.
    """
    ratio = (math.sqrt(5) - 1) / 2
    middle = start
    at_middle = value(start)
    width = 8.0
    for factor in (1 / width, width):
        while 1e-9 * most < middle * factor <= most:
            at_next = value(middle * factor)
            if at_next >= at_middle:
                break
            middle *= factor
            at_middle = at_next

    low = math.log(middle / width)
    high = math.log(min(middle * width, most))
    left = high - ratio * (high - low)
    right = low + ratio * (high - low)
    at_left = value(math.exp(left))
    at_right = value(math.exp(right))
    # Ten turns narrow the range to a few percent.
    for _ in range(10):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = value(math.exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = value(math.exp(right))
    return math.exp((low + high) / 2)
