"""Binds a federate stage to a model and its clients: uplink, privacy and transport fit together, or a RecipeError."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.codecs import VALUES, Key
from fedpress.compress.sparse.compact import compact_
from fedpress.core import parameters, random
from fedpress.core.examples import Preprocess
from fedpress.core.random import derive
from fedpress.errors import RecipeError
from fedpress.federation import (
    Adder,
    Algorithm,
    Client,
    ClientPlan,
    ClientState,
    Cohort,
    DiskState,
    Downlink,
    InMemoryState,
    LocalSettings,
    PlainSum,
    RoundRecord,
    SecureSum,
    Terms,
    Uplink,
    private_sgd,
    sgd,
)
from fedpress.federation.client_state import load_json
from fedpress.federation.downlink import Broadcast
from fedpress.federation.server import rounds
from fedpress.nn.resize import copied
from fedpress.privacy.ledger import POPULATION, Ledger, LedgerEntry
from fedpress.secagg import SecAggClient, identity
from fedpress.stages.federate.privacy import Protection, protect, repeated
from fedpress.stages.federate.settings import FederateSettings
from fedpress.training.augment import Augment, augment
from fedpress.training.device import place_
from fedpress.transport import LocalTransport
from fedpress.wire.message import JSON, Message, pack
from fedpress.workspace.state import State

SERVER = "server"
PROMISE = ("unit", "delta", "noise_multiplier", "clip_norm", "sampling_prob")


@dataclass(frozen=True, eq=False)
class Federation:
    """Everything of a federate stage, bound: only the rounds are missing.

    Attributes:
        stage: the settings.
        model: a copy to work in, its trainable parameters marked.
        terms: what server and clients hold alike.
        clients: by name.
        transport: reaches them.
        protection: the planned privacy.
        ledger: what was spent before this stage; without end, if this stage is open.
        seed: of this stage.
        secret: on which the server's noise hangs instead of the seed.
    """

    stage: FederateSettings
    model: nn.Module
    terms: Terms
    clients: dict[str, Client]
    transport: LocalTransport
    protection: Protection
    ledger: Ledger
    seed: int
    secret: int | None

    @property
    def agreement(self) -> str:
        """The fingerprint of what server and clients hold alike."""
        return self.terms.agreement.fingerprint

    @property
    def uplink(self) -> Uplink:
        """How updates travel."""
        return self.terms.uplink

    @property
    def downlink(self) -> Downlink | None:
        """How the model travels to the clients, None if whole."""
        return self.terms.downlink

    def rounds(
        self, params: Tensor, *, start: int, server_state: dict[str, Tensor] | None
    ) -> Iterator[RoundRecord]:
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
            downlink=self.downlink,
            secret=self.secret,
        )

    @property
    def _sample(self) -> bool:
        return self.stage.privacy is not None and self.stage.privacy.unit == "sample"

    def sizes(self) -> dict[str, Any]:
        """Returns the bytes of real messages, and bits for each value, with an update of Gaussian noise.

        Updates of real training have heavier tails and become smaller. Clients are changed: bind again for a run.
        """
        params, chance = parameters.flatten(self.model), torch.Generator().manual_seed(0)
        change = torch.randn(len(params), generator=chance) * (
            1e-3 * float(params.std()) if len(params) > 1 else 1e-3
        )
        client, cohort = next(iter(self.clients)), self.uplink.cohort.size
        before = self.transport.traffic
        session = self.uplink.adder.open(self.transport, self.agreement)
        set_up = self.transport.traffic - before
        names = list(self.clients)[:cohort]
        tensors = self.uplink.encode(change, Key(self.seed, 1, client))
        header: dict[str, JSON] = {"round": 1, "examples": 1, "loss": 1.0, "steps": 1}
        counts: dict[str, JSON] = {}
        if self.uplink.privacy is not None and self.uplink.trust != "central":
            counts = {"failures": [0.123456789012345, 0.123456789012345]}
        if (member := self.clients[client].member) is not None:
            part = member.mask(tensors[VALUES], round=1, cohort=names)
            header, tensors = {"round": 1, "secure": dict(part.header)}, dict(part.tensors)
        up = len(pack(Message("update", header | counts, tensors)))
        first = down = len(
            pack(Message("fit", self._said(session.invite(names)), {"params": params}))
        )
        if self.downlink is not None:
            broadcast = Broadcast.open(self.downlink, self.seed, [client], {})
            for round, model in ((1, params), (2, params + change)):
                version, tensors = broadcast.code(round, model, [client])[client]
                header = {**self._said(session.invite(names)), "from": version}
                down = len(pack(Message("fit", header, tensors)))
                first = down if round == 1 else first
                broadcast.arrived({})
        size = max(1, len(params))
        return {
            "bits_per_value_up": 8 * up / size,
            "bits_per_value_down": 8 * down / size,
            "bytes_up_per_round": up * cohort,
            "bytes_down_per_round": down * cohort,
            "bytes_down_first_time": first if self.downlink is not None else None,
            "bytes_set_up": set_up.up + set_up.down or None,
        }

    def _said(self, invitation: dict[str, JSON]) -> dict[str, JSON]:
        return {"round": 1, "agreement": self.agreement, **invitation}

    @property
    def keys(self) -> str | None:
        """Where the keys of a secure sum come from: "system" randomness or the "seed"; None for a plain sum."""
        if self.protection.grid is None:
            return None
        return "system" if owns_keys(self.stage) else "seed"

    @property
    def hides(self) -> bool:
        """Whether the server sees what nobody else may: updates without noise, and who sent them."""
        return self.uplink.noise is not None

    @cached_property
    def planned_bytes(self) -> tuple[int, int]:
        """Bytes up and down of a round with the planned cohort and an update of noise."""
        sizes = self.sizes()
        return sizes["bytes_up_per_round"], sizes["bytes_down_per_round"]

    def drawn(self, number: int) -> list[str]:
        """Returns the clients that take part in round `number`."""
        return self.uplink.cohort.draw(
            self.transport.clients(), seed=self.secret or self.seed, round=number
        )

    def charges(self, clients: list[str], first: int, last: int) -> list[LedgerEntry]:
        """Returns what rounds `first` to `last` cost: each of `clients` its own part, or the population as one."""
        planned = self.protection
        if planned.whole and first > 1:  # all rounds are one mechanism, charged before the first
            return []
        count = 1 if planned.whole else math.ceil((last - first + 1) / self.uplink.cohort.period)
        who = [POPULATION] if POPULATION in planned.costs else clients
        name = self.stage.name
        return [
            LedgerEntry.of(w, name, repeated(planned.costs[w], count), first, last) for w in who
        ]

    def failure_noise(self, clients: Sequence[str]) -> tuple[float, float]:
        """Returns how many protected units `clients` bring to a round, as planned, and the noise in their counts.

        The noise is its variance in each count of what failed (see `federate.failures`).
        """
        plans = [self.protection.plans[name] for name in clients]
        of = float(self.uplink.cohort.size)
        if self._sample:
            steps = [1 if self.uplink.joint else plan.steps_per_round for plan in plans]
            sizes = [len(self.clients[name].arrays) for name in clients]
            of = sum(
                plan.sampling_prob * n * k for plan, n, k in zip(plans, sizes, steps, strict=True)
            )
        else:
            steps = [1] * len(plans)
        if self.uplink.noise is not None:
            return of, self.uplink.noise.multiplier**2
        return of, sum(plan.noise_multiplier**2 * k for plan, k in zip(plans, steps, strict=True))

    def grid(self) -> dict[str, Any]:
        """Returns how a secure sum is planned; empty for a plain one."""
        grid = self.protection.grid
        return (
            {}
            if grid is None
            else {"bits": grid.plan.bits, "scale": grid.scale, "sum_limit": grid.limit}
        )

    def promise(self) -> dict[str, Any]:
        """Returns the privacy settings of the client that is charged most."""
        plans = self.protection.plans.values()
        most = max(plans, key=lambda plan: (plan.sampling_prob, plan.steps_per_round))
        told = {**{name: getattr(most, name) for name in PROMISE}, "trust": self.uplink.trust}
        if self.uplink.adaptive is not None:  # the plan counts in units of a clip norm that moves
            told["clip_norm"] = self.uplink.adaptive.initial
        return told


def bind(stage: FederateSettings, state: State, folder: Path | None = None) -> Federation:
    """Fits stage, model and clients together.

    `folder` is where clients keep what must outlive a round and a process; in memory without one.

    Raises:
        RecipeError: naming the setting that does not fit, and the cure.
        PrivacyError: if the budget cannot be kept.
    """
    clients = state.data.clients
    if not clients:
        raise RecipeError("federate: the data set has no clients; set data.num_clients")
    cohort = Cohort(stage.cohort or len(clients), len(clients), stage.sampling)
    model = place_(compact_(_trainable(copied(state.model), stage.trainable), state.spec.sparse))
    layout, private = parameters.Layout.of(model), stage.privacy
    examples = {name: len(arrays) for name, arrays in clients.items()}
    planned = protect(stage, examples, cohort, layout.shapes)
    seed = derive(state.seed, "federate", stage.name)
    memories = _memories(stage, list(clients), folder, seed)
    drawn = private is not None and private.secure_noise
    secrets = {name: secret_of(memory) if drawn else None for name, memory in memories.items()}
    own = owns_keys(stage)
    keys = {
        n: random.secret_key(secret_of(memories[n]) if own else seed, "member", n) for n in clients
    }
    adder = _adder(stage, planned, cohort, keys)
    equal = (
        isinstance(adder, SecureSum)
        or (private is not None and private.unit == "client")
        or planned.divisor
    )
    uplink = Uplink.bind(
        layout.size,
        cohort,
        chain=planned.chain,
        shapes=layout.shapes,
        adder=adder,
        privacy=next(iter(planned.plans.values()), None),
        trust=private.trust if private is not None else None,
        weights=stage.weights or ("equal" if equal else "examples"),
        divisor=planned.divisor,
        noise=planned.noise,
        adaptive=planned.adaptive,
    )
    downlink = (
        Downlink(layout.size, layout.shapes, stage.downlink, stage.first_downlink)
        if stage.downlink
        else None
    )
    if downlink is not None:
        _ = downlink.bound(whole=True), downlink.bound(whole=False)  # says what does not fit
    terms = Terms(
        layout=layout,
        settings=local_settings(stage),
        uplink=uplink,
        seed=seed,
        prepare=Prepare(state.data.preprocess, stage.augment),
        downlink=downlink,
        norm=stage.norm,
        error_feedback=stage.error_feedback,
        num_rounds=stage.num_rounds,
    )
    sample = private is not None and private.unit == "sample"
    shared = Federation(
        stage, model, terms, {}, LocalTransport({}), planned, _ledger(stage, state), seed, None
    )
    run, identities = (
        shared.agreement,
        dict(adder.identities) if isinstance(adder, SecureSum) else {},
    )
    plans = {
        name: ClientPlan.bind(
            terms,
            model,
            local_update=private_sgd if sample and not uplink.joint else sgd,
            privacy=planned.plans[name] if sample else None,
        )
        for name in clients
    }
    made = {
        name: Client(
            name=name,
            arrays=arrays,
            model=model,
            plan=plans[name],
            memory=memories[name],
            member=_member(name, keys[name], adder, identities, run, memories[name]),
            secret=secrets[name],
        )
        for name, arrays in clients.items()
    }
    transport = LocalTransport({name: client.handle for name, client in made.items()})
    return replace(shared, clients=made, transport=transport, secret=secrets[SERVER])


def _memories(
    stage: FederateSettings, clients: list[str], folder: Path | None, seed: int
) -> dict[str, ClientState]:
    """Returns where each client, and the server, keeps what must outlive a process.

    DiskState are put aside by all settings: the memory of a stage that was run otherwise is not taken up.
    """
    names = [*clients, SERVER]
    if folder is None:
        return {name: InMemoryState() for name in names}
    place = folder / random.fingerprint(stage, seed, clients)[:16]
    return {
        name: DiskState(place / (name if name == SERVER else f"{at:05d}"))
        for at, name in enumerate(names)
    }


def owns_keys(stage: FederateSettings) -> bool:
    """Says whether every client draws its keys itself, so that nobody can compute them from the recipe."""
    return stage.secure_keys or (stage.privacy is not None and stage.privacy.secure_noise)


def secret_of(memory: ClientState) -> int:
    """Returns the 256 secret bits in `memory`, drawn from the operating system the first time."""
    note = memory.entry("secret")
    if not note:
        note = {"bytes": torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8)}
        memory.save_entry("secret", note)
    return int.from_bytes(bytes(note["bytes"].tolist()), "little")


def _adder(
    stage: FederateSettings, planned: Protection, cohort: Cohort, keys: dict[str, bytes]
) -> Adder:
    if planned.grid is None:
        return PlainSum()
    identities = tuple((name, identity(key)) for name, key in keys.items())
    return SecureSum(planned.grid.plan, planned.grid.size, planned.grid.limit, identities)


def _member(
    name: str, key: bytes, adder: Adder, identities: dict[str, bytes], run: str, memory: ClientState
) -> SecAggClient | None:
    if not isinstance(adder, SecureSum):
        return None
    member = SecAggClient(name, key, adder.plan, identities, run)
    if noted := load_json(memory, "member"):
        member.load_state_(noted)
    return member


def _ledger(stage: FederateSettings, state: State) -> Ledger:
    """Returns the book for this stage; one without privacy charges the clients without end before it touches them.

    Raises:
        RecipeError: if the book cannot carry this stage's promise.
    """
    private, book = stage.privacy, state.ledger
    if private is None:
        book = book if book is not None else Ledger("sample")
        return (
            book.add(LedgerEntry(POPULATION, stage.name, 1.0, 0.0, 1)) if stage.num_rounds else book
        )
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
