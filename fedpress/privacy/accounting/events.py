"""What the accountant counts: mechanisms and their steps, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from fedpress.errors import RecipeError

LEAST_DELTA = 1e-200
MOST_STEPS = 10**10


@dataclass(frozen=True, order=True)
class GaussianEvent:
    """`steps` noised sums, each over a Poisson sample of the units with probability `sampling_prob`.

    `noise_multiplier` is the noise's standard deviation divided by the clip norm.
    """

    sampling_prob: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_sampling_prob(self.sampling_prob)
        if not self.noise_multiplier >= 0:
            raise RecipeError(
                f"got {self.noise_multiplier}, expected a number >= 0", place="noise_multiplier"
            )
        _check_steps(self.steps)

    def covers(self, other: GaussianEvent) -> bool:
        """Says whether this phase spends at least as much as `other`, number by number."""
        return (
            self.sampling_prob >= other.sampling_prob
            and self.noise_multiplier <= other.noise_multiplier
            and self.steps >= other.steps
        )


@dataclass(frozen=True, order=True)
class SkellamEvent:
    """`steps` sums of whole numbers with Skellam noise, each over a Poisson sample of the units.

    Attributes:
        l2: L2 norm by which one unit can move the sum, in units of the grid, rounding included.
        l1: the same in L1 norm.
        variance: of the noise on each value of the sum.
        steps: how many sums.
        sampling_prob: probability with which each unit takes part.
        failure: chance with which, in one step, `l2` does not hold; it is taken off delta.
    """

    l2: float
    l1: float
    variance: float
    steps: int
    sampling_prob: float = 1.0
    failure: float = 0.0

    def __post_init__(self) -> None:
        check_sampling_prob(self.sampling_prob)
        _check_steps(self.steps)
        for name in ("l2", "l1", "variance"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(
                    f"got {getattr(self, name)}, expected a finite number above 0", place=name
                )
        if not 0 <= self.failure < 1:
            raise RecipeError(
                f"got {self.failure}, expected a chance of 0 or more, far below delta",
                place="failure",
            )

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise divided by the sensitivity after rounding."""
        return math.sqrt(self.variance) / self.l2

    def covers(self, other: SkellamEvent) -> bool:
        """Says whether this phase spends at least as much as `other`, number by number."""
        more = ("l2", "l1", "steps", "sampling_prob", "failure")
        return self.variance <= other.variance and all(
            getattr(self, n) >= getattr(other, n) for n in more
        )


MechanismEvent = GaussianEvent | SkellamEvent

P = TypeVar("P", GaussianEvent, SkellamEvent)


def merge(phases: Iterable[MechanismEvent]) -> tuple[MechanismEvent, ...]:
    """Joins phases of the same mechanism and drops those without a step: the order of steps costs nothing.

    Gaussian phases come first.

    >>> merge([GaussianEvent(0.5, 1.0, 2), GaussianEvent(1.0, 3.0, 0), GaussianEvent(0.5, 1.0, 3)])
    (GaussianEvent(sampling_prob=0.5, noise_multiplier=1.0, steps=5),)
    """
    listed = list(phases)
    return (*_merged(gaussians(listed)), *_merged(skellams(listed)))


def gaussians(phases: Iterable[MechanismEvent]) -> tuple[GaussianEvent, ...]:
    """Returns the Gaussian ones of `phases`."""
    return tuple(p for p in phases if isinstance(p, GaussianEvent))


def skellams(phases: Iterable[MechanismEvent]) -> tuple[SkellamEvent, ...]:
    """Returns the Skellam ones of `phases`."""
    return tuple(p for p in phases if isinstance(p, SkellamEvent))


def _merged(phases: tuple[P, ...]) -> list[P]:
    found: dict[tuple[float, ...], P] = {}
    for phase in phases:
        kind = tuple(
            float(getattr(phase, field.name)) for field in fields(phase) if field.name != "steps"
        )
        earlier = found.get(kind)
        steps = int(phase.steps) + (earlier.steps if earlier is not None else 0)
        found[kind] = replace(phase, steps=steps)
    return sorted(p for p in found.values() if p.steps)


def at_most(phases: tuple[GaussianEvent, ...], most: int) -> tuple[GaussianEvent, ...]:
    """Returns at most `most` merged phases that together spend at least as much as `phases`.

    Neighbours are joined: each sampling probability is rounded up and each noise down, by a factor that grows until few
    are left.

    >>> (one,) = at_most((GaussianEvent(0.1, 1.0, 2), GaussianEvent(0.1001, 1.0, 3)), 1)
    >>> round(one.sampling_prob, 3), one.noise_multiplier, one.steps
    (0.103, 1.0, 5)
    """
    steps = {(p.sampling_prob, p.noise_multiplier): p.steps for p in phases}
    if len(steps) <= most:
        return phases
    step = 0.01  # of the decimal logarithm: 2.3%
    while len(steps) > most:
        joined: dict[tuple[float, float], int] = {}
        for kind, times in steps.items():
            rounded = _spending_more(*kind, step)
            joined[rounded] = joined.get(rounded, 0) + times
        step *= 2 if len(joined) > 4 * most else 1.3
        steps = joined
    return tuple(
        sorted(GaussianEvent(prob, noise, times) for (prob, noise), times in steps.items())
    )


def _spending_more(prob: float, noise: float, step: float) -> tuple[float, float]:
    up = math.ceil(math.log10(prob) / step) * step
    down = math.floor(math.log10(noise) / step) * step
    # What rounding of the logarithms loses must not make a phase spend less.
    return min(1.0, max(prob, 10**up)), min(noise, 10**down)


def check_delta(delta: float) -> None:
    """Raises RecipeError unless `delta` is inside (0, 1)."""
    if not 0 < delta < 1:
        raise RecipeError(
            f"got {delta}, expected a number inside (0, 1), below one over the number of units",
            place="delta",
        )
    if delta < LEAST_DELTA:
        raise RecipeError(
            f"got {delta}, expected {LEAST_DELTA:g} or more, such as 1e-9", place="delta"
        )


def check_sampling_prob(sampling_prob: float) -> None:
    """Raises RecipeError unless `sampling_prob` is inside (0, 1]."""
    if not 0 < sampling_prob <= 1:
        raise RecipeError(
            f"got {sampling_prob}, expected a number inside (0, 1]",
            place="sampling_prob",
            cure="1 means everybody",
        )


def _check_steps(steps: float) -> None:
    if not 0 <= steps < math.inf or steps != int(steps):
        raise RecipeError(f"got {steps}, expected a whole number >= 0", place="steps")
    if steps > MOST_STEPS:
        raise RecipeError(f"got {steps}, expected {MOST_STEPS:,} or fewer", place="steps")
