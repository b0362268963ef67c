"""The mean: a running weighted sum of the updates, which needs the memory of one update."""

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
    """Adds the updates, each times its client's weight; the server divides afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mean"] = "mean"

    @property
    def sees_updates(self) -> bool:
        """It adds decoded and clipped updates, so a guarantee needs no trust in client code."""
        return True

    @property
    def weights(self) -> Weights:
        """It can weigh each client by its examples."""
        return "examples"

    @property
    def sums(self) -> bool:
        """It returns a sum."""
        return True

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns the bound of one vector: if one vector moves, the sum moves as far."""
        return moved.l2

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Accepts any codecs: vectors are decoded before they are added."""

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
    """Sums by name.

    They are float64, because in float32 the rounding errors of a large cohort would add up.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, contribution: Contribution) -> None:
        """Adds every vector times the client's weight."""
        for name, total in self.sums.items():
            # In place: one float64 buffer of the model's size, however many clients there are.
            total.add_(contribution.vectors[name].double(), alpha=contribution.weight)
        self.weight += contribution.weight

    def close(self) -> Total:
        """Returns the sums."""
        return Total(self.sums, self.weight)
