"""The two ways to sum what the clients sent: the plain one sees every update, the secure one only their sum."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedpress.errors import RecipeError, SecureError, WireError
from fedpress.federate.exchange import ClientId, Transport
from fedpress.federate.transforms import VALUES, Bound, Key, Transform
from fedpress.privacy.mechanism import clip
from fedpress.secure import Combiner, Part, SecurePlan
from fedpress.wire.fields import check_header
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

    def add(self, sent: Iterable[Sent], decode: Decode, promise: Bound, cohort: Sequence[ClientId], key: Key) -> Total:
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

    def add(self, sent: Iterable[Sent], decode: Decode, promise: Bound, cohort: Sequence[ClientId], key: Key) -> Total:
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
        combiner = Combiner(self.plan, dict(self.identities), run)
        for client, reply in transport.exchange(dict.fromkeys(transport.clients(), Message("join", {"run": run}))):
            if reply.kind == "join":
                _ignore_faults(combiner.join, client, reply)
        roster = combiner.roster()
        message = Message("roster", roster.header, roster.tensors)
        for client, reply in transport.exchange(dict.fromkeys(transport.clients(), message)):
            if reply.kind == "accepted":
                _ignore_faults(combiner.accepted, client, reply)
        return SecureSession(self, combiner, transport)


@dataclass(frozen=True, eq=False)
class SecureSession:
    """Secure sums of one run."""

    adder: SecureSum
    combiner: Combiner
    transport: Transport

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Every client must know with whom it shares masks."""
        return {"cohort": list(cohort)}

    def add(self, sent: Iterable[Sent], decode: Decode, promise: Bound, cohort: Sequence[ClientId], key: Key) -> Total:
        """Adds the masked updates, asks the committee for what opens the sum, and decodes it: a second exchange."""
        refused: dict[ClientId, str] = {}
        try:
            opened = self.combiner.open(key.round, cohort, self.adder.size)
        except RecipeError as problem:  # a client of the cohort was not there when keys were handed round
            raise SecureError(str(problem)) from problem
        for item in sent:
            try:
                opened.add(item.key.client, Part(dict(item.secure), dict(item.tensors)))
            except WireError as problem:
                refused[item.key.client] = str(problem)
        requests = {name: Message("unmask", part.header, part.tensors) for name, part in opened.requests().items()}
        for client, reply in self.transport.exchange(requests):
            if reply.kind == "shares":
                _ignore_faults(opened.share, client, reply)
        values = opened.sum()
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
            cure = "'randomk' (one mask for all clients)" if kind == "topk" else "'discretize' (one grid for all)"
            raise RecipeError(f"uplink: a secure sum cannot decode a sum of '{kind}'; use {cure}")


def _ignore_faults(take: Callable[[ClientId, Part], None], client: ClientId, reply: Message) -> None:
    """A faulty message is as if none had come: the protocol goes on without this client."""
    with contextlib.suppress(WireError):
        check_header(reply.kind, reply.header)
        take(client, Part(dict(reply.header), dict(reply.tensors)))
