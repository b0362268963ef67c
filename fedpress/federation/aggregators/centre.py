"""Base class of aggregators that combine each coordinate separately: median and trimmed mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from pydantic import BaseModel
from torch import Tensor

from fedpress.codecs import Bound, Key
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.core.settings import SETTINGS
from fedpress.federation.aggregators.base import Contribution, Total, Weights
from fedpress.federation.exchange import Transport
from fedpress.federation.vector_codec import VectorCodec

BLOCK = 1 << 20
"""Number of coordinates sorted at a time. Sorting makes a copy, so this limits the memory."""


class CoordinateWise(BaseModel):
    """An aggregator that treats each coordinate separately; a subclass defines `centre`.

    It keeps all updates of a round in memory: cohort x d float32 values.
    """

    model_config = SETTINGS

    def centre(self, rows: Tensor) -> Tensor:
        """Returns the centre [d] of each column of `rows` [n, d] in float64."""
        raise NotImplementedError

    @property
    def sees_updates(self) -> bool:
        """Yes: it compares single updates."""
        return True

    @property
    def weights(self) -> Weights:
        """Equal: otherwise a client could decide the result by claiming many examples."""
        return "equal"

    @property
    def sums(self) -> bool:
        """No: the result is a centre, which is not divided."""
        return False

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns None: there is no bound.

        One client can move a median to the next value, however far away this value is.
        """
        return None

    def part(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Returns None: all updates are compared, so all are in memory, cohort x d float32 values."""

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Accepts any codecs: vectors are decoded before they are compared."""

    def open(self, transport: Transport | None = None, run: str = "") -> Self:
        """Returns itself: nothing is exchanged before the first round."""
        return self

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns no header fields: clients need not know the cohort."""
        return {}

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> KeptUpdates:
        """Returns an object that stores the updates of a round."""
        return KeptUpdates({codec.name: codec.size for codec in vector_codecs}, self.centre)


@dataclass(eq=False)
class KeptUpdates:
    """Stores the updates of a round until `close` computes their centre.

    Attributes:
        sizes: name of a vector -> its size.
        centre: function that computes the centre: values [n, d] -> [d] in float64.
        kept: one dictionary for each update: name of a vector -> float32 values.
    """

    sizes: dict[str, int]
    centre: Callable[[Tensor], Tensor]
    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, contribution: Contribution) -> None:
        """Stores the vectors and ignores the weight."""
        # Stored as float32 to save memory; `close` computes in float64, a block at a time.
        self.kept.append({name: contribution.vectors[name].float() for name in self.sizes})

    def close(self) -> Total:
        """Returns the centre of each vector; zeros if there are no updates."""
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
