"""Defines a transform of an update, the bound on its output, and a chain of transforms.

Example: the chain clip -> quantize. `bind_chain` checks the order once. A client then calls
`encode_chain` on each update, and the server calls `decode_chain` on each message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedpress.core import random
from fedpress.core.finite import is_finite
from fedpress.core.names import ClientId
from fedpress.core.random_source import RandomSource, private_stream, public_stream
from fedpress.errors import WireError, inside


@dataclass(frozen=True)
class Bound:
    """Guaranteed properties of one client's vector, such as its largest L2 norm.

    `Settings.bind` takes the bound before a transform and returns the bound after it. Noise and
    secure sums are planned from the bound after the last transform.

    Attributes:
        size: number of values.
        l2: largest L2 norm.
        linf: largest absolute value.
        integer: whether all values are integers.
        spread: standard deviation of each value after a random rotation; the tails of the values
            are then no heavier than Gaussian ones. Infinite without a rotation.
        shapes: shapes of the parameters in the vector, in order, such as ((64, 10), (10,)); empty
            after a transform that mixes or drops values.
        decoded_l2: largest L2 norm that an honest client's update can decode to. The server scales
            longer updates down to it, so a malicious client cannot move the mean further.
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
    """Seeds the random streams of one update: one client's update in one round of one run.

    Client and server have the same seed, so both draw the same masks and rotations, and these need
    not be sent. Such streams are called public. Only the client may know its noise. With a
    `secret`, which only the client has, the noise follows from the secret and not from the seed.

    A stream has a name of one or more words, such as ("dither", "shift"). Other words give
    independent numbers.

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
        """Returns the public stream of this client and round that is named `words`.

        Example: `key.client_stream("dither", "shift")`.
        """
        return public_stream(self.seed, *self._words(words))

    def client_seed(self, *words: str | int) -> int:
        """Returns the public 63-bit seed that is named `words`, for torch's global generator."""
        return random.derive(self.seed, *self._words(words))

    def client_key(self, *words: str | int) -> bytes:
        """Returns the 32 public bytes that are named `words`, as a key for `random.keystream`."""
        return random.secret_key(self.seed, *self._words(words))

    def private_stream(self, *words: str | int) -> RandomSource:
        """Returns the stream for draws that privacy depends on: noise, rounding, choice of batches.

        With a `secret`, the noise is rounded to a public grid, because the low bits of value+noise
        could reveal the value. Without a `secret`, rounding would not help: whoever knows the seed
        can compute the noise.
        """
        exact = self.secret is not None
        return private_stream(self._hidden, *self._words(words), exact=exact)

    def private_key(self, *words: str | int) -> bytes:
        """Returns 32 bytes as a key for `random.keystream`; secret if this key has a `secret`."""
        return random.secret_key(self._hidden, *self._words(words))

    def round_stream(self, *words: str | int) -> RandomSource:
        """Returns a public stream that is the same for all clients of this round."""
        return public_stream(self.seed, "shared", "round", self.round, *words)

    def of_vector(self, name: str) -> Key:
        """Returns the key of a second vector in the same update, such as control variates.

        Two vectors must not share a stream. The same noise would cancel in their difference, and
        with the same random rounding their errors would add up.
        """
        secret = None
        if self.secret is not None:
            # 32 bytes: the new secret has 256 bits, like the secret it comes from.
            secret = int.from_bytes(random.secret_key(self.secret, "vector", name), "little")
        return Key(random.derive(self.seed, "vector", name), self.round, self.client, secret)

    @property
    def _hidden(self) -> int:
        return self.seed if self.secret is None else self.secret

    def _words(self, words: tuple[str | int, ...]) -> tuple[str | int, ...]:
        return ("client", self.client, "round", self.round, *words)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Output of a transform.

    Attributes:
        values: input of the next transform, or the values of the message.
        side: further tensors that decoding needs, such as {"scales": one scale for each block}.
    """

    values: Tensor
    side: Mapping[str, Tensor] = field(default_factory=dict)


def check_values(x: Encoded, name: str, size: int, *, integer: bool = False) -> Tensor:
    """Returns the values that an untrusted client sent, after a check.

    Args:
        x: the received values.
        name: kind of the transform, for errors.
        size: number of values.
        integer: whether the values must be integers.

    Raises:
        WireError: if there are side tensors, or the values have another size or type.
    """
    # Only transforms without side tensors call this function.
    if x.side:
        raise WireError(
            "no transform reads this tensor",
            place=f"{name}.{min(x.side)}",
            cure="send only what the chain makes",
        )
    if x.values.shape != (size,) or x.values.is_floating_point() == integer:
        kind = "integers" if integer else "floating-point numbers"
        got = f"{x.values.dtype} {list(x.values.shape)}"
        raise WireError(
            f"got {got}, expected {kind} [{size}]",
            place=f"{name}.values",
            cure="use the same recipe on both sides",
        )
    return x.values


def check_float(values: Tensor, size: int, name: str) -> Tensor:
    """Returns `values`, after a check that they are finite float32 [size].

    Raises:
        WireError: if `values` have another type or shape, or contain NaN or infinity.
    """
    if values.dtype != torch.float32 or values.shape != (size,):
        raise WireError(
            f"got {values.dtype} {list(values.shape)}, expected torch.float32 [{size}]",
            place=name,
            cure="use the same recipe on both sides",
        )
    # One NaN would make the whole mean NaN.
    if not is_finite(values):
        raise WireError("it contains NaN or infinity", place=name, cure="lower the learning rate")
    return values


class Transform(Protocol):
    """One step of a chain, such as "quantize": encodes and decodes vectors of one size.

    It has no state. The client calls `encode` and the server calls `decode`, with the same key.
    Only the client's key has a `secret`.
    """

    @property
    def additive(self) -> bool:
        """Whether decode(a + b) == decode(a) + decode(b) up to rounding.

        Secure aggregation needs this: the server sees only the sum of the encoded updates.
        """
        ...

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Encodes `x` [size]: float32, or integers if a quantizer comes before."""
        ...

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns the decoded vector [size].

        Raises:
            WireError: if `encode` cannot have produced `x`.
        """
        ...


class Settings(Protocol):
    """Settings of a transform in a recipe, the TOML file that describes a run."""

    @property
    def kind(self) -> str:
        """Name of the transform in a recipe, such as "clip"."""
        ...

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Returns the transform for vectors within `bound`, and the bound of its output.

        Raises:
            RecipeError: if the transform cannot encode such vectors, for instance integers.
        """
        ...


Chain: TypeAlias = "Sequence[Transform]"
"""Transforms in the order in which the client applies them."""
VALUES = "values"
"""Name of the tensor in a message that holds the output of the last transform."""


def bind_chain(chain: Sequence[Settings], bound: Bound) -> tuple[tuple[Transform, ...], Bound]:
    """Makes the transforms of a chain, each for the bound of the previous transform's output.

    Args:
        chain: the settings, in the order in which they are applied.
        bound: the bound of the update itself.

    Returns:
        The transforms, and the bound of the last transform's output.

    Raises:
        RecipeError: if a transform cannot encode the output of the previous transform.
    """
    bounded = []
    for at, settings in enumerate(chain):
        # Adds the position in the chain to the place that an error names.
        with inside(f"chain[{at}]"):
            transform, bound = settings.bind(bound)
        bounded.append(transform)
    return tuple(bounded), bound


def encode_chain(chain: Chain, x: Tensor, key: Key) -> dict[str, Tensor]:
    """Encodes `x` with all transforms and returns the tensors of the message.

    These are "values" and the side tensors. A side tensor's name begins with the position of its
    transform: "scales" of the second transform is "1.scales".
    """
    tensors: dict[str, Tensor] = {}
    for at, transform in enumerate(chain):
        encoded = transform.encode(x, key)
        x = encoded.values
        tensors |= {f"{at}.{name}": tensor for name, tensor in encoded.side.items()}
    return {VALUES: x} | tensors


def decode_chain(chain: Chain, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
    """Decodes the tensors that `encode_chain` returned.

    Raises:
        WireError: if a tensor is missing or invalid, or no transform reads it.
    """
    # A copy: each transform removes the tensors that it reads.
    left = dict(tensors)
    if VALUES not in left:
        raise WireError(
            f"'{VALUES}' is missing",
            place="message.tensors",
            cure="send the encoded update under this name",
        )
    x = left.pop(VALUES)
    # In reverse order: "values" is the output of the last transform.
    for at, transform in reversed(list(enumerate(chain))):
        prefix = f"{at}."
        names = [name for name in left if name.startswith(prefix)]
        side = {name.removeprefix(prefix): left.pop(name) for name in names}
        x = transform.decode(Encoded(x, side), key)
    # Unread tensors are refused, so that a client cannot send hidden data.
    if left:
        raise WireError(
            "no transform reads this tensor",
            place=f"message.tensors.{min(left)}",
            cure="send only what the chain makes",
        )
    return x
