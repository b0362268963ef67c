"""Sparse updates: the largest values (`topk`), or a part of all drawn by chance that everybody knows (`randomk`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.errors import RecipeError


class TopK(BaseModel):
    """Keeps the values that are largest in size and zeroes the rest; packing then sends positions and values.

    Biased: use it with error feedback (Stich et al. 2018, arXiv:1809.07599).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["topk"] = "topk"
    density: float = Field(default=0.01, gt=0, le=1, description="share of the values that is kept")

    def bind(self, bound: Bound) -> tuple[BoundTopK, Bound]:
        """Leaves size and norms as they are."""
        return BoundTopK(bound.size, _count(self.density, bound.size)), bound


@dataclass(frozen=True)
class BoundTopK:
    """Keeps `kept` of `size` values."""

    size: int
    kept: int

    @property
    def additive(self) -> bool:
        """Sums of sparse vectors decode well, but their positions differ, so a sum of all would be dense."""
        return False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns `x` [d] with all but its `kept` largest values zero."""
        if self.kept >= self.size:
            return Encoded(x)
        largest = x.abs().topk(self.kept, sorted=False).indices
        sparse = torch.zeros_like(x)
        sparse[largest] = x[largest]
        return Encoded(sparse)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns the values as they are."""
        return check_values(x, "topk", self.size)


class RandomK(BaseModel):
    """Sends a random part of the values, the same for all clients of a round, so no positions travel and sums decode.

    `unbiased` scales what is sent by 1 / density, which keeps the expectation and multiplies the norm; without it the
    values that are not drawn count as zero, which error feedback makes up for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["randomk"] = "randomk"
    density: float = Field(default=0.1, gt=0, le=1, description="share of the values that is sent")
    unbiased: bool = Field(
        default=False,
        description="scale what is sent up by 1 / share, so that the mean of many updates is right",
    )

    def bind(self, bound: Bound) -> tuple[BoundRandomK, Bound]:
        """Promises fewer values; norms grow by the scale if it is unbiased."""
        if bound.integer:
            raise RecipeError(
                "it comes after whole numbers",
                place="kind",
                cure="put it before 'quantize' or 'discretize'",
            )
        kept = _count(self.density, bound.size)
        scale = bound.size / kept if self.unbiased else 1.0
        after = replace(
            bound,
            size=kept,
            l2=bound.l2 * scale,
            linf=bound.linf * scale,
            decoded_l2=bound.decoded_l2 * scale,
            spread=math.inf,
            shapes=(),
        )
        return BoundRandomK(bound.size, kept, scale), after


@dataclass(frozen=True)
class BoundRandomK:
    """Sends `kept` of `size` values times `scale`."""

    size: int
    kept: int
    scale: float

    @property
    def additive(self) -> bool:
        """All clients send the same positions."""
        return True

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the drawn values [kept] of `x` [d]."""
        return Encoded(x[self._drawn(key)] * self.scale)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Puts the values back into their places; zeros elsewhere."""
        values = check_values(x, "randomk", self.kept)
        full = torch.zeros(self.size, dtype=values.dtype)
        full[self._drawn(key)] = values
        return full

    def _drawn(self, key: Key) -> Tensor:
        return key.round_stream("randomk").subset(self.size, self.kept)


def _count(density: float, size: int) -> int:
    return min(size, max(1, math.ceil(density * size))) if size else 0
