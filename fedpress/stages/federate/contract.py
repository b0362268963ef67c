"""The contract of a federate stage: the plan that server and clients compute before the rounds.

The plan includes the noise, the codecs and which client is asked when. Both sides compute it by the
same code from the recipe and from public facts about the clients. So it need not be sent, and a
client does not have to trust the server's plan.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import nn

from fedpress.core import parameters
from fedpress.core.examples import Preprocess
from fedpress.core.inputs import Inputs
from fedpress.core.names import ClientId
from fedpress.core.random import derive
from fedpress.core.random_source import RandomSource
from fedpress.data.population import Population
from fedpress.errors import RecipeError, renaming
from fedpress.federation import (
    Aggregator,
    Algorithm,
    Downlink,
    FedAvg,
    FedProx,
    LocalSettings,
    Mean,
    Payload,
    SecureSum,
    Terms,
    Uplink,
)
from fedpress.federation.aggregators.base import Weights
from fedpress.federation.schedules import Participation, ScheduleContext
from fedpress.federation.schedules.check import Needs, check_schedule
from fedpress.models import ModelSpec
from fedpress.nn.compact import compact_
from fedpress.nn.resize import copied
from fedpress.privacy.ledger import POPULATION, LedgerEntry
from fedpress.privacy.plan import PrivacyPlan
from fedpress.stages.federate.privacy import plan_protection
from fedpress.stages.federate.protection import Protection, is_secure, repeated, trust_of_stage
from fedpress.stages.federate.settings import FederateSettings
from fedpress.tasks import Task
from fedpress.training.augment import Augment, augment
from fedpress.training.device import place_


@dataclass(frozen=True, eq=False)
class Contract:
    """The plan of a stage for certain clients; it contains no client's data or secret.

    Attributes:
        stage: the settings.
        population: names of all clients, with their public numbers of examples and public keys.
        protection: the planned privacy: noise, and cost of each round.
        context: inputs of the schedule: clients, cohort, seeds, delays.
        participation: which client is asked in which round, drawn from the seed. If the server
            draws from a secret instead, it asks other clients, which only the server knows.
        terms: settings that must be equal on both sides; compared before the first round.
    """

    stage: FederateSettings
    population: Population
    protection: Protection
    context: ScheduleContext
    participation: Participation
    terms: Terms

    @property
    def uplink(self) -> Uplink:
        """How the clients' updates are encoded, summed, noised and divided."""
        return self.terms.uplink

    def plan_of(self, name: ClientId) -> PrivacyPlan | None:
        """Returns the privacy plan of one client if examples are protected; else None.

        The plan depends on the client's number of examples, which is public in this case.
        """
        return self.protection.plans[name] if self.uplink.trust.unit == "sample" else None

    def charges(self, tasks: Mapping[ClientId, int], first: int, last: int) -> list[LedgerEntry]:
        """Returns the ledger entries of the rounds from `first` to `last`; none without privacy.

        Args:
            tasks: number of tasks of each client in these rounds (a task: asked in one round).
            first: number of the first round.
            last: number of the last round.

        Returns:
            An entry for each client with a task; or, if the plan has one cost for all clients, a
            single entry for the whole population.
        """
        planned = self.protection
        # With correlated noise all rounds together are one mechanism. The first round is charged
        # for it.
        if not planned.costs or (planned.charged_once and first > 1):
            return []
        if POPULATION in planned.costs:
            rounds = math.ceil((last - first + 1) / self.uplink.cohort.period)
            tasks = {POPULATION: 1 if planned.charged_once else rounds}
        entries = []
        for who, count in tasks.items():
            if count:
                cost = repeated(planned.costs[who], count)
                entries.append(LedgerEntry.of(who, self.stage.name, cost, first, last))
        return entries

    def planned_charges(self, name: ClientId) -> list[LedgerEntry]:
        """Returns the ledger entries that one client must expect, for all rounds together.

        Only the server may know how often a client is really asked. So the entries are for the
        largest number of rounds in which any client is asked.
        """
        if self.stage.privacy is None:
            return [unprotected(self.stage)] if self.stage.num_rounds else []
        if not self.stage.num_rounds:
            return []
        return self.charges({name: self.participation.max_tasks}, 1, self.stage.num_rounds)

    def charges_of_answer(self, name: ClientId, round: int, *, first: bool) -> list[LedgerEntry]:
        """Returns the entries that a client adds to its own ledger before it trains in a round.

        Args:
            name: name of the client.
            round: number of the round.
            first: whether this is the first round that the client answers in the run.
        """
        if self.stage.privacy is None or self._charged_at_first:
            return self.planned_charges(name) if first else []
        return self.charges({name: 1}, round, round)

    @property
    def _charged_at_first(self) -> bool:
        """Whether a client is charged for the whole run with its first answer.

        This is so with correlated noise, and if clients take part at random. Random participation
        costs less privacy per round, but then all rounds count, also those in which the client is
        not asked. The client does not see these rounds and cannot count them.
        """
        common = self.protection.costs.get(POPULATION)
        drawn = common is not None and common.sampling_prob < 1
        return drawn or self.protection.charged_once


def unprotected(stage: FederateSettings) -> LedgerEntry:
    """Returns the ledger entry of a stage without privacy: an infinite epsilon.

    After this entry no later stage can promise privacy to the same clients.
    """
    # A noise multiplier of 0 means an infinite epsilon.
    return LedgerEntry(POPULATION, stage.name, 1.0, 0.0, 1)


@dataclass(frozen=True, eq=False)
class CommonInputs:
    """The inputs that server and clients share: settings, model, preprocessing, task and seed.

    Attributes:
        stage: the settings.
        model: the initial model; `requires_grad` is set on the parameters that are trained. Server
            and clients each take a `copy`.
        preprocess: standardisation of raw examples, fitted on public data.
        task: loss and metrics.
        seed: seed of this stage.
    """

    stage: FederateSettings
    model: nn.Module
    preprocess: Preprocess
    task: Task
    seed: int

    @classmethod
    def of(
        cls,
        stage: FederateSettings,
        spec: ModelSpec,
        model: nn.Module,
        *,
        preprocess: Preprocess,
        task: Task,
        seed: int,
        device: torch.device | None = None,
    ) -> CommonInputs:
        """Prepares a copy of `model` for `stage`.

        Args:
            stage: the settings.
            spec: spec of the model.
            model: the model; it is not changed.
            preprocess: standardisation of raw examples.
            task: loss and metrics.
            seed: seed of the run.
            device: device of this process; chosen automatically if None. Server and clients may
                have different devices.

        Raises:
            RecipeError: if no parameter would be trained.
        """
        return cls.prepared(
            stage,
            spec,
            copied(model),
            preprocess=preprocess,
            task=task,
            seed=derive(seed, "federate", stage.name),
            device=device,
        )

    @classmethod
    def prepared(
        cls,
        stage: FederateSettings,
        spec: ModelSpec,
        model: nn.Module,
        *,
        preprocess: Preprocess,
        task: Task,
        seed: int,
        device: torch.device | None = None,
    ) -> CommonInputs:
        """Like `of`, but takes the seed of the stage, and changes `model` instead of a copy.

        Clients do not get the run's seed, and have built a model that nobody else uses.
        """
        # Sparse weights become vectors of their nonzero values, so that zeros are neither sent nor
        # get noise.
        work = compact_(_trainable(model, stage.trainable), spec.sparse)
        return cls(stage, place_(work, device), preprocess, task, seed)

    def copy(self) -> CommonInputs:
        """Returns the same inputs with a copy of the model.

        The server must not share a model with clients, because it would contain what they learned
        from private data.
        """
        return CommonInputs(self.stage, copied(self.model), self.preprocess, self.task, self.seed)

    def contract(self, population: Population, epsilon: float | None = None) -> Contract:
        """Plans the stage for the clients in `population`.

        Args:
            population: all clients.
            epsilon: what earlier stages have left of the recipe's epsilon; None: all of it.

        Raises:
            RecipeError: if a setting does not fit these clients.
            PrivacyError: if the budget cannot be kept.
        """
        layout = parameters.Layout.of(self.model)
        # As text, because the cache needs hashable arguments.
        text = population.to_json()
        stage = self.stage if epsilon is None else _with_epsilon(self.stage, epsilon)
        return _bind_contract(stage, layout, self.preprocess, self.task, self.seed, text)


def _with_epsilon(stage: FederateSettings, epsilon: float) -> FederateSettings:
    """Returns the settings with another privacy budget."""
    assert stage.privacy is not None
    private = stage.privacy.model_copy(update={"epsilon": epsilon})
    return stage.model_copy(update={"privacy": private})


@lru_cache(maxsize=4)
def _bind_contract(
    stage: FederateSettings,
    layout: parameters.Layout,
    preprocess: Preprocess,
    task: Task,
    seed: int,
    text: str,
) -> Contract:
    """Plans the stage for the population in `text` (JSON).

    The result is cached: calibrating the noise takes seconds, and in a simulation every client of
    the process asks for the same contract.
    """
    population = Population.from_json(text)
    trust = trust_of_stage(stage)
    # Checked before the noise is calibrated, because that takes seconds.
    check_schedule(stage.schedule, needs_of(stage))
    # The schedule sets the size of the cohort: a buffered schedule sets it to its buffer size.
    cohort = stage.schedule.cohort(stage.cohort, len(population), stage.sampling)
    # Drawn from the seed, because clients must not know the server's secret. The real draw may
    # ask other clients, but it has the same number of tasks, and the plan needs only this number.
    context = ScheduleContext(population.names, cohort, seed, seed, stage.delays)
    participation = stage.schedule.plan_participation(context, stage.num_rounds)
    planned = plan_protection(stage, population, participation, cohort, layout.shapes)

    aggregator = _aggregator(stage, planned, population)
    algorithm = algorithm_of(stage)
    if trust.fixed_divisor or algorithm.needs_equal_weights:
        usual: Weights = "equal"
    else:
        usual = aggregator.weights
    uplink = Uplink.bind(
        Payload(layout.size, planned.chain, layout.shapes, algorithm.extras_up),
        cohort,
        guarantee=planned.guarantee(trust),
        aggregator=aggregator,
        weights=stage.weights or usual,
    )
    downlink = _downlink(stage, layout)
    terms = Terms(
        layout=layout,
        settings=local_settings(stage),
        algorithm=algorithm,
        uplink=uplink,
        seed=seed,
        prepare=Prepare(preprocess, stage.augment),
        task=task,
        downlink=downlink,
        norm=stage.norm,
        error_feedback=stage.error_feedback,
        num_rounds=stage.num_rounds,
        max_tasks=participation.max_tasks,
        schedule=stage.schedule,
    )
    return Contract(stage, population, planned, context, participation, terms)


def _downlink(stage: FederateSettings, layout: parameters.Layout) -> Downlink | None:
    """Returns how the server encodes the model for clients; None: the whole model in float32."""
    if not stage.downlink:
        return None
    downlink = Downlink(layout.size, layout.shapes, stage.downlink, stage.first_downlink)
    # Only for its errors, which would otherwise come in the first round.
    with renaming({"chain": "downlink", "first": "first_downlink"}):
        downlink.bound(whole=True)
        downlink.bound(whole=False)
    return downlink


def needs_of(stage: FederateSettings) -> Needs:
    """Returns the features of a stage that not every schedule supports, such as a secure sum."""
    private = stage.privacy
    trust = trust_of_stage(stage)
    return Needs(
        secure=is_secure(stage),
        client_state=algorithm_of(stage).keeps_state,
        downlink=bool(stage.downlink),
        adaptive=private is not None and private.adaptive is not None,
        correlated=private is not None and private.correlated is not None,
        hides_clients=trust.unit == "client" and trust.on_aggregate,
    )


def counts_are_public(stage: FederateSettings) -> bool:
    """Whether clients report how many examples they have.

    If examples are protected, the number is public, because the noise is planned from it. If
    clients are protected, the number is private. A secure sum without privacy does not need it, so
    it is not sent.
    """
    trust = trust_of_stage(stage)
    return trust.unit == "sample" or (trust.unit is None and not is_secure(stage))


def owns_keys(stage: FederateSettings) -> bool:
    """Whether clients draw their keys from the operating system instead of from the seed."""
    return stage.secure_keys or (stage.privacy is not None and stage.privacy.secure_noise)


def _aggregator(stage: FederateSettings, planned: Protection, population: Population) -> Aggregator:
    if planned.grid is None:
        # Without a grid the kind is not "secure". The settings of all other kinds are aggregators.
        return cast(Aggregator, stage.aggregator or Mean())
    # In the order of the population, so that the tuple is equal on both sides.
    identities = tuple(population.identities.items())
    return SecureSum(planned.grid.plan, planned.grid.size, planned.grid.limit, identities)


@dataclass(frozen=True)
class Prepare:
    """Maps raw examples to the network's input: augmentation, then standardisation.

    Each example is mapped independently, because sample privacy requires that one example cannot
    change what is computed from another.
    """

    preprocess: Preprocess
    how: Augment

    def __call__(self, x: Inputs, chance: RandomSource) -> Inputs:
        """Maps raw examples [k, ...] to float32 [k, ...]."""
        return self.preprocess(augment(x, self.how, chance) if self.how.active else x)


def algorithm_of(stage: FederateSettings) -> Algorithm:
    """Returns `algorithm` if it is set; else FedProx if `proximal_mu` is above 0; else FedAvg."""
    if stage.algorithm is not None:
        return stage.algorithm
    if stage.proximal_mu:
        return FedProx(proximal_mu=stage.proximal_mu, server=stage.server)
    return FedAvg(server=stage.server)


def local_settings(stage: FederateSettings) -> LocalSettings:
    """Returns the settings of local training."""
    return LocalSettings(**{name: getattr(stage, name) for name in LocalSettings.model_fields})


def _trainable(model: nn.Module, patterns: tuple[str, ...]) -> nn.Module:
    """Sets `requires_grad` on the parameters whose names match one of the `patterns`."""
    matches = 0
    for name, p in model.named_parameters():
        p.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        matches += p.requires_grad
    # Without a trained parameter all rounds would leave the model as it is.
    if not matches:
        names = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise RecipeError(
            f"no parameter matches {list(patterns)}",
            place="trainable",
            cure=f"give names such as {names}, or '*' for all",
        )
    return model
