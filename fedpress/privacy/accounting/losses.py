"""Computes an upper bound on the epsilon of Gaussian events in limited time.

Each step's privacy loss is rounded to a grid (see `step_losses`). All steps are composed by one
Fourier transform of tilted losses: each probability is first weighted by e^(tilt * loss), so that
rounding errors are relative to delta instead of 1 (the idea of saddle-point accounting, Alghamdi et
al. 2023, arXiv:2208.09595). A coarser grid gives a larger bound; no bound is below the true value.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpress.privacy.accounting.events import GaussianEvent
from fedpress.privacy.accounting.step_losses import (
    MAX_EXPONENT,
    ROUNDING,
    TAIL_SHARE,
    Direction,
    LossDistribution,
    choose_grid,
    dominating_losses,
    losses_of_step,
)

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

POINTS = 1 << 20
"""Default number of grid points: with this many, a bound takes about a second and 200 MB."""

FINE = 0.01
"""If the grid raises the variance of the losses by more than this share, the bound is marked as
not fine."""

HIGHER_TILTS = (1.1, 1.3, 1.7, 2.5, 4.0)
"""Multiples of the tilt for which Chernoff's bound on the upper tail is tried."""


@dataclass(frozen=True)
class EpsilonBound:
    """An upper bound on the epsilon of some events.

    Attributes:
        epsilon: the bound, never below the true value.
        fine: whether the grid was fine enough for a tight bound.
    """

    epsilon: float
    fine: bool


Steps = Sequence[tuple[LossDistribution, int]]
"""For each event: the losses of one step, and the number of steps."""


def epsilon_bound(
    events: Sequence[GaussianEvent],
    *,
    delta: float,
    guarantee: tuple[float, float] | None = None,
    points: int = POINTS,
) -> EpsilonBound:
    """Returns an upper bound on the epsilon of all Gaussian `events` together at `delta`.

    Args:
        events: at least one event. Each has at least one step, and finite noise above 0.
        delta: probability with which the guarantee may fail.
        guarantee: (epsilon, delta) of one further mechanism, which is composed with `events`.
        points: approximate number of grid points that the losses of an event get; with more than
            four events, each gets fewer. More points take more time, and give a smaller bound for
            rare sampling and low noise.

    >>> round(epsilon_bound([GaussianEvent(0.01, 1.0, 100)], delta=1e-5).epsilon, 2)
    0.72
    """
    # Each event has its own transform, so with many events each gets fewer points.
    points = max(1 << 12, 4 * points // max(4, len(events)))
    grid, added = choose_grid(events, delta, points)
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
    """The range of the composed losses has too many grid points."""


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
        steps.append((losses_of_step(event, direction, grid, delta), event.steps))
    if guarantee is not None:
        steps.append((dominating_losses(guarantee, grid), 1))
    return _composed_epsilon(steps, grid, delta, most)


def _composed_epsilon(steps: Steps, grid: float, delta: float, most: int) -> float:
    """Returns the epsilon of all `steps` in one direction.

    Raises:
        _TooLong: if the range of losses needs more than `most` grid points.
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

    # By Chernoff's bound, the sum of losses exceeds (log_moment + log_tail) / tilt with probability
    # at most TAIL_SHARE * delta. The tilt is chosen to minimise that point.
    log_tail = math.log(1 / (TAIL_SHARE * delta))
    tilt = _minimize(lambda t: (log_moment(t) + log_tail) / t, 1 / grid, most=30 / grid)
    composition = _Composition(steps, log_moment, grid, log_tail, remaining, most)
    found, inexact = composition.epsilon(tilt)
    if not inexact:
        return found

    # Epsilon is so far below the tilted losses that rounding errors there exceed 0.1% of delta. A
    # smaller tilt keeps rounding errors small.
    allowed = math.log(1e-3 * remaining / _rounding_error(steps))
    if allowed > 0:
        while log_moment(tilt) > allowed:
            tilt /= 2
    else:
        tilt = _minimize(lambda t: log_moment(t) - t * found / 2, tilt, most=30 / grid)
    try:
        again, _ = composition.epsilon(tilt)
    except _TooLong:
        # The first result is a valid upper bound, because it includes its rounding errors.
        return found
    return min(found, again)


def _rounding_error(steps: Steps) -> float:
    """Returns a bound on the rounding error of a tilted probability.

    The bound grows with the number of steps; the constant 32 covers the Fourier transform.
    """
    return ROUNDING * (sum(times for _, times in steps) + 32)


@dataclass(frozen=True)
class _Composition:
    """The sum of the losses of all steps, by circular convolution on a range of grid points.

    Attributes:
        steps: for each event the losses of one step, and the number of steps.
        log_moment: tilt -> log E[e^(tilt * sum of losses)].
        grid: distance of two losses.
        log_tail: minus the logarithm of the allowed probability of a tail.
        remaining: delta for the finite losses.
        most: maximum number of points.
    """

    steps: Steps
    log_moment: Callable[[float], float]
    grid: float
    log_tail: float
    remaining: float
    most: int

    def epsilon(self, tilt: float) -> tuple[float, bool]:
        """Returns the smallest epsilon whose delta is at most `remaining`.

        The second value is whether rounding errors exceed 0.1% of `remaining`.

        Raises:
            _TooLong: if the range of losses needs more than `most` points.
        """
        moment = self.log_moment(tilt)
        last = math.ceil((moment + self.log_tail) / tilt / self.grid)
        size = self._size(tilt, moment, max(0.0, (moment - 3) / tilt))
        while size <= self.most:
            answer = self._epsilon_on_circle(tilt, moment, last, size)
            if answer is None:
                size *= 2
                continue
            # The size was chosen for a guess of epsilon, so it is checked with the result.
            needed = self._size(tilt, moment, answer[0])
            if needed <= 1.05 * size:
                return answer
            size = min(needed, 4 * size)
        raise _TooLong

    def _size(self, tilt: float, moment: float, lowest: float) -> int:
        """Returns a number of points for which sums that wrap around are negligible.

        Sums below the range wrap around to its upper end, with weight e^(-tilt * length). They are
        negligible if the length is at least log_tail / tilt; or if sums are below the range with
        probability at most `TAIL_SHARE` * delta (Chernoff's bound). Sums above the range wrap
        around to its lower end, with weight e^(tilt * length). They matter only if they land at
        `lowest` or above, where `lowest` is the smallest epsilon that is looked for.
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
        # 64 extra points, because grid points are rounded several times.
        return int(fft.next_fast_len(math.ceil(length / self.grid) + 64, real=True))

    def _epsilon_on_circle(
        self, tilt: float, moment: float, last: int, size: int
    ) -> tuple[float, bool] | None:
        """Computes the result of `epsilon` on `size` grid points; the last one has number `last`.

        Returns None if epsilon is below the range.
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

        # Between two grid points, delta is linear in e^epsilon.
        above = delta_at(low)
        below = delta_at(high)
        share = (above - self.remaining) / (above - below) if above > below else 1.0
        # On a grid of 1 or more the exponential might overflow, so the upper point is returned.
        inside = math.log1p(share * math.expm1(self.grid)) if self.grid < 1 else self.grid
        return float(at[low]) + inside, error(at[low]) > 1e-3 * self.remaining

    def _tilted_sum(self, tilt: float, first: int, size: int) -> Array:
        """Returns the tilted probabilities of the sum of losses, starting at grid point `first`."""
        import numpy as np
        from scipy import fft

        log_transform = np.zeros(size // 2 + 1, complex)
        mean = 0
        for losses, times in self.steps:
            spectrum, step_mean = losses.transform(tilt, self.grid, size)
            log_transform += times * spectrum
            mean += times * step_mean
        centred = fft.irfft(np.exp(log_transform), size)
        # Rounding may give tiny negative probabilities.
        probabilities: Array = np.maximum(np.roll(centred, mean - first), 0.0)
        return probabilities


def _minimize(value: Callable[[float], float], start: float, *, most: float) -> float:
    """Returns roughly where on (0, `most`] a function with a single minimum is smallest.

    Golden-section search in the logarithm. The tilt found need not be exact: any tilt gives a
    bound.
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
    # Ten iterations narrow the range to a few percent.
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
