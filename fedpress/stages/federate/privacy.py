"""Plans the privacy of a federate stage: who adds which noise, on which grid, and what each round costs whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fedpress.codecs import Bound, Clip, Discretize, Noise, Rotate, Settings, bind_chain
from fedpress.codecs.discretize import coordinate_limit
from fedpress.data.population import Population
from fedpress.errors import RecipeError
from fedpress.federation import Cohort, Guarantee, Trust, trust_of
from fedpress.federation.aggregators.secure import check_additive
from fedpress.federation.schedules import Participation
from fedpress.federation.servernoise import ServerNoise
from fedpress.privacy.accounting.events import MechanismEvent
from fedpress.privacy.adaptive import AdaptiveClip, count_noise_for, split
from fedpress.privacy.ledger import POPULATION
from fedpress.privacy.noise import distributed
from fedpress.privacy.noise.factorization import Factorization
from fedpress.privacy.plan import PrivacyPlan
from fedpress.secagg import SecurePlan
from fedpress.stages.federate.settings import FederateSettings, PrivacySettings

T = TypeVar("T")
BITS = 16
"""Bits of a secure sum without noise, where none are asked for: coarser than float32, finer than updates need."""
CLIP_NORM = 10.0
"""Longest update of a secure sum without privacy, where the recipe gives no list: longer than those of usual rounds."""
NOISED_LIST = 'uplink = [{ kind = "rotate" }, { kind = "discretize" }]'
PLAIN_LIST = (
    f'uplink = [{{ kind = "clip", clip_norm = {CLIP_NORM} }}, {{ kind = "rotate" }}, '
    '{ kind = "discretize" }]'
)
"""What a secure sum needs, with privacy (which clips by itself) and without; as a line of a recipe."""


@dataclass(frozen=True)
class Grid:
    """The grid of a secure sum of `size` values by so many clients.

    Attributes:
        plan: of the secure sum.
        size: values that every client sends.
        scale: grid units per unit of the update.
        coordinate_limit: where each value is clamped, in units of the update.
        limit: no value of an honest sum is larger, in grid units.
        noise: the privacy it was planned for, None without.
    """

    plan: SecurePlan
    size: int
    scale: float
    coordinate_limit: float
    limit: int
    noise: distributed.DistributedPlan | None = None

    def fill(self, chain: Sequence[Settings]) -> tuple[Settings, ...]:
        """Returns `chain` with the plan in its `discretize`, and each client's share of the noise behind it."""
        filled: list[Settings] = []
        for transform in chain:
            filled.append(transform)
            if isinstance(transform, Discretize):
                planned = {
                    "bits": self.plan.bits,
                    "scale": self.scale,
                    "limit": self.coordinate_limit,
                }
                if self.noise is not None:
                    planned["again"] = self.noise.rounds_again
                filled[-1] = transform.model_copy(update=planned)
                if self.noise is not None:
                    filled.append(Noise(std=math.sqrt(self.noise.variance)))
        return tuple(filled)


@dataclass(frozen=True)
class Protection:
    """A stage's privacy, planned.

    Attributes:
        chain: the transforms of the uplink, with grid and noise filled in.
        plans: each client's plan; the same one for all but under sample privacy of each client's own; empty without.
        costs: what one round costs those who take part, by name, or "population"; `whole` if it is the cost of all
            rounds together, charged before the first.
        grid: of a secure sum, None for a plain one.
        noise: what the server adds.
        adaptive: how the clip norm moves, with the noise of its count.
        divisor: of the private sum.
        whole: see `costs`.
    """

    chain: tuple[Settings, ...]
    plans: Mapping[str, PrivacyPlan] = field(default_factory=dict)
    costs: Mapping[str, MechanismEvent] = field(default_factory=dict)
    grid: Grid | None = None
    noise: ServerNoise | None = None
    adaptive: AdaptiveClip | None = None
    divisor: float | None = None
    whole: bool = False

    def guarantee(self, trust: Trust) -> Guarantee:
        """Returns what the uplink promises by it; the plan of the first client stands for all."""
        plan = next(iter(self.plans.values()), None)
        return Guarantee(plan, trust.kind, self.noise, self.adaptive, self.divisor)


def protect(
    stage: FederateSettings,
    population: Population,
    participation: Participation,
    cohort: Cohort,
    shapes: Sequence[tuple[int, ...]],
) -> Protection:
    """Plans noise, grid and costs of `stage` for a `population` and parameters of these `shapes`.

    Raises:
        RecipeError: if settings do not fit together.
        PrivacyError: if no noise keeps the budget.
    """
    private, secure = stage.privacy, is_secure(stage)
    chain = tuple(stage.uplink) or (secure_list(private is not None) if secure else ())
    start = Bound(sum(math.prod(s) for s in shapes), shapes=tuple(shapes))
    _check_list(stage, secure, cohort)
    if private is None:
        if not secure:
            return Protection(chain)
        grid = _grid(stage, chain, start, cohort)
        return Protection(grid.fill(chain), grid=grid)
    trust = trust_of_stage(stage)
    if trust.noise == "sum" and not secure:
        assert stage.aggregator is not None
        raise RecipeError(
            (
                f"got '{stage.aggregator.kind}' with trust '{trust.kind}', where only a secure "
                "sum carries all of the noise"
            ),
            place="aggregator",
            cure='leave aggregator out, or set trust = "local"',
        )
    _check_promise(stage, trust, population, cohort)
    if secure and trust.noise != "sum":
        raise RecipeError(
            f"got '{private.trust}' with a secure sum",
            place="privacy.trust",
            cure=(
                'set trust = "distributed", so that the clients make the noise of the sum together'
            ),
        )
    case = _Case(stage, private, trust, population, participation, cohort, chain, start)
    return PLANNERS[trust](case)


def _check_list(stage: FederateSettings, secure: bool, cohort: Cohort) -> None:
    for transform in stage.uplink:
        if stage.error_feedback and getattr(transform, "unbiased", False):
            raise RecipeError(
                f"'{transform.kind}' is unbiased, so what it lost would grow from round to round",
                place="error_feedback",
                cure="set error_feedback = false, or unbiased = false",
            )
        if secure and transform.kind == "noise":
            raise RecipeError(
                "a secure sum plans its own noise",
                place="uplink.noise",
                cure="ask for it with stage.privacy",
            )
        if secure and isinstance(transform, Discretize) and transform.scale is not None:
            raise RecipeError(
                "a secure sum plans it",
                place="uplink.discretize.scale",
                cure="give bits, or leave both out",
            )
    if secure and (
        cohort.sampling == "poisson"
        or (cohort.sampling == "cyclic" and cohort.population % cohort.size)
    ):
        raise RecipeError(
            "a secure sum needs cohorts of one size, whose noise and bits are planned",
            place="sampling",
            cure=(
                f"got '{cohort.sampling}' cohorts of {cohort.size} in {cohort.population}; use "
                "'fixed', or 'cyclic' with a cohort that divides the population"
            ),
        )


def is_secure(stage: FederateSettings) -> bool:
    """Says whether the stage sums securely: it is asked for, or the noise rests on it."""
    if stage.aggregator is not None:
        return not stage.aggregator.sees_updates
    return trust_of_stage(stage).noise == "sum"


def trust_of_stage(stage: FederateSettings) -> Trust:
    """Returns who adds which noise in `stage`."""
    private = stage.privacy
    return trust_of(None) if private is None else trust_of(private.unit, private.trust)


def secure_list(private: bool) -> tuple[Settings, ...]:
    """Returns the transforms of a secure sum where the recipe names none; under privacy a clip comes before them."""
    rest: tuple[Settings, ...] = (Rotate(), Discretize())
    return rest if private else (Clip(clip_norm=CLIP_NORM), *rest)


def noise_makers(plan: SecurePlan) -> int:
    """Returns how many clients' noise a promise may count on.

    Of those who must stay, the corrupt ones tell their noise to others; and every client can take its own away.
    """
    return max(1, plan.survivors - max(plan.corrupt, 1))


def repeated(phase: MechanismEvent, count: int) -> MechanismEvent:
    """Returns `phase` so many times."""
    return replace(phase, steps=phase.steps * count)


def steps_per_round(stage: FederateSettings, examples: int) -> int:
    """Returns the local steps of one round for a client of so many examples."""
    if trust_of_stage(stage).steps == "joint":
        return 1
    return stage.epochs * math.ceil(examples / stage.batch_size)


@dataclass(frozen=True)
class _Case:
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
        return max(1, self.participation.most)

    def each(self, value: T) -> dict[str, T]:
        """Returns the same `value` for every client."""
        return dict.fromkeys(self.population.names, value)


def _alone(case: _Case) -> Protection:
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
        budget, length = private.epsilon, max(1, case.participation.length)
        noise = max(
            p.calibrate(epsilon=budget, num_rounds=length).noise_multiplier
            for p in set(plans.values())
        )
    plans = {name: replace(plan, noise_multiplier=noise) for name, plan in plans.items()}
    costs = {name: plan.phase(num_rounds=1) for name, plan in plans.items()}
    return Protection(case.chain, plans, costs)


def _joint_central(case: _Case) -> Protection:
    """Sample privacy of one joint gradient step a round, noised by the server."""
    plan, divisor = _joint_step(case)
    plan = _calibrated(plan, case.private, max(1, case.participation.length))
    return Protection(
        case.chain,
        case.each(plan),
        case.each(plan.phase(num_rounds=1)),
        noise=ServerNoise(plan),
        divisor=divisor,
    )


def _joint_distributed(case: _Case) -> Protection:
    """Sample privacy of one joint gradient step a round, noised by the clients together."""
    plan, divisor = _joint_step(case)
    # A client's sum is cut to what its usual batch can reach. Scaling into a ball is a projection: it brings no two
    # vectors further apart, so one example still moves the sum by one clip norm.
    usual = plan.sampling_prob * max(case.population.counts.values())
    chain = (Clip(clip_norm=plan.clip_norm * max(1.0, usual)), *case.chain)
    grid = _grid(
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
    return Protection(grid.fill(chain), case.each(plan), costs, grid, divisor=divisor)


def _joint_step(case: _Case) -> tuple[PrivacyPlan, float]:
    """Returns the plan of a step over the examples of the whole cohort, without noise yet, and what divides its sum."""
    stage, cohort, total = case.stage, case.cohort, case.population.total
    _check_joint(stage)
    share = min(1.0, stage.batch_size * len(case.population) / total)
    expected = share * total * cohort.size / cohort.population
    private = case.private
    plan = PrivacyPlan("sample", private.clip_norm, share, 1.0, delta=private.delta)
    return plan, expected / stage.lr


def _check_joint(stage: FederateSettings) -> None:
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


def _client_local(case: _Case) -> Protection:
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


def _client_distributed(case: _Case) -> Protection:
    """Client privacy by noise that the clients make together."""
    private = case.private
    before = (Clip(clip_norm=private.clip_norm), *case.chain)
    grid = _grid(case.stage, before, case.start, case.cohort, times=case.times)
    assert grid.noise is not None
    multiplier = grid.noise.noise_multiplier
    plan = PrivacyPlan("client", private.clip_norm, 1.0, multiplier, delta=private.delta)
    costs = case.each(grid.noise.phase(num_rounds=1))
    return Protection(grid.fill(case.chain), case.each(plan), costs, grid)


def _client_central(case: _Case) -> Protection:
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


def _correlated(case: _Case, plan: PrivacyPlan) -> Protection:
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
        whole=True,
    )


def _calibrated(plan: PrivacyPlan, private: PrivacySettings, steps: int) -> PrivacyPlan:
    if private.noise_multiplier is not None:
        return replace(plan, noise_multiplier=private.noise_multiplier)
    assert private.epsilon is not None
    return plan.calibrate(epsilon=private.epsilon, num_rounds=steps)


def _grid(
    stage: FederateSettings,
    chain: tuple[Settings, ...],
    start: Bound,
    cohort: Cohort,
    *,
    sensitivity: float | None = None,
    sampling_prob: float = 1.0,
    times: int | None = None,
) -> Grid:
    """Plans scale, bits and noise of the grid from what is promised just before it.

    `sensitivity` is how much one protected unit moves a client's vector, its whole bound unless given; `times` how
    often a unit takes part, every round unless given.
    """
    at = next((i for i, transform in enumerate(chain) if isinstance(transform, Discretize)), None)
    before = chain[:at]
    transforms, bound = bind_chain(before, start)
    check_additive({one.kind: transform for one, transform in zip(before, transforms, strict=True)})
    line = PLAIN_LIST if stage.privacy is None else NOISED_LIST
    if at is None:
        raise RecipeError(
            "a secure sum adds whole numbers",
            place="uplink",
            cure=f'end the list with {{ kind = "discretize" }}, as in {line}',
        )
    discretize = chain[at]
    assert isinstance(discretize, Discretize)
    if not bound.l2 < math.inf:
        raise RecipeError(
            "a secure sum needs updates of bounded length, or it could overflow",
            place="uplink",
            cure=f"put 'clip' before it, as in {line}",
        )
    limit = discretize.limit or coordinate_limit(bound)
    private = stage.privacy
    if private is None:
        return _open_grid(stage, discretize.bits or BITS, cohort.size, bound.size, limit)
    planned = distributed.plan(
        size=bound.size,
        clip_norm=sensitivity or bound.l2,
        coordinate_limit=limit,
        clients=cohort.size,
        survivors=noise_makers(SecurePlan(cohort.size, 2, stage.max_dropout)),
        steps=times or max(1, stage.num_rounds),
        delta=private.delta,
        epsilon=private.epsilon,
        noise_multiplier=private.noise_multiplier,
        bits=discretize.bits,
        unit=private.unit,
        sampling_prob=sampling_prob,
    )
    secure = SecurePlan(cohort.size, planned.bits, stage.max_dropout)
    return Grid(secure, bound.size, planned.scale, limit, math.floor(planned.limit), planned)


def _open_grid(stage: FederateSettings, bits: int, clients: int, size: int, limit: float) -> Grid:
    """Plans the grid of a sum without noise, of vectors of `size` values up to `limit`."""
    half = distributed.ROOM * 2 ** (bits - 1)
    largest = math.floor(half / clients)  # of one client's values: no honest sum can overflow
    if largest < 2:
        least = math.ceil(math.log2(2 * clients / distributed.ROOM)) + 1
        raise RecipeError(
            f"{bits} bits cannot hold the sum of {clients} clients",
            place="uplink.discretize.bits",
            cure=f"take {least} or more",
        )
    secure = SecurePlan(clients, bits, stage.max_dropout, bound=largest)
    return Grid(secure, size, (largest - 1) / limit, limit, math.floor(half))


def _check_promise(
    stage: FederateSettings, trust: Trust, population: Population, cohort: Cohort
) -> None:
    private = stage.privacy
    assert private is not None
    # In a buffered schedule the list of clients and the order of asking are the same in neighbouring runs, which differ
    # in what one client sends; see docs/schedules.md.
    displaces = (
        stage.schedule.one_model
        and trust.hides_cohort
        and cohort.sampling == "fixed"
        and cohort.size < cohort.population
    )
    if trust.unit == "client" and displaces:
        raise RecipeError(
            (
                f"a fixed cohort of {cohort.size} in {cohort.population} clients breaks client "
                "privacy, since a client that joins displaces another and moves the sum twice"
            ),
            place="sampling",
            cure="set sampling = 'poisson', or take all clients",
        )
    units = len(population) if trust.unit == "client" else population.total
    if private.delta >= 1 / units:
        raise RecipeError(
            (
                f"got {private.delta:g}, which lets one of the {units} protected "
                f"{private.unit}s be given away whole"
            ),
            place="privacy.delta",
            cure=f"take it well below {1 / units:.1g}",
        )


PLANNERS: Mapping[Trust, Callable[[_Case], Protection]] = {
    trust_of("sample", "local"): _alone,
    trust_of("sample", "distributed"): _joint_distributed,
    trust_of("sample", "central"): _joint_central,
    trust_of("client", "local"): _client_local,
    trust_of("client", "distributed"): _client_distributed,
    trust_of("client", "central"): _client_central,
}
"""Who plans the noise, by who adds it."""
