"""The server of a federate stage: it registers clients, plans the stage, and runs the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fedpress.core import parameters
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.core.random_source import public_stream
from fedpress.data.population import Population
from fedpress.errors import DataError, RecipeError, TrainingError, WireError
from fedpress.federation import (
    RoundRecord,
    Transport,
    Uplink,
)
from fedpress.federation.client_plan import check_norm
from fedpress.federation.exchange import Traffic, exchange
from fedpress.federation.protocol import check_header, need, refusal_of, text_tensor
from fedpress.federation.schedules import Participation
from fedpress.federation.server import Start, rounds
from fedpress.privacy.ledger import Ledger
from fedpress.stages.federate.budget import epsilon_left
from fedpress.stages.federate.contract import CommonInputs, Contract, owns_keys, unprotected
from fedpress.stages.federate.protection import Protection
from fedpress.stages.federate.settings import FederateSettings
from fedpress.stages.federate.sizes import message_sizes
from fedpress.wire.fields import NUMBER, check_field
from fedpress.wire.message import Message, pack

PRIVACY_KEYS = ("unit", "delta", "noise_multiplier", "clip_norm", "sampling_prob")
"""Fields of a privacy plan that are shown in the result."""
ROUNDING = 1e-9
"""Share by which epsilon may exceed the budget, because of floating-point rounding."""


@dataclass(frozen=True, eq=False)
class ServerSide:
    """Everything that the server needs to run the rounds.

    Attributes:
        common: the settings, the server's copy of the model, and the seed.
        contract: the plan of the stage. Clients compute the same plan from the same public facts.
        transport: carries messages to the clients.
        ledger: privacy spent before this stage. If this stage has no privacy, the ledger also
            contains an entry of infinite epsilon.
        secret: key of the server's noise and draws (256 bits). If None, they follow from the seed.
        set_up: bytes of the messages before the first round (offer, register, agree).
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
        population: Population | None = None,
        earlier: Traffic | None = None,
    ) -> ServerSide:
        """Registers the clients, plans the stage for them, and asks every client to agree.

        A client that does not agree answers no round; the records show its reason.

        Args:
            common: inputs that are equal on both sides.
            transport: carries messages to the clients.
            ledger: privacy spent by earlier stages.
            secret: key of the server's noise and draws; None: they follow from the seed.
            population: the clients that have registered before; None: clients register now.
            earlier: bytes of messages before this call that belong to the set-up.

        Raises:
            RecipeError: if settings do not fit the population, or no client agrees.
            PrivacyError: if the budget cannot be kept.
            TrainingError: if a client does not register.
        """
        before = transport.traffic
        population = population or register(transport)
        started = _ledger(common.stage, ledger)
        left = epsilon_left(common, population, started)
        contract = common.contract(population, left)
        trust = contract.uplink.trust
        # Clients check this too, but here the error comes before any message is sent.
        check_norm(contract.terms.norm, common.model, sample=trust.unit == "sample")
        registered = transport.traffic - before
        refused = agree(transport, contract, left)
        agreed = transport.traffic - before - registered
        # A refusal is longer than an agreement, so the real bytes would reveal whether a client
        # refused.
        if trust.hides_cohort:
            agreed = Traffic(_bytes_if_all_agree(contract), agreed.down)
        set_up = (earlier or Traffic()) + registered + agreed
        side = cls(common, contract, transport, started, secret, set_up)
        # If only some clients refuse, the rounds go on without these clients.
        if len(refused) == len(contract.population):
            name = contract.population.names[0]
            raise RecipeError(
                f"no client agrees, for instance {name} ({refused[name]})",
                place="federate",
                cure=(
                    "change the recipe or ask the owners of the data; all clients need the same "
                    "recipe"
                ),
            )
        return side

    @property
    def stage(self) -> FederateSettings:
        """The settings."""
        return self.common.stage

    @property
    def model(self) -> nn.Module:
        """The server's copy of the model; the server's parameters are written into it."""
        return self.common.model

    @property
    def population(self) -> Population:
        """All clients, with their public counts and keys."""
        return self.contract.population

    @property
    def unit(self) -> str | None:
        """What is protected: "sample", "client", or None without privacy."""
        return None if self.stage.privacy is None else self.stage.privacy.unit

    @property
    def uplink(self) -> Uplink:
        """How the clients' updates are encoded, summed, noised and divided."""
        return self.contract.terms.uplink

    @property
    def protection(self) -> Protection:
        """The planned privacy."""
        return self.contract.protection

    def rounds(self, start: Start) -> Iterator[RoundRecord]:
        """Returns the rounds after `start` as a generator."""
        return rounds(
            self.contract.terms,
            self.transport,
            start,
            secret=self.secret,
            delays=self.stage.delays,
        )

    def sizes(self) -> dict[str, Any]:
        """Returns bytes and bits per value of the stage's messages, see `message_sizes`.

        The messages to register and agree were already sent, so their real bytes are added.
        """
        found = message_sizes(self.contract, parameters.flatten(self.model))
        found["bytes_set_up"] += self.set_up.up + self.set_up.down
        return found

    @property
    def noise_source(self) -> str | None:
        """Origin of the noise: "system" (secret and random) or "seed"; None without privacy."""
        if self.stage.privacy is None:
            return None
        return "system" if self.stage.privacy.secure_noise else "seed"

    @property
    def keys(self) -> str | None:
        """Origin of a secure sum's keys: "system" (random) or "seed"; None for a plain sum."""
        if self.protection.grid is None:
            return None
        return "system" if owns_keys(self.stage) else "seed"

    @property
    def hides_cohort(self) -> bool:
        """Whether only the server may know which clients took part."""
        return self.uplink.trust.hides_cohort

    @cached_property
    def planned_bytes(self) -> tuple[int, int]:
        """Planned bytes (up, down) of a round, for an update of random values."""
        sizes = self.sizes()
        return sizes["bytes_up_per_round"], sizes["bytes_down_per_round"]

    @cached_property
    def participation(self) -> Participation:
        """Which client is asked in which round; it is drawn before the run."""
        if self.secret is None:
            return self.contract.participation
        # The contract is drawn from the seed, which clients know. The real draw follows from the
        # secret, so that no client can know who else takes part.
        context = replace(self.contract.context, draw_seed=self.secret)
        return self.stage.schedule.plan_participation(context, self.stage.num_rounds)

    def planned_tasks(self) -> dict[ClientId, int]:
        """Returns how often each client may be asked in all rounds together."""
        return {name: self.participation.tasks(name) for name in self.population.names}

    def spend(self, ledger: Ledger, tasks: Mapping[ClientId, int], first: int, last: int) -> Ledger:
        """Returns `ledger` with the privacy cost of some rounds added.

        Args:
            ledger: the ledger before these rounds.
            tasks: how often each client is asked in these rounds.
            first: number of the first round.
            last: number of the last round.

        Raises:
            PrivacyError: if the budget is exceeded.
        """
        private = self.stage.privacy
        charges = self.contract.charges(tasks, first, last)
        assert private is not None
        if private.epsilon is None or not charges:
            return ledger.add(*charges)
        # The noise was calibrated so that all rounds cost exactly epsilon: without the margin a
        # rounding error could stop the run before its last round.
        budget = private.epsilon * (1 + ROUNDING)
        return ledger.spend(*charges, epsilon=budget, delta=private.delta)

    def schedule_facts(self) -> dict[str, Any]:
        """Returns facts about the schedule; none if it sends one model per round to all clients."""
        if self.stage.schedule.one_model:
            return {}
        return {"schedule": self.stage.schedule.kind, "most_tasks": self.participation.max_tasks}

    def failure_noise(self, clients: Sequence[ClientId]) -> tuple[float, float]:
        """Computes how precise the noised counts of failures in a round are.

        Args:
            clients: clients of the round.

        Returns:
            The expected number of protected units in the round, and the variance of the noise of
            each count (see `federation.failures`).
        """
        trust = self.uplink.trust
        units = 0.0 if trust.unit == "sample" else float(self.uplink.cohort.size)
        variance = 0.0
        for name in clients:
            plan = self.protection.plans[name]
            # A client counts in each local step, each time with noise, and reports the sum.
            steps = trust.noised_counts(plan)
            # One failed unit changes a count by 1, so the noise multiplier is the standard
            # deviation.
            variance += plan.noise_multiplier**2 * steps
            if trust.unit == "sample":
                units += plan.sampling_prob * self.population.counts[name] * steps
        if self.uplink.noise is not None:
            variance = self.uplink.noise.multiplier**2
        return units, variance

    def grid_facts(self) -> dict[str, Any]:
        """Returns bits, scale and limit of a secure sum; nothing for a plain sum."""
        grid = self.protection.grid
        if grid is None:
            return {}
        return {"bits": grid.plan.bits, "scale": grid.scale, "sum_limit": grid.limit}

    def privacy_facts(self) -> dict[str, Any]:
        """Returns the privacy settings of the client with the largest epsilon.

        If earlier stages have spent a part of the budget: also the budget, and what they left.
        """
        plans = self.protection.plans.values()
        # All clients have the same noise multiplier. So the client that samples its examples most
        # often has the largest epsilon.
        most = max(plans, key=lambda plan: (plan.sampling_prob, plan.steps_per_round))
        facts = {name: getattr(most, name) for name in PRIVACY_KEYS}
        facts["trust"] = self.uplink.trust.kind
        private, planned = self.stage.privacy, self.contract.stage.privacy
        if private is not None and planned is not None and planned.epsilon != private.epsilon:
            facts |= {"epsilon_budget": private.epsilon, "epsilon_left": planned.epsilon}
        # With an adaptive clip the plan is in units of the present clip norm, so its clip norm is
        # always 1. The initial clip norm says more.
        if self.uplink.adaptive is not None:
            facts["clip_norm"] = self.uplink.adaptive.initial
        return facts

    def _scored(self) -> list[ClientId]:
        """Returns the clients whose own examples measure the final model."""
        names = self.population.names
        count = self.stage.scored_clients
        if count >= len(names):
            return list(names)
        chance = public_stream(self.common.seed, "scored")
        return [names[index] for index in chance.subset(len(names), count).tolist()]

    def client_scores(self, params: Tensor) -> dict[ClientId, float | None]:
        """Asks clients for the task's metric on their own examples.

        Asks `stage.scored_clients` of them, drawn at random. Under privacy no client is asked,
        because the metric is computed from private data. Clients that do not answer are left out.

        Args:
            params: parameters of the model to measure [d].

        Returns:
            Client -> metric; None where the client's examples do not define it.
        """
        if self.uplink.privacy is not None:
            return {}
        header: dict[str, JSON] = {"agreement": self.contract.terms.agreement.fingerprint}
        question = Message("evaluate", header, {"params": params})
        found: dict[ClientId, float | None] = {}
        metric = self.common.task.primary
        for name, reply in exchange(self.transport, dict.fromkeys(self._scored(), question)):
            if reply.kind != "evaluated":
                continue
            try:
                score = need(reply.kind, reply.header, "metrics").get(metric)
                # None is valid: an AUC is not defined where there is only one class.
                if score is not None:
                    check_field("evaluated.metrics", metric, score, NUMBER)
            # One client's faulty message must not turn a finished run into an error.
            except WireError:
                continue
            found[name] = None if score is None else float(score)
        return found


def register(transport: Transport, left_out: Callable[[str], None] | None = None) -> Population:
    """Asks all clients for their public facts.

    Args:
        transport: carries messages to the clients.
        left_out: a function that is called with a sentence for each client that does not register;
            the stage is then planned without this client. If None, such a client ends the run.

    Raises:
        TrainingError: if a client does not answer, or sends another message.
        RecipeError: if the answers contradict each other.
    """
    names = tuple(transport.clients())
    examples: dict[ClientId, int] = {}
    identities: dict[ClientId, bytes] = {}
    silent = dict.fromkeys(names, "no reply came")
    for name, reply in exchange(transport, dict.fromkeys(names, Message("register"))):
        try:
            check_header(reply.kind, reply.header)
            if reply.kind != "registered":
                silent[name] = refusal_of(reply) or f"it sent {reply.kind!r}"
                continue
            if "examples" in reply.header:
                examples[name] = need(reply.kind, reply.header, "examples")
            if "identity" in reply.header:
                identities[name] = bytes.fromhex(need(reply.kind, reply.header, "identity"))
        except (WireError, ValueError) as problem:
            silent[name] = str(problem)
        else:
            silent.pop(name, None)
    registered = tuple(name for name in names if name not in silent)
    for name, why in silent.items():
        if left_out is not None and registered:
            left_out(
                f"client '{name}' does not take part: it did not register ({why}); see whether it "
                "is running"
            )
            continue
        # In a simulation every client is present, so a client that does not register is a bug.
        raise TrainingError(
            f"it did not register ({why})",
            place=f"client '{name}'",
            cure="see whether it is running, or leave it out",
        )
    try:
        return Population(registered, examples or None, identities)
    except DataError as problem:
        raise RecipeError(
            f"the clients have different recipes ({problem})",
            place="federate",
            cure="use the same recipe",
        ) from problem


def agree(
    transport: Transport, contract: Contract, epsilon: float | None = None
) -> dict[ClientId, str]:
    """Sends every client the population and the agreement.

    Args:
        transport: carries messages to the clients.
        contract: the planned stage.
        epsilon: what earlier stages have left of the recipe's epsilon; None: all of it.

    Returns:
        Clients that refuse -> the reason, such as the setting that differs.
    """
    agreement = contract.terms.agreement
    names = contract.population.names
    question = Message(
        "agree",
        {} if epsilon is None else {"epsilon": epsilon},
        {
            "agreement": text_tensor(agreement.to_json()),
            "population": text_tensor(contract.population.to_json()),
        },
    )
    refused = dict.fromkeys(names, "no reply came")
    for name, reply in exchange(transport, dict.fromkeys(names, question)):
        if reply.kind == "agreed" and reply.header.get("agreement") == agreement.fingerprint:
            refused.pop(name, None)
            continue
        try:
            refused[name] = refusal_of(reply) or f"it sent {reply.kind!r}"
        # One client's message must not end the run for all.
        except WireError as problem:
            refused[name] = str(problem)
    return refused


def _bytes_if_all_agree(contract: Contract) -> int:
    """Returns the total bytes of the replies to "agree" if no client refuses."""
    reply = Message("agreed", {"agreement": contract.terms.agreement.fingerprint})
    return len(pack(reply)) * len(contract.population)


def _ledger(stage: FederateSettings, ledger: Ledger | None) -> Ledger:
    """Returns the ledger at the beginning of this stage.

    A stage without privacy adds an entry of infinite epsilon, so that no later stage can claim
    privacy for the same clients.

    Raises:
        RecipeError: if an earlier stage used the clients without privacy, or protected another
            unit.
    """
    private = stage.privacy
    if private is None:
        ledger = ledger if ledger is not None else Ledger("sample")
        if not stage.num_rounds:
            return ledger
        return ledger.add(unprotected(stage))
    ledger = ledger if ledger is not None else Ledger(private.unit)
    open_stage = next((c.what for c in ledger.entries if c.noise_multiplier == 0), None)
    if open_stage is not None:
        raise RecipeError(
            (
                f"the earlier stage '{open_stage}' uses the same clients without privacy, so "
                "no guarantee can hold"
            ),
            place="privacy",
            cure="give that stage privacy too, or leave it out",
        )
    if ledger.unit != private.unit:
        raise RecipeError(
            f"an earlier stage protects unit '{ledger.unit}' and this one '{private.unit}'",
            place="privacy.unit",
            cure="their budgets do not add up, so use one unit in the whole recipe",
        )
    return ledger
