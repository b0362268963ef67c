"""A transform changes the numbers of one update and states a bound on the result; a chain is a list of transforms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedpress import seeds
from fedpress.errors import WireError
from fedpress.federate.exchange import ClientId
from fedpress.privacy.mechanism import clip


@dataclass(frozen=True)
class Bound:
    """What is promised about one client's vector: its size, its L2 and maximum norm, whether it is whole numbers."""

    size: int
    l2: float = math.inf
    linf: float = math.inf
    integer: bool = False


@dataclass(frozen=True)
class Key:
    """Names the randomness of one update; client and server hold the same key, so masks and rotations need no bytes."""

    seed: int
    round: int
    client: ClientId

    def own(self, *words: str | int) -> torch.Generator:
        """Returns the stream `words` of this client in this round."""
        return seeds.generator(self.seed, "client", self.client, "round", self.round, *words)

    def secret(self, *words: str | int) -> torch.Generator:
        """Returns the stream `words` of this client in this round for what privacy rests on."""
        return seeds.secret_generator(self.seed, "client", self.client, "round", self.round, *words)

    def shared(self, *words: str | int) -> torch.Generator:
        """Returns the stream `words` that all clients of this round have in common."""
        return seeds.generator(self.seed, "shared", "round", self.round, *words)


@dataclass(frozen=True, eq=False)
class Encoded:
    """`values` go on to the next transform or into the sum; `side` holds what else decoding needs, such as scales."""

    values: Tensor
    side: Mapping[str, Tensor] = field(default_factory=dict)


class Transform(Protocol):
    """One change of numbers on the way of an update; frozen settings, no state."""

    @property
    def additive(self) -> bool:
        """Whether decode(a + b) == decode(a) + decode(b), which a secure sum needs."""
        ...

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Fits the transform to vectors within `bound` and states the bound of its `values`, or raises RecipeError."""
        ...

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Changes `x` [bound.size]."""
        ...

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns [bound.size] again; WireError if `x` is not what `encode` could have made."""
        ...


@dataclass(frozen=True)
class Clip:
    """Scales an update down to L2 norm `clip_norm`."""

    clip_norm: float
    additive: bool = field(default=True, init=False)

    def bind(self, bound: Bound) -> tuple[Clip, Bound]:
        """Promises norms of at most `clip_norm`."""
        return self, replace(bound, l2=min(bound.l2, self.clip_norm), linf=min(bound.linf, self.clip_norm))

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Clips `x` [d]."""
        return Encoded(clip(x, self.clip_norm))

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns the values as they are."""
        return x.values


Chain: TypeAlias = "Sequence[Transform]"
VALUES = "values"


def bind_chain(chain: Chain, bound: Bound) -> tuple[tuple[Transform, ...], Bound]:
    """Binds each transform to what the one before it promises.

    Raises:
        RecipeError: if one of them does not fit.

    >>> bind_chain([Clip(2.0), Clip(1.0)], Bound(size=3))[1]
    Bound(size=3, l2=1.0, linf=1.0, integer=False)
    """
    bounded = []
    for transform in chain:
        transform, bound = transform.bind(bound)
        bounded.append(transform)
    return tuple(bounded), bound


def encode_chain(chain: Chain, x: Tensor, key: Key) -> dict[str, Tensor]:
    """Returns the tensors of the message: `values`, and `<place in the chain>.<name>` for every side tensor."""
    tensors: dict[str, Tensor] = {}
    for at, transform in enumerate(chain):
        encoded = transform.encode(x, key)
        x = encoded.values
        tensors |= {f"{at}.{name}": tensor for name, tensor in encoded.side.items()}
    return {VALUES: x} | tensors


def decode_chain(chain: Chain, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
    """Undoes `encode_chain`.

    Raises:
        WireError: if a tensor is missing, or nobody asked for it, or a transform cannot read it.
    """
    left = dict(tensors)
    if VALUES not in left:
        raise WireError(f"message.tensors: '{VALUES}' is missing; send the encoded update under this name")
    x = left.pop(VALUES)
    for at, transform in reversed(list(enumerate(chain))):
        prefix = f"{at}."
        side = {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}
        x = transform.decode(Encoded(x, side), key)
    if left:
        raise WireError(f"message.tensors.{min(left)}: no transform reads this tensor; send only what the chain makes")
    return x
