"""The weighted mean of the updates: a running sum, so updates need not be kept in memory."""

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
    """Adds weight x update over all clients; the server later divides the sum."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mean"] = "mean"

    @property
    def sees_updates(self) -> bool:
        """Yes: the server decodes and clips every update itself."""
        return True

    @property
    def weights(self) -> Weights:
        """Any weights: clients may be weighed by their numbers of examples."""
        return "examples"

    @property
    def sums(self) -> bool:
        """Yes: the sum is divided later."""
        return True

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns the L2 bound of one vector: with weight 1, the sum moves as far as the vector."""
        return moved.l2

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Accepts any codecs: vectors are decoded before they are added."""

    def open(self, transport: Transport | None = None, run: str = "") -> Mean:
        """Returns itself: a mean needs no exchange before the first round."""
        return self

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns no header fields: clients need not know the cohort."""
        return {}

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> RunningSum:
        """Returns sums that are zero."""
        return RunningSum(
            {codec.name: torch.zeros(codec.size, dtype=torch.float64) for codec in vector_codecs}
        )


@dataclass(eq=False)
class RunningSum:
    """The weighted sum of each named vector.

    Sums are float64, because float32 rounding errors would add up over a large cohort.

    Attributes:
        sums: name of a vector -> sum of weight x vector over the clients so far.
        weight: sum of the clients' weights so far.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, contribution: Contribution) -> None:
        """Adds each vector of a client, multiplied by the client's weight."""
        for name, total in self.sums.items():
            # In place, and without a copy in float64: torch converts while it adds.
            total.add_(contribution.vectors[name], alpha=contribution.weight)
        self.weight += contribution.weight

    def close(self) -> Total:
        """Returns the sums and the total weight."""
        return Total(self.sums, self.weight)
