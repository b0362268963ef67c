"""What server and clients of a federate stage compute alike: all of it follows from the recipe and public facts."""

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
    """A stage bound to a population; equal on both sides, for no client's data or secret is in it.

    Attributes:
        stage: the settings.
        population: who can be asked, with the public counts and keys.
        protection: the planned privacy.
        context: what the schedule works with.
        participation: who is asked how often; draws that a secret hides are the server's alone.
        terms: what server and clients must hold alike, whose agreement is compared before the first
            round.
    """

    stage: FederateSettings
    population: Population
    protection: Protection
    context: ScheduleContext
    participation: Participation
    terms: Terms

    @property
    def uplink(self) -> Uplink:
        """How updates travel."""
        return self.terms.uplink

    def plan_of(self, name: ClientId) -> PrivacyPlan | None:
        """Returns the own plan of a client where single examples are protected, which hangs on its public count."""
        return self.protection.plans[name] if self.uplink.trust.unit == "sample" else None


@dataclass(frozen=True, eq=False)
class CommonInputs:
    """What everybody who takes part is given: the recipe's stage, the model as the stage begins, and the seed.

    Attributes:
        stage: the settings.
        model: one to work in, its trainable parameters marked; whoever works makes a `copy` of the
            common.
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
        """Prepares `model`, which stays as it is, for `stage`; `seed` is that of the run.

        Each side chooses its own `device`, as `find` does by default: it is no part of what is
        agreed.

        Raises:
            RecipeError: if no parameter would train.
        """
        work = compact_(_trainable(copied(model), stage.trainable), spec.sparse)
        model = place_(work, device)
        return cls(stage, model, preprocess, task, derive(seed, "federate", stage.name))

    def copy(self) -> CommonInputs:
        """Returns the same with a model of its own: the server never looks into one in which clients train."""
        return CommonInputs(self.stage, copied(self.model), self.preprocess, self.task, self.seed)

    def contract(self, population: Population) -> Contract:
        """Binds the stage to a population.

        Raises:
            RecipeError: naming the setting that does not fit, and the cure.
            PrivacyError: if the budget cannot be kept.
        """
        layout = parameters.Layout.of(self.model)
        return _contract(
            self.stage, layout, self.preprocess, self.task, self.seed, population.to_json()
        )


@lru_cache(maxsize=4)
def _contract(
    stage: FederateSettings,
    layout: parameters.Layout,
    preprocess: Preprocess,
    task: Task,
    seed: int,
    text: str,
) -> Contract:
    """Does the work of `CommonInputs.contract`, once for all who ask in one process: noise takes long to calibrate."""
    population, trust = Population.from_json(text), trust_of_stage(stage)
    check_schedule(stage.schedule, needs_of(stage))
    cohort = stage.schedule.cohort(stage.cohort, len(population), stage.sampling)
    context = ScheduleContext(population.names, cohort, seed, seed, stage.delays)
    participation = stage.schedule.plan_participation(context, stage.num_rounds)
    planned = plan_protection(stage, population, participation, cohort, layout.shapes)
    aggregator, algorithm = _aggregator(stage, planned, population), algorithm_of(stage)
    usual = "equal" if trust.fixed_divisor or algorithm.needs_equal_weights else aggregator.weights
    uplink = Uplink.bind(
        Payload(layout.size, planned.chain, layout.shapes, algorithm.extras_up),
        cohort,
        guarantee=planned.guarantee(trust),
        aggregator=aggregator,
        weights=stage.weights or usual,
    )
    downlink = None
    if stage.downlink:
        downlink = Downlink(layout.size, layout.shapes, stage.downlink, stage.first_downlink)
        with renaming({"chain": "downlink", "first": "first_downlink"}):
            _ = downlink.bound(whole=True), downlink.bound(whole=False)  # says what does not fit
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


def needs_of(stage: FederateSettings) -> Needs:
    """Returns what a stage asks of its schedule."""
    private, trust = stage.privacy, trust_of_stage(stage)
    return Needs(
        secure=is_secure(stage),
        client_state=algorithm_of(stage).keeps_state,
        downlink=bool(stage.downlink),
        adaptive=private is not None and private.adaptive is not None,
        correlated=private is not None and private.correlated is not None,
        hides_clients=trust.unit == "client" and trust.on_aggregate,
    )


def counts_are_public(stage: FederateSettings) -> bool:
    """Says whether a client may tell how many examples it has.

    Where single examples are protected their number is a public one, and the plan of the noise
    needs it. A secure sum without privacy does not: there nobody is asked.
    """
    trust = trust_of_stage(stage)
    return trust.unit == "sample" or (trust.unit is None and not is_secure(stage))


def owns_keys(stage: FederateSettings) -> bool:
    """Says whether every client draws its keys itself, so that nobody can compute them from the recipe."""
    return stage.secure_keys or (stage.privacy is not None and stage.privacy.secure_noise)


def _aggregator(stage: FederateSettings, planned: Protection, population: Population) -> Aggregator:
    if planned.grid is None:
        return cast(Aggregator, stage.aggregator or Mean())  # every row but the secure one is whole
    identities = tuple(population.identities.items())
    return SecureSum(planned.grid.plan, planned.grid.size, planned.grid.limit, identities)


@dataclass(frozen=True)
class Prepare:
    """Raw examples -> network input, each example by itself: augmentation, then standardisation."""

    preprocess: Preprocess
    how: Augment

    def __call__(self, x: Inputs, chance: RandomSource) -> Inputs:
        """Maps raw examples [k, ...] to float32 [k, ...]."""
        return self.preprocess(augment(x, self.how, chance) if self.how.active else x)


def algorithm_of(stage: FederateSettings) -> Algorithm:
    """Returns what clients and server do with the model; without a table of its own, the keys of version 0.1 say it."""
    if stage.algorithm is not None:
        return stage.algorithm
    if stage.proximal_mu:
        return FedProx(proximal_mu=stage.proximal_mu, server=stage.server)
    return FedAvg(server=stage.server)


def local_settings(stage: FederateSettings) -> LocalSettings:
    """Returns the part of the stage that a client needs."""
    return LocalSettings(**{name: getattr(stage, name) for name in LocalSettings.model_fields})


def _trainable(model: nn.Module, patterns: tuple[str, ...]) -> nn.Module:
    hit = 0
    for name, p in model.named_parameters():
        p.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        hit += p.requires_grad
    if not hit:
        names = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise RecipeError(
            f"no parameter matches {list(patterns)}",
            place="trainable",
            cure=f"names look like {names} and '*' matches all",
        )
    return model
