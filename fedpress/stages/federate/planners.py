"""How much noise keeps the budget of a federate stage: one planner for each row of who adds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from fedpress.codecs import Bound, Clip, Settings
from fedpress.data.population import Population
from fedpress.errors import RecipeError
from fedpress.federation import Cohort, Trust, trust_of
from fedpress.federation.local import check_is_sgd
from fedpress.federation.schedules import Participation
from fedpress.federation.servernoise import ServerNoise
from fedpress.privacy.accounting.events import MechanismEvent
from fedpress.privacy.adaptive import count_noise_for, split
from fedpress.privacy.ledger import POPULATION
from fedpress.privacy.noise.factorization import Factorization
from fedpress.privacy.plan import PrivacyPlan
from fedpress.stages.federate.grid import plan_grid
from fedpress.stages.federate.protection import Protection, is_secure, steps_per_round
from fedpress.stages.federate.settings import FederateSettings, PrivacySettings

T = TypeVar("T")


@dataclass(frozen=True)
class PlanningCase:
    """What there is to protect, by whom, in whose updates: the arguments of `protect` and what follows from them."""

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
        """How often one client takes part."""
        return max(1, self.participation.max_tasks)

    def each(self, value: T) -> dict[str, T]:
        """Returns the same `value` for every client."""
        return dict.fromkeys(self.population.names, value)


def _alone(case: PlanningCase) -> Protection:
    """Sample privacy of each client's own noise: all get the noise that the most exposed of them needs."""
    stage, private = case.stage, case.private
    base = PrivacyPlan("sample", private.clip_norm, 1.0, delta=private.delta)
    plans = {
        name: replace(
            base,
            sampling_prob=min(1.0, stage.batch_size / n),
            steps_per_round=steps_per_round(stage, n),
        )
        for name, n in case.population.counts.items()
    }
    noise = private.noise_multiplier
    if noise is None:
        assert private.epsilon is not None
        budget, length = private.epsilon, max(1, case.participation.composed_tasks)
        noise = max(
            p.calibrate(epsilon=budget, num_rounds=length).noise_multiplier
            for p in set(plans.values())
        )
    plans = {name: replace(plan, noise_multiplier=noise) for name, plan in plans.items()}
    costs = {name: plan.phase(num_rounds=1) for name, plan in plans.items()}
    return Protection(case.chain, plans, costs)


def _joint_central(case: PlanningCase) -> Protection:
    """Sample privacy of one joint gradient step a round, noised by the server."""
    plan, divisor = _joint_step(case)
    plan = _calibrated(plan, case.private, max(1, case.participation.composed_tasks))
    return Protection(
        case.chain,
        case.each(plan),
        case.each(plan.phase(num_rounds=1)),
        noise=ServerNoise(plan),
        divisor=divisor,
    )


def _joint_distributed(case: PlanningCase) -> Protection:
    """Sample privacy of one joint gradient step a round, noised by the clients together."""
    plan, divisor = _joint_step(case)
    # A client's sum is cut to what its usual batch can reach. Scaling into a ball is a projection:
    # it brings no two vectors further apart, so one example still moves the sum by one clip norm.
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
    costs = case.each(grid.noise.phase(num_rounds=1))
    return Protection(grid.planned_chain(chain), case.each(plan), costs, grid, divisor=divisor)


def _joint_step(case: PlanningCase) -> tuple[PrivacyPlan, float]:
    """Returns the plan of a step over the examples of the whole cohort, without noise yet, and what divides its sum."""
    stage, cohort, total = case.stage, case.cohort, case.population.total
    _check_joint(stage)
    share = min(1.0, stage.batch_size * len(case.population) / total)
    expected = share * total * cohort.size / cohort.population
    private = case.private
    plan = PrivacyPlan("sample", private.clip_norm, share, 1.0, delta=private.delta)
    return plan, expected / stage.lr


def _check_joint(stage: FederateSettings) -> None:
    check_is_sgd(stage, "with this trust the clients of a cohort take one step together")
    for name, fine in (("epochs", 1), ("momentum", 0.0), ("lr_decay", 1.0)):
        if getattr(stage, name) != fine:
            raise RecipeError(
                (
                    f"got {getattr(stage, name):g}, but with this trust the clients of a cohort "
                    "take one step together"
                ),
                place=f"{name}",
                cure=f"set {name} = {fine:g}, and momentum in stage.server if wanted",
            )
    secure = is_secure(stage)
    fine_here = ("clip", "randomk", "rotate", "discretize") if secure else ("clip", "randomk")
    for transform in stage.uplink:
        if transform.kind not in fine_here or getattr(transform, "unbiased", False):
            raise RecipeError(
                "it could let one example move a client's sum by more than the clip norm",
                place=f"uplink.{transform.kind}",
                cure=(
                    f'use {" and ".join(repr(kind) for kind in fine_here)} here, or trust = "local"'
                ),
            )


def _client_local(case: PlanningCase) -> Protection:
    """Client privacy by each client's own noise."""
    if case.cohort.sampling == "poisson":
        raise RecipeError(
            (
                "with trust 'local' the server knows who takes part, so drawing by chance "
                "hides nothing"
            ),
            place="sampling",
            cure="use 'fixed' or 'cyclic'",
        )
    private = case.private
    # Whoever sees a client's update knows that it took part: sampling hides nothing.
    plan = PrivacyPlan("client", private.clip_norm, 1.0, 1.0, delta=private.delta)
    plan = _calibrated(plan, private, case.times)
    return Protection(case.chain, case.each(plan), case.each(plan.phase(num_rounds=1)))


def _client_distributed(case: PlanningCase) -> Protection:
    """Client privacy by noise that the clients make together."""
    private = case.private
    before = (Clip(clip_norm=private.clip_norm), *case.chain)
    grid = plan_grid(case.stage, before, case.start, case.cohort, times=case.times)
    assert grid.noise is not None
    multiplier = grid.noise.noise_multiplier
    plan = PrivacyPlan("client", private.clip_norm, 1.0, multiplier, delta=private.delta)
    costs = case.each(grid.noise.phase(num_rounds=1))
    return Protection(grid.planned_chain(case.chain), case.each(plan), costs, grid)


def _client_central(case: PlanningCase) -> Protection:
    """Client privacy by the server's noise."""
    private, cohort = case.private, case.cohort
    # An adaptive clip's updates come in units of it.
    unit = 1.0 if private.adaptive is not None else private.clip_norm
    plan = PrivacyPlan("client", unit, cohort.sampling_prob, 1.0, delta=private.delta)
    if private.correlated is not None:
        return _correlated(case, plan)
    plan = _calibrated(plan, private, case.times)
    noise, moving = ServerNoise(plan), None
    if private.adaptive is not None:
        count = private.adaptive.count_noise or count_noise_for(plan.noise_multiplier, cohort.size)
        moving = replace(private.adaptive, count_noise=count)
        noise = ServerNoise(replace(plan, noise_multiplier=split(plan.noise_multiplier, count)))
    phase: MechanismEvent = plan.phase(num_rounds=1)
    everybody = case.stage.schedule.one_model and (
        cohort.sampling == "poisson" or cohort.size == cohort.population
    )
    costs = {POPULATION: phase} if everybody else case.each(phase)
    return Protection(case.chain, case.each(plan), costs, noise=noise, adaptive=moving)


def _correlated(case: PlanningCase, plan: PrivacyPlan) -> Protection:
    """Noise that is correlated over the rounds: all of them together are one Gaussian mechanism."""
    stage, private, cohort = case.stage, case.private, case.cohort
    if cohort.sampling == "poisson":
        raise RecipeError(
            "correlated noise is for populations without sampling",
            place="sampling",
            cure="use 'cyclic', or all clients",
        )
    assert private.correlated is not None
    rounds = max(1, stage.num_rounds)
    mixed = Factorization.plan(
        rounds,
        participations=case.times,
        min_separation=cohort.period,
        bands=min(private.correlated.bands, rounds),
    )
    plan = _calibrated(plan, private, 1)
    return Protection(
        case.chain,
        dict.fromkeys(case.population.names, plan),
        {POPULATION: plan.phase(num_rounds=1)},
        noise=ServerNoise(plan, mixed),
        charged_once=True,
    )


def _calibrated(plan: PrivacyPlan, private: PrivacySettings, steps: int) -> PrivacyPlan:
    if private.noise_multiplier is not None:
        return replace(plan, noise_multiplier=private.noise_multiplier)
    assert private.epsilon is not None
    return plan.calibrate(epsilon=private.epsilon, num_rounds=steps)


PLANNERS: Mapping[Trust, Callable[[PlanningCase], Protection]] = {
    trust_of("sample", "local"): _alone,
    trust_of("sample", "distributed"): _joint_distributed,
    trust_of("sample", "central"): _joint_central,
    trust_of("client", "local"): _client_local,
    trust_of("client", "distributed"): _client_distributed,
    trust_of("client", "central"): _client_central,
}
"""Who plans the noise, by who adds it."""
