"""The coordinate-wise median: a few clients that send anything move it no further than the others' values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedpress.codecs import Bound, Key
from fedpress.core.names import ClientId
from fedpress.federation.aggregators.base import Contribution, Total, Weights
from fedpress.federation.exchange import Transport
from fedpress.federation.way import Way
from fedpress.wire.message import JSON

BLOCK = 1 << 20
"""Values that are sorted at a time: sorting needs a second copy of what it sorts."""


class Median(BaseModel):
    """Takes the median of every coordinate by itself (Yin et al. 2018, arXiv:1803.01498, option I).

    It keeps every update of a round: cohort x d float32 values. While fewer than half of the clients send nonsense,
    each coordinate lies within the range of what the honest ones sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["median"] = "median"

    @property
    def sees_updates(self) -> bool:
        """Compares single updates."""
        return True

    @property
    def weights(self) -> Weights:
        """Each client counts once: by examples, one client that claims many would be the median."""
        return "equal"

    @property
    def sums(self) -> bool:
        """A centre: it is not divided."""
        return False

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """No promise: one client can move every coordinate from one neighbour of the median to the next."""
        return None

    def check(self, ways: Sequence[Way]) -> None:
        """Compares after decoding, so every codec will do."""

    def open(self, transport: Transport | None = None, run: str = "") -> Median:
        """Needs no set-up."""
        return self

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Clients need not know of each other."""
        return {}

    def begin(self, ways: Sequence[Way], cohort: Sequence[ClientId], key: Key) -> MedianOf:
        """Begins with nothing."""
        return MedianOf({way.name: way.size for way in ways})


@dataclass(eq=False)
class MedianOf:
    """The updates of a round, kept until all are there; `sizes` are those of the vectors by name."""

    sizes: dict[str, int]
    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, contribution: Contribution) -> None:
        """Keeps the vectors; the weight does not matter."""
        self.kept.append({name: contribution.vectors[name].float() for name in self.sizes})

    def close(self) -> Total:
        """Returns the medians, zeros if nothing came; of an even number, the mean of the two in the middle."""
        medians = {}
        for name, size in self.sizes.items():
            medians[name] = torch.zeros(size, dtype=torch.float64)
            for at in range(0, size if self.kept else 0, BLOCK):
                block = torch.stack([vectors[name][at : at + BLOCK] for vectors in self.kept])
                medians[name][at : at + BLOCK] = middle(block)
        return Total(medians, float(len(self.kept)))


def middle(rows: Tensor) -> Tensor:
    """Returns the median of each column of `rows` [n, d] in float64.

    >>> middle(torch.tensor([[1.0, 5.0], [2.0, 9.0], [100.0, 6.0], [4.0, 0.0]])).tolist()
    [3.0, 5.5]
    """
    ordered = rows.sort(dim=0).values
    half = (len(rows) - 1) // 2
    return (ordered[half].double() + ordered[len(rows) - 1 - half].double()) / 2
