"""The codec of one named vector from a client into the aggregate: its codecs, its promise, the server's noise on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedpress.codecs import Bound, Chain, Key, Settings, check_float, decode_chain, encode_chain
from fedpress.federation.servernoise import ServerNoise
from fedpress.federation.vectors import UPDATE
from fedpress.privacy.noise.mechanism import clip


@dataclass(frozen=True)
class VectorCodec:
    """One vector's codec, alike on client and server.

    Attributes:
        name: of the vector.
        promise: what holds for every decoded vector that is aggregated, whatever a client sent.
        chain: codecs, bound to each other.
        codecs: the settings that they were bound from.
        end: what the last of them promises about the numbers that travel.
        noise: what the server adds to the aggregate, None if nothing.
    """

    name: str
    promise: Bound
    chain: Chain
    codecs: tuple[Settings, ...]
    end: Bound
    noise: ServerNoise | None = None

    def agreed(self) -> dict[str, object]:
        """Returns what both sides must hold alike; the bound codecs follow from it."""
        return {
            "name": self.name,
            "promise": self.promise,
            "codecs": self.codecs,
            "noise": self.noise,
        }

    @property
    def size(self) -> int:
        """Number of values."""
        return self.promise.size

    def encode(self, vector: Tensor, key: Key) -> dict[str, Tensor]:
        """Returns the tensors that carry `vector` [size]; names of a further vector begin with its own."""
        tensors = encode_chain(self.chain, vector, self._own(key))
        return {self._prefix + name: tensor for name, tensor in tensors.items()}

    def decode(self, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
        """Returns the vector [size] float32 in the `tensors` that are its own, which may come from anybody.

        Raises:
            WireError: if it is not a vector of the agreed size, or not finite.
        """
        found = {name.removeprefix(self._prefix): tensor for name, tensor in tensors.items()}
        return check_float(decode_chain(self.chain, found, self._own(key)), self.size, self.name)

    def receive(self, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
        """Decodes and cuts back to the promised length: what a client says of its own clip is never believed.

        Raises:
            WireError: see `decode`.
        """
        vector = self.decode(tensors, key)
        return clip(vector, self.promise.l2) if self.promise.l2 < math.inf else vector

    def owns(self, tensor: str) -> bool:
        """Says whether the tensor of this name is part of the vector; all that is nobody's is the update's."""
        return tensor.startswith(self._prefix)

    @property
    def _prefix(self) -> str:
        return "" if self.name == UPDATE else f"{self.name}/"

    def _own(self, key: Key) -> Key:
        return key if self.name == UPDATE else key.of_vector(self.name)


def divide(
    vector_codecs: tuple[VectorCodec, ...], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of one message by the vector that they belong to; `vector_codecs` begins with the update."""
    first, *further = vector_codecs
    parts: dict[str, dict[str, Tensor]] = {codec.name: {} for codec in vector_codecs}
    for name, tensor in tensors.items():
        owner = next((codec for codec in further if codec.owns(name)), first)
        parts[owner.name][name] = tensor
    return parts
