"""The server's half of a federate stage: bound from the recipe and a population, never from a client's data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fedpress.core import parameters
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.data.population import Population
from fedpress.errors import DataError, RecipeError, TrainingError, WireError
from fedpress.federation import (
    RoundRecord,
    Transport,
    Uplink,
)
from fedpress.federation.client_plan import check_norm
from fedpress.federation.exchange import Traffic, exchange
from fedpress.federation.protocol import check_header, need, text_tensor
from fedpress.federation.schedules import Participation
from fedpress.federation.server import Start, rounds
from fedpress.privacy.ledger import POPULATION, Ledger, LedgerEntry
from fedpress.stages.federate.contract import CommonInputs, Contract, owns_keys
from fedpress.stages.federate.protection import Protection, repeated
from fedpress.stages.federate.settings import FederateSettings
from fedpress.stages.federate.sizes import sizes
from fedpress.wire.fields import NUMBER, check_field
from fedpress.wire.message import Message, pack

PRIVACY_KEYS = ("unit", "delta", "noise_multiplier", "clip_norm", "sampling_prob")


@dataclass(frozen=True, eq=False)
class ServerHalf:
    """Everything that the server needs: only the rounds are missing.

    Attributes:
        common: the settings, the model to work in, the seed.
        contract: the stage bound to the population; the clients' halves are bound from the same
            facts.
        transport: reaches the clients.
        ledger: what was spent before this stage; without end, if this stage is open.
        secret: 256 bits on which the server's noise and draws hang instead of the seed.
        set_up: bytes of the messages in which clients registered and agreed, as far as they may be
            told.
    """

    common: CommonInputs
    contract: Contract
    transport: Transport
    ledger: Ledger
    secret: int | None = None
    set_up: Traffic = field(default_factory=Traffic)

    @classmethod
    def bind(
        cls,
        common: CommonInputs,
        transport: Transport,
        *,
        ledger: Ledger | None = None,
        secret: int | None = None,
    ) -> ServerHalf:
        """Asks the clients for their public facts, binds the stage to them, and lets every client agree.

        A client that does not agree, and says why, is refused in every round.

        Raises:
            RecipeError: if settings do not fit the population, or no client agrees.
            PrivacyError: if the budget cannot be kept.
            TrainingError: if a client does not say who it is.
        """
        before = transport.traffic
        contract = common.contract(register(transport))
        trust = contract.uplink.trust
        check_norm(contract.terms.norm, common.model, sample=trust.unit == "sample")
        book, registered = _ledger(common.stage, ledger), transport.traffic - before
        refused = agree(transport, contract)
        agreed = transport.traffic - before - registered
        if trust.hides_cohort:  # nor may be told by the length of their replies who refused
            agreed = Traffic(_bytes_if_all_agree(contract), agreed.down)
        plan = cls(common, contract, transport, book, secret, registered + agreed)
        if len(refused) == len(contract.population):
            name = contract.population.names[0]
            raise RecipeError(
                f"no client agrees, for instance {name} ({refused[name]})",
                place="federate",
                cure="start all of them with this recipe",
            )
        return plan

    @property
    def stage(self) -> FederateSettings:
        """The settings."""
        return self.common.stage

    @property
    def model(self) -> nn.Module:
        """A model to work in: the server's parameters are put into it."""
        return self.common.model

    @property
    def population(self) -> Population:
        """Who can be asked."""
        return self.contract.population

    @property
    def unit(self) -> str | None:
        """What is protected: "sample", "client", or None without privacy."""
        return None if self.stage.privacy is None else self.stage.privacy.unit

    @property
    def uplink(self) -> Uplink:
        """How updates travel."""
        return self.contract.terms.uplink

    @property
    def protection(self) -> Protection:
        """The planned privacy."""
        return self.contract.protection

    def rounds(self, start: Start) -> Iterator[RoundRecord]:
        """Returns the rounds after `start`, each computed when it is asked for."""
        return rounds(
            self.contract.terms,
            self.transport,
            start,
            secret=self.secret,
            delays=self.stage.delays,
        )

    def sizes(self) -> dict[str, Any]:
        """Returns the bytes of real messages, and bits for each value, see `sizes.sizes`.

        What sets up a run is counted whole: these messages were sent already when the halves were
        bound.
        """
        told = sizes(self.contract, parameters.flatten(self.model))
        told["bytes_set_up"] += self.set_up.up + self.set_up.down
        return told

    @property
    def keys(self) -> str | None:
        """Where the keys of a secure sum come from: "system" randomness or the "seed"; None for a plain sum."""
        if self.protection.grid is None:
            return None
        return "system" if owns_keys(self.stage) else "seed"

    @property
    def hides_cohort(self) -> bool:
        """Whether the server sees what nobody else may: updates without noise, and who sent them."""
        return self.uplink.trust.hides_cohort

    @cached_property
    def planned_bytes(self) -> tuple[int, int]:
        """Bytes up and down of a round with the planned cohort and an update of noise."""
        sizes = self.sizes()
        return sizes["bytes_up_per_round"], sizes["bytes_down_per_round"]

    @cached_property
    def participation(self) -> Participation:
        """Who is asked in which round, known before anybody is."""
        if self.secret is None:
            return self.contract.participation
        context = replace(self.contract.context, draw_seed=self.secret)
        return self.stage.schedule.plan_participation(context, self.stage.num_rounds)

    def planned_tasks(self) -> dict[ClientId, int]:
        """Returns how often each client may be asked in all rounds together."""
        return {name: self.participation.tasks(name) for name in self.population.names}

    def charges(self, tasks: Mapping[ClientId, int], first: int, last: int) -> list[LedgerEntry]:
        """Returns what `tasks` of clients in rounds `first` to `last` cost: each its own, or the population as one."""
        planned, name = self.protection, self.stage.name
        if (
            planned.charged_once and first > 1
        ):  # all rounds are one mechanism, charged before the first
            return []
        if POPULATION in planned.costs:
            rounds = math.ceil((last - first + 1) / self.uplink.cohort.period)
            tasks = {POPULATION: 1 if planned.charged_once else rounds}
        return [
            LedgerEntry.of(who, name, repeated(planned.costs[who], count), first, last)
            for who, count in tasks.items()
            if count
        ]

    def spend(self, ledger: Ledger, tasks: Mapping[ClientId, int], first: int, last: int) -> Ledger:
        """Returns `ledger` with the `charges` for these tasks and rounds in it.

        Raises:
            PrivacyError: if they pass the budget.
        """
        private, charges = self.stage.privacy, self.charges(tasks, first, last)
        assert private is not None
        if private.epsilon is None or not charges:
            return ledger.add(*charges)
        # The noise was calibrated to this very epsilon: rounding must not make the last round pass
        # it.
        return ledger.spend(*charges, epsilon=private.epsilon * (1 + 1e-9), delta=private.delta)

    def schedule_facts(self) -> dict[str, Any]:
        """Returns what is known of the schedule before the run, where it is not that of plain rounds."""
        if self.stage.schedule.one_model:
            return {}
        return {"schedule": self.stage.schedule.kind, "most_tasks": self.participation.max_tasks}

    def failure_noise(self, clients: Sequence[ClientId]) -> tuple[float, float]:
        """Returns how many protected units `clients` bring to a round, as planned, and the noise in their counts.

        The noise is its variance in each count of what failed (see `federation.failures`).
        """
        plans = [self.protection.plans[name] for name in clients]
        of = float(self.uplink.cohort.size)
        steps = [self.uplink.trust.noised_counts(plan) for plan in plans]
        if self.uplink.trust.unit == "sample":
            counts = [self.population.counts[name] for name in clients]
            of = sum(
                plan.sampling_prob * n * k for plan, n, k in zip(plans, counts, steps, strict=True)
            )
        if self.uplink.noise is not None:
            return of, self.uplink.noise.multiplier**2
        return of, sum(plan.noise_multiplier**2 * k for plan, k in zip(plans, steps, strict=True))

    def grid_facts(self) -> dict[str, Any]:
        """Returns how a secure sum is planned; empty for a plain one."""
        grid = self.protection.grid
        return (
            {}
            if grid is None
            else {"bits": grid.plan.bits, "scale": grid.scale, "sum_limit": grid.limit}
        )

    def privacy_facts(self) -> dict[str, Any]:
        """Returns the privacy settings of the client that is charged most."""
        plans = self.protection.plans.values()
        most = max(plans, key=lambda plan: (plan.sampling_prob, plan.steps_per_round))
        told = {
            **{name: getattr(most, name) for name in PRIVACY_KEYS},
            "trust": self.uplink.trust.kind,
        }
        if self.uplink.adaptive is not None:  # the plan counts in units of a clip norm that moves
            told["clip_norm"] = self.uplink.adaptive.initial
        return told

    def client_scores(self, params: Tensor) -> dict[ClientId, float | None]:
        """Asks every client what the model of `params` [d] is worth on its own examples.

        Under privacy that is a private number: nobody is asked. A client that cannot tell could not
        train either; the records say why.
        """
        if self.uplink.privacy is not None:
            return {}
        header: dict[str, JSON] = {"agreement": self.contract.terms.agreement.fingerprint}
        question = Message("evaluate", header, {"params": params})
        found: dict[ClientId, float | None] = {}
        metric = self.common.task.primary
        for name, reply in exchange(self.transport, dict.fromkeys(self.population.names, question)):
            if reply.kind != "evaluated":
                continue
            try:
                score = need(reply.kind, reply.header, "metrics").get(metric)
                if score is not None:  # such as an AUC where there is one class only
                    check_field("evaluated.metrics", metric, score, NUMBER)
            except WireError:  # whatever a client sends, it must not end a run that is done
                continue
            found[name] = None if score is None else float(score)
        return found


def register(transport: Transport) -> Population:
    """Returns the clients that `transport` reaches with what each of them says of itself.

    Raises:
        TrainingError: if one of them says nothing, or something else.
    """
    names = tuple(transport.clients())
    examples: dict[ClientId, int] = {}
    identities: dict[ClientId, bytes] = {}
    silent = dict.fromkeys(names, "no reply came")
    for name, reply in exchange(transport, dict.fromkeys(names, Message("register"))):
        try:
            check_header(reply.kind, reply.header)
            if reply.kind != "registered":
                silent[name] = str(reply.header.get("reason", f"it sent {reply.kind!r}"))
                continue
            if "examples" in reply.header:
                examples[name] = need(reply.kind, reply.header, "examples")
            if "identity" in reply.header:
                identities[name] = bytes.fromhex(need(reply.kind, reply.header, "identity"))
        except (WireError, ValueError) as problem:
            silent[name] = str(problem)
        else:
            silent.pop(name, None)
    for name, why in silent.items():
        raise TrainingError(
            f"it did not register ({why})",
            place=f"client '{name}'",
            cure="see whether it is running, or leave it out",
        )
    try:
        return Population(names, examples or None, identities)
    except DataError as problem:
        raise RecipeError(
            f"the clients do not work with one recipe ({problem})",
            place="federate",
            cure="use the same recipe",
        ) from problem


def agree(transport: Transport, contract: Contract) -> dict[ClientId, str]:
    """Sends every client the population and the agreement; returns who refuses, with the entry that differs."""
    agreement, names = contract.terms.agreement, contract.population.names
    question = Message(
        "agree",
        {},
        {
            "agreement": text_tensor(agreement.to_json()),
            "population": text_tensor(contract.population.to_json()),
        },
    )
    refused = dict.fromkeys(names, "no reply came")
    for name, reply in exchange(transport, dict.fromkeys(names, question)):
        if reply.kind == "agreed" and reply.header.get("agreement") == agreement.fingerprint:
            refused.pop(name, None)
        else:
            refused[name] = str(reply.header.get("reason", f"it sent {reply.kind!r}"))
    return refused


def _bytes_if_all_agree(contract: Contract) -> int:
    """Returns the bytes of the replies to "agree" if no client refuses."""
    reply = Message("agreed", {"agreement": contract.terms.agreement.fingerprint})
    return len(pack(reply)) * len(contract.population)


def _ledger(stage: FederateSettings, book: Ledger | None) -> Ledger:
    """Returns the book for this stage; one without privacy charges the clients without end before it touches them.

    Raises:
        RecipeError: if the book cannot carry this stage's promise.
    """
    private = stage.privacy
    if private is None:
        book = book if book is not None else Ledger("sample")
        return (
            book.add(LedgerEntry(POPULATION, stage.name, 1.0, 0.0, 1)) if stage.num_rounds else book
        )
    book = book if book is not None else Ledger(private.unit)
    open_stage = next((c.what for c in book.charges if c.noise_multiplier == 0), None)
    if open_stage is not None:
        raise RecipeError(
            (
                f"the earlier stage '{open_stage}' uses the same clients without privacy, so no "
                "promise about them can hold"
            ),
            place="privacy",
            cure="give that stage privacy too, or leave it out",
        )
    if book.unit != private.unit:
        raise RecipeError(
            f"an earlier stage protects unit '{book.unit}' and this one '{private.unit}'",
            place="privacy.unit",
            cure="their budgets do not add up, so use one unit in the whole recipe",
        )
    return book
