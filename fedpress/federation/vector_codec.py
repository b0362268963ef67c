"""How one named vector travels from a client into the aggregate: codecs, bound and server noise."""

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
    """The codec of one named vector; client and server hold the same.

    Attributes:
        name: of the vector.
        bound: what holds for every decoded vector before it is aggregated, whatever a client sent.
        chain: the codecs, bound to each other.
        codecs: the settings from which `chain` was bound.
        end: what the last codec promises about the numbers that travel.
        noise: what the server adds to the aggregate of this vector; None for nothing.
    """

    name: str
    bound: Bound
    chain: Chain
    codecs: tuple[Settings, ...]
    end: Bound
    noise: ServerNoise | None = None

    def agreed(self) -> dict[str, object]:
        """Returns what both sides must hold alike; `chain` and `end` follow from it."""
        return {
            "name": self.name,
            # The key keeps its first name: the agreement's fingerprint must not change.
            "promise": self.bound,
            "codecs": self.codecs,
            "noise": self.noise,
        }

    @property
    def size(self) -> int:
        """Number of values."""
        return self.bound.size

    def encode(self, vector: Tensor, key: Key) -> dict[str, Tensor]:
        """Returns the tensors that carry `vector` [size].

        Their names begin with the name of the vector, except those of the update.
        """
        tensors = encode_chain(self.chain, vector, self._vector_key(key))
        return {self._prefix + name: tensor for name, tensor in tensors.items()}

    def decode(self, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
        """Returns the vector, float32 [size], in its `tensors`, which may come from anybody.

        Raises:
            WireError: if it is not a vector of the agreed size, or not finite.
        """
        named = {name.removeprefix(self._prefix): tensor for name, tensor in tensors.items()}
        # A faulty tensor raises WireError here, before it reaches an aggregate.
        vector = decode_chain(self.chain, named, self._vector_key(key))
        return check_float(vector, self.size, self.name)

    def receive(self, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
        """Decodes a vector and clips it to `bound`: a client's own clip cannot be relied on.

        Raises:
            WireError: see `decode`.
        """
        vector = self.decode(tensors, key)
        return clip(vector, self.bound.l2) if self.bound.l2 < math.inf else vector

    def owns(self, tensor: str) -> bool:
        """Says whether the tensor of this name is part of the vector."""
        return tensor.startswith(self._prefix)

    @property
    def _prefix(self) -> str:
        return "" if self.name == UPDATE else f"{self.name}/"

    def _vector_key(self, key: Key) -> Key:
        # Two vectors of one message must not draw the same noise or the same rotation.
        return key if self.name == UPDATE else key.of_vector(self.name)


def divide(
    vector_codecs: tuple[VectorCodec, ...], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of one message grouped by vector; `vector_codecs` begins with the update.

    A tensor that no other vector owns belongs to the update, which refuses what it does not know.
    """
    first, *further = vector_codecs
    parts: dict[str, dict[str, Tensor]] = {codec.name: {} for codec in vector_codecs}
    for name, tensor in tensors.items():
        owner = first
        for codec in further:
            if codec.owns(name):
                owner = codec
                break
        parts[owner.name][name] = tensor
    return parts
