"""The contract of a federate stage: what both sides compute alike from recipe and public facts."""

from __future__ import annotations

import fnmatch
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
from fedpress.privacy.plan import PrivacyPlan
from fedpress.stages.federate.privacy import plan_protection
from fedpress.stages.federate.protection import Protection, is_secure, trust_of_stage
from fedpress.stages.federate.settings import FederateSettings
from fedpress.tasks import Task
from fedpress.training.augment import Augment, augment
from fedpress.training.device import place_


@dataclass(frozen=True, eq=False)
class Contract:
    """A stage bound to a population.

    It is equal on both sides, because no client's data or secret is in it.

    Attributes:
        stage: the settings.
        population: names of all clients, with their public counts and keys.
        protection: the planned privacy.
        context: what the schedule works with.
        participation: which client is asked how often, as drawn from the seed. If the server draws
            from a secret, only the server knows who is really asked.
        terms: what must be alike; their agreement is compared before the first round.
    """

    stage: FederateSettings
    population: Population
    protection: Protection
    context: ScheduleContext
    participation: Participation
    terms: Terms

    @property
    def uplink(self) -> Uplink:
        """How updates become their mean."""
        return self.terms.uplink

    def plan_of(self, name: ClientId) -> PrivacyPlan | None:
        """Returns a client's own privacy plan under unit "sample", else None.

        It follows from the public number of the client's examples.
        """
        return self.protection.plans[name] if self.uplink.trust.unit == "sample" else None


@dataclass(frozen=True, eq=False)
class CommonInputs:
    """What server and clients are both given: the stage's settings, the model and the seed.

    Attributes:
        stage: the settings.
        model: a model to work in, with `requires_grad` set on the parameters that train. Each side
            takes a `copy` of these inputs.
        preprocess: the fixed step from raw examples to the network's input, fitted on public data.
        task: what is learned.
        seed: of this stage.
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
            spec: of the model.
            model: stays as it is.
            preprocess: see the attribute.
            task: see the attribute.
            seed: of the run.
            device: where this side works, chosen as `find` does if None. It is not agreed on: each
                side may have another.

        Raises:
            RecipeError: if no parameter would train.
        """
        return cls.prepared(
            stage,
            spec,
            model,
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
        """Does the same for a client that was sent the seed of the stage, not that of the run."""
        # Sparse weights train as vectors of their kept values: only these travel and get noise.
        work = compact_(_trainable(copied(model), stage.trainable), spec.sparse)
        return cls(stage, place_(work, device), preprocess, task, seed)

    def copy(self) -> CommonInputs:
        """Returns the same with a copy of the model.

        The server must not work in a model in which clients train: it could hold private data.
        """
        return CommonInputs(self.stage, copied(self.model), self.preprocess, self.task, self.seed)

    def contract(self, population: Population) -> Contract:
        """Binds the stage to a population.

        Raises:
            RecipeError: naming the setting that does not fit, and the cure.
            PrivacyError: if the budget cannot be kept.
        """
        layout = parameters.Layout.of(self.model)
        # As text, which can be a key of the cache.
        text = population.to_json()
        return _bind_contract(self.stage, layout, self.preprocess, self.task, self.seed, text)


@lru_cache(maxsize=4)
def _bind_contract(
    stage: FederateSettings,
    layout: parameters.Layout,
    preprocess: Preprocess,
    task: Task,
    seed: int,
    text: str,
) -> Contract:
    """Binds the stage to the population in `text`.

    In a simulation all clients of one process ask for the same contract, and calibrating the noise
    takes seconds: so the result is cached.
    """
    population = Population.from_json(text)
    trust = trust_of_stage(stage)
    # Before the noise is calibrated, which takes seconds.
    check_schedule(stage.schedule, needs_of(stage))
    # The schedule decides: of a buffered one the buffer is the cohort.
    cohort = stage.schedule.cohort(stage.cohort, len(population), stage.sampling)
    # The seed takes the place of the server's secret, which must not be in the contract: other
    # clients are drawn, but as many tasks are planned.
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
    """Returns the checked downlink; None if the model travels whole."""
    if not stage.downlink:
        return None
    downlink = Downlink(layout.size, layout.shapes, stage.downlink, stage.first_downlink)
    # Bound here only for the error: in the first round it would come too late.
    with renaming({"chain": "downlink", "first": "first_downlink"}):
        downlink.bound(whole=True)
        downlink.bound(whole=False)
    return downlink


def needs_of(stage: FederateSettings) -> Needs:
    """Returns which parts of a stage need something of its schedule."""
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
    """Says whether a client may report how many examples it has.

    Under unit "sample" the number is public, because the noise is planned from it. Under unit
    "client" it is private. A secure sum without privacy does not need it, so nobody is asked.
    """
    trust = trust_of_stage(stage)
    return trust.unit == "sample" or (trust.unit is None and not is_secure(stage))


def owns_keys(stage: FederateSettings) -> bool:
    """Says whether every client draws its own keys, so that they do not follow from the seed."""
    return stage.secure_keys or (stage.privacy is not None and stage.privacy.secure_noise)


def _aggregator(stage: FederateSettings, planned: Protection, population: Population) -> Aggregator:
    if planned.grid is None:
        # Every row but "secure", which always has a grid, is an aggregator as it stands.
        return cast(Aggregator, stage.aggregator or Mean())
    # In the order of the population, so that both sides have the same tuple.
    identities = tuple(population.identities.items())
    return SecureSum(planned.grid.plan, planned.grid.size, planned.grid.limit, identities)


@dataclass(frozen=True)
class Prepare:
    """Raw examples -> network input: augmentation, then standardisation.

    Each example is mapped by itself: under sample privacy one must not change another.
    """

    preprocess: Preprocess
    how: Augment

    def __call__(self, x: Inputs, chance: RandomSource) -> Inputs:
        """Maps raw examples [k, ...] to float32 [k, ...]."""
        return self.preprocess(augment(x, self.how, chance) if self.how.active else x)


def algorithm_of(stage: FederateSettings) -> Algorithm:
    """Returns the algorithm: of the key `algorithm`, or of the keys that version 0.1 had for it."""
    if stage.algorithm is not None:
        return stage.algorithm
    if stage.proximal_mu:
        return FedProx(proximal_mu=stage.proximal_mu, server=stage.server)
    return FedAvg(server=stage.server)


def local_settings(stage: FederateSettings) -> LocalSettings:
    """Returns the part of the stage that a client needs."""
    return LocalSettings(**{name: getattr(stage, name) for name in LocalSettings.model_fields})


def _trainable(model: nn.Module, patterns: tuple[str, ...]) -> nn.Module:
    """Sets which parameters of `model` train: those whose name matches one of the `patterns`."""
    matches = 0
    for name, p in model.named_parameters():
        p.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        matches += p.requires_grad
    if not matches:
        names = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise RecipeError(
            f"no parameter matches {list(patterns)}",
            place="trainable",
            cure=f"names look like {names} and '*' matches all",
        )
    return model
