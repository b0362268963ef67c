"""The mean: a weighted sum of the updates, one after another, in the memory of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedpress.codecs import Bound, Key
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.federation.aggregators.base import Contribution, Total, Weights
from fedpress.federation.exchange import Transport
from fedpress.federation.vector_codec import VectorCodec


class Mean(BaseModel):
    """Adds the updates, each times its client's weight; the server divides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mean"] = "mean"

    @property
    def sees_updates(self) -> bool:
        """Decodes each update and holds it to its promise, so a guarantee rests on server code alone."""
        return True

    @property
    def weights(self) -> Weights:
        """Any weight."""
        return "examples"

    @property
    def sums(self) -> bool:
        """A sum."""
        return True

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """A sum moves as far as the one vector in it that moves, however many there are."""
        return moved.l2

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Adds after decoding, so every codec will do."""

    def open(self, transport: Transport | None = None, run: str = "") -> Mean:
        """Needs no set-up."""
        return self

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Clients need not know of each other."""
        return {}

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> RunningSum:
        """Begins at zero."""
        return RunningSum(
            {codec.name: torch.zeros(codec.size, dtype=torch.float64) for codec in vector_codecs}
        )


@dataclass(eq=False)
class RunningSum:
    """Sums by name in float64: the same order of contributions gives the same bits."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, contribution: Contribution) -> None:
        """Adds every vector times the client's weight."""
        for name, total in self.sums.items():
            total.add_(contribution.vectors[name].double(), alpha=contribution.weight)
        self.weight += contribution.weight

    def close(self) -> Total:
        """Returns the sums."""
        return Total(self.sums, self.weight)
