"""The ways to sum what the clients sent: here the plain one, which sees every update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fedpress.errors import WireError
from fedpress.federate.exchange import ClientId
from fedpress.federate.transforms import Bound, Chain, Key
from fedpress.privacy.mechanism import clip
from fedpress.wire.message import JSON


@dataclass(frozen=True, eq=False)
class Sent:
    """One client's message after its header was checked: the encoded update, its weight, and what else it says."""

    key: Key
    tensors: Mapping[str, Tensor]
    weight: float
    row: Mapping[str, JSON]


@dataclass(eq=False)
class Total:
    """A weighted sum [d] in float64 with the weight in it, a row per client in it, and who was refused and why."""

    sum: Tensor
    weight: float = 0.0
    rows: list[dict[str, JSON]] = field(default_factory=list)
    refused: dict[ClientId, str] = field(default_factory=dict)


class Adder(Protocol):
    """One of the two ways to sum what the clients sent."""

    def check(self, chain: Chain, bound: Bound) -> None:
        """Raises RecipeError if it cannot sum what `chain` makes of vectors; `bound` is that of the chain's end."""
        ...

    def add(self, sent: Iterable[Sent], decode: Callable[[Sent], Tensor], promise: Bound) -> Total:
        """Sums the updates, each within `promise` whatever was sent; faulty ones are refused, not raised."""
        ...


@dataclass(frozen=True)
class PlainSum:
    """Decodes each update, holds it to the promised bound, and adds; so a guarantee rests on server code alone."""

    def check(self, chain: Chain, bound: Bound) -> None:
        """Sums after decoding, so every chain will do."""

    def add(self, sent: Iterable[Sent], decode: Callable[[Sent], Tensor], promise: Bound) -> Total:
        """Adds in the order of `sent`, in float64: the same order gives the same bits."""
        total = Total(torch.zeros(promise.size, dtype=torch.float64))
        for item in sent:
            try:
                update = decode(item)
            except WireError as problem:
                total.refused[item.key.client] = str(problem)
                continue
            if promise.l2 < math.inf:
                update = clip(update, promise.l2)
            total.sum.add_(update.double(), alpha=item.weight)
            total.weight += item.weight
            total.rows.append({**item.row, "update_norm": float(update.double().norm())})
        return total
