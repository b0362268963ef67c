"""Computes the mean of one round's updates: adds them up, adds the server's noise, and divides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from fedpress.codecs import Key
from fedpress.core import random
from fedpress.core.canonical import JSON
from fedpress.core.finite import CHUNK, norm
from fedpress.core.names import ClientId
from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.federation.aggregators.base import (
    Contribution,
    Gathering,
    PartialSum,
    Session,
    Total,
)
from fedpress.federation.failures import Tally
from fedpress.federation.protocol import check_header, need, refusal_of
from fedpress.federation.uplink import Uplink
from fedpress.federation.vectors import UPDATE, Vectors
from fedpress.privacy.adaptive import AdaptiveClip, share_below
from fedpress.privacy.noise.mechanism import noise_sum
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire.message import Message

SERVER = "server"
"""Name of the server in the keys of random streams."""


@dataclass(frozen=True, eq=False)
class RoundMean:
    """The mean of one round's updates.

    Attributes:
        vectors: name -> mean of this vector, float32; empty if there is no usable update.
        rows: one row for each client in the mean; empty in a secure sum, and if privacy forbids to
            name clients.
        refused: client whose reply is not in the mean -> the reason.
        state: state of correlated noise and adaptive clip norm, for the next round.
        failures: noisy counts of failed examples or clients; None without privacy, or if the
            updates could not be added up.
        cohort: number of clients in the mean. If it is secret who replied, the planned number.
    """

    vectors: Vectors
    rows: list[dict[str, JSON]]
    refused: dict[ClientId, str]
    state: dict[str, Tensor] = field(default_factory=dict)
    failures: Tally | None = None
    cohort: int = 0

    @property
    def update(self) -> Tensor | None:
        """The mean update [d]; None if there is no usable update."""
        return self.vectors.get(UPDATE)


def gather(
    uplink: Uplink,
    *,
    seed: int,
    round: int,
    session: Session | None = None,
    cohort: Sequence[ClientId] = (),
    state: Mapping[str, Tensor] | None = None,
    secret: int | None = None,
) -> Gatherer:
    """Starts the mean of one round, to which replies are then added.

    Float sums depend on the order: for the same bits, add the replies in the same order.

    Args:
        uplink: how updates are decoded, aggregated and noised.
        seed: seed of the run.
        round: number of the round.
        session: the aggregator's server side; needed for a secure sum.
        cohort: the clients that are asked; needed for a secure sum.
        state: `RoundMean.state` of the last round; None before the first round.
        secret: key of the server's noise generator (256 bits). If None, the noise follows from
            `seed`.
    """
    key = Key(seed, round, SERVER, secret)
    gatherer = Gatherer(uplink, key, tuple(cohort), dict(state or uplink.init()))
    try:
        begun = session or uplink.aggregator.open(None, "")
        gatherer.gathering = begun.begin(uplink.vector_codecs, cohort, key)
    # The run goes on, and this round has no update: in the next round, enough clients may be there.
    except SecureError as problem:
        gatherer.closed = str(problem)
    return gatherer


def round_mean(
    uplink: Uplink,
    replies: Iterable[tuple[ClientId, Message | None]],
    *,
    seed: int,
    round: int,
    session: Session | None = None,
    cohort: Sequence[ClientId] = (),
    state: Mapping[str, Tensor] | None = None,
    secret: int | None = None,
) -> RoundMean:
    """Returns the mean of `replies`, if all of them have come already.

    Args:
        uplink: see `gather`, also for the other arguments.
        replies: client and its reply (None: no reply), always in the same order of clients.
        seed: seed of the run.
        round: number of the round.
        session: the aggregator's server side.
        cohort: the clients that were asked.
        state: state after the last round.
        secret: key of the server's noise generator.
    """
    gatherer = gather(
        uplink, seed=seed, round=round, session=session, cohort=cohort, state=state, secret=secret
    )
    for client, reply in replies:
        gatherer.take(client, reply)
    return gatherer.close()


@dataclass(frozen=True, eq=False)
class Part:
    """The answers of some clients of a round, which stand next to each other in the cohort.

    Attributes:
        total: the sums over these clients.
        taken: number of answers, used or not.
        rows: see `RoundMean`.
        refused: see `RoundMean`.
        below: see `Gatherer`.
        failures: see `Gatherer`.
        num_added: number of updates in the sums.
    """

    total: Total
    taken: int
    rows: list[dict[str, JSON]]
    refused: dict[ClientId, str]
    below: list[bool]
    failures: dict[ClientId, Tally]
    num_added: int


@runtime_checkable
class SummingTransport(Protocol):
    """A transport that can add up the answers of clients where they work."""

    def prepare(self, uplink: Uplink, seed: int) -> None:
        """Tells how the answers are added up; called before the first round.

        Args:
            uplink: how updates are decoded and aggregated.
            seed: seed of the run.
        """
        ...

    def parts(
        self, requests: Sequence[tuple[ClientId, Message]], round: int, size: int
    ) -> Iterator[Part]:
        """Sends requests, and yields the sum over the answers of each block of clients, in order.

        Args:
            requests: the clients with their requests, in the order of the cohort.
            round: number of the round.
            size: number of clients in a block.
        """
        ...


def part_of(
    uplink: Uplink, answers: Iterable[tuple[ClientId, Message]], *, seed: int, round: int
) -> Part:
    """Adds up the answers of clients of one block, for `Gatherer.merge`.

    The aggregator must have a `part`.
    """
    gatherer = Gatherer(uplink, Key(seed, round, SERVER), (), {})
    gatherer.gathering = uplink.aggregator.part(uplink.vector_codecs)
    assert gatherer.gathering is not None
    for client, answer in answers:
        gatherer.take(client, answer)
    return Part(
        gatherer.gathering.close(),
        gatherer.taken,
        gatherer.rows,
        gatherer.refused,
        gatherer.below,
        gatherer.failures,
        gatherer.num_added,
    )


@dataclass(eq=False)
class Gatherer:
    """Collects the replies of one round: call `take` for each reply, then `close`.

    Attributes:
        uplink: how updates are decoded, aggregated and noised.
        key: seeds the server's random streams of this round.
        cohort: the clients that were asked.
        state: state of correlated noise and adaptive clip norm.
        gathering: the aggregate of the updates so far; None if it cannot be computed.
        closed: why the aggregate cannot be computed; "" if it can be computed.
        rows: see `RoundMean`.
        refused: see `RoundMean`.
        below: for each client, whether its update was not longer than the adaptive clip norm.
        failures: client -> the counts of failures that it reported.
        num_added: number of updates in the aggregate.
        taken: number of answers so far, used or not.
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
    num_added: int = 0
    taken: int = 0

    def merge(self, part: Part) -> None:
        """Adds the answers of several clients, which come next in the cohort."""
        gathering = cast("PartialSum", self.gathering)
        gathering.merge(part.total, self.taken, part.taken)
        self.taken += part.taken
        self.rows += part.rows
        self.refused |= part.refused
        self.below += part.below
        self.failures |= part.failures
        self.num_added += part.num_added

    def take(
        self,
        client: ClientId,
        reply: Message | None,
        *,
        task: int | None = None,
        scale: float = 1.0,
    ) -> None:
        """Adds the reply of one client to the mean, or refuses the reply if it is not valid.

        Args:
            client: the client that was asked.
            reply: the client's answer; None if it did not answer.
            task: number of the round that the update must name; None: this round.
            scale: factor on the client's vectors, from 0 to 1. With more than 1, a client could
                move the sum by more than the bound for which the noise is planned. The weight by
                which the sum is divided does not change.

        Raises:
            RecipeError: if `scale` is outside 0..1.
        """
        if not 0 <= scale <= 1:
            raise RecipeError(f"got {scale}, expected a number inside 0..1", place="scale")
        position = self.taken
        self.taken += 1
        try:
            # A client that failed, or may not answer, sends a reason and no update.
            reason = None if reply is None else refusal_of(reply)
            if reason is not None:
                self.refused[client] = reason
                return
            named = self.key.round if task is None else task
            self._take(Key(self.key.seed, named, client), reply, scale, position)
        except WireError as problem:
            self.refused[client] = str(problem)

    def close(self) -> RoundMean:
        """Closes the aggregate, adds the server's noise, divides, and returns the mean.

        If privacy protects whole clients, the fact that a client replied is private, too. So the
        divisor is a public number instead of the number of replies, and noise is added even if
        nobody replied.
        """
        if self.gathering is None:
            return self._without_aggregate(self.closed)
        try:
            total = self.gathering.close()
        except SecureError as problem:
            return self._without_aggregate(str(problem))
        # Counted before noise is added to the sums: a digest of the exact sums is in the name of
        # the random stream from which the noise of the counts is drawn.
        failures = self._count_failures(total)
        if not self.uplink.trust.fixed_divisor:
            means = self._weighted_means(total)
            return RoundMean(means, self.rows, self.refused, self.state, failures, self.num_added)
        means = self._private_means(total)
        if self.uplink.adaptive is not None:
            self.state |= self._next_clip(self.uplink.adaptive)
        planned = self.uplink.cohort.size
        return RoundMean(means, self.rows, self.refused, self.state, failures, planned)

    def _weighted_means(self, total: Total) -> dict[str, Tensor]:
        """Divides by the sum of weights; used if everybody may know who replied."""
        if total.weight <= 0:
            return {}
        weight = total.weight if self.uplink.aggregator.sums else 1.0
        return {name: _divided(vector, weight) for name, vector in total.vectors.items()}

    def _private_means(self, total: Total) -> dict[str, Tensor]:
        """Adds the server's noise and divides by the public divisor."""
        uplink = self.uplink
        # Clients divided their updates by this round's clip norm; `_next_clip` changes it later.
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
        """Returns the result of a round whose aggregate could not be computed."""
        refused = dict.fromkeys(self.cohort, reason) | self.refused
        return RoundMean({}, [], refused, self.state)

    def _take(self, key: Key, reply: Message | None, scale: float, position: int) -> None:
        """Adds an update to the aggregate.

        Args:
            key: seeds the client's random streams in the round of its task.
            reply: the client's answer.
            scale: see `take`.
            position: see `Contribution`.

        Raises:
            WireError: if the update is not valid; then nothing was added.
        """
        uplink = self.uplink
        opened = self._open(reply, key.round)
        header, tensors = opened.header, opened.tensors
        updates_seen = uplink.aggregator.sees_updates
        # Numbers of examples are read only if the record of the round may name clients.
        named = updates_seen and uplink.trust.names_clients
        examples: int = need("update", header, "examples") if named else 1
        # Read before the vectors are added: if a field of the header is faulty, the whole update is
        # refused.
        self._note(key.client, header)
        if self.gathering is None:
            return

        vectors = uplink.receive(tensors, key) if updates_seen else {}
        scaled = dict(vectors)
        if scale != 1:
            for name, vector in vectors.items():
                scaled[name] = vector * scale
        # `examples` is 1 if clients may not be named; then all clients have the same weight.
        weight = float(examples) if uplink.weights == "examples" else 1.0
        secure: Mapping[str, JSON] = need("update", header, "secure") if "secure" in header else {}
        self.gathering.add(
            Contribution(key, weight, scaled, tensors, secure, position, opened.unmade)
        )
        self.num_added += 1
        if not named:
            return
        measured = {n: header[n] for n in uplink.trust.reported_measures if n in header}
        length = norm(vectors[UPDATE])
        self.rows.append(
            {"client": key.client, "examples": examples, **measured, "update_norm": length}
        )

    def _note(self, client: ClientId, header: Mapping[str, JSON]) -> None:
        """Stores the header's bit for the adaptive clip norm, and its counts of failures."""
        uplink = self.uplink
        if uplink.adaptive is not None:
            self.below.append(need("update", header, "below"))
        if uplink.privacy is not None and "failures" in header:
            self.failures[client] = uplink.trust.tally(header, uplink.privacy)

    def _open(self, reply: Message | None, task: int) -> Message:
        """Returns the reply, which must be the update for round `task`.

        Raises:
            WireError: if `reply` is something else.
        """
        if reply is None:
            raise WireError(
                "no reply came", place="update", cure="check whether the client is still running"
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
        return reply

    def _count_failures(self, total: Total) -> Tally | None:
        """Returns the total counts of failures, with the server's noise if the server adds noise.

        None without privacy.
        """
        uplink = self.uplink
        if uplink.privacy is None:
            return None
        # A refused client already counts as one failure. Its own report would change the counts by
        # another 1, but the noise covers a change of 1 per client in total.
        reported = [tally for name, tally in self.failures.items() if name not in self.refused]
        counted = uplink.trust.with_refused(Tally.sum(reported), len(self.refused))
        if uplink.noise is None:
            return counted
        named = random.fingerprint(*total.vectors.values())
        noised, self.state = uplink.noise.count(counted.tensor(), self.state, self.key, named)
        return Tally(*noised.double().tolist())

    def _next_clip(self, adaptive: AdaptiveClip) -> dict[str, Tensor]:
        """Returns the next clip norm as state; a noised count of unclipped updates decides it."""
        norm = float(self.state["clip_norm"])
        named = random.fingerprint(self.below, norm, adaptive)
        chance = self.key.private_stream("clip", named)
        # Bits are -1/2 and +1/2 instead of 0 and 1, so one client moves the sum by 1/2 instead of
        # 1, and half the noise gives the same privacy (Andrew et al. 2021).
        count = PrivacyPlan("client", 0.5, 1.0, 2 * (adaptive.count_noise or 0.0))
        centred = 0.0
        for below in self.below:
            centred += 0.5 if below else -0.5
        bits = torch.tensor([centred], dtype=torch.float64)
        noised = float(noise_sum(bits, count, chance))
        # Divided by the planned number of clients, since it is private how many replied.
        share = share_below(noised, self.uplink.cohort.size)
        return {"clip_norm": torch.tensor(adaptive.update(norm, share), dtype=torch.float64)}


def _divided(total: Tensor, weight: float) -> Tensor:
    """Returns `total` / `weight` as float32 [d].

    It is divided in parts: the quotient of a whole float64 vector would take twice the memory of
    the result.
    """
    mean = torch.empty(total.shape, dtype=torch.float32)
    for part, values in zip(mean.split(CHUNK), total.split(CHUNK), strict=True):
        part.copy_(values / weight)
    return mean
