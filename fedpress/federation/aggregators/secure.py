"""The secure sum: clients send masked whole numbers, and the server learns only their sum."""

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
    """The recipe's `aggregator = "secure"`; the stage plans the grid and makes a `SecureSum`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["secure"] = "secure"

    @property
    def sees_updates(self) -> bool:
        """The server sees their sum only."""
        return False


@dataclass(frozen=True)
class SecureSum:
    """Adds masked whole numbers; see docs/secure-aggregation.md.

    Attributes:
        plan: cohort, bits and thresholds.
        size: values that every client sends.
        limit: largest absolute value in a sum of honest clients; a larger one is an overflow, or
            the vector of a client that did not follow the protocol.
        identities: every client's name and public signing key, known to all before the run.
    """

    plan: SecurePlan
    size: int
    limit: int
    identities: tuple[tuple[ClientId, bytes], ...]
    kind: Literal["secure"] = "secure"

    def agreed(self) -> dict[str, object]:
        """Returns what both sides must hold alike, with a digest in place of the list of keys."""
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
        """The server sees their sum only."""
        return False

    @property
    def weights(self) -> Weights:
        """The server cannot see how many examples stand behind an update."""
        return "equal"

    @property
    def sums(self) -> bool:
        """It returns a sum."""
        return True

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns the bound of one vector, as of a plain sum.

        The server cannot clip what it does not see: here the whole numbers bound the vectors.
        """
        return moved.l2

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Accepts one vector, of additive codecs that end in whole numbers.

        Raises:
            RecipeError: if there is more than the update, or its codecs do not fit.
        """
        for codec in vector_codecs:
            if codec.name != UPDATE:
                raise RecipeError(
                    (
                        "a secure sum is planned for one vector, and the algorithm sends "
                        f"'{codec.name}' too"
                    ),
                    place="aggregator",
                    cure='take aggregator = "mean", or another algorithm',
                )
            kinds = [one.kind for one in codec.codecs]
            check_additive(dict(zip(kinds, codec.chain, strict=True)))
            # Masks are whole numbers modulo 2^bits; floats would not cancel exactly.
            if not codec.end.integer:
                raise RecipeError(
                    "a secure sum adds whole numbers",
                    place="chain",
                    cure=(
                        'end the list with { kind = "clip", clip_norm = 10.0 }, '
                        '{ kind = "discretize" }'
                    ),
                )

    def open(self, transport: Transport | None, run: str) -> SecureSession:
        """Collects the clients' keys and sends all keys to all clients: two exchanges, once a run.

        Raises:
            SecureError: if too few clients took part.
        """
        # Other aggregators need none; a caller may have left it out for all.
        if transport is None:
            raise SecureError(
                "its keys travel", place="transport", cure="open it with a transport first"
            )
        server = SecAggServer(self.plan, dict(self.identities), run)
        clients = transport.clients()
        # Absent until a good reply has come.
        absent = dict.fromkeys(clients, "no reply came")
        join = dict.fromkeys(clients, Message("join", {"run": run}))
        _collect(transport, join, "join", server.join, absent)
        try:
            roster = server.roster()
        except SecureError as error:
            error.problem += _reasons(absent, clients)
            raise
        # Those who joined must also accept the roster; until then they are absent again.
        for name in clients:
            absent.setdefault(name, "no reply came")
        # Clients compare the keys in it with the identities that they know beforehand.
        message = Message("roster", roster.header, roster.tensors)
        _collect(transport, dict.fromkeys(clients, message), "accepted", server.accepted, absent)
        return SecureSession(self, server, transport, absent)


@dataclass(frozen=True, eq=False)
class SecureSession:
    """The secure sums of one run.

    Attributes:
        aggregator: the agreed plan.
        server: the server's side of the protocol.
        transport: reaches the clients.
        absent: clients that take part in no sum of the run -> the reason.
    """

    aggregator: SecureSum
    server: SecAggServer
    transport: Transport
    absent: Mapping[ClientId, str] = field(default_factory=dict)

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns the cohort: every client must know with whom it shares masks."""
        return {"cohort": list(cohort)}

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> MaskedSum:
        """Begins the sum of one round.

        Raises:
            SecureError: if a client of the cohort took no part in the exchange of keys.
        """
        try:
            opened = self.server.open(key.round, cohort, self.aggregator.size)
        except RecipeError as error:
            problem = f"{error.problem}{_reasons(self.absent, cohort)}"
            raise SecureError(problem, place=error.place, cure=error.cure) from error
        return MaskedSum(self, vector_codecs[0], key, opened)


@dataclass(eq=False)
class MaskedSum:
    """The sum of one round, masked until enough clients of the committee have sent their shares."""

    session: SecureSession
    codec: VectorCodec
    key: Key
    opened: SecureRound

    def add(self, contribution: Contribution) -> None:
        """Adds masked numbers."""
        masked = SecAggMessage(dict(contribution.secure), dict(contribution.tensors))
        self.opened.add(contribution.key.client, masked)

    def close(self) -> Total:
        """Asks the committee for the shares that unmask the sum, and decodes it.

        Raises:
            SecureError: if too few answered, or the sum cannot be that of honest clients.
        """
        requests = {}
        for name, part in self.opened.requests().items():
            requests[name] = Message("unmask", part.header, part.tensors)
        # A silent client is no error: the shares of a threshold of them are enough.
        silent = dict.fromkeys(requests, "no reply came")
        _collect(self.session.transport, requests, "shares", self.opened.share, silent)
        try:
            values = self.opened.sum()
        except SecureError as error:
            error.problem += _reasons(silent, list(requests))
            raise
        # Single vectors cannot be checked, so the sum is: beyond the limit it has wrapped around
        # modulo 2^bits, or a client sent more than the grid allows.
        largest = int(values.abs().max()) if values.numel() else 0
        limit = self.session.aggregator.limit
        if largest > limit:
            raise SecureError(
                (
                    f"a value of {largest} is beyond the planned {limit}, so the sum overflowed or "
                    "a client sent nonsense"
                ),
                place="secure sum",
                cure="this round does not count",
            )
        # The sum is decoded as one vector, because all codecs before are additive.
        update = self.codec.decode({VALUES: values}, self.key)
        return Total({UPDATE: update.double()}, float(len(self.opened.reported)))


def check_additive(chain: Mapping[str, Transform]) -> None:
    """Checks that the sum of encoded vectors decodes to the sum of the vectors.

    Args:
        chain: the transforms by kind.

    Raises:
        RecipeError: if one transform is not additive.
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
    """Sends the requests and gives each good reply to `take`.

    A faulty reply is treated as none: the protocol goes on without that client.

    Args:
        transport: reaches the clients.
        requests: a message for each client.
        kind: of the replies.
        take: raises WireError if a reply is faulty.
        missing: client -> why it is missing. A client that gave a good reply is removed.
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


def _reasons(missing: Mapping[ClientId, str], among: Sequence[ClientId]) -> str:
    """Returns the reasons of up to three missing clients; empty if none of `among` is missing."""
    # Cut: a reason comes from a client and may be of any length.
    found = [f"{name} ({missing[name][:200]})" for name in among if name in missing]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; missing: {', '.join(found[:3])}{more}" if found else ""
