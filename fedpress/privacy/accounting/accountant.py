"""The accountant: the epsilon of a sequence of noised sums, and the noise for a given epsilon.

Every step is a Gaussian or Skellam mechanism on a Poisson sample; neighbouring data sets differ by
adding or removing one unit. An event is a number of steps with the same mechanism. The method
depends on the events:

- Gaussian without sampling: the closed form of Balle & Wang 2018, see `closed_form`.
- Gaussian with sampling: privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022,
  "Connect the dots") by the library dp-accounting, whose discretisation only rounds epsilon up. If
  dp-accounting would be too slow or too imprecise (rare sampling, low noise, many steps or events,
  a tiny delta), the module `losses` computes an upper bound in limited time.
- Skellam: a Renyi bound.
- Gaussian and Skellam together: the smaller of two upper bounds, see `_mixture`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting import closed_form, losses, renyi
from fedpress.privacy.accounting.events import (
    GaussianEvent,
    MechanismEvent,
    SkellamEvent,
    check_delta,
    check_sampling_prob,
    gaussians,
    merge,
    merge_similar,
    skellams,
)
from fedpress.privacy.accounting.step_losses import loss_span
from fedpress.privacy.roots import bracket, safe_root

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# dp_accounting and scipy are imported where they are used: importing them takes a second, and most
# callers need neither.

NOISE_RANGE = (1e-2, 1e5)
"""Range in which noise multipliers are searched."""

SKELLAM_SHARES = (0.05, 0.2, 0.5, 0.8, 0.95)
"""Shares of delta that are tried for the Skellam events of a mixture."""

LONGEST_TABLE = 100_000
"""Largest number of losses that dp-accounting gets; for this many it takes half a second."""

MANY_EVENTS = 16
"""With more events dp-accounting is too slow, because it composes them one by one."""

MOST_EVENTS = 100
"""With more events, similar events are merged until this many are left, because each event takes
time even on the coarsest grid."""

MOST_BY_RENYI = 300
"""Like `MOST_EVENTS`, for Renyi accounting, which takes only a few milliseconds per event."""

RAREST_SAMPLE = 1e-12
"""Smaller sampling probabilities are replaced by this number, which spends more."""

LEAST_NOISE = 1e-6
"""Below this noise multiplier, epsilon is reported as infinite, which is a valid upper bound."""

MOST_NOISE = 1e12
"""Larger noise multipliers are replaced by this number, so that their squares stay finite."""

FEW_POINTS = 1 << 17
"""Grid points of the module `losses` in a search for the noise and for mixtures; each epsilon then
takes a tenth of a second."""

UPPER_BOUND = "an upper bound: the exact epsilon may be more than 1% smaller"
"""Note beside an epsilon that is not known to be tight."""

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
    """The epsilon of some events, and whether it is tight.

    Attributes:
        epsilon: the epsilon, never below the true value.
        upper_bound: whether `epsilon` may be more than 1% above the true value, as with Renyi
            accounting or a coarse grid.
    """

    epsilon: float
    upper_bound: bool = False

    @property
    def note(self) -> str:
        """Text to print next to `epsilon` if `upper_bound` is set; else ""."""
        return UPPER_BOUND if self.upper_bound else ""


def epsilon(events: Iterable[MechanismEvent], *, delta: float) -> float:
    """Returns the epsilon of all `events` together at `delta`; infinite without noise.

    The result is never below the true value. `spent` also says whether the result is tight.

    Raises:
        RecipeError: if `delta` is not inside (0, 1), or is below 1e-200.

    >>> round(epsilon([GaussianEvent(1.0, 5.0, 50)], delta=1e-3), 2)
    4.85
    >>> epsilon([GaussianEvent(1.0, 5.0, 0)], delta=1e-3)
    0.0
    """
    return spent(events, delta=delta).epsilon


def spent(events: Iterable[MechanismEvent], *, delta: float, points: int = losses.POINTS) -> Spent:
    """Returns the epsilon of all `events` together, and whether it is only an upper bound.

    Args:
        events: the mechanisms and their steps.
        delta: probability with which the guarantee may fail.
        points: grid points of the module `losses`. With fewer points the result comes faster, and
            is larger except for rounding errors.

    Raises:
        RecipeError: if `delta` is not inside (0, 1), or is below 1e-200.

    >>> spent([GaussianEvent(1.0, 5.0, 50)], delta=1e-3).upper_bound
    False
    """
    check_delta(delta)
    return _spent(merge(events), delta, points)


def renyi_bound(events: Iterable[MechanismEvent], *, delta: float) -> float:
    """Returns a quick upper bound on the epsilon of `events`, typically 10% too high.

    The bound is infinite if an event has no noise, or if its sensitivity bound may fail.
    """
    merged = merge(events)
    for event in merged:
        if event.noise_multiplier == 0:
            return math.inf
        if isinstance(event, SkellamEvent) and event.failure:
            return math.inf
    return renyi.epsilon(merged, delta=delta)


def noise_multiplier(*, epsilon: float, delta: float, sampling_prob: float, steps: int) -> float:
    """Returns the smallest noise multiplier, from 0.01 on, with which `steps` sums fit `epsilon`.

    The epsilon of the result is computed and checked. The result is at most 0.01% above the
    smallest valid noise multiplier, or at most 1% if sampling is rare or the noise is low.

    Args:
        epsilon: the budget of all steps.
        delta: probability with which the guarantee may fail.
        sampling_prob: probability with which each unit takes part in a step.
        steps: number of noised sums.

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

    def spending(noise: float, points: int) -> float:
        event = GaussianEvent(sampling_prob, noise, int(steps))
        return _spent((event,), delta, points).epsilon

    # The central limit of the composition (Bu et al. 2020, "Deep learning with Gaussian
    # differential privacy") is a good first guess, and exact without sampling. With sampling it is
    # only a guess, because the limit may be below the true value.
    mu = closed_form.largest_mu(epsilon, delta)
    if sampling_prob == 1:
        guess = math.sqrt(steps) / mu
    else:
        guess = 1 / math.sqrt(math.log1p((mu / sampling_prob) ** 2 / steps))
    found = _smallest_noise(lambda noise: spending(noise, FEW_POINTS), epsilon, guess)

    # More points give a smaller epsilon, but rounding errors may raise its last digits above the
    # budget.
    increase = 1e-5
    while spending(found, losses.POINTS) > epsilon:
        found *= 1 + increase
        increase *= 2
    return found


# Cached, because a ledger asks about the same events after every round.
@lru_cache(maxsize=4096)
def _spent(events: tuple[MechanismEvent, ...], delta: float, points: int = losses.POINTS) -> Spent:
    gaussian = gaussians(events)
    skellam = skellams(events)
    least = min((event.noise_multiplier for event in gaussian), default=math.inf)
    if least == 0:
        return Spent(math.inf)
    if least < LEAST_NOISE:
        return Spent(math.inf, upper_bound=True)
    gaussian = _in_range(gaussian)
    if skellam:
        epsilon = _mixture(merge_similar(gaussian, MOST_EVENTS), skellam, delta)
        return Spent(epsilon, upper_bound=True)
    if all(event.sampling_prob == 1 for event in gaussian):
        return Spent(closed_form.epsilon_of(closed_form.total_mu(gaussian), delta))
    return _spent_on_samples(gaussian, delta, points)


def _spent_on_samples(gaussian: tuple[GaussianEvent, ...], delta: float, points: int) -> Spent:
    if len(gaussian) > MOST_EVENTS:
        by_losses = _spent(merge_similar(gaussian, MOST_EVENTS), delta, points).epsilon
        by_renyi = renyi.epsilon(merge_similar(gaussian, MOST_BY_RENYI), delta=delta)
        return Spent(min(by_losses, by_renyi), upper_bound=True)

    # Sampling never increases epsilon, so the closed form without sampling is a bound as well. If
    # nearly all units take part, the closed form may be slightly below the result of the grid.
    unsampled = tuple(replace(event, sampling_prob=1.0) for event in gaussian)
    without_sampling = closed_form.epsilon_of(closed_form.total_mu(unsampled), delta)

    merged = _merge_unsampled(gaussian)
    table = _loss_table(merged, delta)
    if table is not None:
        return Spent(min(without_sampling, float(table[0].get_epsilon_for_delta(delta))))

    bound = losses.epsilon_bound(merged, delta=delta, points=points)
    found = min(without_sampling, bound.epsilon)
    if bound.fine:
        return Spent(found)
    return Spent(min(found, renyi.epsilon(gaussian, delta=delta)), upper_bound=True)


def _in_range(events: tuple[GaussianEvent, ...]) -> tuple[GaussianEvent, ...]:
    """Limits sampling probabilities and noise multipliers, so that their squares are finite.

    The returned events spend at least as much. Events with infinite noise spend nothing, and are
    left out.
    """
    found = []
    for event in events:
        if event.noise_multiplier == math.inf:
            continue
        prob = max(event.sampling_prob, RAREST_SAMPLE)
        noise = min(event.noise_multiplier, MOST_NOISE)
        found.append(replace(event, sampling_prob=prob, noise_multiplier=noise))
    return tuple(found)


def _merge_unsampled(events: tuple[GaussianEvent, ...]) -> list[GaussianEvent]:
    """Replaces all events without sampling by one event with one step and the same epsilon."""
    merged = [event for event in events if event.sampling_prob < 1]
    mu = closed_form.total_mu(events)
    if mu > 0:
        merged.append(GaussianEvent(1.0, 1 / mu, 1))
    return merged


def _suits_dp_accounting(events: list[GaussianEvent], delta: float) -> bool:
    """Returns whether dp-accounting takes at most about a second, and is precise enough.

    Its Fourier transforms have rounding errors of about 1e-15 times the steps, independent of
    delta, and it truncates tails of 1e-15. The errors may be at most 0.1% of delta.
    """
    steps = _total_steps(events)
    if len(events) > MANY_EVENTS or delta < 1e-10 or 1e-16 * steps > 1e-4 * delta:
        return False
    grid = grid_step(events)
    widest = max(loss_span(event) for event in events)
    total_std = math.sqrt(_total_variance(events))
    # A grid step is never below 1e-8. For very rare sampling this may be more than a tenth of a
    # step's standard deviation, and then the bound is loose.
    fine = grid <= 0.1 * total_std / math.sqrt(steps)
    return fine and max(widest, 16 * total_std) <= LONGEST_TABLE * grid


def _loss_table(
    events: list[GaussianEvent], delta: float
) -> tuple[PrivacyLossDistribution, float] | None:
    """Returns the privacy loss distribution of all `events` together, and its grid step.

    Returns None if dp-accounting would be too slow or too imprecise, or if it fails.
    """
    if not _suits_dp_accounting(events, delta):
        return None
    grid = grid_step(events)
    total = None
    for event in events:
        try:
            step = _step_losses(event.sampling_prob, event.noise_multiplier, grid)
        except ValueError:
            # dp-accounting takes logarithms of differences that round to 0 if the sampling
            # probability is almost 1.
            return None
        composed = step.self_compose(event.steps)
        total = composed if total is None else total.compose(composed, tail_mass_truncation=1e-15)
    return None if total is None else (total, grid)


def _mixture(
    gaussian: tuple[GaussianEvent, ...], skellam: tuple[SkellamEvent, ...], delta: float
) -> float:
    """Returns an upper bound on the epsilon of Gaussian and Skellam events together.

    It is the smaller of two bounds: Renyi accounting of all events, and `_compose_with_dominating`.

    The probability that a sensitivity bound fails is subtracted from delta. Proof: let M be the
    real mechanism, and let M' be equal to M except where a bound fails; there M' releases the
    output of the neighbouring data set. Then M' has the bounded sensitivity, and differs from M
    with probability at most `failure` in each step.
    """
    remaining = delta - sum(event.failure * event.steps for event in skellam)
    if remaining <= 0:
        return math.inf
    skellam_alone = renyi.epsilon(skellam, delta=remaining)
    if not gaussian or skellam_alone == math.inf:
        return skellam_alone
    by_renyi = renyi.epsilon([*gaussian, *skellam], delta=remaining)
    joined = min(by_renyi, _compose_with_dominating(gaussian, skellam, remaining))
    # A mixture spends at least as much as its parts. If its bound is below the bound of a part, the
    # bound of the part is loose. The larger bound is returned, to be consistent.
    return max(joined, skellam_alone, _spent(gaussian, delta).epsilon)


def _compose_with_dominating(
    gaussian: tuple[GaussianEvent, ...], skellam: tuple[SkellamEvent, ...], delta: float
) -> float:
    """Composes the Gaussian losses with those of one mechanism that replaces the Skellam events.

    The Skellam events get a share of delta, which gives an epsilon. A single mechanism dominates
    all mechanisms with this (epsilon, delta) (Kairouz, Oh & Viswanath 2015). Its losses are
    composed with the losses of the Gaussian events, which is tighter than adding the two epsilons.
    The smallest result over `SKELLAM_SHARES` is returned.
    """
    from dp_accounting.pld import common, privacy_loss_distribution

    guarantees = []
    for share in SKELLAM_SHARES:
        guarantees.append((renyi.epsilon(skellam, delta=share * delta), share * delta))
    merged = _merge_unsampled(gaussian)
    table = _loss_table(merged, delta)
    found = math.inf
    if table is None:
        for guarantee in guarantees:
            bound = losses.epsilon_bound(
                merged, delta=delta, guarantee=guarantee, points=FEW_POINTS
            )
            found = min(found, bound.epsilon)
        return found

    of_gaussian, grid = table
    for skellam_epsilon, share in guarantees:
        # The table of losses would be too long, and so large an epsilon is useless anyway.
        if skellam_epsilon > 1e6 * grid:
            continue
        dominating = privacy_loss_distribution.from_privacy_parameters(
            common.DifferentialPrivacyParameters(skellam_epsilon, share),
            value_discretization_interval=grid,
        )
        composed = of_gaussian.compose(dominating, tail_mass_truncation=1e-15)
        found = min(found, float(composed.get_epsilon_for_delta(delta)))
    return found


def grid_step(events: list[GaussianEvent]) -> float:
    """Returns a distance of two grid points that raises epsilon by at most about 0.03%.

    "Connect the dots" moves each privacy loss to its two neighbouring grid points. This adds about
    grid^2/6 to the variance of a step, since losses are spread evenly between grid points. For a
    grid of 0.06 standard deviations of a step this is 6e-4 of the variance.
    """
    variance = _total_variance(events) / _total_steps(events)
    # With very low noise, losses are of the order of 1/noise^2. Then the grid is so coarse that a
    # million points cover them.
    widest = max((1 + 20 * event.noise_multiplier) / event.noise_multiplier**2 for event in events)
    return min(max(0.06 * math.sqrt(variance), 1e-8), max(1e-3, 1e-6 * widest))


def _total_steps(events: list[GaussianEvent]) -> int:
    return sum(event.steps for event in events)


def _total_variance(events: list[GaussianEvent]) -> float:
    """Returns the approximate variance of the total loss of all steps."""
    return sum(event.steps * _loss_variance(event) for event in events)


def _loss_variance(event: GaussianEvent) -> float:
    """Returns the approximate variance of one step's loss: q^2 (e^(1/z^2) - 1), at most 1/z^2."""
    inverse = event.noise_multiplier**-2
    # The exponent is limited against overflow: e^100 is far above the bound 1/z^2.
    return min(event.sampling_prob**2 * math.expm1(min(inverse, 100.0)), inverse)


@lru_cache(maxsize=32)
def _step_losses(sampling_prob: float, noise: float, grid: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=sampling_prob,
        value_discretization_interval=grid,
        use_connect_dots=True,
    )


def _smallest_noise(spent: Callable[[float], float], target: float, guess: float) -> float:
    """Returns the smallest noise multiplier with `spent(noise) <= target`, within 0.01%.

    `dp_accounting.calibrate_dp_mechanism` does the same with 10 to 13 calls of `spent` instead of 3
    to 10, and each call may take half a second. Over nine budgets `calibrate_dp_mechanism` took 1.9
    times as long (measured 2026-11 by benchmarks/accounting.py).
    """
    least, most = NOISE_RANGE

    @cache
    def excess(noise: float) -> float:
        return math.log(max(spent(noise), 1e-300) / target)

    # The guess is usually within a few percent, but may be far off for rare sampling.
    strides = (1.1, 1.1, 1.1, *[3.0] * 40)
    ends = bracket(excess, guess, strides=strides, least=least, most=most)
    if ends is None:
        raise PrivacyError(
            f"even noise_multiplier {most:g} spends {spent(most):.3g}, above {target:g}",
            place="epsilon",
            cure="take fewer steps, a larger delta or a larger epsilon",
        )
    return safe_root(excess, unsafe=ends[0], safe=ends[1], rtol=5e-5, margin=3e-5)
