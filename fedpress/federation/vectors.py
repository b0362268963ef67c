"""Named vectors of a message: update, parameters, and an algorithm's further vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from fedpress.codecs import Bound, Settings

Vectors: TypeAlias = Mapping[str, Tensor]
"""Name -> float32 [size]."""
UPDATE = "update"
"""Sent by every client: its parameters after local training minus the server's."""
PARAMS = "params"
"""Sent to every client: the server's parameters."""


@dataclass(frozen=True)
class ExtraVector:
    """A vector that an algorithm sends in addition to the update or the parameters.

    Example: SCAFFOLD sends its control variate as `{"control": ExtraVector()}`.

    Attributes:
        size: number of values; None: as many as the model has trainable values.
        codecs: compress it from client to server, in this order; unused in the other direction.
        clip_norm: L2 bound of one client's vector. Client privacy needs it, because the noise is
            proportional to this bound.
    """

    size: int | None = None
    codecs: tuple[Settings, ...] = ()
    clip_norm: float | None = None


@dataclass(frozen=True)
class Payload:
    """The vectors that every client sends in a round: its update, and an algorithm's extras.

    Attributes:
        size: number of values of an update.
        chain: codecs of the update, in order.
        shapes: shapes of the parameters in the update, for codecs that work on whole matrices.
        extras: further vectors by name.
    """

    size: int
    chain: tuple[Settings, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    extras: Mapping[str, ExtraVector] = field(default_factory=dict)

    def vectors(self, clip_norm: float | None) -> dict[str, ExtraVector]:
        """Returns all vectors by name, the update first, which has the L2 bound `clip_norm`."""
        return {UPDATE: ExtraVector(codecs=self.chain, clip_norm=clip_norm), **self.extras}

    def start(self, vector: ExtraVector) -> Bound:
        """Returns the bound of one of the vectors before its first codec: its size, no norm."""
        if vector.size is None:
            return Bound(self.size, shapes=self.shapes)
        return Bound(vector.size)
