"""A transform changes the numbers of one update and states a bound on the result; a chain is a list of transforms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedpress.core import random
from fedpress.core.names import ClientId
from fedpress.core.random_source import RandomSource, private_stream, public_stream
from fedpress.errors import WireError, inside


@dataclass(frozen=True)
class Bound:
    """What is promised about one client's vector: its size, its L2 and maximum norm, whether it is whole numbers.

    `spread` is the standard deviation of each value after a random rotation, whose tails are no heavier than a
    Gaussian's; infinite without one. `shapes` are those of the parameters that the vector [size] holds one after
    another, empty once a transform has mixed or dropped values. `decoded_l2` is the L2 norm of the longest update that
    the chain up to here can decode to when an honest client encoded it: whoever decodes cuts longer ones back to it.
    """

    size: int
    l2: float = math.inf
    linf: float = math.inf
    integer: bool = False
    spread: float = math.inf
    shapes: tuple[tuple[int, ...], ...] = ()
    decoded_l2: float = math.inf


@dataclass(frozen=True)
class Key:
    """Names the randomness of one update; client and server hold the same key, so masks and rotations need no bytes.

    `secret` is what the client's noise hangs on instead of `seed` where the seed is not secret; only the client has it.
    """

    seed: int
    round: int
    client: ClientId
    secret: int | None = field(default=None, repr=False)

    def client_stream(self, *words: str | int) -> RandomSource:
        """Returns the public stream `words` of this client in this round."""
        return public_stream(self.seed, *self._words(words))

    def client_seed(self, *words: str | int) -> int:
        """Returns 63 bits under the name `words` of this client in this round, for torch's global generator."""
        return random.derive(self.seed, *self._words(words))

    def client_key(self, *words: str | int) -> bytes:
        """Returns 32 public bytes under the name `words` of this client in this round, for `random.keystream`."""
        return random.secret_key(self.seed, *self._words(words))

    def private_stream(self, *words: str | int) -> RandomSource:
        """Returns the stream `words` of this client in this round for what privacy rests on: coins, batches, noise.

        It is exact if there is a `secret`; without one, whoever knows the seed knows the noise, bit by bit.
        """
        exact = self.secret is not None
        return private_stream(self._hidden, *self._words(words), exact=exact)

    def private_key(self, *words: str | int) -> bytes:
        """Returns the 32-byte name of the stream `words` of this client in this round, as secret as its noise."""
        return random.secret_key(self._hidden, *self._words(words))

    def round_stream(self, *words: str | int) -> RandomSource:
        """Returns the public stream `words` that all clients of this round have in common."""
        return public_stream(self.seed, "shared", "round", self.round, *words)

    def of_vector(self, name: str) -> Key:
        """Returns the key of one further vector `name` of the same update: nothing it draws is drawn for another one.

        Two vectors with the same noise would tell their difference, and with one rounding they would err alike.
        """
        secret = None
        if self.secret is not None:
            secret = int.from_bytes(random.secret_key(self.secret, "vector", name), "little")
        return Key(random.derive(self.seed, "vector", name), self.round, self.client, secret)

    @property
    def _hidden(self) -> int:
        return self.seed if self.secret is None else self.secret

    def _words(self, words: tuple[str | int, ...]) -> tuple[str | int, ...]:
        return ("client", self.client, "round", self.round, *words)


@dataclass(frozen=True, eq=False)
class Encoded:
    """`values` go on to the next transform or into the sum; `side` holds what else decoding needs, such as scales."""

    values: Tensor
    side: Mapping[str, Tensor] = field(default_factory=dict)


def check_values(x: Encoded, name: str, size: int, *, integer: bool = False) -> Tensor:
    """Returns the values [size] of `x`, which may come from anybody, if they are all there is.

    Raises:
        WireError: if there are side tensors, or the values are of another size or type.
    """
    if x.side:
        raise WireError(
            "no such tensor is read",
            place=f"{name}.{min(x.side)}",
            cure="send only what the chain makes",
        )
    if x.values.shape != (size,) or x.values.is_floating_point() == integer:
        kind = "whole numbers" if integer else "floating-point numbers"
        got = f"{x.values.dtype} {list(x.values.shape)}"
        raise WireError(
            f"got {got}, expected {kind} [{size}]",
            place=f"{name}.values",
            cure="use the same recipe on both sides",
        )
    return x.values


def check_float(values: Tensor, size: int, name: str) -> Tensor:
    """Returns `values`, which may come from anybody, if they are float32 [size] and finite.

    Raises:
        WireError: if they are not.
    """
    if values.dtype != torch.float32 or values.shape != (size,):
        raise WireError(
            f"got {values.dtype} {list(values.shape)}, expected torch.float32 [{size}]",
            place=name,
            cure="use the same recipe on both sides",
        )
    if not bool(torch.isfinite(values).all()):
        raise WireError("it holds NaN or infinity", place=name, cure="lower the learning rate")
    return values


class Transform(Protocol):
    """One change of numbers on the way of an update, bound to a size; frozen, no state.

    `encode` is called by the client, `decode` by whoever reads; both hold the same key but for its `secret`.
    """

    @property
    def additive(self) -> bool:
        """Whether decode(a + b) == decode(a) + decode(b), up to rounding, which a secure sum needs."""
        ...

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Changes `x` [bound.size]."""
        ...

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns [bound.size] again; WireError if `x` is not what `encode` could have made."""
        ...


class Settings(Protocol):
    """What a recipe says of a transform; its `kind` is the row of the table."""

    @property
    def kind(self) -> str:
        """Name of the row."""
        ...

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Fits the transform to vectors within `bound` and states the bound of its `values`, or raises RecipeError."""
        ...


Chain: TypeAlias = "Sequence[Transform]"
VALUES = "values"


def bind_chain(chain: Sequence[Settings], bound: Bound) -> tuple[tuple[Transform, ...], Bound]:
    """Binds each transform to what the one before it promises.

    Raises:
        RecipeError: if one of them does not fit.
    """
    bounded = []
    for at, settings in enumerate(chain):
        with inside(f"chain[{at}]"):
            transform, bound = settings.bind(bound)
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
        raise WireError(
            f"'{VALUES}' is missing",
            place="message.tensors",
            cure="send the encoded update under this name",
        )
    x = left.pop(VALUES)
    for at, transform in reversed(list(enumerate(chain))):
        prefix = f"{at}."
        side = {
            name.removeprefix(prefix): left.pop(name)
            for name in list(left)
            if name.startswith(prefix)
        }
        x = transform.decode(Encoded(x, side), key)
    if left:
        raise WireError(
            "no transform reads this tensor",
            place=f"message.tensors.{min(left)}",
            cure="send only what the chain makes",
        )
    return x
