"""Base of robust aggregators: they keep all updates and take a centre of each coordinate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedpress.codecs import Bound, Key
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.federation.aggregators.base import Contribution, Total, Weights
from fedpress.federation.exchange import Transport
from fedpress.federation.vector_codec import VectorCodec

BLOCK = 1 << 20
"""Coordinates that are sorted at a time: sorting makes a second copy of what it sorts."""


class CoordinateWise(BaseModel):
    """An aggregator that computes each coordinate by itself; a subclass defines `centre`.

    It keeps every update of a round in memory: cohort x d float32 values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def centre(self, rows: Tensor) -> Tensor:
        """Returns the centre [d] of each column of `rows` [n, d] in float64."""
        raise NotImplementedError

    @property
    def sees_updates(self) -> bool:
        """It compares single updates."""
        return True

    @property
    def weights(self) -> Weights:
        """Each client counts once: with weights, a client could claim many examples and win."""
        return "equal"

    @property
    def sums(self) -> bool:
        """It returns a centre, which is not divided."""
        return False

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns None.

        One client can move a median from one neighbouring value to the next, however far they are
        apart.
        """
        return None

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Accepts any codecs: vectors are decoded before they are compared."""

    def open(self, transport: Transport | None = None, run: str = "") -> Self:
        """Needs no set-up."""
        return self

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Clients need not know of each other."""
        return {}

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> KeptUpdates:
        """Begins with nothing."""
        return KeptUpdates({codec.name: codec.size for codec in vector_codecs}, self.centre)


@dataclass(eq=False)
class KeptUpdates:
    """The updates of a round, kept until all have come.

    Attributes:
        sizes: of the vectors, by name.
        centre: [n, d] -> [d] in float64.
        kept: the vectors of each client.
    """

    sizes: dict[str, int]
    centre: Callable[[Tensor], Tensor]
    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, contribution: Contribution) -> None:
        """Keeps the vectors; the weight is ignored."""
        # In float32, half the memory of float64: the centre is computed in float64, a block at a
        # time.
        self.kept.append({name: contribution.vectors[name].float() for name in self.sizes})

    def close(self) -> Total:
        """Returns the centres, zeros if nothing came."""
        centres = {}
        for name, size in self.sizes.items():
            centres[name] = torch.zeros(size, dtype=torch.float64)
            if not self.kept:
                continue
            for first in range(0, size, BLOCK):
                columns = slice(first, first + BLOCK)
                block = torch.stack([vectors[name][columns] for vectors in self.kept])
                centres[name][columns] = self.centre(block)
        return Total(centres, float(len(self.kept)))
