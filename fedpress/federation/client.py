"""The client of a federated run: trains on its private examples, and answers the server's messages.

Under privacy the answers contain only values that the privacy plan covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from fedpress.codecs import VALUES, Clip, Key
from fedpress.core import parameters, random
from fedpress.core.canonical import JSON
from fedpress.core.examples import Arrays
from fedpress.core.finite import is_finite, norm
from fedpress.core.names import ClientId
from fedpress.errors import DivergedError, RecipeError, WireError
from fedpress.federation.agreement import Agreement, Terms
from fedpress.federation.client_plan import ClientPlan
from fedpress.federation.client_state import ClientState, InMemoryState, save_json
from fedpress.federation.counted import LOST_STATE
from fedpress.federation.downlink import LOST_MODEL, SERVER
from fedpress.federation.local import LocalWork, Measures, Outcome, too_large, training_mode
from fedpress.federation.private import rehearse_private
from fedpress.federation.protocol import check_header, need, read_text
from fedpress.federation.replay import answer_once
from fedpress.federation.secure_client import answer_secure
from fedpress.federation.stacked import Training, computed
from fedpress.federation.uplink import Uplink
from fedpress.federation.vectors import PARAMS, UPDATE, Vectors
from fedpress.privacy.noise.mechanism import clip
from fedpress.secagg import SecAggClient
from fedpress.wire.message import Message, pack, unpack

STATE = "state."
"""Prefix of the algorithm's tensors in a client's storage. Example: `state.control`."""
TASK = "task"
"""Name under which a stored state keeps its round: the round after which it was saved."""


@dataclass(frozen=True, eq=False)
class Client:
    """One client of a federated run.

    Attributes:
        name: the client's name in the transport.
        arrays: the client's private examples.
        model: the model to train. Every "fit" request overwrites its trainable parameters, so
            clients in one process may share it. Its buffers are restored after every round.
        plan: the settings agreed with the server, and how the client trains.
        memory: stores the client's state between rounds.
        member: the client's side of the secure sum; None for a plain sum.
        secret: key of the client's noise generator (256 bits). If None, the noise follows from the
            seed, and everybody who knows the recipe could subtract it.

    Raises:
        RecipeError: if the client has no examples, or `member` does not fit the aggregator.
    """

    name: ClientId
    arrays: Arrays
    model: nn.Module
    plan: ClientPlan
    memory: ClientState = field(default_factory=InMemoryState)
    member: SecAggClient | None = None
    secret: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not len(self.arrays):
            raise RecipeError(
                "it has no examples",
                place=f"client '{self.name}'",
                cure="leave this client out, or partition the data differently",
            )
        if (self.member is None) != self.uplink.aggregator.sees_updates:
            raise RecipeError(
                "it must be given if the aggregator is secure, and only then",
                place="member",
                cure="give a SecAggClient if the aggregator is secure, else None",
            )

    @property
    def terms(self) -> Terms:
        """The settings that server and clients agreed on."""
        return self.plan.terms

    @property
    def uplink(self) -> Uplink:
        """How the update is coded, clipped and aggregated, as agreed."""
        return self.plan.terms.uplink

    def handle(self, request: bytes) -> bytes:
        """Answers one message; request and answer are serialized messages. See `answer`."""
        return pack(self.answer(unpack(request)))

    def answer(self, message: Message) -> Message:
        """Answers "fit" with "update", "agree" with "agreed", and the messages of a secure sum.

        Raises:
            WireError: if the request is damaged or does not fit the agreed terms.
            SecureError: if the answer would reveal a single client's update.
            TrainingError: if the local update fails, unless the client must then send zeros (see
                `Trust.on_failure`). The error hides the cause if privacy demands it.
            Exception: any error of the user's network, without privacy.
        """
        check_header(message.kind, message.header)
        if message.kind == "agree":
            return self._agree(message)
        if self.member is not None and message.kind in ("join", "roster", "unmask"):
            return self._secure(self.member, message)
        return self._update(message, self._key(message))

    def training(self, message: Message) -> Training:
        """Returns the training that a "fit" request asks for; nothing is changed.

        It has no state of the algorithm, so the algorithm must not correct gradients.

        Raises:
            WireError: if the request is damaged or does not fit the agreed terms.
        """
        check_header(message.kind, message.header)
        key = self._key(message)
        down, _ = self._receive(message, key)
        work = self._work(down, {}, key)
        corrects = self.terms.algorithm.corrects_gradients
        return Training(self.model, work, self.terms.norm, corrects)

    def answer_trained(self, message: Message, outcome: Outcome | DivergedError) -> Message:
        """Does the same as `answer` for a "fit" request whose training is done.

        Args:
            message: the request.
            outcome: result of the training; or why it failed.
        """
        local = replace(self.plan.local, source=computed(outcome))
        return replace(self, plan=replace(self.plan, local=local)).answer(message)

    def _update(self, message: Message, key: Key) -> Message:
        """Trains for one round, returns the update, and stores the state for the next round."""
        terms = self.terms
        uplink = self.uplink
        down, after = self._receive(message, key)
        # Checked before any work on private data: to a different request of an answered round, even
        # an error of the training would reveal something.
        if uplink.privacy is not None:
            answer_once(message, key.round, terms, self.memory)

        state = self._state(message, key.round)
        before = self.memory.load(key.round)
        vectors, next_state, measured = self._try_fit(down, state, key)
        header = self._header(down, vectors, measured, key)
        scale = self._update_scale(message)

        # The residual (the coding error of the last update) is added before the clip, so that the
        # sum of residual and update stays within the bound.
        if terms.error_feedback and "residual" in before:
            vectors = {**vectors, UPDATE: vectors[UPDATE] + before["residual"]}
        if uplink.adaptive is not None:
            header["below"] = norm(vectors[UPDATE]) <= scale
        tensors = uplink.encode(vectors, key, scale=scale)

        after |= self._state_after(state, next_state, tensors, key)
        if terms.error_feedback:
            decoded = scale * uplink.decode(tensors, key)[UPDATE]
            after["residual"] = self._clipped(vectors[UPDATE], scale) - decoded
        unmade: Mapping[str, int | Tensor] = {}
        if self.member is not None:
            names: list[str] = need("fit", message.header, "cohort")
            values = tensors[VALUES]
            report = self.member.mask(
                values, round=key.round, cohort=names, by_hand=message.by_hand
            )
            header["secure"] = dict(report.header)
            tensors, unmade = dict(report.tensors), report.unmade
            # Stored before the answer is sent. After a crash, the client must still know that it
            # used this round's masks: two vectors under one mask would reveal their difference.
            # Nobody can reveal what stays in this process.
            if not unmade:
                self._remember(self.member)
        if after:
            self.memory.save(key.round, after)
        packed_floats = uplink.packed_floats(tensors)
        return Message("update", header, tensors, packed_floats, unmade=unmade)

    def _state_after(
        self, before: Vectors, computed: Vectors, tensors: dict[str, Tensor], key: Key
    ) -> dict[str, Tensor]:
        """Returns the algorithm's state after this round, as named tensors to store.

        Args:
            before: the state before the local update.
            computed: the state that the local update computed.
            tensors: the encoded vectors that are sent to the server.
            key: seeds this client's random streams of this round.
        """
        algorithm = self.terms.algorithm
        if not algorithm.keeps_state:
            return {}
        # Decoded as the server does it, because clip and codecs may have changed the vectors.
        arrived = self.uplink.receive(tensors, key)
        kept = algorithm.client_commit(before, computed, arrived)
        stored = {f"{STATE}{name}": tensor for name, tensor in kept.items()}
        return stored | {TASK: torch.tensor(key.round)}

    def _header(
        self, down: Vectors, vectors: Vectors, measured: Measures, key: Key
    ) -> dict[str, JSON]:
        """Returns the header of an update: measures that may be reported, and counts of failures.

        Args:
            down: the vectors from the server.
            vectors: the vectors to send, before they are encoded.
            measured: measures of the local update.
            key: seeds this client's random streams of this round.
        """
        uplink = self.uplink
        trust = uplink.trust
        plan = self.plan.local.privacy or uplink.privacy
        header: dict[str, JSON] = {"round": key.round}
        header |= trust.reported(
            measured, len(self.arrays), updates_seen=uplink.aggregator.sees_updates
        )
        if plan is not None:
            sent = [vectors[codec.name] for codec in uplink.vector_codecs]
            # The noise on the failure counts is drawn from a stream with this name. The same noise
            # must never be added to two different answers: their difference would reveal both.
            shown = (down[PARAMS], *sent, self.arrays.x, self.arrays.y)
            hidden = partial(random.fingerprint, *shown)
            header |= trust.failures(measured, plan, key, hidden)
        return header

    def _agree(self, message: Message) -> Message:
        """Compares the server's agreement with this client's own, entry by entry.

        Raises:
            WireError: if they differ; the error names the first entry that differs, and its values.
        """
        own = self.terms.agreement
        text = read_text(message, "agreement")
        # Texts are nearly always equal; then they need no parsing.
        if text != own.to_json():
            Agreement.from_json(text).compare(own)
        return Message("agreed", {"agreement": own.fingerprint})

    def _try_fit(
        self, down: Vectors, state: Vectors, key: Key
    ) -> tuple[Vectors, Vectors, Measures]:
        """Returns the result of `_fit`; zeros if `_fit` fails and the failure must stay secret.

        With zeros the algorithm's state stays as before. If the failure need not stay secret,
        raises an error.
        """
        try:
            return self._fit(down, state, key)
        # Catches every exception: a user's own network may raise anything. Under privacy, the fact
        # that it raised would say something about the examples.
        except (Exception, SystemExit) as problem:
            plan = self.plan.local.privacy
            batch = 0.0 if plan is None else plan.sampling_prob * len(self.arrays)
            measured = self.uplink.trust.after_failure(problem, batch)
            zeros = {codec.name: torch.zeros(codec.size) for codec in self.uplink.vector_codecs}
            return zeros, state, measured

    def _state(self, message: Message, round: int) -> Vectors:
        """Returns the algorithm's state after this client's last answer that the server used.

        If an answer is lost or refused, the server does not use it. The client then drops the state
        that it saved with that answer. Otherwise the client's state would not fit the server's: in
        SCAFFOLD, the server's control would no longer be the mean of the clients' controls.

        Raises:
            WireError: if this client has lost the state that the server expects.
        """
        algorithm = self.terms.algorithm
        if not algorithm.keeps_state:
            return {}
        counted: int = need("fit", message.header, "counted")
        # 0: the server has used no answer of this client so far.
        if not counted:
            return algorithm.client_init(self.uplink.size)
        state = self.memory.load(counted + 1)
        if TASK not in state or int(state[TASK]) != counted:
            raise WireError(
                f"this client has lost its state of round {counted}",
                place="fit.counted",
                cure=LOST_STATE,
            )
        latest = self.memory.load(round)
        # Saving under an older round deletes the states of later rounds, whose answers the server
        # has not used.
        if int(latest[TASK]) != counted:
            self.memory.save(counted, state)
        return parameters.tensors_under(state, STATE)

    def _secure(self, member: SecAggClient, message: Message) -> Message:
        """Answers a message of the secure sum, and stores which requests were answered."""
        answer = answer_secure(member, message)
        # An answer to "join" depends on the keys alone, and one that is not made tells nothing: then
        # there is nothing new to store.
        if message.kind != "join" and not answer.unmade:
            self._remember(member)
        return answer

    def _remember(self, member: SecAggClient) -> None:
        """Stores which rounds were answered: a restarted client must not answer a round twice."""
        save_json(self.memory, "member", member.state())

    def _clipped(self, update: Tensor, scale: float) -> Tensor:
        """Returns `update` after the clip and before the other codecs, for error feedback.

        The residual must not contain the part that the clip cuts off: this part would be added
        again in every round, and the residual would grow without limit.
        """
        chain = self.uplink.vector_codecs[0].chain
        first = chain[0] if chain else None
        if isinstance(first, Clip):
            return clip(update, scale * first.clip_norm)
        return update

    def _update_scale(self, message: Message) -> float:
        """Returns the number by which the update is divided: the adaptive clip norm, or 1."""
        if self.uplink.adaptive is None:
            return 1.0
        return float(need("fit", message.header, "clip_norm"))

    def _key(self, request: Message) -> Key:
        """Checks a "fit" request, and returns the key that seeds this round's random streams."""
        if request.kind != "fit":
            raise WireError(
                f"got {request.kind!r}, expected 'fit'",
                place="fit.kind",
                cure="use the same fedpress on both sides",
            )
        round: int = need("fit", request.header, "round")
        self.check_agreement(request)
        return Key(self.terms.seed, round, self.name, self.secret)

    def check_agreement(self, request: Message) -> None:
        """Refuses a request whose agreement differs from this client's own.

        Raises:
            WireError: if the fingerprints differ. The answer to "agree" names the entry that
                differs.
        """
        own = self.terms.agreement.fingerprint
        received = request.header.get("agreement")
        if received != own:
            raise WireError(
                (
                    f"the server has {received!r} and this client {own!r}: settings, seed or model "
                    "differ"
                ),
                place=f"{request.kind}.agreement",
                cure="use the same recipe",
            )

    def read_params(self, request: Message) -> Tensor:
        """Returns the server's parameters [d] from a `request` that sends them uncoded.

        Raises:
            WireError: if they are missing, not float32, or not finite.
        """
        return _finite(request, PARAMS)

    def _receive(self, request: Message, key: Key) -> tuple[Vectors, dict[str, Tensor]]:
        """Reads the vectors of a "fit" request.

        Returns:
            The vectors by name (parameters [d] and the algorithm's extras), and the tensors that
            the client must store to decode the next request.

        Raises:
            WireError: if a vector does not fit, or if it is coded as a difference to a model that
                this client has lost.
        """
        terms = self.terms
        extras = {}
        for name, extra in terms.algorithm.extras_down.items():
            size = self.uplink.size if extra.size is None else extra.size
            extras[name] = _finite(request, name, size)
        if terms.downlink is None:
            return {PARAMS: self.read_params(request), **extras}, {}

        # The model is coded as a difference to the model of round `version`; 0: the full model.
        version: int = need("fit", request.header, "from")
        if version >= key.round:
            raise WireError(
                f"got {version!r}, expected a round before {key.round}",
                place="fit.from",
                cure="use the same recipe",
            )
        state = self.memory.load(version + 1) if version else {}
        if version and ("held" not in state or int(state["version"]) != version):
            raise WireError(
                f"this client has lost the model of round {version}",
                place="fit.from",
                cure=LOST_MODEL,
            )
        coded = {name: t for name, t in request.tensors.items() if name not in extras}
        # The server coded the difference once for all clients, so decoding uses the server's key,
        # not the client's.
        server_key = Key(terms.seed, key.round, SERVER)
        held = terms.downlink.decode(coded, state.get("held"), server_key)
        return {PARAMS: held, **extras}, {"held": held, "version": torch.tensor(key.round)}

    def _fit(self, down: Vectors, state: Vectors, key: Key) -> tuple[Vectors, Vectors, Measures]:
        """Runs the algorithm's local update; the model's buffers are restored afterwards.

        Args:
            down: the vectors from the server.
            state: the algorithm's state of this client.
            key: seeds this client's random streams of this round.

        Returns:
            The vectors to send (on the CPU), the next state, and the measures.

        Raises:
            DivergedError: if a vector is not finite.
        """
        algorithm = self.terms.algorithm
        parameters.assign_(self.model, down[PARAMS])
        work = self._work(down, state, key)
        with self._at_work(key):
            vectors, after, measured = algorithm.client_update(self.model, work, down, state)
        if not all(is_finite(vector) for vector in vectors.values()):
            settings = too_large(work.plan.settings, work.lr, penalties=algorithm.penalties)
            raise DivergedError(
                f"after {measured.get('steps', 1)} steps it is not finite in round {key.round}",
                place="local update",
                cure=f"lower {settings}",
            )
        return vectors, after, measured

    def _work(self, down: Vectors, state: Vectors, key: Key) -> LocalWork:
        """Returns the training of a round; see `_fit` for the arguments."""
        extras = {name: vector for name, vector in down.items() if name != PARAMS}
        stored = {f"{STATE}{name}": vector for name, vector in state.items()}
        return LocalWork(self.arrays, key, self.plan.local, down[PARAMS], extras | stored)

    def rehearse(self, arrays: Arrays) -> None:
        """Takes one training step on public `arrays` to test the model, then restores the model.

        Raises:
            Exception: any error of the network.
            TrainingError: if no gradient is usable.
        """
        params = parameters.flatten(self.model)
        key = Key(self.terms.seed, 1, self.name)
        # A batch norm in training mode needs at least two examples.
        one_batch = {"epochs": 1, "batch_size": max(2, len(arrays))}
        settings = self.terms.settings.model_copy(update=one_batch)
        work = LocalWork(arrays, key, replace(self.plan.local, settings=settings))
        try:
            with self._at_work(key):
                if self.plan.local.privacy is None:
                    work.begin(self.model).finish()
                else:
                    rehearse_private(self.model, work)
        finally:
            parameters.assign_(self.model, params)

    def _at_work(self, key: Key) -> AbstractContextManager[None]:
        """Prepares the model for training inside the block, and restores its buffers afterwards.

        Dropout gets a random stream of this client and round.
        """
        return training_mode(self.model, norm=self.terms.norm, seed=key.client_seed("dropout"))


def _finite(request: Message, name: str, size: int | None = None) -> Tensor:
    """Returns the vector `name` of a request, float32 [size] (any size if None).

    Raises:
        WireError: if it is missing, of another type or size, or not finite.
    """
    vector = request.tensors.get(name)
    fits = vector is not None and vector.dtype == torch.float32
    if vector is None or not fits or not is_finite(vector):
        raise WireError(
            "expected finite float32 values",
            place=f"{request.kind}.{name}",
            cure=f"send the server's {name} with every request",
        )
    if size is not None and vector.shape != (size,):
        raise WireError(
            f"got {list(vector.shape)}, expected [{size}]",
            place=f"{request.kind}.{name}",
            cure="use the same recipe on both sides",
        )
    return vector
