"""The two ways to sum what the clients sent: the plain one sees every update, the secure one only their sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedpress.codecs import VALUES, Bound, Key, Transform
from fedpress.core.names import ClientId
from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.federation.exchange import Transport, exchange
from fedpress.federation.protocol import check_header
from fedpress.privacy.noise.mechanism import clip
from fedpress.secagg import SecAggMessage, SecAggServer, SecurePlan
from fedpress.wire.message import JSON, Message

Decode: TypeAlias = "Callable[[Mapping[str, Tensor], Key], Tensor]"


@dataclass(frozen=True, eq=False)
class Sent:
    """One client's message after its header was checked: the encoded update, its weight, and what else it says."""

    key: Key
    tensors: Mapping[str, Tensor]
    weight: float
    row: Mapping[str, JSON]
    secure: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(eq=False)
class Total:
    """A weighted sum [d] in float64 with the weight in it, a row per client in it, and who was refused and why."""

    sum: Tensor
    weight: float = 0.0
    rows: list[dict[str, JSON]] = field(default_factory=list)
    refused: dict[ClientId, str] = field(default_factory=dict)


class Session(Protocol):
    """The server's side of the sums of one run."""

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns what a request says besides, so that the clients of `cohort` can send what is summed here."""
        ...

    def add(
        self,
        sent: Iterable[Sent],
        decode: Decode,
        promise: Bound,
        cohort: Sequence[ClientId],
        key: Key,
    ) -> Total:
        """Sums the updates, each within `promise` whatever was sent; faulty ones are refused, not raised.

        Args:
            sent: what came, in the order of `cohort`.
            decode: tensors of a message and their key -> the update [d] float32; WireError if it is none.
            promise: what holds for every update in the sum.
            cohort: who was asked.
            key: of the round, for decoding a sum.

        Raises:
            SecureError: if there can be no sum.
        """
        ...


class Adder(Protocol):
    """One of the two ways to sum what the clients sent; frozen, and alike on both sides."""

    def check(self, chain: Mapping[str, Transform], bound: Bound) -> None:
        """Raises RecipeError if it cannot sum what `chain` makes of vectors; `bound` is that of the chain's end.

        `chain` holds the transforms in order, by the kind under which the recipe knows them.
        """
        ...

    def open(self, transport: Transport, run: str) -> Session:
        """Sets up the sums of one run, named `run`."""
        ...


@dataclass(frozen=True)
class PlainSum:
    """Decodes each update, holds it to the promised bound, and adds; so a guarantee rests on server code alone."""

    def check(self, chain: Mapping[str, Transform], bound: Bound) -> None:
        """Sums after decoding, so every chain will do."""

    def open(self, transport: Transport, run: str) -> PlainSum:
        """Needs no set-up."""
        return self

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Clients need not know of each other."""
        return {}

    def add(
        self,
        sent: Iterable[Sent],
        decode: Decode,
        promise: Bound,
        cohort: Sequence[ClientId],
        key: Key,
    ) -> Total:
        """Adds in the order of `sent`, in float64: the same order gives the same bits."""
        total = Total(torch.zeros(promise.size, dtype=torch.float64))
        for item in sent:
            try:
                update = decode(item.tensors, item.key)
            except WireError as problem:
                total.refused[item.key.client] = str(problem)
                continue
            if promise.l2 < math.inf:
                update = clip(update, promise.l2)
            total.sum.add_(update.double(), alpha=item.weight)
            total.weight += item.weight
            total.rows.append({**item.row, "update_norm": float(update.double().norm())})
        return total


@dataclass(frozen=True)
class SecureSum:
    """Adds masked whole numbers, so that the server learns their sum and nothing else; see docs/secure-aggregation.md.

    Attributes:
        plan: cohort, bits and thresholds.
        size: values that every client sends.
        limit: largest size of a value in an honest sum; a larger one is an overflow, or somebody sent nonsense.
        identities: every client's name and public signing key, known to all before the run.
    """

    plan: SecurePlan
    size: int
    limit: int
    identities: tuple[tuple[ClientId, bytes], ...]

    def check(self, chain: Mapping[str, Transform], bound: Bound) -> None:
        """Needs a chain whose sums decode, and whole numbers at its end."""
        check_additive(chain)
        if not bound.integer:
            raise RecipeError(
                'uplink: a secure sum adds whole numbers; end the list with { kind = "clip", clip_norm = 10.0 }, '
                '{ kind = "discretize" }'
            )

    def open(self, transport: Transport, run: str) -> SecureSession:
        """Collects the clients' keys and hands them round: two exchanges, once per run.

        Raises:
            SecureError: if too few clients took part.
        """
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
        except SecureError as problem:
            raise SecureError(f"{problem}{_named(absent, clients)}") from problem
        message = Message("roster", roster.header, roster.tensors)
        absent |= dict.fromkeys((name for name in clients if name not in absent), "no reply came")
        _collect(transport, dict.fromkeys(clients, message), "accepted", combiner.accepted, absent)
        return SecureSession(self, combiner, transport, absent)


@dataclass(frozen=True, eq=False)
class SecureSession:
    """Secure sums of one run; `absent` says why clients are not in it."""

    adder: SecureSum
    combiner: SecAggServer
    transport: Transport
    absent: Mapping[ClientId, str] = field(default_factory=dict)

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Every client must know with whom it shares masks."""
        return {"cohort": list(cohort)}

    def add(
        self,
        sent: Iterable[Sent],
        decode: Decode,
        promise: Bound,
        cohort: Sequence[ClientId],
        key: Key,
    ) -> Total:
        """Adds the masked updates, asks the committee for what opens the sum, and decodes it: a second exchange."""
        refused: dict[ClientId, str] = {}
        try:
            opened = self.combiner.open(key.round, cohort, self.adder.size)
        except (
            RecipeError
        ) as problem:  # a client of the cohort was not there when keys were handed round
            raise SecureError(f"{problem}{_named(self.absent, cohort)}") from problem
        for item in sent:
            try:
                opened.add(item.key.client, SecAggMessage(dict(item.secure), dict(item.tensors)))
            except WireError as problem:
                refused[item.key.client] = str(problem)
        requests = {
            name: Message("unmask", part.header, part.tensors)
            for name, part in opened.requests().items()
        }
        silent = dict.fromkeys(requests, "no reply came")
        _collect(self.transport, requests, "shares", opened.share, silent)
        try:
            values = opened.sum()
        except SecureError as problem:
            raise SecureError(f"{problem}{_named(silent, list(requests))}") from problem
        largest = int(values.abs().max()) if values.numel() else 0
        if largest > self.adder.limit:
            raise SecureError(
                f"secure sum: a value of {largest} is beyond the planned {self.adder.limit}, so the sum overflowed or "
                "a client sent nonsense; this round does not count"
            )
        update = decode({VALUES: values}, key)
        return Total(update.double(), float(len(opened.reported)), [], refused)


def check_additive(chain: Mapping[str, Transform]) -> None:
    """Raises RecipeError unless sums of what `chain` makes, transforms by kind, can be decoded."""
    for kind, transform in chain.items():
        if not transform.additive:
            cure = (
                "'randomk' (one mask for all clients)"
                if kind == "topk"
                else "'discretize' (one grid for all)"
            )
            raise RecipeError(f"uplink: a secure sum cannot decode a sum of '{kind}'; use {cure}")


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
                raise WireError(str(reply.header.get("reason", "the client failed")))
            if reply.kind != kind:
                raise WireError(f"{kind}.kind: got {reply.kind!r}")
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
