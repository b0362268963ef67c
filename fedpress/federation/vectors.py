"""Named vectors: the update, the parameters, and what else an algorithm sends beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from fedpress.codecs import Bound, Settings

Vectors: TypeAlias = Mapping[str, Tensor]
"""Name -> float32 [size]."""
UPDATE = "update"
"""Sent by every client: its parameters after local training minus those it was sent."""
PARAMS = "params"
"""Sent to every client: the server's parameters."""


@dataclass(frozen=True)
class ExtraVector:
    """A further named vector of an algorithm, from client to server or back.

    Example: SCAFFOLD sends its control variate as `{"control": ExtraVector()}`.

    Attributes:
        size: number of values; None for as many as the model trains.
        codecs: what compresses it from client to server, in order; unused in the other direction.
        clip_norm: L2 bound of one client's vector. Client privacy needs it: the noise is measured
            against this bound.
    """

    size: int | None = None
    codecs: tuple[Settings, ...] = ()
    clip_norm: float | None = None


@dataclass(frozen=True)
class Payload:
    """What every client sends in a round: its update, and the further vectors of an algorithm.

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
        """Returns all vectors by name, the update first; `clip_norm` is the bound of the update."""
        return {UPDATE: ExtraVector(codecs=self.chain, clip_norm=clip_norm), **self.extras}

    def start(self, vector: ExtraVector) -> Bound:
        """Returns what is known of one of the vectors before its first codec."""
        if vector.size is None:
            return Bound(self.size, shapes=self.shapes)
        return Bound(vector.size)
