"""A client: answers a "fit" message with its update, and lets nothing else out that the privacy plan does not allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedpress.codecs import VALUES, Clip, Key
from fedpress.core import parameters, random
from fedpress.core.canonical import JSON
from fedpress.core.examples import Arrays
from fedpress.core.names import ClientId
from fedpress.errors import DivergedError, RecipeError, WireError
from fedpress.federation.agreement import Agreement, Terms
from fedpress.federation.client_plan import ClientPlan
from fedpress.federation.client_state import ClientState, InMemoryState, save_json
from fedpress.federation.counted import LOST_STATE
from fedpress.federation.downlink import LOST_MODEL, SERVER
from fedpress.federation.local import LocalWork, Measures, too_large
from fedpress.federation.private import rehearse_private
from fedpress.federation.protocol import check_header, need, read_text
from fedpress.federation.replay import answer_once
from fedpress.federation.secure_client import answer_secure
from fedpress.federation.uplink import Uplink
from fedpress.federation.vectors import PARAMS, UPDATE, Vectors
from fedpress.models.norms import freeze_batch_norm_
from fedpress.privacy.noise.mechanism import clip
from fedpress.secagg import SecAggClient
from fedpress.wire.message import Message, pack, unpack

STATE = "state."
"""Before the names of an algorithm's state in the memory of a client."""
TASK = "task"
"""The round that left this state."""


@dataclass(frozen=True, eq=False)
class Client:
    """One client, ready to answer.

    Attributes:
        name: under which the transport knows it.
        arrays: its private examples.
        model: a model to work in; its trainable parameters are overwritten by every request, so clients in one
            process may share it. Buffers are as given before and after every round.
        plan: what it does, see `ClientPlan.bind`.
        memory: keeps what must outlive a round.
        member: this client's part in a secure sum.
        secret: 256 random bits of its own, on which its noise hangs instead of the seed.

    Raises:
        RecipeError: if it has no examples, or no part in a secure sum that was agreed.
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
                cure="leave it out or partition differently",
            )
        if (self.member is None) != self.uplink.aggregator.sees_updates:
            raise RecipeError(
                "a secure sum needs a member with keys on every client",
                place="member",
                cure="give a member if the aggregator is secure, and none otherwise",
            )

    @property
    def terms(self) -> Terms:
        """What was agreed with the server."""
        return self.plan.terms

    @property
    def uplink(self) -> Uplink:
        """The agreed way home."""
        return self.plan.terms.uplink

    def handle(self, request: bytes) -> bytes:
        """Answers the bytes of a message with those of another, see `answer`."""
        return pack(self.answer(unpack(request)))

    def answer(self, message: Message) -> Message:
        """Answers "fit" with an "update", "agree" with "agreed", and the questions of a secure sum.

        Raises:
            WireError: if the request is damaged or does not fit what was agreed.
            SecureError: if it asks for what would open a single client's update.
            TrainingError: if the local update fails; under privacy without saying on what.
        """
        check_header(message.kind, message.header)
        if message.kind == "agree":
            return self._agree(message)
        if self.member is not None and message.kind in ("join", "roster", "unmask"):
            return self._secure(self.member, message)
        return self._update(message, self._key(message))

    def _update(self, message: Message, key: Key) -> Message:
        """Returns the "update" to a "fit", and keeps what this client needs in its next one."""
        terms, uplink = self.terms, self.uplink
        down, after = self._receive(message, key)
        if uplink.privacy is not None:
            answer_once(message, key.round, terms, self.memory)
        state = self._state(message, key.round)
        before = self.memory.load(key.round)
        vectors, next_state, measured = self._try_fit(down, state, key)
        header = self._header(down, vectors, measured, key)
        unit = self._unit(message)
        if terms.error_feedback and "residual" in before:
            vectors = {**vectors, UPDATE: vectors[UPDATE] + before["residual"]}
        if uplink.adaptive is not None:
            header["below"] = float(vectors[UPDATE].double().norm()) <= unit
        tensors = uplink.encode(vectors, key, unit=unit)
        if terms.algorithm.keeps_state:
            arrived = uplink.receive(tensors, key)
            kept = terms.algorithm.client_commit(state, next_state, arrived)
            after |= {f"{STATE}{name}": tensor for name, tensor in kept.items()}
            after[TASK] = torch.tensor(key.round)
        if terms.error_feedback:
            decoded = unit * uplink.decode(tensors, key)[UPDATE]
            after["residual"] = self._clipped(vectors[UPDATE], unit) - decoded
        if self.member is not None:
            names: list[str] = need("fit", message.header, "cohort")
            part = self.member.mask(tensors[VALUES], round=key.round, cohort=names)
            header["secure"], tensors = dict(part.header), dict(part.tensors)
            self._remember(self.member)
        if after:
            self.memory.save(key.round, after)
        return Message("update", header, tensors)

    def _header(
        self, down: Vectors, vectors: Vectors, measured: Measures, key: Key
    ) -> dict[str, JSON]:
        """Returns what an update says beside its vectors: what the trust allows, and what failed."""
        uplink = self.uplink
        trust, plan = uplink.trust, self.plan.local.privacy or uplink.privacy
        header: dict[str, JSON] = {"round": key.round}
        header |= trust.said(measured, len(self.arrays), seen=uplink.aggregator.sees_updates)
        if plan is not None:
            sent = [vectors[codec.name] for codec in uplink.vector_codecs]
            hidden = random.fingerprint(down[PARAMS], *sent, self.arrays.x, self.arrays.y)
            header |= trust.failures(measured, plan, key, hidden)
        return header

    def _agree(self, message: Message) -> Message:
        """Compares the server's agreement with this client's own, entry by entry.

        Raises:
            WireError: naming the first entry that differs, with both values.
        """
        own, text = self.terms.agreement, read_text(message, "agreement")
        if text != own.to_json():  # nearly always they are equal: then nothing has to be read
            Agreement.from_json(text).compare(own)
        return Message("agreed", {"agreement": own.fingerprint})

    def _try_fit(
        self, down: Vectors, state: Vectors, key: Key
    ) -> tuple[Vectors, Vectors, Measures]:
        """Returns what `_fit` does; zeros and the old state if the work fails where that may not be told."""
        try:
            return self._fit(down, state, key)
        except Exception as problem:
            plan = self.plan.local.privacy
            batch = 0.0 if plan is None else plan.sampling_prob * len(self.arrays)
            measured = self.uplink.trust.after_failure(problem, batch)
            zeros = {codec.name: torch.zeros(codec.size) for codec in self.uplink.vector_codecs}
            return zeros, state, measured

    def _state(self, message: Message, round: int) -> Vectors:
        """Returns the algorithm's state of this client, as its last round left it whose answer counted.

        An answer that was lost moved nothing on the server, so it must move nothing here. What came after the last one
        that counted is forgotten.

        Raises:
            WireError: if this client does not hold that state any more.
        """
        algorithm = self.terms.algorithm
        if not algorithm.keeps_state:
            return {}
        counted: int = need("fit", message.header, "counted")
        if not counted:
            return algorithm.client_init(self.uplink.size)
        state = self.memory.load(counted + 1)
        if TASK not in state or int(state[TASK]) != counted:
            raise WireError(
                f"this client does not hold its state of round {counted} any more",
                place="fit.counted",
                cure=LOST_STATE,
            )
        latest = self.memory.load(round)
        if int(latest[TASK]) != counted:
            self.memory.save(counted, state)
        return parameters.part_of(state, STATE)

    def _secure(self, member: SecAggClient, message: Message) -> Message:
        answer = answer_secure(member, message)
        if message.kind != "join":  # which hangs on the keys alone
            self._remember(member)
        return answer

    def _remember(self, member: SecAggClient) -> None:
        """Keeps which rounds were answered: a client that starts again must not answer another question in one."""
        save_json(self.memory, "member", member.state())

    def _clipped(self, update: Tensor, unit: float) -> Tensor:
        """What error feedback compares with: what a clip cuts off is lost on purpose."""
        chain = self.uplink.vector_codecs[0].chain
        first = chain[0] if chain else None
        return clip(update, unit * first.clip_norm) if isinstance(first, Clip) else update

    def _unit(self, message: Message) -> float:
        if self.uplink.adaptive is None:
            return 1.0
        return float(need("fit", message.header, "clip_norm"))

    def _key(self, request: Message) -> Key:
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
        """Refuses work under another agreement than this client's own.

        Raises:
            WireError: if the fingerprints differ; "agree" tells which entry.
        """
        agreed, said = self.terms.agreement.fingerprint, request.header.get("agreement")
        if said != agreed:
            raise WireError(
                (
                    f"the server works under {said!r} and this client under {agreed!r}: other "
                    "settings, another seed or another model"
                ),
                place=f"{request.kind}.agreement",
                cure="use the same recipe",
            )

    def read_params(self, request: Message) -> Tensor:
        """Returns the server's parameters [d] that `request` brings whole.

        Raises:
            WireError: if they are missing, no float32, or not finite.
        """
        return _finite(request, PARAMS)

    def _receive(self, request: Message, key: Key) -> tuple[Vectors, dict[str, Tensor]]:
        """Returns the server's parameters [d] and further vectors by name, and what to remember of them."""
        terms = self.terms
        beside = {}
        for name, extra in terms.algorithm.extras_down.items():
            size = self.uplink.size if extra.size is None else extra.size
            beside[name] = _finite(request, name, size)
        if terms.downlink is None:
            return {PARAMS: self.read_params(request), **beside}, {}
        version: int = need("fit", request.header, "from")
        if version >= key.round:
            raise WireError(
                f"got {version!r}, expected a round before {key.round}",
                place="fit.from",
                cure="use the same recipe",
            )
        state = self.memory.load(version + 1) if version else {}
        coded = {name: t for name, t in request.tensors.items() if name not in beside}
        if version and ("held" not in state or int(state["version"]) != version):
            raise WireError(
                f"this client does not hold the model of round {version} any more",
                place="fit.from",
                cure=LOST_MODEL,
            )
        held = terms.downlink.decode(coded, state.get("held"), Key(terms.seed, key.round, SERVER))
        return {PARAMS: held, **beside}, {"held": held, "version": torch.tensor(key.round)}

    def _fit(self, down: Vectors, state: Vectors, key: Key) -> tuple[Vectors, Vectors, Measures]:
        """Returns the vectors on the CPU, the next state and what was measured; the model's buffers are put back."""
        algorithm, params = self.terms.algorithm, down[PARAMS]
        parameters.assign_(self.model, params)
        beside = {name: vector for name, vector in down.items() if name != PARAMS}
        remembered = {f"{STATE}{name}": vector for name, vector in state.items()}
        work = LocalWork(self.arrays, key, self.plan.local, params, beside | remembered)
        with self._at_work(key):
            vectors, after, measured = algorithm.client_update(self.model, work, down, state)
        if not all(bool(torch.isfinite(vector).all()) for vector in vectors.values()):
            raise DivergedError(
                f"after {measured.get('steps', 1)} steps it is not finite in round {key.round}",
                place="local update",
                cure=f"lower {too_large(work.plan.settings, work.lr, penalties=algorithm.penalties)}",
            )
        return vectors, after, measured

    def rehearse(self, arrays: Arrays) -> None:
        """Does one step of this client's work on `arrays`, which must be public; the model is left as it was.

        Raises:
            Exception: whatever the network raises on them.
            TrainingError: if its gradients are of no use.
        """
        params, key = parameters.flatten(self.model), Key(self.terms.seed, 1, self.name)
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

    @contextmanager
    def _at_work(self, key: Key) -> Iterator[None]:
        """Puts the model into the modes of local training, with its own stream of dropout; buffers are put back."""
        buffers = [b.clone() for b in self.model.buffers()]
        self.model.train()
        if self.terms.norm == "frozen":
            freeze_batch_norm_(self.model)
        try:
            with torch.random.fork_rng():  # dropout draws from torch's global generator
                torch.manual_seed(key.client_seed("dropout"))
                yield
        finally:  # whatever a module keeps of private examples must not reach the next request
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)


def _finite(request: Message, name: str, size: int | None = None) -> Tensor:
    """Returns the vector `name` of a request, of `size` values if given.

    Raises:
        WireError: if it is missing, of another type or size, or not finite.
    """
    vector = request.tensors.get(name)
    fits = vector is not None and vector.dtype == torch.float32
    if vector is None or not fits or not bool(torch.isfinite(vector).all()):
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
