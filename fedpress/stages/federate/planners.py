"""Plans the noise of a federate stage, with a function for each kind of trust.

The kind of trust says what is protected (an example or a client) and who adds the noise: each
client ("local"), all clients together in a secure sum ("distributed"), or the server ("central").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from fedpress.codecs import Bound, Clip, Settings
from fedpress.data.population import Population
from fedpress.errors import RecipeError
from fedpress.federation import Cohort, Trust, trust_of
from fedpress.federation.local import check_is_sgd
from fedpress.federation.schedules import Participation
from fedpress.federation.servernoise import ServerNoise
from fedpress.privacy.accounting import accountant
from fedpress.privacy.accounting.events import MechanismEvent
from fedpress.privacy.adaptive import count_noise_for, update_noise_multiplier
from fedpress.privacy.ledger import POPULATION
from fedpress.privacy.noise.factorization import Factorization
from fedpress.privacy.plan import PrivacyPlan
from fedpress.stages.federate.grid import plan_grid
from fedpress.stages.federate.protection import Protection, is_secure, steps_per_round
from fedpress.stages.federate.settings import FederateSettings, PrivacySettings

T = TypeVar("T")


@dataclass(frozen=True)
class PlanningCase:
    """The arguments of a planner.

    Attributes:
        stage: the settings of the stage.
        private: the privacy settings of the stage.
        trust: the protected unit (an example or a client), and who adds the noise.
        population: all clients, with their public numbers of examples.
        participation: in which rounds each client is asked.
        cohort: how the clients of a round are chosen: number, sampling and population.
        chain: codecs that a client applies to its update before it sends it, in order.
        start: bounds of the norms of an update before the first codec.
    """

    stage: FederateSettings
    private: PrivacySettings
    trust: Trust
    population: Population
    participation: Participation
    cohort: Cohort
    chain: tuple[Settings, ...]
    start: Bound

    @property
    def times(self) -> int:
        """The largest number of rounds in which one client takes part, at least 1."""
        return max(1, self.participation.max_tasks)

    def each(self, value: T) -> dict[str, T]:
        """Returns the same `value` for every client."""
        return dict.fromkeys(self.population.names, value)


def _sample_local(case: PlanningCase) -> Protection:
    """Plans privacy of examples; each client adds noise in each of its local steps (DP-SGD)."""
    stage = case.stage
    private = case.private
    base = PrivacyPlan("sample", private.clip_norm, 1.0, delta=private.delta)
    plans = {}
    for name, n in case.population.counts.items():
        plans[name] = replace(
            base,
            sampling_prob=min(1.0, stage.batch_size / n),
            steps_per_round=steps_per_round(stage, n),
        )

    noise = private.noise_multiplier
    if noise is None:
        assert private.epsilon is not None
        rounds = max(1, case.participation.composed_tasks)
        noise = _noise_for_each(set(plans.values()), private.epsilon, rounds)
    plans = {name: replace(plan, noise_multiplier=noise) for name, plan in plans.items()}
    costs = {name: plan.event(num_rounds=1) for name, plan in plans.items()}
    return Protection(case.chain, plans, costs)


def _noise_for_each(plans: Iterable[PrivacyPlan], epsilon: float, rounds: int) -> float:
    """Returns the least noise multiplier with which each of the plans costs at most `epsilon`."""
    # A client with few examples samples each of them more often and needs more noise. The losses of
    # its steps have about this variance, so the first plan most likely needs the most noise.
    costly = sorted(
        plans, key=lambda plan: plan.sampling_prob**2 * plan.steps_per_round, reverse=True
    )
    noise = 0.0
    for plan in costly:
        if not noise or not _fits(replace(plan, noise_multiplier=noise), epsilon, rounds):
            noise = plan.calibrate(epsilon=epsilon, num_rounds=rounds).noise_multiplier
    return noise


def _fits(plan: PrivacyPlan, epsilon: float, rounds: int) -> bool:
    """Returns whether the plan costs at most `epsilon`."""
    # The bound takes milliseconds, the epsilon itself a quarter of a second. A calibration asks for
    # it up to ten times.
    bound = accountant.renyi_bound([plan.event(num_rounds=rounds)], delta=plan.delta)
    return bound <= epsilon or plan.epsilon(num_rounds=rounds) <= epsilon


def _sample_central(case: PlanningCase) -> Protection:
    """Plans privacy of examples; the server adds the noise.

    In each round, all clients of the cohort together take one gradient step.
    """
    plan, divisor = _joint_step(case)
    plan = _calibrated(plan, case.private, max(1, case.participation.composed_tasks))
    return Protection(
        case.chain,
        case.each(plan),
        case.each(plan.event(num_rounds=1)),
        noise=ServerNoise(plan),
        divisor=divisor,
    )


def _sample_distributed(case: PlanningCase) -> Protection:
    """Plans privacy of examples; each client adds a share of the noise, in a secure sum.

    In each round, all clients of the cohort together take one gradient step.
    """
    plan, divisor = _joint_step(case)
    # A secure sum needs a bound on each client's sum of gradients, but the size of a Poisson batch
    # is not bounded. So the sum is clipped to the largest norm of a batch of the expected size, at
    # the client with the largest number of examples.
    # Clipping is a projection onto a ball and moves no two vectors further apart, so one example
    # still changes the sum by at most one clip norm.
    usual = plan.sampling_prob * max(case.population.counts.values())
    chain = (Clip(clip_norm=plan.clip_norm * max(1.0, usual)), *case.chain)
    grid = plan_grid(
        case.stage,
        chain,
        case.start,
        case.cohort,
        sensitivity=plan.clip_norm,
        sampling_prob=plan.sampling_prob,
    )
    assert grid.noise is not None
    plan = replace(plan, noise_multiplier=grid.noise.noise_multiplier)
    costs = case.each(grid.noise.event(num_rounds=1))
    return Protection(grid.planned_chain(chain), case.each(plan), costs, grid, divisor=divisor)


def _joint_step(case: PlanningCase) -> tuple[PrivacyPlan, float]:
    """Plans one gradient step over the examples of the whole cohort.

    Returns:
        The plan, with a preliminary noise multiplier of 1, and the divisor of the sum of gradients:
        the expected number of examples / the learning rate. Sum / divisor is the step of SGD.
    """
    stage = case.stage
    cohort = case.cohort
    total = case.population.total
    _check_joint(stage)
    # Every example of every client is drawn with the same probability. On average over the
    # clients, a batch has `batch_size` examples.
    share = min(1.0, stage.batch_size * len(case.population) / total)
    expected = share * total * cohort.size / cohort.population
    private = case.private
    plan = PrivacyPlan("sample", private.clip_norm, share, 1.0, delta=private.delta)
    return plan, expected / stage.lr


def _check_joint(stage: FederateSettings) -> None:
    """Refuses settings and codecs that do not fit one joint gradient step.

    Such settings are meant for several local steps. Such codecs could raise the sensitivity: the
    largest change of the sum that one example can cause.

    Raises:
        RecipeError: if there is such a setting or codec.
    """
    check_is_sgd(
        stage, "with this value of `trust`, the clients of a cohort take one step together"
    )
    for name, fine in (("epochs", 1), ("momentum", 0.0), ("lr_decay", 1.0)):
        if getattr(stage, name) != fine:
            raise RecipeError(
                (
                    f"got {getattr(stage, name):g}, but with this value of `trust`, the clients of "
                    "a cohort take one step together"
                ),
                place=f"{name}",
                cure=f"set {name} = {fine:g}; for momentum, set it in stage.server",
            )
    secure = is_secure(stage)
    # These codecs never move two sums further apart. Quantizers and `topk` can do so: one example
    # may change the step of the grid, or the positions that are sent.
    fine_here = ("clip", "randomk", "rotate", "discretize") if secure else ("clip", "randomk")
    for transform in stage.uplink:
        # An unbiased codec multiplies values by a factor above 1, which raises the sensitivity.
        if transform.kind not in fine_here or getattr(transform, "unbiased", False):
            raise RecipeError(
                "it could let one example move a client's sum by more than the clip norm",
                place=f"uplink.{transform.kind}",
                cure=(
                    f'use {" and ".join(repr(kind) for kind in fine_here)} here, or trust = "local"'
                ),
            )


def _client_local(case: PlanningCase) -> Protection:
    """Plans privacy of clients; each client adds the full noise to its update."""
    if case.cohort.sampling == "poisson":
        raise RecipeError(
            (
                "with trust 'local' the server knows who takes part, so Poisson sampling does not "
                "amplify privacy"
            ),
            place="sampling",
            cure="use 'fixed' or 'cyclic'",
        )
    private = case.private
    # The sampling probability is 1: the server sees the update, so it knows who took part.
    plan = PrivacyPlan("client", private.clip_norm, 1.0, 1.0, delta=private.delta)
    plan = _calibrated(plan, private, case.times)
    return Protection(case.chain, case.each(plan), case.each(plan.event(num_rounds=1)))


def _client_distributed(case: PlanningCase) -> Protection:
    """Plans privacy of clients; each client adds a share of the noise, in a secure sum."""
    private = case.private
    before = (Clip(clip_norm=private.clip_norm), *case.chain)
    grid = plan_grid(case.stage, before, case.start, case.cohort, times=case.times)
    assert grid.noise is not None
    multiplier = grid.noise.noise_multiplier
    plan = PrivacyPlan("client", private.clip_norm, 1.0, multiplier, delta=private.delta)
    costs = case.each(grid.noise.event(num_rounds=1))
    return Protection(grid.planned_chain(case.chain), case.each(plan), costs, grid)


def _client_central(case: PlanningCase) -> Protection:
    """Plans privacy of clients; the server adds the noise to the sum of updates."""
    private = case.private
    cohort = case.cohort
    # With an adaptive clip, updates are divided by the present clip norm, so their bound is 1.
    clip_norm = 1.0 if private.adaptive is not None else private.clip_norm
    plan = PrivacyPlan("client", clip_norm, cohort.sampling_prob, 1.0, delta=private.delta)
    if private.correlated is not None:
        return _correlated(case, plan)
    plan = _calibrated(plan, private, case.times)
    noise = ServerNoise(plan)
    adaptive = None
    if private.adaptive is not None:
        count = private.adaptive.count_noise or count_noise_for(plan.noise_multiplier, cohort.size)
        adaptive = replace(private.adaptive, count_noise=count)
        # The count of clipped updates also costs privacy. The updates get more noise, so that both
        # together cost the planned epsilon.
        multiplier = update_noise_multiplier(plan.noise_multiplier, count)
        noise = ServerNoise(replace(plan, noise_multiplier=multiplier))
    event: MechanismEvent = plan.event(num_rounds=1)
    # If every client has the same cost in every round, the ledger needs only one entry for all.
    # With Poisson sampling one entry is necessary: entries by name would reveal who was drawn.
    same_for_all = cohort.sampling == "poisson" or cohort.size == cohort.population
    if case.stage.schedule.one_model and same_for_all:
        costs = {POPULATION: event}
    else:
        costs = case.each(event)
    return Protection(case.chain, case.each(plan), costs, noise=noise, adaptive=adaptive)


def _correlated(case: PlanningCase, plan: PrivacyPlan) -> Protection:
    """Plans privacy of clients; the server adds noise that is correlated over the rounds.

    For the accounting, all rounds together are one mechanism.
    """
    stage = case.stage
    private = case.private
    cohort = case.cohort
    # The analysis needs a minimum number of rounds between two tasks of a client, and Poisson
    # sampling has none.
    if cohort.sampling == "poisson":
        raise RecipeError(
            "correlated noise does not work with Poisson sampling",
            place="sampling",
            cure="use 'cyclic', or all clients",
        )
    assert private.correlated is not None
    rounds = max(1, stage.num_rounds)
    factorization = Factorization.plan(
        rounds,
        participations=case.times,
        min_separation=cohort.period,
        bands=min(private.correlated.bands, rounds),
    )
    plan = _calibrated(plan, private, 1)
    return Protection(
        case.chain,
        dict.fromkeys(case.population.names, plan),
        {POPULATION: plan.event(num_rounds=1)},
        noise=ServerNoise(plan, factorization),
        charged_once=True,
    )


def _calibrated(plan: PrivacyPlan, private: PrivacySettings, steps: int) -> PrivacyPlan:
    """Returns `plan` with the noise multiplier of the settings, or calibrated to their epsilon.

    Args:
        plan: the plan; its noise multiplier is replaced.
        private: the privacy settings.
        steps: number of rounds in which one unit takes part.
    """
    if private.noise_multiplier is not None:
        return replace(plan, noise_multiplier=private.noise_multiplier)
    assert private.epsilon is not None
    return plan.calibrate(epsilon=private.epsilon, num_rounds=steps)


PLANNERS: Mapping[Trust, Callable[[PlanningCase], Protection]] = {
    trust_of("sample", "local"): _sample_local,
    trust_of("sample", "distributed"): _sample_distributed,
    trust_of("sample", "central"): _sample_central,
    trust_of("client", "local"): _client_local,
    trust_of("client", "distributed"): _client_distributed,
    trust_of("client", "central"): _client_central,
}
"""The planner of each kind of trust: protected unit, and who adds the noise."""
