"""The plan of distributed privacy: how wide the numbers of a secret sum are, how fine their grid, how much noise each.

Every client scales its clipped, rotated vector to a grid, clamps and rounds each value, adds Skellam noise and sends
the result modulo 2^bits; only the sum is seen (Agarwal, Kairouz & Liu 2021, arXiv:2110.04995). A finer grid makes
rounding cheaper and the sum larger, so bits buy privacy: the plan says how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting import accountant
from fedpress.privacy.accounting.events import GaussianEvent, SkellamEvent, check_delta
from fedpress.privacy.noise import skellam
from fedpress.privacy.roots import safe_root

Unit = Literal["sample", "client"]

BITS = range(8, 25)
"""Widths of a number in a secret sum that can be planned."""

ROOM = 0.9
"""Share of the half range that the sum may use: what passes its limit lands in the rest and is seen, not wrapped."""

OVERFLOW = 2.0**-30
"""Chance, at most, that in one round the noise carries any value of the sum beyond the limit."""

NEAR = 1.05
"""Bits are enough when epsilon is within this factor of what the noise alone would cost."""

MAX_NOISE = 1e3
"""Noise multipliers beyond this are not searched: nothing can be learned from such sums."""


@dataclass(frozen=True)
class Task:
    """What is to be summed, and by how many; see `plan` for the words."""

    size: int
    clip_norm: float
    coordinate_limit: float
    clients: int
    survivors: int
    steps: int
    delta: float
    unit: Unit = "client"
    sampling_prob: float = 1.0

    def __post_init__(self) -> None:
        for name in ("size", "clients", "survivors", "steps"):
            value = getattr(self, name)
            if value < 1 or value != int(value):
                raise RecipeError(f"got {value}, expected a whole number >= 1", place=name)
        for name in ("clip_norm", "coordinate_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(
                    f"got {getattr(self, name)}, expected a finite number above 0", place=name
                )
        if self.survivors > self.clients:
            raise RecipeError(
                f"got {self.survivors}, expected at most the {self.clients} clients",
                place="survivors",
            )
        if self.unit not in ("sample", "client"):
            raise RecipeError(f"got {self.unit!r}, expected 'sample' or 'client'", place="unit")
        check_delta(self.delta)
        GaussianEvent(self.sampling_prob, 1.0, 1)  # checks sampling_prob

    @property
    def failure(self) -> float:
        """Chance in one step that rounding is longer than its bound.

        A client rounds again until its own vector is short enough, so under unit "client" there is none. Under unit
        "sample" two neighbours are two sums x and x + D of one client, rounded with the same coins u: coordinate by
        coordinate floor(x + D + u) - floor(x + u) = floor(D + v), where v is the fraction of x + u, uniform again.
        So the difference is D, stochastically rounded: its bound holds but with chance beta, and is not up to anybody
        to enforce. The coins do not depend on data, so the pair is close for all other coins, and beta adds to delta.
        """
        return 0.0 if self.unit == "client" else self.delta / (1000 * self.steps)


@dataclass(frozen=True)
class Cost:
    """What numbers of `bits` cost: the epsilon of all steps (inf if the sum does not fit), and the grid."""

    bits: int
    epsilon: float
    scale: float


@dataclass(frozen=True)
class DistributedPlan:
    """A bound plan of distributed privacy; make it with `plan`, on server and clients alike.

    Attributes:
        task: what was asked.
        bits: the sum is taken modulo 2^bits.
        noise_multiplier: standard deviation of the noise of `survivors` clients / `clip_norm`.
        scale: grid units per unit of the vector.
        limit: no value of the sum is larger, but with chance 2^-30 a round; at most 0.9 * 2^(bits - 1).
    """

    task: Task
    bits: int
    noise_multiplier: float
    scale: float
    limit: float

    @property
    def variance(self) -> float:
        """Variance of one client's noise in grid units squared: `survivors` clients make all the noise planned."""
        return (self.noise_multiplier * self.scale * self.task.clip_norm) ** 2 / self.task.survivors

    @property
    def l2(self) -> float:
        """Sensitivity in grid units after rounding; under unit "client" a client rounds again until it is so short."""
        beta = self.task.failure or skellam.RETRY_BETA
        return skellam.rounded_sensitivity(self.scale * self.task.clip_norm, self.task.size, beta)

    @property
    def l1(self) -> float:
        """The same in L1 norm."""
        return skellam.l1_sensitivity(self.l2, self.task.size)

    @property
    def rounds_again(self) -> bool:
        """Whether a client draws its rounding again until the result is no longer than `l2`.

        Under unit "client" it must. Under unit "sample" it must not: two neighbouring sums could be short enough after
        different numbers of tries, with different coins, and then they are far apart.
        """
        return self.task.unit == "client"

    @property
    def coordinate_limit(self) -> float:
        """Each value is clamped to this many grid units before it is rounded."""
        return self.scale * self.task.coordinate_limit

    @property
    def epsilon(self) -> float:
        """What all planned steps spend at the task's delta."""
        return accountant.epsilon([self.phase(num_rounds=self.task.steps)], delta=self.task.delta)

    def phase(self, *, num_rounds: int) -> SkellamEvent:
        """Returns what `num_rounds` sums are to the accountant, with the noise of `survivors` clients."""
        t = self.task
        noise = self.variance * t.survivors
        return SkellamEvent(self.l2, self.l1, noise, num_rounds, t.sampling_prob, t.failure)

    def table(self) -> list[Cost]:
        """Returns what each number of bits would cost with the same noise."""
        return [_cost(self.task, bits, self.noise_multiplier) for bits in BITS]


def plan(
    *,
    size: int,
    clip_norm: float,
    coordinate_limit: float,
    clients: int,
    survivors: int,
    steps: int,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    bits: int | None = None,
    unit: Unit = "client",
    sampling_prob: float = 1.0,
) -> DistributedPlan:
    """Returns the plan with the finest grid that fits into `bits`, and the smallest noise that keeps `epsilon`.

    Args:
        size: number of values in the sum, after rotation.
        clip_norm: L2 norm by which one unit can move the sum, in units of the vector.
        coordinate_limit: each client clamps each rotated value to this; that stretches no distance.
        clients: the most that take part in a round.
        survivors: the fewest whose sum is opened; they alone must make the planned noise.
        steps: sums in the whole run.
        delta: chance with which the promise may fail.
        epsilon: budget of all steps; or give `noise_multiplier`.
        noise_multiplier: standard deviation of the survivors' noise / `clip_norm`; or give `epsilon`.
        bits: width of a number; the fewest whose epsilon is within 5% of the noise's own, unless given.
        unit: who is protected; "sample" means one clipped gradient inside one client's sum.
        sampling_prob: probability with which each unit takes part in a step.

    Raises:
        RecipeError: if an argument is out of range.
        PrivacyError: if the sum does not fit, or the budget cannot be kept; it names the fewest bits that would do.

    >>> p = plan(size=2**20, clip_norm=1.0, coordinate_limit=0.006, clients=10, survivors=10, steps=50, delta=1e-3,
    ...          noise_multiplier=5.0)
    >>> p.bits, round(p.epsilon, 2), p.limit <= 0.9 * 2 ** (p.bits - 1)
    (18, 5.6, True)
    """
    task = Task(
        size, clip_norm, coordinate_limit, clients, survivors, steps, delta, unit, sampling_prob
    )
    if (epsilon is None) == (noise_multiplier is None):
        raise RecipeError(
            "got both epsilon and noise_multiplier, or none, expected one of the two",
            place="epsilon",
            cure="give epsilon to have the noise calibrated, or noise_multiplier",
        )
    if bits is not None and bits not in BITS:
        raise RecipeError(f"got {bits}, expected {BITS.start} to {BITS.stop - 1}", place="bits")
    if noise_multiplier is not None:
        if not 0 < noise_multiplier <= MAX_NOISE:
            raise RecipeError(
                f"got {noise_multiplier}, expected a number in (0, {MAX_NOISE:g}]",
                place="noise_multiplier",
            )
        return _plan_with_noise(task, bits, noise_multiplier)
    assert epsilon is not None
    if not 0 < epsilon < math.inf:
        raise RecipeError(
            f"got {epsilon}, expected a finite number above 0, for instance 8", place="epsilon"
        )
    alone = _least_noise(lambda z: _noise_alone(task, z), epsilon)
    if alone is None:
        raise PrivacyError(
            f"even noise_multiplier {MAX_NOISE:g} spends more than {epsilon:g}",
            place="epsilon",
            cure="take fewer steps or more delta",
        )
    if bits is None:
        bits = _plan_with_noise(task, None, alone).bits
    noise = _least_noise(lambda z: _cost(task, bits, z).epsilon, epsilon, alone)
    if noise is None:
        raise PrivacyError(
            f"{bits} cannot keep epsilon {epsilon:g}",
            place="bits",
            cure=_cure(task, epsilon, alone),
        )
    return _fitted(task, bits, noise)


def _plan_with_noise(task: Task, bits: int | None, noise: float) -> DistributedPlan:
    target = NEAR * _noise_alone(task, noise)
    if bits is None:
        bits = next((b for b in BITS if _cost(task, b, noise).epsilon <= target), BITS[-1])
    if _scale(task, bits, noise) == 0:
        fits = next((b for b in BITS if _scale(task, b, noise) > 0), None)
        cure = (
            f"take at least {fits}"
            if fits
            else f"even {BITS[-1]} are too few for so many clients; take fewer"
        )
        raise PrivacyError(
            f"a sum of {task.clients} clients does not fit into {bits}",
            place="bits",
            cure=cure,
        )
    return _fitted(task, bits, noise)


def _fitted(task: Task, bits: int, noise: float) -> DistributedPlan:
    scale = _scale(task, bits, noise)
    return DistributedPlan(task, bits, noise, scale, _limit(task, scale, noise))


def _cure(task: Task, epsilon: float, start: float) -> str:
    for bits in BITS:
        noise = _least_noise(lambda z: _cost(task, bits, z).epsilon, epsilon, start)  # noqa: B023
        if noise is not None:
            return f"take at least {bits}, with noise_multiplier {noise:.3g}"
    return f"nor can {BITS[-1]}; take fewer clients, a smaller vector or a larger epsilon"


def _cost(task: Task, bits: int, noise: float) -> Cost:
    scale = _scale(task, bits, noise)
    spent = _fitted(task, bits, noise).epsilon if scale > 0 else math.inf
    return Cost(bits, spent, scale)


def _noise_alone(task: Task, noise: float) -> float:
    """Returns what the noise would cost on an infinitely fine grid, by the same accounting."""
    fine = 1e9  # grid units in a clip norm, in a vector of one value: rounding is nothing
    phase = SkellamEvent(
        fine, fine, (noise * fine) ** 2, task.steps, task.sampling_prob, task.failure
    )
    return accountant.epsilon([phase], delta=task.delta)


def _limit(task: Task, scale: float, noise: float) -> float:
    """Returns the largest value that the sum can have: rounding moves a clamped value by less than one."""
    signal = task.clients * (task.coordinate_limit * scale + 1)
    variance = (
        (noise * scale * task.clip_norm) ** 2 * task.clients / task.survivors
    )  # if nobody drops out
    return signal + skellam.tail(task.size, variance, OVERFLOW)


def _scale(task: Task, bits: int, noise: float) -> float:
    """Returns the largest scale whose sum fits into `bits`, or 0; the limit grows with the scale."""
    room = ROOM * 2.0 ** (bits - 1)
    # Beyond this the table that noise is drawn from would be too long, and the grid finer than anybody needs.
    low, high = (
        0.0,
        (1 - 1e-9) * math.sqrt(skellam.MAX_VARIANCE * task.survivors) / (noise * task.clip_norm),
    )
    if _limit(task, high, noise) <= room:
        return high
    low = high
    while _limit(task, low, noise) > room:
        low, high = low / 2, low
        if low < 1e-30:
            return 0.0
    return safe_root(lambda scale: _limit(task, scale, noise) / room - 1, unsafe=high, safe=low)


def _least_noise(
    spent: Callable[[float], float], epsilon: float, start: float = 1e-2
) -> float | None:
    """Returns the least noise multiplier from `start` on with `spent(noise) <= epsilon`, or None.

    More noise in equal bits needs a coarser grid, so `spent` may rise again: the first step of 20% that keeps the
    budget is found by walking, and only inside it the crossing.
    """

    @cache
    def excess(noise: float) -> float:
        return math.log(max(spent(noise), 1e-300) / epsilon)

    low = high = start
    while excess(high) > 0:
        if high >= MAX_NOISE:
            return None
        low, high = high, min(1.2 * high, MAX_NOISE)
    return safe_root(excess, unsafe=low, safe=high, rtol=1e-9)
