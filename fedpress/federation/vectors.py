"""Named vectors: the update, the parameters, and whatever else an algorithm sends beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from fedpress.codecs import Bound, Settings

Vectors: TypeAlias = Mapping[str, Tensor]
"""Name -> float32 [size]."""
UPDATE = "update"
"""What every client sends: its parameters after local training minus those it was sent."""
PARAMS = "params"
"""What every client is sent: the server's parameters."""


@dataclass(frozen=True)
class ExtraVector:
    """One further named vector of an algorithm, on its way up or down.

    Attributes:
        size: number of values; None for as many as the model trains.
        codecs: what makes it small on its way up, in order; none on the way down.
        clip_norm: L2 norm that one client's vector never exceeds. It is needed under client privacy, where this bound
            is what the noise is measured against.
    """

    size: int | None = None
    codecs: tuple[Settings, ...] = ()
    clip_norm: float | None = None


@dataclass(frozen=True)
class Payload:
    """What every client sends in a round: its update, and the further vectors of an algorithm.

    Attributes:
        size: number of values of an update.
        chain: codecs that make it small, in order.
        shapes: of the parameters in it, for codecs that look at whole matrices.
        extras: further vectors by name.
    """

    size: int
    chain: tuple[Settings, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    extras: Mapping[str, ExtraVector] = field(default_factory=dict)

    def vectors(self, clip_norm: float | None) -> dict[str, ExtraVector]:
        """Returns all vectors by name, the update first, which one client moves by at most `clip_norm`."""
        return {UPDATE: ExtraVector(codecs=self.chain, clip_norm=clip_norm), **self.extras}

    def start(self, one: ExtraVector) -> Bound:
        """Returns what is known of `one` of its vectors before the first codec."""
        return Bound(self.size, shapes=self.shapes) if one.size is None else Bound(one.size)
