"""The secure sum: masked whole numbers are added, so that the server learns their sum and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fedpress.codecs import VALUES, Bound, Key, Transform
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.federation.aggregators.base import Contribution, Total, Weights
from fedpress.federation.exchange import Transport, exchange
from fedpress.federation.protocol import check_header
from fedpress.federation.vector_codec import VectorCodec
from fedpress.federation.vectors import UPDATE
from fedpress.secagg import SecAggMessage, SecAggServer, SecurePlan, SecureRound
from fedpress.secagg.keys import digest
from fedpress.wire.message import Message


class Secure(BaseModel):
    """The row of a recipe: `aggregator = "secure"`. The stage plans the grid and makes a `SecureSum` of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["secure"] = "secure"

    @property
    def sees_updates(self) -> bool:
        """Only their sum."""
        return False


@dataclass(frozen=True)
class SecureSum:
    """Adds masked whole numbers; see docs/secure-aggregation.md.

    Attributes:
        plan: cohort, bits and thresholds.
        size: values that every client sends.
        limit: largest size of a value in an honest sum; a larger one is an overflow, or somebody
            sent nonsense.
        identities: every client's name and public signing key, known to all before the run.
    """

    plan: SecurePlan
    size: int
    limit: int
    identities: tuple[tuple[ClientId, bytes], ...]
    kind: Literal["secure"] = "secure"

    def agreed(self) -> dict[str, object]:
        """Returns what both sides must hold alike; of the keys a digest: the population names them."""
        parts = [part for pair in self.identities for part in pair]
        return {
            "kind": self.kind,
            "plan": self.plan,
            "size": self.size,
            "limit": self.limit,
            "identities": digest("identities", *parts).hex(),
        }

    @property
    def sees_updates(self) -> bool:
        """Only their sum."""
        return False

    @property
    def weights(self) -> Weights:
        """The server cannot see how many examples stand behind an update."""
        return "equal"

    @property
    def sums(self) -> bool:
        """A sum."""
        return True

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """A sum moves as far as the one vector in it that moves; the grid bounds it, for no update is seen."""
        return moved.l2

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Needs one vector, codecs whose sums decode, and whole numbers at their end."""
        for codec in vector_codecs:
            if codec.name != UPDATE:
                raise RecipeError(
                    (
                        f"a secure sum is planned for one vector, and the algorithm sends '{codec.name}' "
                        "too"
                    ),
                    place="aggregator",
                    cure='take aggregator = "mean", or another algorithm',
                )
            kinds = [one.kind for one in codec.codecs]
            check_additive(dict(zip(kinds, codec.chain, strict=True)))
            if not codec.end.integer:
                raise RecipeError(
                    "a secure sum adds whole numbers",
                    place="chain",
                    cure='end the list with { kind = "clip", clip_norm = 10.0 }, { kind = "discretize" }',
                )

    def open(self, transport: Transport | None, run: str) -> SecureSession:
        """Collects the clients' keys and hands them round: two exchanges, once per run.

        Raises:
            SecureError: if too few clients took part.
        """
        if transport is None:
            raise SecureError(
                "its keys travel", place="transport", cure="open it with a transport first"
            )
        combiner, clients = SecAggServer(self.plan, dict(self.identities), run), transport.clients()
        absent = dict.fromkeys(clients, "no reply came")
        _collect(
            transport,
            dict.fromkeys(clients, Message("join", {"run": run})),
            "join",
            combiner.join,
            absent,
        )
        try:
            roster = combiner.roster()
        except SecureError as error:
            error.problem += _named(absent, clients)
            raise
        message = Message("roster", roster.header, roster.tensors)
        absent |= dict.fromkeys((name for name in clients if name not in absent), "no reply came")
        _collect(transport, dict.fromkeys(clients, message), "accepted", combiner.accepted, absent)
        return SecureSession(self, combiner, transport, absent)


@dataclass(frozen=True, eq=False)
class SecureSession:
    """Secure sums of one run; `absent` says why clients are not in it."""

    aggregator: SecureSum
    combiner: SecAggServer
    transport: Transport
    absent: Mapping[ClientId, str] = field(default_factory=dict)

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Every client must know with whom it shares masks."""
        return {"cohort": list(cohort)}

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> MaskedSum:
        """Begins the sum of one round.

        Raises:
            SecureError: if a client of the cohort was not there when keys were handed round.
        """
        try:
            opened = self.combiner.open(key.round, cohort, self.aggregator.size)
        except RecipeError as error:
            problem = f"{error.problem}{_named(self.absent, cohort)}"
            raise SecureError(problem, place=error.place, cure=error.cure) from error
        return MaskedSum(self, vector_codecs[0], key, opened)


@dataclass(eq=False)
class MaskedSum:
    """The sum of one round, masked until enough of the committee have sent what opens it."""

    session: SecureSession
    codec: VectorCodec
    key: Key
    opened: SecureRound

    def add(self, contribution: Contribution) -> None:
        """Adds masked numbers."""
        part = SecAggMessage(dict(contribution.secure), dict(contribution.tensors))
        self.opened.add(contribution.key.client, part)

    def close(self) -> Total:
        """Asks the committee for what opens the sum, and decodes it: a second exchange.

        Raises:
            SecureError: if too few answered, or the sum cannot be that of honest clients.
        """
        requests = {
            name: Message("unmask", part.header, part.tensors)
            for name, part in self.opened.requests().items()
        }
        silent = dict.fromkeys(requests, "no reply came")
        _collect(self.session.transport, requests, "shares", self.opened.share, silent)
        try:
            values = self.opened.sum()
        except SecureError as error:
            error.problem += _named(silent, list(requests))
            raise
        largest, limit = (
            int(values.abs().max()) if values.numel() else 0,
            self.session.aggregator.limit,
        )
        if largest > limit:
            raise SecureError(
                (
                    f"a value of {largest} is beyond the planned {limit}, so the sum overflowed or "
                    "a client sent nonsense"
                ),
                place="secure sum",
                cure="this round does not count",
            )
        update = self.codec.decode({VALUES: values}, self.key)
        return Total({UPDATE: update.double()}, float(len(self.opened.reported)))


def check_additive(chain: Mapping[str, Transform]) -> None:
    """Raises RecipeError unless sums of what `chain` makes, transforms by kind, can be decoded."""
    for kind, transform in chain.items():
        if not transform.additive:
            cure = (
                "'randomk' (one mask for all clients)"
                if kind == "topk"
                else "'discretize' (one grid for all)"
            )
            raise RecipeError(
                f"a secure sum cannot decode a sum of '{kind}'", place="chain", cure=f"use {cure}"
            )


def _collect(
    transport: Transport,
    requests: Mapping[ClientId, Message],
    kind: str,
    take: Callable[[ClientId, SecAggMessage], None],
    missing: dict[ClientId, str],
) -> None:
    """Gives each reply of `kind` to `take`; a faulty one is as if none had come, for the protocol goes on without it.

    Who gave a good reply is taken out of `missing`; for the others it says why.
    """
    for client, reply in exchange(transport, requests):
        try:
            check_header(reply.kind, reply.header)
            if reply.kind == "error":
                missing[client] = str(reply.header.get("reason", "the client failed"))
                continue
            if reply.kind != kind:
                raise WireError(
                    f"got {reply.kind!r}, expected {kind!r}",
                    place=f"{kind}.kind",
                    cure="use the same fedpress on both sides",
                )
            take(client, SecAggMessage(dict(reply.header), dict(reply.tensors)))
        except WireError as problem:
            missing[client] = str(problem)
        else:
            missing.pop(client, None)


def _named(missing: Mapping[ClientId, str], among: Sequence[ClientId]) -> str:
    """Says for a few of the missing clients why; empty if none of `among` is missing."""
    found = [f"{name} ({missing[name][:200]})" for name in among if name in missing]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; missing: {', '.join(found[:3])}{more}" if found else ""
