"""One client of a federate stage: it registers, checks the settings, and trains in the rounds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import nn

from fedpress.core import parameters, random
from fedpress.core.canonical import JSON
from fedpress.core.examples import Arrays
from fedpress.core.names import ClientId
from fedpress.data.population import Population
from fedpress.errors import DivergedError, FedpressError, RecipeError, TrainingError, WireError
from fedpress.federation import Client, ClientPlan, ClientState
from fedpress.federation.client_state import load_json
from fedpress.federation.local import GradientSource, Outcome
from fedpress.federation.protocol import check_header, need, read_text
from fedpress.federation.stacked import Training
from fedpress.secagg import SecAggClient, identity
from fedpress.stages.federate.contract import (
    CommonInputs,
    Contract,
    counts_are_public,
    owns_keys,
)
from fedpress.stages.federate.protection import is_secure
from fedpress.tasks.base import json_number
from fedpress.training.evaluate import evaluate
from fedpress.wire.message import Message, pack, unpack

IDENTITY = "identity"
"""Name of an entry in a client's memory: the 32 secret bytes from which its keys follow. Only a
client that keeps its keys for several runs has this entry."""


@dataclass(eq=False)
class ClientSide:
    """One client of a stage, which answers all messages of the server.

    The server first asks the client to register; the client answers with public facts. Then the
    server asks the client to agree to the planned stage. Only a client that has agreed answers in
    rounds.

    Attributes:
        name: name of the client in the transport, which carries the messages.
        arrays: the client's private examples.
        common: settings and model, which are equal on server and clients.
        memory: stores the client's secret and its state between rounds.
        client: answers in the rounds; None until this client has agreed.
        contract: the plan of the stage that this client has agreed to; None before.
        model: the model that this client trains; None: `common.model`.
        source: computes the gradients; None: the default of `ClientPlan`.
    """

    name: ClientId
    arrays: Arrays
    common: CommonInputs
    memory: ClientState
    client: Client | None = None
    contract: Contract | None = None
    model: nn.Module | None = None
    source: GradientSource | None = None
    _refusal: FedpressError | None = field(default=None, repr=False)

    @property
    def num_examples(self) -> int:
        """Number of this client's examples."""
        return len(self.arrays)

    def recall(self) -> None:
        """Reads from `memory` which messages of a secure sum this client has answered.

        Several processes may answer for one client, one after another. In a secure sum, each must
        know what the others have answered.
        """
        if self.client is not None and self.client.member is not None:
            self.client.member.recall_(load_json(self.memory, "member"))

    def handle(self, request: bytes) -> bytes:
        """Answers one message; request and answer are serialized messages. See `answer`."""
        return pack(self.answer(unpack(request)))

    def answer(self, message: Message) -> Message:
        """Answers one message of the server.

        Neither side changes the tensors of the other in place: in one process both messages may
        share them.

        Raises:
            WireError: if the request is invalid, or this client has not agreed.
            FedpressError: any error of `Client.answer`, or if the network calls `sys.exit`.
        """
        try:
            return self._answered(message)
        # It is no `Exception`, so it would end the whole simulation, without a word.
        except SystemExit as problem:
            raise TrainingError(
                f"the client's code has called sys.exit({problem.code!r})",
                place=message.kind,
                cure="raise an error in its place",
            ) from problem

    def _answered(self, message: Message) -> Message:
        """See `answer`."""
        check_header(message.kind, message.header)
        if message.kind == "register":
            return self._register()
        if message.kind == "agree":
            return self._agree(message)
        client = self._agreed(message)
        if message.kind == "evaluate":
            return self._evaluate(client, message)
        return client.answer(message)

    def training(self, message: Message) -> Training:
        """Returns the training that a "fit" request asks for; see `Client.training`.

        Raises:
            WireError: if the request is invalid, or this client has not agreed.
        """
        return self._agreed(message).training(message)

    def answer_trained(self, message: Message, outcome: Outcome | DivergedError) -> Message:
        """Answers a "fit" request whose training is done; see `Client.answer_trained`.

        Raises:
            FedpressError: any error of `Client.answer`.
        """
        return self._agreed(message).answer_trained(message, outcome)

    def _agreed(self, message: Message) -> Client:
        """Returns the object that answers in the rounds.

        Raises:
            WireError: if this client has not agreed. Until then it only sends public facts.
        """
        if self.client is None:
            raise self._refused(message.kind)
        return self.client

    def _refused(self, question: str) -> WireError:
        """Returns the error for a request that comes before this client has agreed.

        If the client has refused to agree, the error gives the reason.
        """
        why = self._refusal
        if why is None:
            return WireError(
                "this client has not agreed yet", place=question, cure="send 'agree' first"
            )
        return WireError(why.problem, place=why.place, cure=why.cure)

    def _register(self) -> Message:
        """Answers with the public facts of this client: its number of examples and public key."""
        header: dict[str, JSON] = {}
        # Under client privacy even the number of examples is private.
        if counts_are_public(self.common.stage):
            header["examples"] = len(self.arrays)
        if is_secure(self.common.stage):
            header["identity"] = identity(self._key()).hex()
        return Message("registered", header)

    def _agree(self, message: Message) -> Message:
        """Plans the stage for the clients that the server names, and compares both sides' plans.

        Raises:
            WireError: if the two plans differ; the error names the setting. From then on this
                client refuses every request but "register" and "agree".
        """
        # If this client refuses now, an agreement from before must not stay valid.
        self.withdraw()
        try:
            population = Population.from_json(read_text(message, "population"))
            self._check_own(population)
            contract = self.common.contract(population, self._epsilon(message))
            client = self._bind(contract)
            answer = client.answer(message)
        except FedpressError as problem:
            # Kept, so that later requests are refused with the same reason.
            self._refusal = problem
            if isinstance(problem, WireError):
                raise
            raise WireError(
                f"this client's recipe does not fit these clients ({problem})",
                place="agree",
                cure="use the same recipe",
            ) from problem
        self.client = client
        self.contract = contract
        return answer

    def _epsilon(self, message: Message) -> float | None:
        """Returns the epsilon that earlier stages have left; None: that of the recipe.

        Raises:
            WireError: if it is larger than the recipe's, which would mean too little noise.
        """
        if "epsilon" not in message.header:
            return None
        left: float = need(message.kind, message.header, "epsilon")
        private = self.common.stage.privacy
        budget = None if private is None else private.epsilon
        if budget is None or left > budget:
            raise WireError(
                f"the server plans with {left:g}, this client's recipe with {budget or 'none'}",
                place="agree.epsilon",
                cure="use the same recipe",
            )
        return left

    def withdraw(self) -> None:
        """Takes the agreement back. From now on only public facts leave this client."""
        self.client = None
        self.contract = None
        self._refusal = None

    def _check_own(self, population: Population) -> None:
        """Checks that the server names this client, with its right number of examples and its key.

        The noise is planned from the number of examples. A malicious server could make the noise
        too small by claiming that this client has more examples.

        Raises:
            WireError: if the server does not name this client, or gives another number or key.
        """
        if self.name not in population:
            raise WireError(
                f"it does not name {self.name!r}",
                place="agree.population",
                cure="let this client register",
            )
        if population.examples is not None and counts_are_public(self.common.stage):
            claimed = population.examples[self.name]
            own = len(self.arrays)
            if claimed != own:
                raise WireError(
                    f"the server says that {self.name!r} has {claimed}, but it has {own}",
                    place="agree.population.examples",
                    cure="let this client register again",
                )
        # With another key under this name, a malicious server could pretend to be this client.
        named = population.identities.get(self.name)
        if is_secure(self.common.stage) and named != identity(self._key()):
            raise WireError(
                f"the server names another key than that of {self.name!r}",
                place="agree.population.identities",
                cure="let this client register again",
            )

    def _bind(self, contract: Contract) -> Client:
        """Returns the object that trains and answers in the rounds, as `contract` plans them."""
        stage = self.common.stage
        privacy = contract.plan_of(self.name)
        model = self.model or self.common.model
        plan = ClientPlan.bind(contract.terms, model, source=self.source, privacy=privacy)
        secure_noise = stage.privacy is not None and stage.privacy.secure_noise
        return Client(
            name=self.name,
            arrays=self.arrays,
            model=model,
            plan=plan,
            memory=self.memory,
            member=self._member(contract),
            secret=secret_of(self.memory) if secure_noise else None,
        )

    def _member(self, contract: Contract) -> SecAggClient | None:
        """Returns the client's part of a secure sum; None for a plain sum.

        It remembers the rounds that this client has answered before a restart.
        """
        grid = contract.protection.grid
        run = contract.terms.agreement.fingerprint
        if grid is None:
            return None
        identities = dict(contract.population.identities)
        member = SecAggClient(self.name, self._key(), grid.plan, identities, run)
        stored = load_json(self.memory, "member")
        if stored.get("run") == run:
            member.load_state_(stored)
        # An older version stored another name of the run. Rounds answered then still count as
        # answered, because a second answer in the same round would reveal the update.
        elif stored:
            member.take_over_(stored)
        return member

    def _key(self) -> bytes:
        """Returns the secret from which this client's keys follow: random, or from the seed."""
        # A client on another machine has one key for all runs, so that other clients can know the
        # key beforehand.
        if identity := self.memory.entry(IDENTITY):
            return bytes(identity["bytes"].tolist())
        own = owns_keys(self.common.stage)
        seed = secret_of(self.memory) if own else self.common.seed
        return random.secret_key(seed, "member", self.name)

    def _evaluate(self, client: Client, message: Message) -> Message:
        """Answers with the metric of the server's model on this client's own examples.

        Raises:
            WireError: under privacy, because the metric depends on private data; if the message
                belongs to another agreement; or if the parameters do not fit the model.
        """
        client.check_agreement(message)
        if client.uplink.privacy is not None:
            raise WireError(
                "a metric on private examples is private too",
                place="evaluate",
                cure="send no 'evaluate' under privacy",
            )
        model = self.common.model
        parameters.assign_(model, client.read_params(message))
        task = self.common.task
        precision = self.common.stage.precision
        found = evaluate(model, self.arrays, self.common.preprocess, task, precision=precision)
        metrics: dict[str, JSON] = {task.primary: json_number(found.score)}
        return Message("evaluated", {"examples": len(self.arrays), "metrics": metrics})

    def rehearse(self, arrays: Arrays) -> None:
        """Takes one private training step on public examples, to find errors before the run.

        Raises:
            RecipeError: if this client has not agreed.
            Exception: any error of the network.
        """
        if self.client is None:
            refused = self._refused("rehearse")
            where = f"client '{self.name}': {refused.place}"
            raise RecipeError(refused.problem, place=where, cure=refused.cure)
        self.client.rehearse(arrays)


def secret_of(memory: ClientState) -> int:
    """Returns the 256 secret bits in `memory`; the first call draws them from the operating system.

    The bits are stored, because a repeated round must draw the same noise. A second answer about
    the same data with new noise would cost privacy once more.
    """
    stored = memory.entry("secret")
    if not stored:
        stored = {"bytes": torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8)}
        memory.save_entry("secret", stored)
    return int.from_bytes(bytes(stored["bytes"].tolist()), "little")
