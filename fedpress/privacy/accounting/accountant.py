"""How much privacy a sequence of noised sums has spent, and how much noise a budget needs.

Every step is a Gaussian or Skellam mechanism on a Poisson sample, under add-or-remove-one neighbours. Gaussian steps
compose exactly up to a grid: privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022, "Connect the
dots") from dp-accounting, whose discretisation only ever rounds epsilon up. Where its tables would be too long (rare
samples, low noise, many steps, a tiny delta) `losses` answers in bounded time. Steps without subsampling use the closed
form of Balle & Wang 2018. Skellam steps have a Renyi bound; a mixture takes the better of two sound ways to join both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting import losses, renyi
from fedpress.privacy.accounting.events import (
    GaussianEvent,
    MechanismEvent,
    SkellamEvent,
    at_most,
    check_delta,
    check_sampling_prob,
    gaussians,
    merge,
    skellams,
)
from fedpress.privacy.roots import bracket, safe_root

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# dp_accounting and scipy are imported where they are used: they cost a second, and most callers never get there.

NOISE_RANGE = (1e-2, 1e5)
"""Noise multipliers outside this range are not searched."""


SPLITS = (0.05, 0.2, 0.5, 0.8, 0.95)
"""Shares of delta that are tried for the Skellam part of a mixture."""

LONGEST_TABLE = 100_000
"""Most losses of one step, or of all, that dp-accounting is asked to handle: it needs up to half a second for them."""

MANY_PHASES = 16
"""dp-accounting composes more than these one by one, which takes long."""

MOST_PHASES = 100
"""Of more, neighbours are joined: each takes time, also where its grid is as coarse as can be."""

MOST_BY_RENYI = 300
"""The same where Renyi accounting answers, which takes some milliseconds for each."""

RAREST_SAMPLE, LEAST_NOISE, MOST_NOISE = 1e-12, 1e-6, 1e12
"""Rarer samples and more noise count as these; less noise promises nothing that could be said."""

FEW_POINTS = 1 << 17
"""Points of `losses` while a noise is searched for: a tenth of a second for each question."""

UPPER_BOUND = "an upper bound: the exact epsilon may be more than 1% smaller"

__all__ = [
    "GaussianEvent",
    "MechanismEvent",
    "SkellamEvent",
    "Spent",
    "check_delta",
    "epsilon",
    "merge",
    "noise_multiplier",
    "spent",
]


@dataclass(frozen=True)
class Spent:
    """What some phases spend: `epsilon` is never below the truth.

    `upper_bound` says that it may lie more than a percent above it, as Renyi accounting and a coarse grid do.
    """

    epsilon: float
    upper_bound: bool = False

    @property
    def note(self) -> str:
        """What is to be said beside `epsilon`, if anything."""
        return UPPER_BOUND if self.upper_bound else ""


def epsilon(phases: Iterable[MechanismEvent], *, delta: float) -> float:
    """Returns the smallest known epsilon that all `phases` together spend at `delta` (inf without noise).

    Never below the truth, and never below what it says of a part of `phases`.

    Raises:
        RecipeError: if `delta` is not inside (0, 1).

    >>> round(epsilon([GaussianEvent(1.0, 5.0, 50)], delta=1e-3), 2)
    4.85
    >>> epsilon([GaussianEvent(1.0, 5.0, 0)], delta=1e-3)
    0.0
    """
    return spent(phases, delta=delta).epsilon


def spent(phases: Iterable[MechanismEvent], *, delta: float, points: int = losses.POINTS) -> Spent:
    """Returns the smallest known epsilon of all `phases` together at `delta`, and whether it is a mere upper bound.

    Args:
        phases: the mechanisms and their steps.
        delta: chance with which the promise may fail.
        points: of the grid where tables are long; fewer are quicker and may raise epsilon, never lower it.

    Raises:
        RecipeError: if `delta` is not inside (0, 1).

    >>> spent([GaussianEvent(1.0, 5.0, 50)], delta=1e-3).upper_bound
    False
    """
    check_delta(delta)
    return _spent(merge(phases), delta, points)


def renyi_bound(phases: Iterable[MechanismEvent], *, delta: float) -> float:
    """Returns a quick upper bound on what all `phases` together spend at `delta`, larger than `epsilon` by a tenth.

    It is inf where phases have no noise, or bounds that may fail.
    """
    merged = merge(phases)
    if any(p.noise_multiplier == 0 for p in merged) or any(p.failure for p in skellams(merged)):
        return math.inf
    return renyi.epsilon(merged, delta=delta)


def noise_multiplier(*, epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
    """Returns the smallest noise multiplier with which `steps` sums spend at most `epsilon` at `delta`.

    The answer is confirmed by `epsilon` itself, and at most 0.01% above the least that `epsilon` would confirm where
    samples are not so rare, or the noise so low, that tables of losses are long; there it may be 1% above.

    Raises:
        RecipeError: if an argument is out of range.
        PrivacyError: if no noise multiplier up to 1e5 meets the budget.

    >>> round(noise_multiplier(epsilon=8, delta=1e-3, sampling_prob=1.0, steps=50), 3)
    3.394
    """
    if not 0 < epsilon < math.inf:
        raise RecipeError(
            f"got {epsilon}, expected a finite number above 0, for instance 8", place="epsilon"
        )
    check_delta(delta)
    check_sampling_prob(sampling_prob)
    if not steps >= 1 or steps != int(steps):
        raise RecipeError(f"got {steps}, expected a whole number >= 1", place="steps")

    def spending(noise: float) -> float:
        return _spent(
            (GaussianEvent(sampling_prob, noise, int(steps)),), delta, points=FEW_POINTS
        ).epsilon

    # The central limit of the composition (Bu et al. 2020, "Gaussian DP") is a good first guess, and exact for q = 1.
    mu = _gaussian_mu(epsilon, delta)
    if sampling_prob == 1:
        guess = math.sqrt(steps) / mu
    else:
        guess = 1 / math.sqrt(math.log1p((mu / sampling_prob) ** 2 / steps))
    found = _smallest(spending, epsilon, guess)
    # More points may find a larger epsilon by the last digits of rounding.
    more = 1e-5
    while _spent((GaussianEvent(sampling_prob, found, int(steps)),), delta).epsilon > epsilon:
        found *= 1 + more
        more *= 2
    return found


@lru_cache(maxsize=4096)
def _spent(phases: tuple[MechanismEvent, ...], delta: float, points: int = losses.POINTS) -> Spent:
    gaussian, skellam = gaussians(phases), skellams(phases)
    if any(p.noise_multiplier == 0 for p in gaussian):
        return Spent(math.inf)
    gaussian = tuple(_in_range(p) for p in gaussian if p.noise_multiplier < math.inf)
    if any(p.noise_multiplier < LEAST_NOISE for p in gaussian):
        return Spent(math.inf, upper_bound=True)
    if skellam:
        gaussian = at_most(gaussian, MOST_PHASES)
        return Spent(_mixture(gaussian, skellam, delta), upper_bound=True)
    if all(p.sampling_prob == 1 for p in gaussian):
        return Spent(_gaussian_epsilon(total_mu(gaussian), delta))
    if len(gaussian) > MOST_PHASES:
        joined = _spent(at_most(gaussian, MOST_PHASES), delta, points).epsilon
        return Spent(
            min(joined, renyi.epsilon(at_most(gaussian, MOST_BY_RENYI), delta=delta)),
            upper_bound=True,
        )
    # Sampling never adds. Where nearly everybody takes part, a grid may say a little more than the closed form.
    everybody = _gaussian_epsilon(
        total_mu(tuple(replace(p, sampling_prob=1.0) for p in gaussian)), delta
    )
    parts = _parts(gaussian)
    if table := _losses(parts, delta):
        return Spent(min(everybody, float(table[0].get_epsilon_for_delta(delta))))
    bound = losses.epsilon(parts, delta=delta, points=points)
    if bound.fine:
        return Spent(min(everybody, bound.epsilon))
    return Spent(
        min(everybody, bound.epsilon, renyi.epsilon(gaussian, delta=delta)), upper_bound=True
    )


def _in_range(phase: GaussianEvent) -> GaussianEvent:
    """Returns a phase that spends no less, and whose numbers can be squared."""
    prob = max(phase.sampling_prob, RAREST_SAMPLE)
    return replace(
        phase, sampling_prob=prob, noise_multiplier=min(phase.noise_multiplier, MOST_NOISE)
    )


def _parts(phases: tuple[GaussianEvent, ...]) -> list[GaussianEvent]:
    """Returns phases that spend the same, with one step at most on everybody."""
    parts, mu = [p for p in phases if p.sampling_prob < 1], total_mu(phases)
    if mu > 0:
        parts.append(GaussianEvent(1.0, 1 / mu, 1))
    return parts


def _quick(parts: list[GaussianEvent], delta: float) -> bool:
    """Says whether dp-accounting answers within about a second, and with enough digits.

    It rounds what a transform gives to about 1e-15 times the steps, whatever delta is, and cuts off tails of 1e-15.
    """
    steps = sum(p.steps for p in parts)
    if len(parts) > MANY_PHASES or delta < 1e-10 or 1e-16 * steps > 1e-4 * delta:
        return False
    grid = grid_step(parts)
    widest = max(losses.span(p) for p in parts)
    total = math.sqrt(sum(p.steps * _loss_variance(p) for p in parts))
    # A grid of more than a tenth of a step's losses, as rare samples have, makes long tables of loose bounds.
    fine = grid <= 0.1 * total / math.sqrt(steps)
    return fine and max(widest, 16 * total) <= LONGEST_TABLE * grid


def total_mu(phases: tuple[GaussianEvent, ...]) -> float:
    """Gaussian mechanisms on everybody compose exactly into one: mu^2 = sum of steps / noise^2."""
    return math.sqrt(sum(p.steps / p.noise_multiplier**2 for p in phases if p.sampling_prob == 1))


def _losses(
    parts: list[GaussianEvent], delta: float
) -> tuple[PrivacyLossDistribution, float] | None:
    """Returns the privacy losses of all `parts` together, and their grid; None where dp-accounting is no help."""
    if not _quick(parts, delta):
        return None
    grid = grid_step(parts)
    total = None
    for p in parts:
        try:
            step = _step_losses(p.sampling_prob, p.noise_multiplier, grid)
        except (
            ValueError
        ):  # its differences of logarithms do not stand a sampling probability next to 1
            return None
        part = step.self_compose(p.steps)
        total = part if total is None else total.compose(part, tail_mass_truncation=1e-15)
    return None if total is None else (total, grid)


def _mixture(
    gaussian: tuple[GaussianEvent, ...], skellam: tuple[SkellamEvent, ...], delta: float
) -> float:
    """Returns the better of Renyi accounting for everything and `_split`; each is an upper bound on the truth.

    Steps whose bound may fail are charged to delta. Let the other world's output stand in wherever a bound fails: that
    mechanism keeps its bounds, and differs from the real one with chance at most `failure` a step.
    """
    left = delta - sum(p.failure * p.steps for p in skellam)
    if left <= 0:
        return math.inf
    alone = renyi.epsilon(skellam, delta=left)
    if not gaussian or alone == math.inf:
        return alone
    joined = min(renyi.epsilon([*gaussian, *skellam], delta=left), _split(gaussian, skellam, left))
    # The truth about a mixture is at least that about its parts, so the larger bound is no loss.
    return max(joined, alone, _spent(gaussian, delta).epsilon)


def _split(
    gaussian: tuple[GaussianEvent, ...], skellam: tuple[SkellamEvent, ...], delta: float
) -> float:
    """Composes the Gaussian losses with the worst mechanism that has the Skellam part's epsilon at a part of `delta`.

    That mechanism dominates every other with the same promise (Kairouz, Oh & Viswanath 2015), so the composition is
    that of losses and not a sum of epsilons.
    """
    from dp_accounting.pld import common, privacy_loss_distribution

    parts = _parts(gaussian)
    table = _losses(parts, delta)
    if table is None:
        promises = [
            (renyi.epsilon(skellam, delta=share * delta), share * delta) for share in SPLITS
        ]
        return min(
            losses.epsilon(parts, delta=delta, promise=p, points=FEW_POINTS).epsilon
            for p in promises
        )
    of_gaussian, grid = table
    found = math.inf
    for share in SPLITS:
        promise = renyi.epsilon(skellam, delta=share * delta)
        if (
            promise > 1e6 * grid
        ):  # a table of losses would be too long, and so large an epsilon promises nothing
            continue
        worst = privacy_loss_distribution.from_privacy_parameters(
            common.DifferentialPrivacyParameters(promise, share * delta),
            value_discretization_interval=grid,
        )
        found = min(
            found,
            float(
                of_gaussian.compose(worst, tail_mass_truncation=1e-15).get_epsilon_for_delta(delta)
            ),
        )
    return found


def grid_step(phases: list[GaussianEvent]) -> float:
    """Returns a grid of losses that raises epsilon by about 0.03% at most.

    Connect-the-dots moves each loss to the two nearest grid points, which adds at most grid^2/6 to the variance of a
    step on average: with grid = 0.06 standard deviations of a step that is 6e-4 of the variance.
    """
    steps = sum(p.steps for p in phases)
    variance = sum(p.steps * _loss_variance(p) for p in phases) / steps
    # Very low noise has losses of the order of 1/noise^2: keep the number of grid points near a million.
    widest = max((1 + 20 * p.noise_multiplier) / p.noise_multiplier**2 for p in phases)
    return min(max(0.06 * math.sqrt(variance), 1e-8), max(1e-3, 1e-6 * widest))


def _loss_variance(phase: GaussianEvent) -> float:
    inverse = phase.noise_multiplier**-2
    return min(phase.sampling_prob**2 * math.expm1(min(inverse, 100.0)), inverse)


@lru_cache(maxsize=32)
def _step_losses(sampling_prob: float, noise: float, grid: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=sampling_prob,
        value_discretization_interval=grid,
        use_connect_dots=True,
    )


def gaussian_log_delta(mu: float, epsilon: float) -> float:
    """Returns log delta of the Gaussian mechanism with sensitivity / noise = `mu` (Balle & Wang 2018, Theorem 8)."""
    from scipy.special import log_ndtr

    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return first + math.log(-math.expm1(second - first)) if second < first else -math.inf


def _gaussian_epsilon(mu: float, delta: float) -> float:
    if mu == 0 or gaussian_log_delta(mu, 0.0) <= math.log(delta):
        return 0.0
    # In log delta the crossing is nearly a line, and numbers stay finite where delta is tiny.
    target = math.log(delta)

    def excess(epsilon: float) -> float:
        return gaussian_log_delta(mu, epsilon) - target

    ends = bracket(excess, 1.0)
    assert ends is not None, "delta falls to 0 as epsilon grows"
    return safe_root(excess, unsafe=ends[0], safe=ends[1])


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """Returns the largest `mu` whose Gaussian mechanism is (epsilon, delta)-private."""
    target = math.log(delta)

    def excess(noise: float) -> float:
        return gaussian_log_delta(1 / noise, epsilon) - target

    ends = bracket(excess, 1.0)
    assert ends is not None, "delta falls to 0 as the noise grows"
    return 1 / safe_root(excess, unsafe=ends[0], safe=ends[1])


def _smallest(spent: Callable[[float], float], target: float, guess: float) -> float:
    """Returns the smallest noise with `spent(noise) <= target`, within 0.01%.

    `dp_accounting.calibrate_dp_mechanism` does the same, but seeks its bracket in steps that double and asks twice
    more at the end: 10 to 13 questions where this takes 3 to 10, and each may take half a second
    (benchmarks/accounting.py; measured 2026-11: 1.9 times the time over nine budgets).
    """
    least, most = NOISE_RANGE

    @cache
    def excess(noise: float) -> float:
        return math.log(max(spent(noise), 1e-300) / target)

    # The guess is seldom wrong by more than a few percent; where samples are rare it may be far off.
    ends = bracket(excess, guess, strides=(1.1, 1.1, 1.1, *[3.0] * 40), least=least, most=most)
    if ends is None:
        raise PrivacyError(
            f"even noise_multiplier {most:g} spends {spent(most):.3g}, above {target:g}",
            place="epsilon",
            cure="take fewer steps, a larger delta or a larger epsilon",
        )
    return safe_root(excess, unsafe=ends[0], safe=ends[1], rtol=5e-5, margin=3e-5)
