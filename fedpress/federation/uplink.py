"""How updates travel home: codecs, aggregate, noise and division, all bound and checked before the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from fedpress.codecs import Bound, Key, bind_chain
from fedpress.core import random
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.errors import RecipeError, SecureError, WireError, renaming
from fedpress.federation.aggregators.base import (
    Aggregator,
    Contribution,
    Gathering,
    Session,
    Total,
    Weights,
)
from fedpress.federation.aggregators.mean import Mean
from fedpress.federation.failures import Tally
from fedpress.federation.guarantee import OPEN, Guarantee
from fedpress.federation.protocol import check_header, need
from fedpress.federation.sampling import Cohort
from fedpress.federation.servernoise import ServerNoise
from fedpress.federation.trust import Trust, share
from fedpress.federation.vector_codec import VectorCodec, divide
from fedpress.federation.vectors import UPDATE, ExtraVector, Payload, Vectors
from fedpress.privacy.adaptive import AdaptiveClip, share_below
from fedpress.privacy.noise.mechanism import noise_sum
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire.message import Message

SERVER = "server"


@dataclass(frozen=True, eq=False)
class RoundMean:
    """What a round learned.

    Attributes:
        vectors: the mean of each named vector, float32; empty if nothing usable came.
        rows: one for each client, as far as it may be named.
        refused: whose replies do not count, with the reason.
        state: what the next round's noise and clip norm need.
        failures: protected units that gave nothing, counted with noise; None without privacy.
        cohort: clients behind the mean: those that came, or the planned cohort where who replied is secret.
    """

    vectors: Vectors
    rows: list[dict[str, JSON]]
    refused: dict[ClientId, str]
    state: dict[str, Tensor] = field(default_factory=dict)
    failures: Tally | None = None
    cohort: int = 0

    @property
    def update(self) -> Tensor | None:
        """The mean update [d]; None if nothing usable came."""
        return self.vectors.get(UPDATE)


@dataclass(frozen=True)
class Uplink:
    """The agreed way of updates from clients to their mean; make it with `Uplink.bind`, on both sides alike.

    Attributes:
        vector_codecs: of the named vectors, the update first.
        cohort: the public plan of who takes part.
        aggregator: how the vectors of a round become one.
        privacy: the plan, or None.
        trust: who adds the noise of the plan, and all that follows from it.
        weights: "examples" weighs each client by its number of examples, "equal" by one.
        divisor: public number by which a private sum is divided, whoever replied.
        noise: what the server adds, with trust "central".
        adaptive: how the clip norm follows the updates; it then travels with each request, and updates are sent in
            units of it.
    """

    vector_codecs: tuple[VectorCodec, ...]
    cohort: Cohort
    aggregator: Aggregator
    privacy: PrivacyPlan | None
    trust: Trust
    weights: Weights
    divisor: float
    noise: ServerNoise | None = None
    adaptive: AdaptiveClip | None = None

    @classmethod
    def bind(
        cls,
        payload: Payload,
        cohort: Cohort,
        *,
        guarantee: Guarantee = OPEN,
        aggregator: Aggregator | None = None,
        weights: Weights = "examples",
    ) -> Uplink:
        """Fits codecs, cohort, privacy and aggregate to each other; the mean if there is no `aggregator`.

        Raises:
            RecipeError: if the parts do not fit together, or a privacy promise could not be kept.
        """
        aggregator, trust, plan = aggregator or Mean(), guarantee.row, guarantee.plan
        trust.check(plan, cohort, weights, aggregator)
        guarantee.check(payload)
        noise = trust.server_noise(plan, guarantee.noise)
        clip_norm = plan.clip_norm if plan is not None and trust.unit == "client" else None
        vectors = payload.vectors(clip_norm)
        binder = _Binder(trust, plan, aggregator, cohort.size, noise, len(vectors))
        vector_codecs = tuple(
            binder.bind(name, one, payload.start(one)) for name, one in vectors.items()
        )
        aggregator.check(vector_codecs)
        return cls(
            vector_codecs,
            cohort,
            aggregator,
            plan,
            trust,
            weights,
            guarantee.divisor or cohort.size,
            noise,
            guarantee.adaptive,
        )

    def agreed(self) -> dict[str, object]:
        """Returns what both sides must hold alike: every field, the codecs under their first name, "ways"."""
        entries = {one.name: getattr(self, one.name) for one in fields(self)}
        # The agreement's fingerprint names the run of a secure sum: a renamed field must not change it.
        entries["ways"] = entries.pop("vector_codecs")
        return entries

    @property
    def size(self) -> int:
        """Number of values of an update."""
        return self.vector_codecs[0].size

    def encode(self, vectors: Vectors, key: Key, *, unit: float = 1.0) -> dict[str, Tensor]:
        """Returns the tensors that carry `vectors` to the server, in units of `unit`."""
        tensors: dict[str, Tensor] = {}
        for codec in self.vector_codecs:
            vector = vectors[codec.name]
            tensors |= codec.encode(vector if unit == 1 else vector / unit, key)
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Returns the vectors in `tensors`, which may come from anybody, each as it was encoded.

        Raises:
            WireError: if one is not of the agreed size, or not finite.
        """
        parts = divide(self.vector_codecs, tensors)
        return {codec.name: codec.decode(parts[codec.name], key) for codec in self.vector_codecs}

    def receive(self, tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Returns the vectors in `tensors`, each within its promise, whatever was sent.

        Raises:
            WireError: if one is not of the agreed size, or not finite.
        """
        parts = divide(self.vector_codecs, tensors)
        return {codec.name: codec.receive(parts[codec.name], key) for codec in self.vector_codecs}

    def init(self) -> dict[str, Tensor]:
        """Returns the state before the first round."""
        if self.adaptive is None:
            return {}
        return {"clip_norm": torch.tensor(self.adaptive.initial, dtype=torch.float64)}

    def unit(self, state: Mapping[str, Tensor]) -> float:
        """Returns the unit of updates in the next round: the clip norm of an adaptive clip, else 1."""
        return 1.0 if self.adaptive is None else float(state["clip_norm"])

    def gather(
        self,
        *,
        seed: int,
        round: int,
        session: Session | None = None,
        cohort: Sequence[ClientId] = (),
        state: Mapping[str, Tensor] | None = None,
        secret: int | None = None,
    ) -> Gatherer:
        """Begins the mean of one round; give it the replies one by one, always in the same order.

        Args:
            seed: of the run.
            round: of the replies.
            session: the aggregator's server side; needed for a secure sum.
            cohort: the clients asked; needed for a secure sum.
            state: of the round before, or None before the first.
            secret: what the server's noise hangs on instead of the seed.
        """
        key = Key(seed, round, SERVER, secret)
        gatherer = Gatherer(self, key, tuple(cohort), dict(state or self.init()))
        try:
            begun = session or self.aggregator.open(None, "")
            gatherer.gathering = begun.begin(self.vector_codecs, cohort, key)
        except SecureError as problem:
            gatherer.closed = str(problem)
        return gatherer

    def mean(
        self,
        replies: Iterable[tuple[ClientId, Message | None]],
        *,
        seed: int,
        round: int,
        session: Session | None = None,
        cohort: Sequence[ClientId] = (),
        state: Mapping[str, Tensor] | None = None,
        secret: int | None = None,
    ) -> RoundMean:
        """Returns the mean of `replies`, given in client order; for the rest see `gather`."""
        gatherer = self.gather(
            seed=seed, round=round, session=session, cohort=cohort, state=state, secret=secret
        )
        for client, reply in replies:
            gatherer.take(client, reply)
        return gatherer.close()


@dataclass(frozen=True)
class _Binder:
    """What all vector_codecs of an uplink have in common; `vectors` is how many there are."""

    trust: Trust
    plan: PrivacyPlan | None
    aggregator: Aggregator
    cohort: int
    noise: ServerNoise | None
    vectors: int

    def bind(self, name: str, one: ExtraVector, start: Bound) -> VectorCodec:
        """Binds the codecs of a vector of `start`; RecipeError if they do not fit together."""
        first = self.trust.codecs(self.plan, one.clip_norm, self.vectors)
        codecs = (*first, *one.codecs)
        given = "chain" if name == UPDATE else f"extras[{name!r}].codecs"
        own = {f"chain[{len(first) + at}]": f"{given}[{at}]" for at in range(len(one.codecs))}
        with renaming({f"chain[{at}]": "privacy" for at in range(len(first))} | own):
            chain, end = bind_chain(codecs, start)
        promise = self.trust.promise(one.clip_norm, start, end)
        return VectorCodec(name, promise, chain, codecs, end, self._noise(one.clip_norm))

    def _noise(self, clip_norm: float | None) -> ServerNoise | None:
        """Returns the server's noise on the aggregate of a vector that a client moves by `clip_norm`.

        None: a client is not bounded as a whole, but one example moves its vector by the clip norm of the plan.
        """
        if self.noise is None:
            return None
        plan = self.noise.plan
        moved = plan.clip_norm if clip_norm is None else clip_norm
        sensitivity = self.aggregator.sensitivity(Bound(1, l2=moved), self.cohort)
        assert sensitivity is not None  # see `Trust.check`
        multiplier = share(plan.noise_multiplier, self.vectors)
        plan = replace(plan, clip_norm=sensitivity, noise_multiplier=multiplier)
        return replace(self.noise, plan=plan)


@dataclass(eq=False)
class Gatherer:
    """The replies of one round on their way into a mean: `take` each, then `close`.

    `closed` says why there can be no aggregate, empty while there can; `came` is how many were taken.
    """

    uplink: Uplink
    key: Key
    cohort: tuple[ClientId, ...]
    state: dict[str, Tensor]
    gathering: Gathering | None = None
    closed: str = ""
    rows: list[dict[str, JSON]] = field(default_factory=list)
    refused: dict[ClientId, str] = field(default_factory=dict)
    below: list[bool] = field(default_factory=list)
    failures: dict[ClientId, Tally] = field(default_factory=dict)
    came: int = 0

    def take(
        self,
        client: ClientId,
        reply: Message | None,
        *,
        task: int | None = None,
        scale: float = 1.0,
    ) -> None:
        """Takes the reply of `client`, None if none came; one that does not fit is refused and moves nothing.

        Args:
            client: who was asked.
            reply: what came.
            task: the number that an update must name, the gatherer's round if None.
            scale: how often its vectors count, at most once: more would pass the promise that the noise is measured
                against. It does not change the weight that a sum is divided by.
        """
        if not 0 <= scale <= 1:
            raise RecipeError(f"got {scale}, expected a number inside 0..1", place="scale")
        try:
            if reply is not None and reply.kind == "error":  # in words of its own
                check_header(reply.kind, reply.header)
                reason = reply.header.get("reason", "the client failed and gave no reason")
                self.refused[client] = str(reason)[:500]
                return
            named = self.key.round if task is None else task
            self._take(Key(self.key.seed, named, client), reply, scale)
        except WireError as problem:
            self.refused[client] = str(problem)

    def close(self) -> RoundMean:
        """Closes the aggregate, adds the server's noise, and divides.

        Under privacy the divisor is public and never the number of replies, and noise is added even if nothing came:
        who replied is as private as what was sent.
        """
        up = self.uplink
        if self.gathering is None:
            return self._without(self.closed)
        try:
            total = self.gathering.close()
        except SecureError as problem:
            return self._without(str(problem))
        failures = self._count_failures(total)
        if not up.trust.fixed_divisor:  # open, or every update is private by itself
            weight = total.weight if up.aggregator.sums else 1.0
            found = {} if total.weight <= 0 else total.vectors
            means = {name: (vector / weight).float() for name, vector in found.items()}
            return RoundMean(means, self.rows, self.refused, self.state, failures, self.came)
        unit = up.unit(self.state)
        divisor = up.divisor if up.aggregator.sums else 1.0
        means = {}
        for codec in up.vector_codecs:
            vector = total.vectors[codec.name]
            if codec.noise is not None:
                vector, self.state = codec.noise.add(vector, self.state, self.key, codec.name)
            means[codec.name] = (vector.double() * (unit / divisor)).float()
        if up.adaptive is not None:
            self.state |= self._next_clip(up.adaptive)
        planned = up.cohort.size
        return RoundMean(means, self.rows, self.refused, self.state, failures, planned)

    def _without(self, reason: str) -> RoundMean:
        """Returns what a round comes to in which no aggregate was opened."""
        return RoundMean({}, [], dict.fromkeys(self.cohort, reason) | self.refused, self.state)

    def _take(self, key: Key, reply: Message | None, scale: float) -> None:
        up = self.uplink
        header, tensors = self._open(reply, key.round)
        seen = up.aggregator.sees_updates
        named = seen and up.trust.names_clients
        examples: int = need("update", header, "examples") if named else 1
        self._note(key.client, header)
        if self.gathering is None:  # there will be no aggregate
            return
        vectors = up.receive(tensors, key) if seen else {}
        scaled = {name: v if scale == 1 else v * scale for name, v in vectors.items()}
        weight = float(examples) if up.weights == "examples" else 1.0
        secure: Mapping[str, JSON] = need("update", header, "secure") if "secure" in header else {}
        self.gathering.add(Contribution(key, weight, scaled, tensors, secure))
        self.came += 1
        if named:
            measured = {n: header[n] for n in up.trust.measures if n in header}
            norm = float(vectors[UPDATE].double().norm())
            self.rows.append(
                {"client": key.client, "examples": examples, **measured, "update_norm": norm}
            )

    def _note(self, client: ClientId, header: Mapping[str, JSON]) -> None:
        """Notes what else a header says: the bit of an adaptive clip, and the counts of what failed."""
        up = self.uplink
        if up.adaptive is not None:
            self.below.append(need("update", header, "below"))
        if up.privacy is not None and "failures" in header:
            self.failures[client] = up.trust.tally(header, up.privacy)

    def _open(
        self, reply: Message | None, task: int
    ) -> tuple[Mapping[str, JSON], Mapping[str, Tensor]]:
        """Returns header and tensors of an update that names `task`.

        Raises:
            WireError: if `reply` is none.
        """
        if reply is None:
            raise WireError(
                "no reply came", place="update", cure="see whether the client is still running"
            )
        header = reply.header
        check_header(reply.kind, header)
        if reply.kind != "update":
            raise WireError(
                f"got {reply.kind!r}, expected 'update'",
                place="update.kind",
                cure="answer the request that was sent",
            )
        if need("update", header, "round") != task:
            raise WireError(
                f"got {header['round']!r}, expected {task}",
                place="update.round",
                cure="answer the last request",
            )
        return header, reply.tensors

    def _count_failures(self, total: Total) -> Tally | None:
        """Returns how many units gave nothing; noise is added here if it is the server's, else it is in the counts."""
        up = self.uplink
        if up.privacy is None:
            return None
        # What a client says of itself and that it was refused would move two counts: only one of them may stand.
        heard = [tally for name, tally in self.failures.items() if name not in self.refused]
        counted = up.trust.counted(Tally.sum(heard), len(self.refused))
        if up.noise is None:
            return counted
        named = random.fingerprint(*total.vectors.values())
        noised, self.state = up.noise.count(counted.tensor(), self.state, self.key, named)
        return Tally(*noised.double().tolist())

    def _next_clip(self, adaptive: AdaptiveClip) -> dict[str, Tensor]:
        norm = float(self.state["clip_norm"])
        named = random.fingerprint(self.below, norm, adaptive)
        chance = self.key.private_stream("clip", named)
        count = PrivacyPlan("client", 0.5, 1.0, 2 * (adaptive.count_noise or 0.0))
        centred = sum(0.5 if bit else -0.5 for bit in self.below)
        bits = torch.tensor([centred], dtype=torch.float64)
        share = share_below(float(noise_sum(bits, count, chance)), self.uplink.cohort.size)
        return {"clip_norm": torch.tensor(adaptive.update(norm, share), dtype=torch.float64)}
