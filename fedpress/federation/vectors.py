"""The vectors that server and clients exchange: parameters, update, and extras of an algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from fedpress.codecs import Bound, Settings

Vectors: TypeAlias = Mapping[str, Tensor]
"""Name of a vector -> its values, float32 [size]."""
UPDATE = "update"
"""Name of the vector that every client sends. For FedAvg, its values are the client's parameters
after local training minus the server's."""
PARAMS = "params"
"""Name of the vector that the server sends to every client: the server's parameters."""


@dataclass(frozen=True)
class ExtraVector:
    """A vector that an algorithm sends in addition to the update or the parameters.

    Example: SCAFFOLD sends its control variate as `{"control": ExtraVector()}`.

    Attributes:
        size: number of values; None: as many as the model has trainable values.
        codecs: compress the vector from client to server, in this order; unused from server to
            client.
        clip_norm: L2 bound of one client's vector; None: no bound. Privacy of whole clients needs a
            bound, because the noise is proportional to it.
    """

    size: int | None = None
    codecs: tuple[Settings, ...] = ()
    clip_norm: float | None = None


@dataclass(frozen=True)
class Payload:
    """All vectors that a client sends in a round: its update, and the extras of the algorithm.

    Attributes:
        size: number of values of an update.
        chain: codecs of the update, in the order in which they encode.
        shapes: shapes of the parameters in the update, for codecs that work on whole matrices.
        extras: name -> further vector.
    """

    size: int
    chain: tuple[Settings, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    extras: Mapping[str, ExtraVector] = field(default_factory=dict)

    def vectors(self, clip_norm: float | None) -> dict[str, ExtraVector]:
        """Returns all vectors by name, the update first; `clip_norm` is the update's L2 bound."""
        # The update is first: other code takes the first vector for the update.
        return {UPDATE: ExtraVector(codecs=self.chain, clip_norm=clip_norm), **self.extras}

    def start(self, vector: ExtraVector) -> Bound:
        """Returns the known bound of a vector before its first codec: the size, but no norm."""
        # Only the update has the model's shapes; `size` None means as large as an update.
        if vector.size is None:
            return Bound(self.size, shapes=self.shapes)
        return Bound(vector.size)
