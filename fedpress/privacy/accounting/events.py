"""Mechanism events, the input of the accountant: noised sums with their noise and sampling.

Example: `GaussianEvent(0.01, 1.0, 500)` stands for 500 steps of DP-SGD with sampling probability
0.01 and noise multiplier 1. A unit is what is protected: an example or a client.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from fedpress.errors import RecipeError

LEAST_DELTA = 1e-200
"""Smallest delta that is accepted: the accountant divides delta among steps and tails, and the
parts must not become 0 in double precision."""

MOST_STEPS = 10**10
"""Limit of the number of steps, far more than any training needs."""


@dataclass(frozen=True, order=True)
class GaussianEvent:
    """`steps` sums with Gaussian noise, each over a Poisson sample of the units.

    Attributes:
        sampling_prob: probability with which each unit takes part in a step.
        noise_multiplier: standard deviation of the noise / sensitivity.
        steps: number of sums.

    Raises:
        RecipeError: if a number is out of range.
    """

    sampling_prob: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        check_sampling_prob(self.sampling_prob)
        # `not >=` and not `<`, so that NaN is refused as well.
        if not self.noise_multiplier >= 0:
            raise RecipeError(
                f"got {self.noise_multiplier}, expected a number >= 0", place="noise_multiplier"
            )
        _check_steps(self.steps)

    def covers(self, other: GaussianEvent) -> bool:
        """Returns whether every field of this event spends at least as much as in `other`."""
        return (
            self.sampling_prob >= other.sampling_prob
            and self.noise_multiplier <= other.noise_multiplier
            and self.steps >= other.steps
        )


@dataclass(frozen=True, order=True)
class SkellamEvent:
    """`steps` sums of whole numbers with Skellam noise, each over a Poisson sample of the units.

    Attributes:
        l2: L2 sensitivity of the sum after rounding, in grid units: values are rounded to multiples
            of a grid unit, so that a sum is a whole number of units.
        l1: L1 sensitivity of the sum after rounding, in grid units.
        variance: variance of the noise on each value of the sum, in grid units squared.
        steps: number of sums.
        sampling_prob: probability with which each unit takes part in a step.
        failure: probability with which one unit moves the sum by more than `l2` in one step. The
            accountant subtracts it from delta.

    Raises:
        RecipeError: if a number is out of range.
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
                f"got {self.failure}, expected a probability >= 0, far below delta",
                place="failure",
            )

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise / L2 sensitivity after rounding."""
        return math.sqrt(self.variance) / self.l2

    def covers(self, other: SkellamEvent) -> bool:
        """Returns whether every field of this event spends at least as much as in `other`."""
        return (
            self.l2 >= other.l2
            and self.l1 >= other.l1
            and self.variance <= other.variance
            and self.steps >= other.steps
            and self.sampling_prob >= other.sampling_prob
            and self.failure >= other.failure
        )


MechanismEvent = GaussianEvent | SkellamEvent

# Binds argument and result of `_merged` to the same class.
Event = TypeVar("Event", GaussianEvent, SkellamEvent)


def merge(events: Iterable[MechanismEvent]) -> tuple[MechanismEvent, ...]:
    """Merges events with equal mechanisms into one event, and drops events without steps.

    Epsilon does not depend on the order of steps, so merging does not change epsilon. The result is
    sorted, with Gaussian events first.

    >>> merge([GaussianEvent(0.5, 1.0, 2), GaussianEvent(1.0, 3.0, 0), GaussianEvent(0.5, 1.0, 3)])
    (GaussianEvent(sampling_prob=0.5, noise_multiplier=1.0, steps=5),)
    """
    listed = list(events)
    return (*_merged(gaussians(listed)), *_merged(skellams(listed)))


def gaussians(events: Iterable[MechanismEvent]) -> tuple[GaussianEvent, ...]:
    """Returns the Gaussian events."""
    return tuple(event for event in events if isinstance(event, GaussianEvent))


def skellams(events: Iterable[MechanismEvent]) -> tuple[SkellamEvent, ...]:
    """Returns the Skellam events."""
    return tuple(event for event in events if isinstance(event, SkellamEvent))


def _merged(events: tuple[Event, ...]) -> list[Event]:
    found: dict[Event, int] = {}
    for event in events:
        mechanism = replace(event, steps=0)
        found[mechanism] = found.get(mechanism, 0) + int(event.steps)
    merged = []
    for mechanism, steps in found.items():
        if steps:
            merged.append(replace(mechanism, steps=steps))
    return sorted(merged)


def merge_similar(events: tuple[GaussianEvent, ...], most: int) -> tuple[GaussianEvent, ...]:
    """Returns at most `most` events that together spend at least as much as `events`.

    Sampling probabilities are rounded up and noise multipliers down on a logarithmic grid. The grid
    gets coarser until there are few enough different events. No two of the given events may have
    the same mechanism (see `merge`), and each has noise above 0.

    >>> events = (GaussianEvent(0.1, 1.0, 2), GaussianEvent(0.1001, 1.0, 3))
    >>> (one,) = merge_similar(events, 1)
    >>> round(one.sampling_prob, 3), one.noise_multiplier, one.steps
    (0.103, 1.0, 5)
    """
    steps = {(event.sampling_prob, event.noise_multiplier): event.steps for event in events}
    if len(steps) <= most:
        return events
    # 0.01 in the decimal logarithm is a step of 2.3%.
    grid = 0.01
    while len(steps) > most:
        merged: dict[tuple[float, float], int] = {}
        for (prob, noise), times in steps.items():
            rounded = _rounded_to_spend_more(prob, noise, grid)
            merged[rounded] = merged.get(rounded, 0) + times
        # The grid doubles while there are far too many events, to save time; then it grows slowly,
        # to lose less.
        grid *= 2 if len(merged) > 4 * most else 1.3
        steps = merged
    found = [GaussianEvent(prob, noise, times) for (prob, noise), times in steps.items()]
    return tuple(sorted(found))


def _rounded_to_spend_more(prob: float, noise: float, grid: float) -> tuple[float, float]:
    # More frequent sampling and less noise both spend more privacy.
    up = 10 ** (math.ceil(math.log10(prob) / grid) * grid)
    down = 10 ** (math.floor(math.log10(noise) / grid) * grid)
    # The logarithms have rounding errors, which must not make the event spend less.
    return min(1.0, max(prob, up)), min(noise, down)


def check_delta(delta: float) -> None:
    """Raises RecipeError unless `delta` is inside (0, 1) and at least `LEAST_DELTA`."""
    if not 0 < delta < 1:
        raise RecipeError(
            f"got {delta}, expected a number inside (0, 1), best below 1 / number of units",
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
            cure="1 means that all units take part",
        )


def _check_steps(steps: float) -> None:
    if not 0 <= steps < math.inf or steps != int(steps):
        raise RecipeError(f"got {steps}, expected a whole number >= 0", place="steps")
    if steps > MOST_STEPS:
        raise RecipeError(f"got {steps}, expected {MOST_STEPS:,} or fewer", place="steps")
