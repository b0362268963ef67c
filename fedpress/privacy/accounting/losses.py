"""An upper bound on the epsilon of Gaussian phases in bounded time and memory, however rare the samples are.

A step's privacy loss is put on a grid so that the result dominates the step ("connect the dots", Doroshenko et al.
2022, arXiv:2207.04380). All steps are composed by one Fourier transform of tilted losses: each chance is first weighted
by e^(tilt * loss), so that rounding errors are relative to delta and not to 1 (the idea of saddle-point accounting,
Alghamdi et al. 2023, arXiv:2208.09595). A grid that had to be coarse makes the answer larger, never too small.
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
"""Whether the unit is in the first world (`remove`) or in the second one (`add`); neither is always the worse."""

POINTS = 1 << 20
"""Points of all grids together: an answer takes about a second and 200 MB."""
ADDED = 2e-4
"""Share by which the grid may raise the variance of the losses; epsilon rises by half of that."""
FINE = 0.01
"""A grid that raises the variance by more than this gives an answer that is said to be an upper bound."""
SPARED = 1e-4
"""Share of delta that each tail left out may cost."""
HIGHER = (1.1, 1.3, 1.7, 2.5, 4.0)
"""Multiples of the tilt whose bounds on the upper tail are tried."""
LARGE = 600.0
"""Losses beyond this, whose exponential might overflow, go to the upper end of their interval."""
ROUNDING = 4e-16
"""Relative error of one operation in double precision, doubled."""


@dataclass(frozen=True)
class Bound:
    """An epsilon that is never below the truth; `fine` says whether the grid was as fine as it should be."""

    epsilon: float
    fine: bool


@dataclass(frozen=True)
class Losses:
    """One step's losses: the chance of (first + i) * grid is e^logs[i]; `lost` that of an infinite loss."""

    first: int
    logs: Array
    lost: float

    def log_moment(self, tilt: float, grid: float) -> float:
        """Returns log E[e^(tilt * loss)] over the finite losses."""
        exponents, top = self._tilted(tilt, grid)
        return top + math.log(float(exponents.sum()))

    def transform(self, tilt: float, grid: float, size: int) -> tuple[Array, int]:
        """Returns log of the Fourier transform of the tilted losses on a circle of `size` points, and their middle.

        The middle stands at the circle's point 0: phases stay small, and with them the rounding errors of a power.
        """
        import numpy as np
        from scipy import fft

        tilted, _ = self._tilted(tilt, grid)
        tilted /= tilted.sum()
        middle = int(np.dot(tilted, np.arange(len(tilted), dtype=float)))
        start = -middle % size
        padded = np.zeros(-(-(start + len(tilted)) // size) * size)
        padded[start : start + len(tilted)] = tilted
        circle = padded.reshape(-1, size).sum(axis=0)
        with np.errstate(divide="ignore"):
            return np.log(fft.rfft(circle)), self.first + middle

    def _tilted(self, tilt: float, grid: float) -> tuple[Array, float]:
        import numpy as np

        exponents = np.arange(self.first, self.first + len(self.logs), dtype=float)
        exponents *= tilt * grid
        exponents += self.logs
        top = float(exponents.max())
        exponents -= top
        return np.exp(exponents, out=exponents), top


Steps = Sequence[tuple[Losses, int]]
"""Losses of one step, and how many such steps there are."""


def epsilon(
    phases: Sequence[GaussianEvent],
    *,
    delta: float,
    promise: tuple[float, float] | None = None,
    points: int = POINTS,
) -> Bound:
    """Returns an upper bound on what Gaussian `phases` spend together at `delta`.

    Args:
        phases: at least one, each with steps and with finite noise above 0.
        delta: chance with which the promise may fail.
        promise: (epsilon, delta) of one more mechanism, of which nothing else is known.
        points: of the grids; more take more time and give a smaller bound where samples are rare and noise is low.

    >>> round(epsilon([GaussianEvent(0.01, 1.0, 100)], delta=1e-5).epsilon, 2)
    0.72
    """
    # Every phase is transformed by itself: many phases share the time of a few.
    points = max(1 << 12, 4 * points // max(4, len(phases)))
    grid, added = _grid(phases, delta, points)
    while True:
        if promise is not None and promise[0] > points * grid:
            return Bound(math.inf, fine=False)
        try:
            found = max(
                _one_way(way, phases, promise, grid, delta, 2 * points) for way in ("remove", "add")
            )
        except _TooLong:
            grid, added = 2 * grid, 4 * added
            continue
        return Bound(found, fine=added <= FINE)


class _TooLong(Exception):
    """The composed losses reach over too many points of the grid."""


def _one_way(
    way: Direction,
    phases: Sequence[GaussianEvent],
    promise: tuple[float, float] | None,
    grid: float,
    delta: float,
    most: int,
) -> float:
    steps = [(_step(phase, way, grid, delta), phase.steps) for phase in phases]
    if promise is not None:
        steps.append((_worst(promise, grid), 1))
    return _composed(steps, grid, delta, most)


# The grid ------------------------------------------------------------------------------------------------------------


def _grid(phases: Sequence[GaussianEvent], delta: float, points: int) -> tuple[float, float]:
    """Returns the grid, and by what share it raises the variance of the losses: `ADDED`, or more for want of points.

    Rounding a loss to its two neighbours adds (loss - lower) * (upper - loss) to the variance: grid^2 / 6 on average,
    and at most |loss| * grid, since 0 lies on the grid.
    """
    import numpy as np

    nodes = np.linspace(-12, 12, 4001)
    density = np.exp(-(nodes**2) / 2)
    density /= density.sum()
    sizes, weights = [], []
    for phase in phases:
        q, z = phase.sampling_prob, phase.noise_multiplier
        for centre, part in ((0.0, 1 - q), (1.0, q)):
            sizes.append(np.abs(_loss_at(centre + z * nodes, q, z)))
            weights.append(phase.steps * part * density)
    size, weight = np.concatenate(sizes), np.concatenate(weights)
    variance = float(np.sum(weight * size**2))

    def added(grid: float) -> float:
        return float(np.sum(weight * np.minimum(size * grid, grid**2 / 6))) / variance

    low, high = 1e-3 * math.sqrt(variance / float(weight.sum())), float(size.max())
    least = sum(span(phase, delta) for phase in phases) / points
    grid = max(least, _widest(lambda grid: math.log(added(grid) / ADDED), low, high))
    return grid, added(grid)


def _widest(excess: Callable[[float], float], low: float, high: float) -> float:
    """Returns the largest grid from `low` to `high` with an `excess` of at most 0; `low` if there is none."""
    if excess(high) <= 0:
        return high
    if excess(low) > 0:
        return low
    return safe_root(excess, unsafe=high, safe=low, rtol=1e-9)


def span(phase: GaussianEvent, delta: float = 1e-15) -> float:
    """Returns the distance between the smallest and the largest loss of a step that count at `delta`."""
    bottom, top = _reach(phase, delta)
    return top - bottom


def _reach(phase: GaussianEvent, delta: float) -> tuple[float, float]:
    """Returns the smallest and the largest loss on the grid; what lies beyond costs `SPARED` of delta in all steps."""
    from scipy.special import ndtri

    q, z = phase.sampling_prob, phase.noise_multiplier
    far = max(6.0, -float(ndtri(SPARED * delta / phase.steps / 4)))
    return float(_loss_at(-z * far, q, z)), float(_loss_at(1 + z * far, q, z))


def _loss_at(x: Any, q: float, z: float) -> Array:
    """Returns log(1 - q + q e^((2x - 1) / (2 z^2))): the loss where the noised sum is `x`, for a clip norm of 1."""
    import numpy as np

    exponent = (2 * np.asarray(x, float) - 1) / (2 * z * z)
    if q == 1:
        return exponent
    near = np.log1p(q * np.expm1(np.minimum(exponent, 500.0)))
    return np.where(exponent < 500, near, math.log(q) + exponent)


def _sum_at(loss: Array, q: float, z: float) -> Array:
    """Returns the sum at which the loss is `loss`, the inverse of `_loss_at`; -inf where no sum has so small a loss."""
    import numpy as np

    if q == 1:
        return loss * z * z + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.log1p(np.expm1(np.minimum(loss, 40.0)) / q)
        exponent = np.where(loss < 40, near, loss - math.log(q))
    return np.where(np.isnan(exponent), -np.inf, exponent * z * z + 0.5)


# One step ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _step(phase: GaussianEvent, way: Direction, grid: float, delta: float) -> Losses:
    """Returns the losses of one step on the grid.

    Between two grid points lies an interval of sums, with a chance in each world. The first world's chance is moved to
    the two points so that the second world's chance stays as well: that is "connect the dots". What rounding makes
    uncertain goes to the upper point, which can only raise epsilon.
    """
    import numpy as np
    from scipy.special import ndtr

    q, z = phase.sampling_prob, phase.noise_multiplier
    bottom, top = _reach(phase, delta)
    ends = np.arange(math.floor(bottom / grid), math.ceil(top / grid) + 1)
    edges = _sum_at(ends * grid, q, z)
    out, out_error = _between(
        edges / z
    )  # the chance of each interval without the unit's clipped vector in the sum
    own, own_error = _between((edges - 1) / z)  # and with it
    first, last = float(edges[0]), float(edges[-1])
    chances = np.zeros(len(ends))
    if way == "remove":
        # Chance less the other world's times e^loss: terms that nearly cancel are taken off by hand.
        at = ends[:-1] * grid
        lower = np.expm1(np.clip(at, -LARGE, LARGE))
        chance = (1 - q) * out + q * own
        excess = q * (own - out) - out * lower
        error = q * (own_error + out_error) + out_error * np.abs(lower)
        up = np.where(np.abs(at) < LARGE, _upper_part(chance, excess + error, grid), chance)
        chances[1:] += up
        chances[:-1] += chance - up
        chances[0] += (1 - q) * ndtr(first / z) + q * ndtr(
            (first - 1) / z
        )  # smaller losses count as this one
        lost = (1 - q) * ndtr(-last / z) + q * ndtr((1 - last) / z)
        start = int(ends[0])
    else:
        # The loss has the other sign here, so the upper point of an interval is that of its smaller sums.
        at = ends[1:] * grid
        lower = -np.expm1(np.clip(-at, -LARGE, LARGE))
        excess = out * lower - q * (own - out) * (1 - lower)
        error = out_error * np.abs(lower) + q * (own_error + out_error) * (1 - lower)
        up = np.where(np.abs(at) < LARGE, _upper_part(out, excess + error, grid), out)
        chances[:-1] += up
        chances[1:] += out - up
        chances[-1] += ndtr(-last / z)
        chances, lost = chances[::-1], ndtr(first / z)
        start = -int(ends[-1])
    with np.errstate(divide="ignore"):
        return Losses(start, np.log(chances), float(lost))


def _between(edges: Array) -> tuple[Array, Array]:
    """Returns the standard normal chance between neighbours of `edges`, and a bound on its error."""
    import numpy as np
    from scipy.special import ndtr

    # Each difference is taken in the nearer tail, where both numbers are small.
    upper = edges[:-1] > 0
    low = ndtr(np.where(upper, -edges[1:], edges[:-1]))
    high = ndtr(np.where(upper, -edges[:-1], edges[1:]))
    return np.maximum(high - low, 0.0), 8 * ROUNDING * high


def _upper_part(chance: Array, excess: Array, grid: float) -> Array:
    import numpy as np

    return np.clip(excess / -math.expm1(-grid), 0.0, chance)


def _worst(promise: tuple[float, float], grid: float) -> Losses:
    """Returns the losses that dominate all mechanisms with the same promise (Kairouz, Oh & Viswanath 2015)."""
    import numpy as np

    bound, lost = promise
    high, low = math.ceil(bound / grid), math.ceil(-bound / grid)
    chances = np.zeros(high - low + 1)
    chances[0] += (1 - lost) / (1 + math.exp(bound)) if bound < 700 else 0.0
    chances[-1] += (1 - lost) / (1 + math.exp(-bound))
    with np.errstate(divide="ignore"):
        return Losses(low, np.log(chances), lost)


# All steps -----------------------------------------------------------------------------------------------------------


def _composed(steps: Steps, grid: float, delta: float, most: int) -> float:
    """Returns the epsilon of all `steps`, in one direction."""
    lost = -math.expm1(sum(times * math.log1p(-losses.lost) for losses, times in steps))
    left = (1 - 2 * SPARED) * delta - lost
    if left <= 0:
        return math.inf

    def log_moment(tilt: float) -> float:
        return sum(times * losses.log_moment(tilt, grid) for losses, times in steps)

    far = math.log(1 / (SPARED * delta))
    # A sum passes (log_moment + far) / tilt with a chance of at most `SPARED` * delta, by the bound of Chernoff.
    tilt = _least(lambda t: (log_moment(t) + far) / t, 1 / grid, most=30 / grid)
    found, noisy = _tilted_answer(steps, tilt, log_moment, grid, far, left, most)
    if not noisy:
        return found
    # An answer that lies far below the tilted losses is drowned in rounding errors: tilt so little that none can be.
    allowed = math.log(1e-3 * left / _doubt(steps))
    if allowed > 0:
        while log_moment(tilt) > allowed:
            tilt /= 2
    else:
        tilt = _least(lambda t: log_moment(t) - t * found / 2, tilt, most=30 / grid)
    try:
        again, _ = _tilted_answer(steps, tilt, log_moment, grid, far, left, most)
    except _TooLong:
        return found  # it holds as it is
    return min(found, again)


def _doubt(steps: Steps) -> float:
    """Returns how far rounding can move a tilted chance: a power multiplies the error of its base."""
    return ROUNDING * (sum(times for _, times in steps) + 32)


def _tilted_answer(
    steps: Steps,
    tilt: float,
    log_moment: Callable[[float], float],
    grid: float,
    far: float,
    left: float,
    most: int,
) -> tuple[float, bool]:
    """Returns the smallest epsilon whose delta is at most `left`, and whether rounding errors show in it."""
    moment = log_moment(tilt)
    last = math.ceil((moment + far) / tilt / grid)
    size = _length(log_moment, tilt, moment, max(0.0, (moment - 3) / tilt), grid, far)
    while size <= most:
        answer = _answer(steps, tilt, moment, grid, last, size, left)
        if answer is None:
            size *= 2
            continue
        # The length was right for a guess at the answer: measure it by the answer itself.
        needed = _length(log_moment, tilt, moment, answer[0], grid, far)
        if needed <= 1.05 * size:
            return answer
        size = min(needed, 4 * size)
    raise _TooLong


def _length(
    log_moment: Callable[[float], float],
    tilt: float,
    moment: float,
    counted: float,
    grid: float,
    far: float,
) -> int:
    """Returns the points of a circle on which sums that come round to the wrong end cost next to nothing.

    Sums below the circle come round to its upper end, where they are weighted e^(-tilt * length): `far` / tilt is
    enough, and so is a length that no sum falls below, but with a chance of `SPARED` * delta (Chernoff). Sums above the
    circle's end come round with a weight of e^(tilt * length), and count where they reach `counted`.
    """
    from scipy import fft

    high = (moment + far) / tilt
    below = far / tilt
    for downward in (1.0, 10.0, 100.0, 1e3, 1e4, 1e5):
        below = min(below, high + max(0.0, log_moment(-downward) + far) / downward)
    above = min(
        (log_moment(more * tilt) - more * tilt * counted + far) / ((more - 1) * tilt)
        for more in HIGHER
    )
    return int(
        fft.next_fast_len(math.ceil(max(below, above, high - counted) / grid) + 64, real=True)
    )


def _answer(
    steps: Steps, tilt: float, moment: float, grid: float, last: int, size: int, left: float
) -> tuple[float, bool] | None:
    """Returns the smallest epsilon whose delta is at most `left`, and whether rounding errors show in it.

    None if it lies below the circle, which ends at the grid point `last`.
    """
    import numpy as np
    from scipy import fft

    power, middle = np.zeros(size // 2 + 1, complex), 0
    for losses, times in steps:
        spectrum, own = losses.transform(tilt, grid, size)
        power += times * spectrum
        middle += times * own
    tilted = fft.irfft(np.exp(power), size)
    first = last - size + 1
    tilted = np.maximum(np.roll(tilted, middle - first), 0.0)
    at = np.arange(first, last + 1) * grid
    doubt = _doubt(steps)
    weights = tilted * np.exp(np.minimum(moment - tilt * at, 700.0))

    def error(epsilon: float) -> float:
        return doubt * math.exp(min(moment - tilt * epsilon, 700.0))

    def spent(index: int) -> float:
        """Returns delta at the grid point `index`."""
        above = slice(index + 1, None)
        return float(np.dot(weights[above], -np.expm1(at[index] - at[above]))) + error(at[index])

    low, high = max(0, -first), size - 1
    if low >= high:
        return 0.0, False
    if spent(low) <= left:
        return (0.0, False) if first <= 0 else None
    inner = range(low + 1, high)
    high = low + 1 + bisect_left(inner, True, key=lambda index: spent(index) <= left)
    low = high - 1
    # Between the points, delta falls from spent(low) to spent(high) as a line in e^epsilon.
    above, below = spent(low), spent(high)
    share = (above - left) / (above - below) if above > below else 1.0
    inside = math.log1p(share * math.expm1(grid)) if grid < 1 else grid
    return float(at[low]) + inside, error(at[low]) > 1e-3 * left


def _least(value: Callable[[float], float], start: float, *, most: float) -> float:
    """Returns about where a function on (0, `most`] with one dip is least, by the golden section in the logarithm."""
    ratio = (math.sqrt(5) - 1) / 2
    middle, at_middle = start, value(start)
    width = 8.0
    for factor in (1 / width, width):
        while 1e-9 * most < middle * factor <= most:
            at_next = value(middle * factor)
            if at_next >= at_middle:
                break
            middle, at_middle = middle * factor, at_next
    low, high = math.log(middle / width), math.log(min(middle * width, most))
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = value(math.exp(left)), value(math.exp(right))
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
