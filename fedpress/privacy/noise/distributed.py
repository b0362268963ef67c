"""Plans distributed differential privacy: bits, grid and Skellam noise of a secure sum.

In a secure sum (secure aggregation) the server sees only the sum of the clients' vectors. Every
client scales its clipped and rotated vector to a grid, clamps and rounds each value, adds Skellam
noise (integers), and sends the result modulo 2^bits under a mask (Agarwal, Kairouz & Liu 2021,
arXiv:2110.04995). With a finer grid, rounding costs less privacy, but the sum needs more bits.
`plan` finds the fewest bits that are enough, unless they are given, and then grid and noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting import accountant
from fedpress.privacy.accounting.events import SkellamEvent, check_delta, check_sampling_prob
from fedpress.privacy.noise import skellam
from fedpress.privacy.roots import safe_root

Unit = Literal["sample", "client"]

BITS = range(8, 25)
"""Bits per value that can be planned."""

USED_RANGE = 0.9
"""Share of the range 0 to 2^(bits - 1) that the sum may use. A value slightly above the limit is
then in the unused part, where it is detected, instead of wrapping around to the other sign."""

OVERFLOW = 2.0**-30
"""Allowed probability that noise moves any value beyond the limit in one round."""

BITS_TOLERANCE = 1.05
"""Bits are enough if epsilon is at most this factor times the epsilon without a grid."""

MAX_NOISE = 1e3
"""Larger noise multipliers are not searched: a model would not learn from such sums."""


@dataclass(frozen=True)
class SecretSum:
    """Size, bounds and number of the sums of a run; for the attributes see `plan`.

    Raises:
        RecipeError: if a field is out of range.
    """

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
        check_sampling_prob(self.sampling_prob)

    @property
    def failure(self) -> float:
        """Probability in one step that the sensitivity after rounding exceeds its bound.

        Under unit "client" this is 0: a client repeats the rounding until the norm of its vector is
        small enough.

        Under unit "sample", neighbouring inputs are two sums x and x + D of one client. They are
        rounded with the same random numbers u. For each value,
        floor(x + D + u) - floor(x + u) = floor(D + v), where v is the fractional part of x + u,
        which is uniform too. So the difference is D after stochastic rounding, and exceeds its
        bound with probability beta. A client cannot prevent this, because it does not know D. The
        random numbers do not depend on the data, so beta is added to delta.
        """
        if self.unit == "client":
            return 0.0
        # All steps together use a thousandth of delta, so epsilon hardly changes.
        return self.delta / (1000 * self.steps)


@dataclass(frozen=True)
class Cost:
    """The epsilon and the grid for a number of bits.

    Attributes:
        bits: bits per value.
        epsilon: epsilon of all steps; infinite if the sum does not fit into the bits.
        scale: grid points per unit of the vector; 0 if the sum does not fit into the bits.
    """

    bits: int
    epsilon: float
    scale: float


@dataclass(frozen=True)
class DistributedPlan:
    """The result of `plan`. Server and clients each compute it and get the same values.

    Attributes:
        task: size, bounds and number of the sums.
        bits: the sum is taken modulo 2^bits.
        noise_multiplier: standard deviation of the noise of `survivors` clients / `clip_norm`.
        scale: grid points per unit of the vector. The distance of two points is a grid unit.
        limit: bound on the absolute values of the sum, in grid units; at most 0.9 * 2^(bits - 1).
            In a round the sum exceeds it with probability at most 2^-30.
    """

    task: SecretSum
    bits: int
    noise_multiplier: float
    scale: float
    limit: float

    @property
    def variance(self) -> float:
        """Variance of one client's noise, in grid units squared."""
        # Divided by the number of survivors, not of all clients: if clients drop out, their noise
        # is missing, and the noise of the survivors must be enough.
        total_std = self.noise_multiplier * self.scale * self.task.clip_norm
        return total_std**2 / self.task.survivors

    @property
    def l2(self) -> float:
        """L2 sensitivity after rounding, in grid units."""
        beta = self.task.failure or skellam.RETRY_BETA
        return skellam.rounded_sensitivity(self.scale * self.task.clip_norm, self.task.size, beta)

    @property
    def l1(self) -> float:
        """L1 sensitivity after rounding, in grid units."""
        return skellam.l1_sensitivity(self.l2, self.task.size)

    @property
    def redraws_rounding(self) -> bool:
        """Whether a client repeats its rounding until the norm is at most `l2`.

        Under unit "client" it must repeat. Under unit "sample" it must not: two neighbouring sums
        could need different numbers of tries. Then their random numbers would differ, and the
        rounded sums would be far apart.
        """
        return self.task.unit == "client"

    @property
    def coordinate_limit(self) -> float:
        """Each value is clamped to this many grid units before it is rounded."""
        return self.scale * self.task.coordinate_limit

    @property
    def epsilon(self) -> float:
        """The epsilon of all planned steps at the planned delta."""
        return accountant.epsilon([self.event(num_rounds=self.task.steps)], delta=self.task.delta)

    def event(self, *, num_rounds: int) -> SkellamEvent:
        """Returns the accountant's event of `num_rounds` sums."""
        task = self.task
        # Only the noise of the survivors is guaranteed.
        return SkellamEvent(
            l2=self.l2,
            l1=self.l1,
            variance=self.variance * task.survivors,
            steps=num_rounds,
            sampling_prob=task.sampling_prob,
            failure=task.failure,
        )

    def table(self) -> list[Cost]:
        """Returns epsilon and grid for each number of bits in `BITS`, at the same noise."""
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
    """Returns the plan with the finest grid that fits into `bits`.

    Give either `epsilon`, which the plan meets with the least noise, or `noise_multiplier`.

    Args:
        size: number of values in the sum, after rotation.
        clip_norm: L2 norm by which one unit can move the sum, in units of the vector.
        coordinate_limit: bound to which each client clamps the absolute value of each rotated
            value.
        clients: maximum number of clients in a round.
        survivors: minimum number of clients in a sum; a sum of fewer clients is not unmasked. The
            noise of this number of clients is the planned noise.
        steps: number of sums in the whole run.
        delta: probability with which the guarantee may fail.
        epsilon: budget of all steps.
        noise_multiplier: standard deviation of the survivors' noise / `clip_norm`.
        bits: bits per value; None: the fewest bits with which epsilon is at most 5% above the
            epsilon without a grid; 24 if no number of bits is enough.
        unit: what is protected: "client", or "sample" (one clipped gradient in one client's sum).
        sampling_prob: probability with which each unit takes part in a step.

    Raises:
        RecipeError: if an argument is out of range.
        PrivacyError: if the sum does not fit into `bits`, or the budget cannot be met. If more bits
            would help, the error names the fewest that are enough.

    >>> p = plan(size=2**20, clip_norm=1.0, coordinate_limit=0.006, clients=10, survivors=10,
    ...          steps=50, delta=1e-3, noise_multiplier=5.0)
    >>> p.bits, round(p.epsilon, 2), p.limit <= 0.9 * 2 ** (p.bits - 1)
    (18, 5.6, True)
    """
    task = SecretSum(
        size, clip_norm, coordinate_limit, clients, survivors, steps, delta, unit, sampling_prob
    )
    if bits is not None and bits not in BITS:
        raise RecipeError(f"got {bits}, expected {BITS.start} to {BITS.stop - 1}", place="bits")
    if epsilon is not None and noise_multiplier is None:
        return _plan_with_epsilon(task, bits, epsilon)
    if noise_multiplier is not None and epsilon is None:
        return _plan_with_noise(task, bits, noise_multiplier)
    raise RecipeError(
        "got both epsilon and noise_multiplier, or none, expected one of the two",
        place="epsilon",
        cure="give epsilon to have the noise calibrated, or noise_multiplier",
    )


def _plan_with_epsilon(task: SecretSum, bits: int | None, epsilon: float) -> DistributedPlan:
    if not 0 < epsilon < math.inf:
        raise RecipeError(
            f"got {epsilon}, expected a finite number above 0, for instance 8", place="epsilon"
        )
    # Without a grid less noise is needed, so this is the start of the search on the grid.
    least = _least_noise(lambda noise: _epsilon_without_grid(task, noise), epsilon)
    if least is None:
        raise PrivacyError(
            f"even noise_multiplier {MAX_NOISE:g} spends more than {epsilon:g}",
            place="epsilon",
            cure="take fewer steps or more delta",
        )
    if bits is None:
        bits = _fewest_bits(task, least)
    noise = _least_noise(_epsilon_by_noise(task, bits), epsilon, least)
    if noise is None:
        raise PrivacyError(
            f"{bits} cannot keep epsilon {epsilon:g}",
            place="bits",
            cure=_cure(task, epsilon, least),
        )
    return _fitted(task, bits, noise)


def _plan_with_noise(task: SecretSum, bits: int | None, noise: float) -> DistributedPlan:
    if not 0 < noise <= MAX_NOISE:
        raise RecipeError(
            f"got {noise}, expected a number in (0, {MAX_NOISE:g}]", place="noise_multiplier"
        )
    if bits is None:
        bits = _fewest_bits(task, noise)
    _check_fits(task, bits, noise)
    return _fitted(task, bits, noise)


def _fewest_bits(task: SecretSum, noise: float) -> int:
    """Returns the fewest bits whose epsilon is at most 5% above the epsilon without a grid.

    If no number of bits is enough, returns the largest number.

    Raises:
        PrivacyError: if the sum does not fit even into the largest number of bits.
    """
    target = BITS_TOLERANCE * _epsilon_without_grid(task, noise)
    for bits in BITS:
        if _cost(task, bits, noise).epsilon <= target:
            return bits
    _check_fits(task, BITS[-1], noise)
    return BITS[-1]


def _check_fits(task: SecretSum, bits: int, noise: float) -> None:
    if _scale(task, bits, noise) > 0:
        return
    cure = f"even {BITS[-1]} are too few for so many clients; take fewer clients"
    fitting = [more for more in BITS if _scale(task, more, noise) > 0]
    if fitting:
        cure = f"take at least {fitting[0]}"
    raise PrivacyError(
        f"a sum of {task.clients} clients does not fit into {bits}", place="bits", cure=cure
    )


def _fitted(task: SecretSum, bits: int, noise: float) -> DistributedPlan:
    scale = _scale(task, bits, noise)
    return DistributedPlan(task, bits, noise, scale, _limit(task, scale, noise))


def _cure(task: SecretSum, epsilon: float, start: float) -> str:
    # Searched only after a failure, because every number of bits takes a search for the noise.
    for bits in BITS:
        noise = _least_noise(_epsilon_by_noise(task, bits), epsilon, start)
        if noise is not None:
            return f"take at least {bits}, with noise_multiplier {noise:.3g}"
    return f"nor can {BITS[-1]}; take fewer clients, a smaller vector or a larger epsilon"


def _epsilon_by_noise(task: SecretSum, bits: int) -> Callable[[float], float]:
    return lambda noise: _cost(task, bits, noise).epsilon


def _cost(task: SecretSum, bits: int, noise: float) -> Cost:
    scale = _scale(task, bits, noise)
    if scale == 0:
        return Cost(bits, math.inf, scale)
    return Cost(bits, _fitted(task, bits, noise).epsilon, scale)


def _epsilon_without_grid(task: SecretSum, noise: float) -> float:
    """Returns the epsilon of the noise on an infinitely fine grid, by the same accounting."""
    # The clip norm is a billion grid units, so that rounding does not matter.
    fine = 1e9
    event = SkellamEvent(
        l2=fine,
        l1=fine,
        variance=(noise * fine) ** 2,
        steps=task.steps,
        sampling_prob=task.sampling_prob,
        failure=task.failure,
    )
    return accountant.epsilon([event], delta=task.delta)


def _limit(task: SecretSum, scale: float, noise: float) -> float:
    """Returns a bound on the sum's absolute values, exceeded with probability `OVERFLOW`."""
    # Rounding moves a clamped value by less than one grid unit.
    signal = task.clients * (task.coordinate_limit * scale + 1)
    # If no client drops out, all clients add noise that is sized for the survivors.
    variance = (noise * scale * task.clip_norm) ** 2 * task.clients / task.survivors
    return signal + skellam.tail(task.size, variance, OVERFLOW)


def _scale(task: SecretSum, bits: int, noise: float) -> float:
    """Returns the largest scale for which the sum fits into `bits`; 0 if there is none."""
    allowed = USED_RANGE * 2.0 ** (bits - 1)
    # At a larger scale the noise variance would exceed its maximum. The factor allows for rounding
    # errors.
    largest = math.sqrt(skellam.MAX_VARIANCE * task.survivors) / (noise * task.clip_norm)
    high = (1 - 1e-9) * largest
    if _limit(task, high, noise) <= allowed:
        return high

    # The limit grows with the scale, so the scale is halved until the sum fits into the bits.
    low = high
    while _limit(task, low, noise) > allowed:
        high = low
        low /= 2
        if low < 1e-30:
            return 0.0
    return safe_root(lambda scale: _limit(task, scale, noise) / allowed - 1, unsafe=high, safe=low)


def _least_noise(
    spent: Callable[[float], float], epsilon: float, start: float = 1e-2
) -> float | None:
    """Returns the least noise multiplier from `start` on with `spent(noise) <= epsilon`, or None.

    With equal bits, more noise needs a coarser grid, so `spent` is not monotone, and a bisection
    over the whole range could fail. Therefore the noise grows in steps of 20% until the budget is
    met, and the exact value is searched within the last step.
    """

    @cache
    def excess(noise: float) -> float:
        return math.log(max(spent(noise), 1e-300) / epsilon)

    low = start
    high = start
    while excess(high) > 0:
        if high >= MAX_NOISE:
            return None
        low = high
        high = min(1.2 * high, MAX_NOISE)
    return safe_root(excess, unsafe=low, safe=high, rtol=1e-9)
