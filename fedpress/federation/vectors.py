"""Named vectors: the update, the parameters, and whatever else an algorithm sends beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fedpress.codecs import Settings

Vectors: TypeAlias = Mapping[str, Tensor]
"""Name -> float32 [size]."""
UPDATE = "update"
"""What every client sends: its parameters after local training minus those it was sent."""
PARAMS = "params"
"""What every client is sent: the server's parameters."""


@dataclass(frozen=True)
class Extra:
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
