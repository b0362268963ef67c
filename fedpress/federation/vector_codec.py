"""Encodes and decodes one of a client's vectors, and enforces its norm bound on the server.

A client's vectors are its update and, for some algorithms, extras such as SCAFFOLD's control.
"""

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
    """Encoding of one vector, equal on client and server.

    Attributes:
        name: name of the vector, such as "update".
        bound: size and norm limits of the decoded vector. The server enforces them.
        chain: the transforms that encode and decode, in the order of encoding.
        codecs: the settings from which `chain` was made.
        end: limits of the output of the last transform, that is, of the numbers that are sent.
        noise: noise that the server adds to the aggregate of this vector; None: no noise.
        packs_floats: whether floats among its tensors are packed in the shortest form: so if the
            sender chose codecs, which may leave zeros. Clip and noise of a privacy plan do not
            count. An uncoded vector is sent raw: packing would take longer than training.
    """

    name: str
    bound: Bound
    chain: Chain
    codecs: tuple[Settings, ...]
    end: Bound
    noise: ServerNoise | None = None
    packs_floats: bool = False

    def agreed(self) -> dict[str, object]:
        """Returns the fields that server and client compare; `chain` and `end` follow from them."""
        return {
            "name": self.name,
            # "promise" is the older name of the bound. It stays, because another key would change
            # the agreement's fingerprint.
            "promise": self.bound,
            "codecs": self.codecs,
            "noise": self.noise,
        }

    @property
    def size(self) -> int:
        """Number of values."""
        return self.bound.size

    def encode(self, vector: Tensor, key: Key) -> dict[str, Tensor]:
        """Returns the encoded tensors of `vector` [size].

        Their names begin with the vector's name, such as `control/values`. Tensors of the update
        have no such prefix.
        """
        tensors = encode_chain(self.chain, vector, self._vector_key(key))
        return {self._prefix + name: tensor for name, tensor in tensors.items()}

    def decode(self, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
        """Decodes untrusted `tensors` to a vector, float32 [size].

        Raises:
            WireError: if the vector has another size than agreed, or is not finite.
        """
        named = {name.removeprefix(self._prefix): tensor for name, tensor in tensors.items()}
        vector = decode_chain(self.chain, named, self._vector_key(key))
        return check_float(vector, self.size, self.name)

    def receive(self, tensors: Mapping[str, Tensor], key: Key) -> Tensor:
        """Decodes a vector, and clips it to the L2 norm of `bound`, in case the client did not.

        Raises:
            WireError: see `decode`.
        """
        vector = self.decode(tensors, key)
        return clip(vector, self.bound.l2) if self.bound.l2 < math.inf else vector

    def owns(self, tensor: str) -> bool:
        """Returns whether the tensor with the name `tensor` may be part of this vector.

        Names of the update have no prefix, so its codec returns True for every name (see `divide`).
        """
        return tensor.startswith(self._prefix)

    @property
    def _prefix(self) -> str:
        return "" if self.name == UPDATE else f"{self.name}/"

    def _vector_key(self, key: Key) -> Key:
        # Each vector has its own key: two vectors of a message must not get the same noise.
        return key if self.name == UPDATE else key.of_vector(self.name)


def divide(
    vector_codecs: tuple[VectorCodec, ...], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Groups the tensors of a message by vector.

    Args:
        vector_codecs: codecs of all vectors; the first must be that of the update.
        tensors: the tensors of the message, by name.

    Returns:
        Name of the vector -> its tensors. The update gets all tensors that belong to no other
        vector; its transforms refuse unknown tensors.
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
