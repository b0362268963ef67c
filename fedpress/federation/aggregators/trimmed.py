"""The trimmed mean: the largest and smallest values of every coordinate do not count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.codecs import Bound, Key
from fedpress.core.names import ClientId
from fedpress.federation.aggregators.base import Contribution, Total, Weights
from fedpress.federation.exchange import Transport
from fedpress.federation.way import Way
from fedpress.wire.message import JSON

BLOCK = 1 << 20
"""Values that are sorted at a time: sorting needs a second copy of what it sorts."""


class Trimmed(BaseModel):
    """`aggregator = { kind = "trimmed", beta = 0.1 }` (Yin et al. 2018, arXiv:1803.01498, option II).

    Of n values of a coordinate the floor(beta n) smallest and as many largest are dropped; the rest is averaged. While
    no more than beta n clients send nonsense, each coordinate lies within the range of what the honest ones sent. It
    keeps every update of a round: cohort x d float32 values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["trimmed"] = "trimmed"
    beta: float = Field(default=0.1, ge=0, lt=0.5, description="share of clients on each side")

    @property
    def sees_updates(self) -> bool:
        """Compares single updates."""
        return True

    @property
    def weights(self) -> Weights:
        """Each client counts once: by examples, one that claims many would be all that is left."""
        return "equal"

    @property
    def sums(self) -> bool:
        """A mean already: it is not divided."""
        return False

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """No promise: whoever comes or goes changes how many are dropped."""
        return None

    def check(self, ways: Sequence[Way]) -> None:
        """Compares after decoding, so every codec will do."""

    def open(self, transport: Transport | None = None, run: str = "") -> Trimmed:
        """Needs no set-up."""
        return self

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Clients need not know of each other."""
        return {}

    def begin(self, ways: Sequence[Way], cohort: Sequence[ClientId], key: Key) -> TrimmedOf:
        """Begins with nothing."""
        return TrimmedOf({way.name: way.size for way in ways}, self.beta)


@dataclass(eq=False)
class TrimmedOf:
    """The updates of a round, kept until all are there; `sizes` are those of the vectors by name."""

    sizes: dict[str, int]
    beta: float
    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, contribution: Contribution) -> None:
        """Keeps the vectors; the weight does not matter."""
        self.kept.append({name: contribution.vectors[name].float() for name in self.sizes})

    def close(self) -> Total:
        """Returns the trimmed means, zeros if nothing came."""
        means, drop = {}, int(self.beta * len(self.kept))
        for name, size in self.sizes.items():
            means[name] = torch.zeros(size, dtype=torch.float64)
            for at in range(0, size if self.kept else 0, BLOCK):
                block = torch.stack([vectors[name][at : at + BLOCK] for vectors in self.kept])
                inner = block.sort(dim=0).values[drop : len(block) - drop]
                means[name][at : at + BLOCK] = inner.double().mean(0)
        return Total(means, float(len(self.kept)))
