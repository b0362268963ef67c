"""A client's half of a federate stage: bound from the recipe, public facts, and its own data, secret and state."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from fedpress.core import parameters, random
from fedpress.core.canonical import JSON
from fedpress.core.examples import Arrays
from fedpress.core.names import ClientId
from fedpress.data.population import Population
from fedpress.errors import FedpressError, RecipeError, WireError
from fedpress.federation import Client, ClientPlan, ClientState
from fedpress.federation.client_state import load_json
from fedpress.federation.protocol import check_header, read_text
from fedpress.secagg import SecAggClient, identity
from fedpress.stages.federate.contract import (
    CommonInputs,
    Contract,
    counts_are_public,
    owns_keys,
)
from fedpress.stages.federate.protection import is_secure
from fedpress.tasks.base import number
from fedpress.training.evaluate import evaluate
from fedpress.wire.message import Message, pack, unpack


@dataclass(eq=False)
class ClientHalf:
    """One client, from the first question ("register") to the last; it knows no other client's data.

    Attributes:
        name: under which the transport knows it.
        arrays: its private examples.
        common: what everybody is given.
        memory: what it keeps from round to round, and its secret.
        client: what answers in the rounds; None before it has agreed.
    """

    name: ClientId
    arrays: Arrays
    common: CommonInputs
    memory: ClientState
    client: Client | None = None
    _refusal: FedpressError | None = field(default=None, repr=False)

    def handle(self, request: bytes) -> bytes:
        """Answers the bytes of one message, see `fedpress.federation.protocol`.

        Raises:
            WireError: if the request is damaged, or this client has not agreed to what it is asked
                under.
            FedpressError: whatever the answer raises, see `Client.answer`.
        """
        message = unpack(request)
        check_header(message.kind, message.header)
        if message.kind == "register":
            return pack(self._register())
        if message.kind == "agree":
            return pack(self._agree(message))
        if self.client is None:
            raise self._refused(message.kind)
        if message.kind == "evaluate":
            return pack(self._evaluate(self.client, message))
        return pack(self.client.answer(message))

    def _refused(self, question: str) -> WireError:
        """Returns why this client answers no question: it did not agree, or was never asked to."""
        why = self._refusal
        if why is None:
            return WireError(
                "this client has agreed to nothing", place=question, cure="send 'agree' first"
            )
        return WireError(why.problem, place=why.place, cure=why.cure)

    def _register(self) -> Message:
        """Says what may be known of this client: no count of examples where whole clients are protected."""
        header: dict[str, JSON] = {}
        if counts_are_public(self.common.stage):
            header["examples"] = len(self.arrays)
        if is_secure(self.common.stage):
            header["identity"] = identity(self._key()).hex()
        return Message("registered", header)

    def _agree(self, message: Message) -> Message:
        """Binds this half to the population that the server sent, and compares the agreements.

        Raises:
            WireError: naming the entry that differs; from then on every question gets this answer.
        """
        self.client, self._refusal = None, None
        try:
            population = Population.from_json(read_text(message, "population"))
            self._check_own(population)
            client = self._bind(self.common.contract(population))
            answer = client.answer(message)
        except FedpressError as problem:
            self._refusal = problem
            if isinstance(problem, WireError):
                raise
            raise WireError(
                f"this client's recipe does not go with these clients ({problem})",
                place="agree",
                cure="use the same recipe",
            ) from problem
        self.client = client
        return answer

    def _check_own(self, population: Population) -> None:
        """Sees that the server says of this client what it said itself: its noise is planned from that."""
        if self.name not in population.names:
            raise WireError(
                f"it does not name {self.name!r}",
                place="agree.population",
                cure="let this client register",
            )
        if population.examples is not None and counts_are_public(self.common.stage):
            told, own = population.examples[self.name], len(self.arrays)
            if told != own:
                raise WireError(
                    f"the server says that {self.name!r} has {told}, it has {own}",
                    place="agree.population.examples",
                    cure="let this client register again",
                )
        named = population.identities.get(self.name)
        if is_secure(self.common.stage) and named != identity(self._key()):
            raise WireError(
                f"the server names another key than that of {self.name!r}",
                place="agree.population.identities",
                cure="let this client register again",
            )

    def _bind(self, contract: Contract) -> Client:
        terms, stage = contract.terms, self.common.stage
        privacy = contract.plan_of(self.name)
        plan = ClientPlan.bind(
            terms,
            self.common.model,
            privacy=privacy,
        )
        drawn = stage.privacy is not None and stage.privacy.secure_noise
        return Client(
            name=self.name,
            arrays=self.arrays,
            model=self.common.model,
            plan=plan,
            memory=self.memory,
            member=self._member(contract),
            secret=secret_of(self.memory) if drawn else None,
        )

    def _member(self, contract: Contract) -> SecAggClient | None:
        grid, run = contract.protection.grid, contract.terms.agreement.fingerprint
        if grid is None:
            return None
        identities = dict(contract.population.identities)
        member = SecAggClient(self.name, self._key(), grid.plan, identities, run)
        noted = load_json(self.memory, "member")
        if noted.get("run") == run:
            member.load_state_(noted)
        elif noted:  # by an older version, which named the run otherwise
            member.take_over_(noted)
        return member

    def _key(self) -> bytes:
        """The secret behind this client's keys of a secure sum: its own, or in experiments from the seed."""
        own = owns_keys(self.common.stage)
        seed = secret_of(self.memory) if own else self.common.seed
        return random.secret_key(seed, "member", self.name)

    def _evaluate(self, client: Client, message: Message) -> Message:
        """Says what the server's model is worth on this client's own examples.

        Raises:
            WireError: under privacy, where that is a private number, or if the parameters are not
                those of the model.
        """
        client.check_agreement(message)
        if client.uplink.privacy is not None:
            raise WireError(
                "what a model is worth on private examples is a private number",
                place="evaluate",
                cure="leave it out under privacy",
            )
        model = self.common.model
        parameters.assign_(model, client.read_params(message))
        task = self.common.task
        found = evaluate(model, self.arrays, self.common.preprocess, task)
        metrics: dict[str, JSON] = {task.primary: number(found.score)}
        return Message("evaluated", {"examples": len(self.arrays), "metrics": metrics})

    def rehearse(self, arrays: Arrays) -> None:
        """Does one step of this client's work on `arrays`, which must be public, see `Client.rehearse`.

        Raises:
            RecipeError: if this client has not agreed to anything.
            Exception: whatever the network raises on them.
        """
        if self.client is None:
            refused = self._refused("rehearse")
            where = f"client '{self.name}': {refused.place}"
            raise RecipeError(refused.problem, place=where, cure=refused.cure)
        self.client.rehearse(arrays)


def secret_of(memory: ClientState) -> int:
    """Returns the 256 secret bits in `memory`, drawn from the operating system the first time."""
    note = memory.entry("secret")
    if not note:
        note = {"bytes": torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8)}
        memory.save_entry("secret", note)
    return int.from_bytes(bytes(note["bytes"].tolist()), "little")
