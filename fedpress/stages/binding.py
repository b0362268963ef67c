"""Binds a federate stage to a model and its clients: uplink, privacy and transport fit together, or a RecipeError."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedpress import tree
from fedpress.arrays import Preprocess
from fedpress.augment import Augment, augment
from fedpress.errors import RecipeError
from fedpress.federate import (
    Algorithm,
    Client,
    Cohort,
    LocalSettings,
    RoundRecord,
    Uplink,
    agreement,
    private_sgd,
    rounds,
    sgd,
)
from fedpress.privacy.ledger import POPULATION, Charge, Ledger
from fedpress.privacy.plan import PrivacyPlan
from fedpress.seeds import derive
from fedpress.stages.settings import FederateSettings, PrivacySettings
from fedpress.state import State
from fedpress.training import place_
from fedpress.transport import LocalTransport
from fedpress.wire.message import Message

PROMISE = ("unit", "delta", "noise_multiplier", "clip_norm", "sampling_prob")


@dataclass(frozen=True, eq=False)
class Federation:
    """Everything of a federate stage, bound: only the rounds are missing.

    Attributes:
        stage: the settings.
        model: a copy to work in, its trainable parameters marked.
        uplink: how updates travel.
        transport: reaches the clients.
        plans: each client's privacy plan; under unit "client" the one plan under every name; empty without privacy.
        ledger: what was spent before this stage; without end, if this stage is open.
        seed: of this stage.
    """

    stage: FederateSettings
    model: nn.Module
    uplink: Uplink
    transport: LocalTransport
    plans: dict[str, PrivacyPlan]
    ledger: Ledger
    seed: int

    @property
    def agreement(self) -> str:
        """The fingerprint of what server and clients hold alike."""
        return agreement(tree.Layout.of(self.model), local_settings(self.stage), self.uplink)

    def request(self, number: int, params: Tensor) -> Message:
        """Returns the message that asks a client for round `number`."""
        return Message("fit", {"round": number, "agreement": self.agreement}, {"params": params})

    def rounds(self, params: Tensor, *, start: int, server_state: dict[str, Tensor] | None) -> Iterator[RoundRecord]:
        """Returns the rounds after `start`, each computed when it is asked for."""
        return rounds(
            params,
            self.uplink,
            Algorithm(private_sgd if self._sample else sgd, self.stage.server),
            self.transport,
            num_rounds=self.stage.num_rounds,
            seed=self.seed,
            start=start,
            server_state=server_state or None,
            agreement=self.agreement,
        )

    @property
    def _sample(self) -> bool:
        return self.stage.privacy is not None and self.stage.privacy.unit == "sample"

    def drawn(self, number: int) -> list[str]:
        """Returns the clients that take part in round `number`."""
        return self.uplink.cohort.draw(self.transport.clients(), seed=self.seed, round=number)

    def charges(self, clients: list[str], first: int, last: int) -> list[Charge]:
        """Returns what rounds `first` to `last` cost: each client its own steps, or the population one sum a round."""
        count, name = last - first + 1, self.stage.name
        if self._sample:
            mine = {c: self.plans[c].phase(num_rounds=count) for c in clients}
        else:
            mine = {"population": next(iter(self.plans.values())).phase(num_rounds=count)}
        return [Charge(who, name, p.sampling_prob, p.noise_multiplier, p.steps, first, last) for who, p in mine.items()]

    def promise(self) -> dict[str, Any]:
        """Returns the privacy settings of the client that is charged most."""
        most = max(self.plans.values(), key=lambda plan: (plan.sampling_prob, plan.steps_per_round))
        return {name: getattr(most, name) for name in PROMISE}


def bind(stage: FederateSettings, state: State) -> Federation:
    """Fits stage, model and clients together.

    Raises:
        RecipeError: naming the setting that does not fit, and the cure.
    """
    clients = state.data.clients
    if not clients:
        raise RecipeError("federate: the data set has no clients; set data.num_clients")
    cohort = Cohort(stage.cohort or len(clients), len(clients), stage.sampling)
    model = place_(_trainable(copy.deepcopy(state.model), stage.trainable))
    plans = _plans(stage, {name: len(arrays) for name, arrays in clients.items()}, cohort)
    private, first = stage.privacy, next(iter(plans.values()), None)
    weights = stage.weights or ("equal" if private is not None and private.unit == "client" else "examples")
    size = tree.Layout.of(model).size
    uplink = Uplink.bind(size, cohort, privacy=first, weights=weights)
    seed = derive(state.seed, "federate", stage.name)
    prepare = Prepare(state.data.preprocess, stage.augment)
    sample = private is not None and private.unit == "sample"
    handlers = {
        name: Client(
            name=name,
            arrays=arrays,
            model=model,
            settings=local_settings(stage),
            uplink=uplink,
            seed=seed,
            prepare=prepare,
            local_update=private_sgd if sample else sgd,
            plan=plans[name] if sample else None,
            norm=stage.norm,
        ).handle
        for name, arrays in clients.items()
    }
    return Federation(stage, model, uplink, LocalTransport(handlers), plans, _ledger(stage, state), seed)


def _ledger(stage: FederateSettings, state: State) -> Ledger:
    """Returns the book for this stage; one without privacy charges the clients without end before it touches them.

    Raises:
        RecipeError: if the book cannot carry this stage's promise.
    """
    private, book = stage.privacy, state.ledger
    if private is None:
        book = book if book is not None else Ledger("sample")
        return book.add(Charge(POPULATION, stage.name, 1.0, 0.0, 1)) if stage.num_rounds else book
    book = book if book is not None else Ledger(private.unit)
    open_stage = next((c.what for c in book.charges if c.noise_multiplier == 0), None)
    if open_stage is not None:
        raise RecipeError(
            f"stage.privacy: the earlier stage '{open_stage}' uses the same clients without privacy, so no promise "
            "about them can hold; give that stage privacy too, or leave it out"
        )
    if book.unit != private.unit:
        raise RecipeError(
            f"stage.privacy.unit: an earlier stage protects unit '{book.unit}' and this one '{private.unit}'; "
            "their budgets do not add up, so use one unit in the whole recipe"
        )
    return book


@dataclass(frozen=True)
class Prepare:
    """Raw examples -> network input, each example by itself: augmentation, then standardisation."""

    preprocess: Preprocess
    how: Augment

    def __call__(self, x: Tensor, chance: torch.Generator) -> Tensor:
        """Maps raw examples [k, ...] to float32 [k, ...]."""
        return self.preprocess(augment(x, self.how, chance) if self.how.active else x)


def local_settings(stage: FederateSettings) -> LocalSettings:
    """Returns the part of the stage that a client needs."""
    return LocalSettings(**{name: getattr(stage, name) for name in LocalSettings.model_fields})


def steps_per_round(stage: FederateSettings, examples: int) -> int:
    """Returns the local steps of one round for a client of so many examples."""
    return stage.epochs * math.ceil(examples / stage.batch_size)


def _trainable(model: nn.Module, patterns: tuple[str, ...]) -> nn.Module:
    hit = 0
    for name, p in model.named_parameters():
        p.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        hit += p.requires_grad
    if not hit:
        names = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise RecipeError(
            f"federate.trainable: no parameter matches {list(patterns)}; names look like {names} and '*' matches all"
        )
    return model


def _check_promise(private: PrivacySettings, examples: dict[str, int], cohort: Cohort) -> None:
    if private.unit == "client" and cohort.sampling == "fixed" and cohort.size < cohort.population:
        raise RecipeError(
            f"stage.sampling: a fixed cohort of {cohort.size} in {cohort.population} clients breaks client privacy, "
            "since a client that joins displaces another and moves the sum twice; set sampling = 'poisson', or take "
            "all clients"
        )
    units = len(examples) if private.unit == "client" else sum(examples.values())
    if private.delta >= 1 / units:
        raise RecipeError(
            f"stage.privacy.delta: got {private.delta:g}, which lets one of the {units} protected {private.unit}s be "
            f"given away whole; take it well below {1 / units:.1g}"
        )


def _plans(stage: FederateSettings, examples: dict[str, int], cohort: Cohort) -> dict[str, PrivacyPlan]:
    """Returns every client's plan, all with the noise that the most exposed of them needs."""
    private = stage.privacy
    if private is None:
        return {}
    _check_promise(private, examples, cohort)
    base = PrivacyPlan(private.unit, private.clip_norm, cohort.sampling_prob, delta=private.delta)
    if private.unit == "client":
        plans = dict.fromkeys(examples, base)
    else:
        plans = {
            name: replace(base, sampling_prob=min(1.0, stage.batch_size / n), steps_per_round=steps_per_round(stage, n))
            for name, n in examples.items()
        }
    noise = private.noise_multiplier
    if noise is None:
        assert private.epsilon is not None
        budget, length = private.epsilon, max(1, stage.num_rounds)
        noise = max(p.calibrate(epsilon=budget, num_rounds=length).noise_multiplier for p in set(plans.values()))
    return {name: replace(plan, noise_multiplier=noise) for name, plan in plans.items()}
