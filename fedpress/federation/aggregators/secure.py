"""The secure sum as an aggregator: clients send masked integers, and the server learns the sum.

The protocol itself is in `fedpress.secagg`; this file connects it to the rounds and the transport.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from fedpress.codecs import VALUES, Bound, Key, Transform
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.core.settings import SETTINGS
from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.federation.aggregators.base import Contribution, Total, Weights
from fedpress.federation.exchange import Transport, exchange
from fedpress.federation.protocol import check_header, refusal_of
from fedpress.federation.vector_codec import VectorCodec
from fedpress.federation.vectors import UPDATE
from fedpress.secagg import SecAggMessage, SecAggServer, SecurePlan, SecureRound
from fedpress.secagg.keys import digest
from fedpress.wire.message import Message


class Secure(BaseModel):
    """The value `aggregator = "secure"` of a recipe. The stage makes a `SecureSum` in its place."""

    model_config = SETTINGS

    kind: Literal["secure"] = "secure"

    @property
    def sees_updates(self) -> bool:
        """No: the server sees only the sum of the updates."""
        return False


@dataclass(frozen=True)
class SecureSum:
    """Settings of the secure sum of a run; see docs/secure-aggregation.md.

    Attributes:
        plan: number of clients, bits of a sum, and how many clients may drop out or be dishonest.
        size: number of values in each client's vector.
        limit: largest absolute value that a sum has if all clients are honest. A larger value means
            an overflow, or that a client did not follow the protocol.
        identities: name and public signing key of every client, known to all before the run.
    """

    plan: SecurePlan
    size: int
    limit: int
    identities: tuple[tuple[ClientId, bytes], ...]
    kind: Literal["secure"] = "secure"

    def agreed(self) -> dict[str, object]:
        """Returns the values that server and client compare; a digest replaces the public keys."""
        # The keys of thousands of clients would make each agreement long.
        parts: list[ClientId | bytes] = []
        for name, public_key in self.identities:
            parts += [name, public_key]
        return {
            "kind": self.kind,
            "plan": self.plan,
            "size": self.size,
            "limit": self.limit,
            "identities": digest("identities", *parts).hex(),
        }

    @property
    def sees_updates(self) -> bool:
        """No: the server sees only the sum of the updates."""
        return False

    @property
    def weights(self) -> Weights:
        """Equal: the server does not learn a client's number of examples."""
        return "equal"

    @property
    def sums(self) -> bool:
        """Yes: the sum is divided later."""
        return True

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns the L2 bound of one vector, as for a plain sum.

        The server does not see single vectors, so it cannot clip them. Honest clients clip their
        own vectors.
        """
        return moved.l2

    def part(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Returns None: masks cancel only in the sum over the whole cohort."""

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Checks that only the update is sent, and that its codecs are additive and give integers.

        With additive codecs, a sum of encoded vectors decodes to the sum of the vectors.

        Raises:
            RecipeError: if there are further vectors, or if the update's codecs do not fit.
        """
        for codec in vector_codecs:
            if codec.name != UPDATE:
                raise RecipeError(
                    (
                        "a secure sum adds one vector per client, and the algorithm also sends "
                        f"'{codec.name}'"
                    ),
                    place="aggregator",
                    cure='take aggregator = "mean", or another algorithm',
                )
            kinds = [one.kind for one in codec.codecs]
            check_additive(dict(zip(kinds, codec.chain, strict=True)))
            # Masks are whole numbers modulo 2^bits; floats would not cancel exactly.
            if not codec.end.integer:
                raise RecipeError(
                    "a secure sum adds whole numbers, and these codecs give floats",
                    place="chain",
                    cure=(
                        'end the list with { kind = "clip", clip_norm = 10.0 }, '
                        '{ kind = "discretize" }'
                    ),
                )

    def open(self, transport: Transport | None, run: str) -> SecureSession:
        """Exchanges keys, once for each run: collects each client's key, and sends all keys to all.

        Raises:
            SecureError: if too few clients take part, or `transport` is None.
        """
        if transport is None:
            raise SecureError(
                "a secure sum exchanges keys with the clients, and there is no transport",
                place="transport",
                cure="call open with a transport first",
            )
        server = SecAggServer(self.plan, dict(self.identities), run)
        clients = transport.clients()
        # Each client counts as absent until a valid reply has come.
        absent = dict.fromkeys(clients, "no reply came")
        join = dict.fromkeys(clients, Message("join", {"run": run}))
        _collect(transport, join, "join", server.join, absent)
        try:
            roster = server.roster()
        except SecureError as error:
            error.problem += _reasons(absent, clients)
            raise
        # Clients that joined must also accept the roster (the list of all keys), so they count as
        # absent until they do.
        for name in clients:
            absent.setdefault(name, "no reply came")
        # Clients check the roster's signatures with the identities that they knew before the run.
        message = Message("roster", roster.header, roster.tensors)
        _collect(transport, dict.fromkeys(clients, message), "accepted", server.accepted, absent)
        return SecureSession(self, server, transport, absent)


@dataclass(frozen=True, eq=False)
class SecureSession:
    """Starts the secure sums of one run, after the exchange of keys.

    Attributes:
        aggregator: settings of the secure sum.
        server: the server's side of the protocol.
        transport: carries messages to the clients.
        absent: client that cannot take part in this run -> the reason.
    """

    aggregator: SecureSum
    server: SecAggServer
    transport: Transport
    absent: Mapping[ClientId, str] = field(default_factory=dict)

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns the cohort: each client must know with which clients it shares masks."""
        return {"cohort": list(cohort)}

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> MaskedSum:
        """Starts the sum of one round.

        Raises:
            SecureError: if the cohort is not as planned, or if a client in it did not take part in
                the exchange of keys.
        """
        try:
            opened = self.server.open(key.round, cohort, self.aggregator.size)
        except RecipeError as error:
            problem = f"{error.problem}{_reasons(self.absent, cohort)}"
            raise SecureError(problem, place=error.place, cure=error.cure) from error
        return MaskedSum(self, vector_codecs[0], key, opened)


@dataclass(eq=False)
class MaskedSum:
    """The masked sum of one round.

    Attributes:
        session: settings of the secure sum, and the transport.
        codec: decodes the sum.
        key: seeds the server's random streams of this round, with which the sum is decoded.
        opened: the server's side of this round's protocol.
    """

    session: SecureSession
    codec: VectorCodec
    key: Key
    opened: SecureRound

    def add(self, contribution: Contribution) -> None:
        """Adds a client's masked integers."""
        report = SecAggMessage(
            dict(contribution.secure), dict(contribution.tensors), contribution.unmade
        )
        # In one process, the first report tells that none of them has a mask.
        if report.unmade and not self.opened.reported and type(self.opened) is SecureRound:
            self.opened = self.opened.simulated()
        self.opened.add(contribution.key.client, report)

    def close(self) -> Total:
        """Asks the committee (clients that help to unmask) for shares, and decodes the sum.

        Raises:
            SecureError: if too few members of the committee answer, or if a value of the sum
                exceeds the limit.
        """
        requests = {}
        for name, part in self.opened.requests().items():
            requests[name] = Message("unmask", part.header, part.tensors, unmade=part.unmade)
        # A missing answer is no error, since a threshold of the members is enough.
        silent = dict.fromkeys(requests, "no reply came")
        _collect(self.session.transport, requests, "shares", self.opened.share, silent)
        try:
            values = self.opened.sum()
        except SecureError as error:
            error.problem += _reasons(silent, list(requests))
            raise
        # Single vectors are masked, so only the sum can be checked. A value beyond the limit means
        # that the sum wrapped around modulo 2^bits, or that a client sent too large values.
        largest = int(values.abs().max()) if values.numel() else 0
        limit = self.session.aggregator.limit
        if largest > limit:
            raise SecureError(
                (
                    f"a value of {largest} exceeds the limit {limit}: the sum overflowed, or a "
                    "client sent invalid values"
                ),
                place="secure sum",
                cure="go on with the next round; this one has no update",
            )
        # The codecs are additive, so the sum is decoded like a single vector.
        update = self.codec.decode({VALUES: values}, self.key)
        return Total({UPDATE: update.double()}, float(len(self.opened.reported)))


def check_additive(chain: Mapping[str, Transform]) -> None:
    """Checks that the sum of encoded vectors decodes to the sum of the vectors.

    Args:
        chain: the transforms by kind, such as {"clip": ..., "discretize": ...}.

    Raises:
        RecipeError: if a transform is not additive.
    """
    for kind, transform in chain.items():
        if transform.additive:
            continue
        if kind == "topk":
            cure = "'randomk' (one mask for all clients)"
        else:
            cure = "'discretize' (one grid for all)"
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
    """Sends the requests, and passes each valid reply to `take`.

    A client with an invalid reply is treated like a client that did not reply.

    Args:
        transport: carries messages to the clients.
        requests: a message for each client.
        kind: expected kind of the replies.
        take: stores a reply; raises WireError if the reply is invalid.
        missing: client -> why it is missing. Clients with a valid reply are removed here.
    """
    for client, reply in exchange(transport, requests):
        try:
            check_header(reply.kind, reply.header)
            reason = refusal_of(reply)
            if reason is not None:
                missing[client] = reason
                continue
            if reply.kind != kind:
                raise WireError(
                    f"got {reply.kind!r}, expected {kind!r}",
                    place=f"{kind}.kind",
                    cure="use the same fedpress on both sides",
                )
            take(client, SecAggMessage(dict(reply.header), dict(reply.tensors), reply.unmade))
        except WireError as problem:
            missing[client] = str(problem)
        else:
            missing.pop(client, None)


def _reasons(missing: Mapping[ClientId, str], among: Sequence[ClientId]) -> str:
    """Returns why clients are missing, for up to three of `among`; empty if none is missing."""
    # Cut, because a client's reason may have any length.
    found = [f"{name} ({missing[name][:200]})" for name in among if name in missing]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; missing: {', '.join(found[:3])}{more}" if found else ""
