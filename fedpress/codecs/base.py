"""A transform changes the numbers of an update and states a bound on the result; also chains."""

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
    """What is guaranteed about one client's vector.

    Attributes:
        size: number of values.
        l2: largest L2 norm.
        linf: largest absolute value.
        integer: whether all values are whole numbers.
        spread: standard deviation of each value after a random rotation, whose tails are no heavier
            than a Gaussian's; infinite without a rotation.
        shapes: shapes of the parameters that the vector holds one after another; empty once a
            transform has mixed or dropped values.
        decoded_l2: largest L2 norm that an honest client's update can decode to. The server cuts
            longer ones back to it, so a client that lies moves the mean no further.
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
    """Names all random streams of one update.

    Client and server hold the same key, so both draw the same masks and rotations, and these need
    no bytes. The client's noise must not be known to others: where the seed is not secret, it
    comes from `secret`, which only the client has.

    Attributes:
        seed: seed of the run.
        round: number of the round.
        client: the client's name.
        secret: key of the client's noise (256 bits). If None, the noise follows from `seed`.
    """

    seed: int
    round: int
    client: ClientId
    secret: int | None = field(default=None, repr=False)

    def client_stream(self, *words: str | int) -> RandomSource:
        """Returns the public stream named `words` of this client in this round."""
        return public_stream(self.seed, *self._words(words))

    def client_seed(self, *words: str | int) -> int:
        """Returns a public 63-bit seed named `words`, for torch's global generator."""
        return random.derive(self.seed, *self._words(words))

    def client_key(self, *words: str | int) -> bytes:
        """Returns 32 public bytes named `words`, for `random.keystream`."""
        return random.secret_key(self.seed, *self._words(words))

    def private_stream(self, *words: str | int) -> RandomSource:
        """Returns the stream named `words` for what privacy rests on: rounding, batches, noise.

        Noise from it lies on a public grid if there is a `secret`. Without one, whoever knows the
        seed can compute the noise anyway.
        """
        exact = self.secret is not None
        return private_stream(self._hidden, *self._words(words), exact=exact)

    def private_key(self, *words: str | int) -> bytes:
        """Returns 32 bytes named `words` that are as secret as the client's noise."""
        return random.secret_key(self._hidden, *self._words(words))

    def round_stream(self, *words: str | int) -> RandomSource:
        """Returns the public stream named `words`, the same for all clients of this round."""
        return public_stream(self.seed, "shared", "round", self.round, *words)

    def of_vector(self, name: str) -> Key:
        """Returns the key of a further vector `name` of the same update.

        No two vectors draw from the same stream. The same noise on two vectors would cancel in
        their difference, and with the same random rounding their errors would add up.
        """
        secret = None
        if self.secret is not None:
            # As many random bits as the secret itself has.
            secret = int.from_bytes(random.secret_key(self.secret, "vector", name), "little")
        return Key(random.derive(self.seed, "vector", name), self.round, self.client, secret)

    @property
    def _hidden(self) -> int:
        return self.seed if self.secret is None else self.secret

    def _words(self, words: tuple[str | int, ...]) -> tuple[str | int, ...]:
        return ("client", self.client, "round", self.round, *words)


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a transform makes of a vector.

    Attributes:
        values: go on to the next transform, or into the message.
        side: what else decoding needs, by name, for instance scales.
    """

    values: Tensor
    side: Mapping[str, Tensor] = field(default_factory=dict)


def check_values(x: Encoded, name: str, size: int, *, integer: bool = False) -> Tensor:
    """Returns the values of `x`, whose sender is not trusted.

    Args:
        x: what was sent.
        name: kind of the transform, for errors.
        size: number of values.
        integer: whether they must be whole numbers.

    Raises:
        WireError: if there are side tensors, or the values are of another size or type.
    """
    if x.side:
        raise WireError(
            "no transform reads this tensor",
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
    """Returns `values`, whose sender is not trusted.

    Raises:
        WireError: if they are not finite float32 [size].
    """
    if values.dtype != torch.float32 or values.shape != (size,):
        raise WireError(
            f"got {values.dtype} {list(values.shape)}, expected torch.float32 [{size}]",
            place=name,
            cure="use the same recipe on both sides",
        )
    # One NaN would make the whole mean NaN.
    if not bool(torch.isfinite(values).all()):
        raise WireError("it holds NaN or infinity", place=name, cure="lower the learning rate")
    return values


class Transform(Protocol):
    """A change of numbers, bound to vectors of one size; frozen, without state.

    The client calls `encode`, the server `decode`. Both hold the same key, except that only the
    client's has a `secret`.
    """

    @property
    def additive(self) -> bool:
        """Whether decode(a + b) == decode(a) + decode(b) up to rounding: a secure sum needs it."""
        ...

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Changes `x`, float32 [size of the bound], or whole numbers after a quantizer."""
        ...

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns a vector of the size of the bound again.

        Raises:
            WireError: if `x` is not what `encode` could have made.
        """
        ...


class Settings(Protocol):
    """Settings of a transform in a recipe."""

    @property
    def kind(self) -> str:
        """Name of the transform in the table."""
        ...

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Returns the transform for vectors within `bound`, and the bound of what it makes.

        Raises:
            RecipeError: if such vectors do not suit it.
        """
        ...


Chain: TypeAlias = "Sequence[Transform]"
VALUES = "values"


def bind_chain(chain: Sequence[Settings], bound: Bound) -> tuple[tuple[Transform, ...], Bound]:
    """Binds each transform to the bound of the one before it.

    Args:
        chain: the settings, in the order in which they are applied.
        bound: the bound of the update itself.

    Returns:
        The transforms, and the bound of what the last one makes.

    Raises:
        RecipeError: if one of them does not suit what comes before it.
    """
    bounded = []
    for at, settings in enumerate(chain):
        with inside(f"chain[{at}]"):
            transform, bound = settings.bind(bound)
        bounded.append(transform)
    return tuple(bounded), bound


def encode_chain(chain: Chain, x: Tensor, key: Key) -> dict[str, Tensor]:
    """Returns the tensors of the message.

    They are `values`, and every side tensor under `<place in the chain>.<name>`, for instance
    `1.scales`.
    """
    tensors: dict[str, Tensor] = {}
    for at, transform in enumerate(chain):
        encoded = transform.encode(x, key)
        x = encoded.values
        tensors |= {f"{at}.{name}": tensor for name, tensor in encoded.side.items()}
    return {VALUES: x} | tensors


def decode_chain(chain: Chain, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
    """Returns the update that `encode_chain` made these tensors of.

    Raises:
        WireError: if a tensor is missing, no transform reads it, or a transform cannot read it.
    """
    left = dict(tensors)
    if VALUES not in left:
        raise WireError(
            f"'{VALUES}' is missing",
            place="message.tensors",
            cure="send the encoded update under this name",
        )
    x = left.pop(VALUES)
    # Backwards: what was sent is the output of the last transform.
    for at, transform in reversed(list(enumerate(chain))):
        prefix = f"{at}."
        names = [name for name in left if name.startswith(prefix)]
        side = {name.removeprefix(prefix): left.pop(name) for name in names}
        x = transform.decode(Encoded(x, side), key)
    # Refused, so that a client cannot send further data along unnoticed.
    if left:
        raise WireError(
            "no transform reads this tensor",
            place=f"message.tensors.{min(left)}",
            cure="send only what the chain makes",
        )
    return x
