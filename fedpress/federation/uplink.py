"""How updates become a mean: codecs, aggregate, noise, division; all checked before the run."""

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
from fedpress.federation.trust import Trust, per_vector_multiplier
from fedpress.federation.vector_codec import VectorCodec, divide
from fedpress.federation.vectors import UPDATE, ExtraVector, Payload, Vectors
from fedpress.privacy.adaptive import AdaptiveClip, share_below
from fedpress.privacy.noise.mechanism import noise_sum
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire.message import Message

SERVER = "server"
MAX_REASON = 500
"""Characters of a client's reason that are kept: it may come from anybody and fill the records."""


@dataclass(frozen=True, eq=False)
class RoundMean:
    """The result of one round.

    Attributes:
        vectors: the mean of each named vector, float32; empty if nothing usable came.
        rows: one for each client, as far as clients may be named.
        refused: clients whose replies do not count -> the reason.
        state: what the next round's noise and clip norm need.
        failures: protected units that gave nothing, counted with noise; None without privacy.
        cohort: clients behind the mean: those that replied, or the planned number where it is
            secret who replied.
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
    """How updates become their mean, as agreed; made by `Uplink.bind`, on both sides alike.

    Attributes:
        vector_codecs: of the named vectors, the update first.
        cohort: the public plan of who takes part.
        aggregator: how the vectors of a round become one.
        privacy: the plan, or None.
        trust: who adds the noise of the plan, and all that follows from it.
        weights: "examples" weighs each client by its number of examples, "equal" by one.
        divisor: public number by which a private sum is divided, whoever replied.
        noise: what the server adds, with trust "central".
        adaptive: how the clip norm follows the updates. The current clip norm then travels with
            each request, and updates are sent in units of it.
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
        """Fits codecs, cohort, privacy and aggregator to each other.

        Args:
            payload: what every client sends.
            cohort: who takes part.
            guarantee: the privacy that is promised.
            aggregator: the mean if None.
            weights: of the clients in the mean.

        Raises:
            RecipeError: if the parts do not fit together, or the guarantee could not be kept.
        """
        aggregator = aggregator or Mean()
        trust = guarantee.trust_row
        plan = guarantee.plan
        trust.check(plan, cohort, weights, aggregator)
        guarantee.check(payload)

        noise = trust.server_noise(plan, guarantee.noise)
        # Under unit "sample" one example is bounded by the clip of its gradient, not the update.
        clip_norm = plan.clip_norm if plan is not None and trust.unit == "client" else None
        vectors = payload.vectors(clip_norm)
        binder = _Binder(trust, plan, aggregator, cohort.size, noise, len(vectors))
        vector_codecs = tuple(
            binder.bind(name, vector, payload.start(vector)) for name, vector in vectors.items()
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
        """Returns what both sides must hold alike: every field."""
        entries = {one.name: getattr(self, one.name) for one in fields(self)}
        # The entry keeps its first name: the agreement's fingerprint names the run of a secure sum,
        # and a run that goes on must find its own.
        entries["ways"] = entries.pop("vector_codecs")
        return entries

    @property
    def size(self) -> int:
        """Number of values of an update."""
        return self.vector_codecs[0].size

    def encode(self, vectors: Vectors, key: Key, *, scale: float = 1.0) -> dict[str, Tensor]:
        """Returns the tensors that carry `vectors` to the server, each divided by `scale`."""
        tensors: dict[str, Tensor] = {}
        for codec in self.vector_codecs:
            vector = vectors[codec.name]
            scaled = vector if scale == 1 else vector / scale
            tensors |= codec.encode(scaled, key)
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Returns the vectors in `tensors`, which may come from anybody, as they were encoded.

        Raises:
            WireError: if one is not of the agreed size, or not finite.
        """
        parts = divide(self.vector_codecs, tensors)
        return {codec.name: codec.decode(parts[codec.name], key) for codec in self.vector_codecs}

    def receive(self, tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
        """Returns the vectors in `tensors`, each clipped to its bound, whatever was sent.

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

    def update_scale(self, state: Mapping[str, Tensor]) -> float:
        """Returns the unit of the updates in the next round: the adaptive clip norm, else 1."""
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
            secret: key of the server's noise generator (256 bits); the noise follows from `seed`
                if None.
        """
        key = Key(seed, round, SERVER, secret)
        gatherer = Gatherer(self, key, tuple(cohort), dict(state or self.init()))
        try:
            begun = session or self.aggregator.open(None, "")
            gatherer.gathering = begun.begin(self.vector_codecs, cohort, key)
        # A round without an aggregate is no error of the run: clients may be back in the next one.
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
    """What the codecs of all vectors of an uplink have in common.

    Attributes:
        trust: who adds the noise.
        plan: of the noise; None without privacy.
        aggregator: gives the sensitivity of the aggregate.
        cohort: number of clients in a round.
        noise: the noise of the server; None if it adds none.
        vectors: how many vectors a client sends.
    """

    trust: Trust
    plan: PrivacyPlan | None
    aggregator: Aggregator
    cohort: int
    noise: ServerNoise | None
    vectors: int

    def bind(self, name: str, vector: ExtraVector, start: Bound) -> VectorCodec:
        """Binds the codecs of one vector whose first bound is `start`.

        Raises:
            RecipeError: if they do not fit together.
        """
        privacy = self.trust.codecs(self.plan, vector.clip_norm, self.vectors)
        codecs = (*privacy, *vector.codecs)
        with renaming(_places(name, len(privacy), len(vector.codecs))):
            chain, end = bind_chain(codecs, start)
        bound = self.trust.decoded_bound(vector.clip_norm, start, end)
        return VectorCodec(name, bound, chain, codecs, end, self._noise(vector.clip_norm))

    def _noise(self, clip_norm: float | None) -> ServerNoise | None:
        """Returns the server's noise on the aggregate of a vector with this bound.

        Without a bound (unit "sample") it is one example that is protected: it moves its client's
        sum of gradients by at most the clip norm of the plan.
        """
        if self.noise is None:
            return None
        plan = self.noise.plan
        moved = plan.clip_norm if clip_norm is None else clip_norm
        sensitivity = self.aggregator.sensitivity(Bound(1, l2=moved), self.cohort)
        # `Trust.check` has refused every aggregator that has none.
        assert sensitivity is not None
        multiplier = per_vector_multiplier(plan.noise_multiplier, self.vectors)
        plan = replace(plan, clip_norm=sensitivity, noise_multiplier=multiplier)
        return replace(self.noise, plan=plan)


def _places(name: str, privacy: int, own: int) -> dict[str, str]:
    """Returns the places of errors: `chain[i]` of the bound codecs -> what the user wrote.

    `privacy` codecs come first and belong to the key privacy; `own` codecs of the vector follow.
    """
    given = "chain" if name == UPDATE else f"extras[{name!r}].codecs"
    places = {f"chain[{index}]": "privacy" for index in range(privacy)}
    for index in range(own):
        places[f"chain[{privacy + index}]"] = f"{given}[{index}]"
    return places


@dataclass(eq=False)
class Gatherer:
    """Collects the replies of one round: `take` each of them, then `close`.

    Attributes:
        uplink: as agreed.
        key: of the server in this round.
        cohort: the clients asked.
        state: of noise and clip norm.
        gathering: the aggregate as it grows; None if there can be none.
        closed: why there can be no aggregate; empty while there can.
        rows: see `RoundMean`.
        refused: see `RoundMean`.
        below: for each client whether its update was shorter than the adaptive clip norm.
        failures: what each client reported to have failed.
        came: how many replies were taken.
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
        """Takes the reply of one client; one that does not fit is refused and changes nothing.

        Args:
            client: who was asked.
            reply: what came; None if nothing did.
            task: the number that an update must name; the gatherer's round if None.
            scale: factor on the client's vectors, from 0 to 1. Above 1 a client could move the sum
                by more than its bound, which the noise is measured against. The weight by which
                the sum is divided does not change.

        Raises:
            RecipeError: if `scale` is outside 0..1.
        """
        if not 0 <= scale <= 1:
            raise RecipeError(f"got {scale}, expected a number inside 0..1", place="scale")
        try:
            # A client that failed says why; it has sent no update that could be checked.
            if reply is not None and reply.kind == "error":
                check_header(reply.kind, reply.header)
                reason = reply.header.get("reason", "the client failed and gave no reason")
                self.refused[client] = str(reason)[:MAX_REASON]
                return
            named = self.key.round if task is None else task
            self._take(Key(self.key.seed, named, client), reply, scale)
        except WireError as problem:
            self.refused[client] = str(problem)

    def close(self) -> RoundMean:
        """Closes the aggregate, adds the server's noise, and divides.

        Under privacy the divisor is public and never the number of replies, and noise is added even
        if nothing came: who replied is as private as what was sent.
        """
        if self.gathering is None:
            return self._without_aggregate(self.closed)
        try:
            total = self.gathering.close()
        except SecureError as problem:
            return self._without_aggregate(str(problem))
        # Before the division: the noise of the counts is named by the sums as they came.
        failures = self._count_failures(total)
        if not self.uplink.trust.fixed_divisor:
            means = self._weighted_means(total)
            return RoundMean(means, self.rows, self.refused, self.state, failures, self.came)
        means = self._private_means(total)
        if self.uplink.adaptive is not None:
            self.state |= self._next_clip(self.uplink.adaptive)
        planned = self.uplink.cohort.size
        return RoundMean(means, self.rows, self.refused, self.state, failures, planned)

    def _weighted_means(self, total: Total) -> dict[str, Tensor]:
        """Divides by the weights that came: no privacy, or every update is private by itself."""
        if total.weight <= 0:
            return {}
        weight = total.weight if self.uplink.aggregator.sums else 1.0
        return {name: (vector / weight).float() for name, vector in total.vectors.items()}

    def _private_means(self, total: Total) -> dict[str, Tensor]:
        """Adds the server's noise and divides by the public divisor."""
        uplink = self.uplink
        # The clip norm of this round, before `_next_clip` moves it: the updates are in units of it.
        scale = uplink.update_scale(self.state)
        divisor = uplink.divisor if uplink.aggregator.sums else 1.0
        means = {}
        for codec in uplink.vector_codecs:
            vector = total.vectors[codec.name]
            if codec.noise is not None:
                vector, self.state = codec.noise.add(vector, self.state, self.key, codec.name)
            means[codec.name] = (vector.double() * (scale / divisor)).float()
        return means

    def _without_aggregate(self, reason: str) -> RoundMean:
        """Returns the result of a round in which no aggregate was opened."""
        refused = dict.fromkeys(self.cohort, reason) | self.refused
        return RoundMean({}, [], refused, self.state)

    def _take(self, key: Key, reply: Message | None, scale: float) -> None:
        """Adds an update to the aggregate; WireError if it does not fit, and nothing is added."""
        uplink = self.uplink
        header, tensors = self._open(reply, key.round)
        updates_seen = uplink.aggregator.sees_updates
        named = updates_seen and uplink.trust.names_clients
        examples: int = need("update", header, "examples") if named else 1
        # Before the aggregate: a faulty entry must refuse the whole update.
        self._note(key.client, header)
        if self.gathering is None:
            return

        vectors = uplink.receive(tensors, key) if updates_seen else {}
        scaled = dict(vectors)
        if scale != 1:
            for name, vector in vectors.items():
                scaled[name] = vector * scale
        # Where clients may not be named, `examples` is 1, and all weigh the same.
        weight = float(examples) if uplink.weights == "examples" else 1.0
        secure: Mapping[str, JSON] = need("update", header, "secure") if "secure" in header else {}
        self.gathering.add(Contribution(key, weight, scaled, tensors, secure))
        self.came += 1
        if not named:
            return
        measured = {n: header[n] for n in uplink.trust.reported_measures if n in header}
        norm = float(vectors[UPDATE].double().norm())
        self.rows.append(
            {"client": key.client, "examples": examples, **measured, "update_norm": norm}
        )

    def _note(self, client: ClientId, header: Mapping[str, JSON]) -> None:
        """Notes the bit of an adaptive clip, and the counts of what failed."""
        uplink = self.uplink
        if uplink.adaptive is not None:
            self.below.append(need("update", header, "below"))
        if uplink.privacy is not None and "failures" in header:
            self.failures[client] = uplink.trust.tally(header, uplink.privacy)

    def _open(
        self, reply: Message | None, task: int
    ) -> tuple[Mapping[str, JSON], Mapping[str, Tensor]]:
        """Returns header and tensors of an update that names `task`.

        Raises:
            WireError: if `reply` is no such update.
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
        """Returns how many units gave nothing, with the server's noise if it adds any."""
        uplink = self.uplink
        if uplink.privacy is None:
            return None
        # A refused client counts as one failure already. Its own report would move a second count,
        # and the noise covers a change of 1 in all counts together.
        reported = [tally for name, tally in self.failures.items() if name not in self.refused]
        counted = uplink.trust.with_refused(Tally.sum(reported), len(self.refused))
        if uplink.noise is None:
            return counted
        named = random.fingerprint(*total.vectors.values())
        noised, self.state = uplink.noise.count(counted.tensor(), self.state, self.key, named)
        return Tally(*noised.double().tolist())

    def _next_clip(self, adaptive: AdaptiveClip) -> dict[str, Tensor]:
        """Returns the state with the next clip norm, from a noised count of clipped updates."""
        norm = float(self.state["clip_norm"])
        named = random.fingerprint(self.below, norm, adaptive)
        chance = self.key.private_stream("clip", named)
        # Bits of -1/2 and +1/2 instead of 0 and 1: one client then moves the sum by 1/2 whether it
        # is added or removed, so the same noise is worth twice as much (Andrew et al. 2021).
        count = PrivacyPlan("client", 0.5, 1.0, 2 * (adaptive.count_noise or 0.0))
        centred = 0.0
        for below in self.below:
            centred += 0.5 if below else -0.5
        bits = torch.tensor([centred], dtype=torch.float64)
        noised = float(noise_sum(bits, count, chance))
        share = share_below(noised, self.uplink.cohort.size)
        return {"clip_norm": torch.tensor(adaptive.update(norm, share), dtype=torch.float64)}
