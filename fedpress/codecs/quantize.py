"""Quantize: few levels instead of floats, at a number of bits per value that packing then reaches.

`rate` is a target in bits per value *after* packing: a uniform grid so coarse that entropy coding ends up there. At
every rate that takes fewer bits than a fixed number of levels; at high rates it is 0.25 bits above Shannon's limit
(Gish and Pierce 1968). The unbiased form adds dither that both sides draw from the key and the reader subtracts
(Roberts 1962; Zamir and Feder 1992).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, Transform
from fedpress.codecs.dithered import Dithered
from fedpress.codecs.levels import (
    as_array,
    block_means,
    chunks,
    over_blocks,
    scaled,
    smallest_type,
    uniform,
)
from fedpress.codecs.rate import Centroids
from fedpress.errors import Argument, RecipeError, SettingError


class Quantize(BaseModel):
    """Rounds an update to a grid: `rate` bits per value after packing, or `bits` bits with a scale for each block.

    >>> Quantize(rate=1.0).bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quantize"] = "quantize"
    rate: float | None = Field(
        default=None,
        ge=0.05,
        le=8,
        allow_inf_nan=False,
        description="bits of each value after packing, such as 1.5; the step of the grid follows",
    )
    bits: int | None = Field(
        default=None,
        ge=2,
        le=16,
        description="bits of each value before packing, with a scale for each block; give it or rate",
    )
    unbiased: bool = Field(
        default=False, description="round by chance, so that the mean of many updates is right"
    )
    block: int = Field(default=256, ge=16, le=1 << 20, description="values that share one scale")

    @model_validator(mode="after")
    def _one_of_two(self) -> Quantize:
        if self.rate is None and self.bits is None:
            raise SettingError(
                "it needs either rate (bits per value after packing) or bits (levels of a fixed grid)",
                cure=("give ", Argument("rate", 2.0), " or ", Argument("bits", 8)),
            )
        if self.rate is not None and self.bits is not None:
            raise SettingError("rate and bits are both given", cure="leave one of them out")
        return self

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Promises whole numbers; their norm is in units of a step that depends on the update."""
        size, after = _bound(self.kind, bound)
        if self.bits is not None:
            return _Grid(size, self.block, (1 << (self.bits - 1)) - 1, self.unbiased), after
        assert self.rate is not None
        if self.unbiased:
            return Dithered(size, self.block, self.rate), after
        return Centroids(size, self.rate), after


class Sign(BaseModel):
    """One bit a value: its sign, times the mean absolute value of its block (Bernstein et al. 2018).

    >>> Sign().bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sign"] = "sign"
    block: int = Field(default=4096, ge=16, le=1 << 20, description="values that share one scale")

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Promises whole numbers."""
        size, after = _bound(self.kind, bound)
        return _Sign(size, self.block), after


class Ternary(BaseModel):
    """Minus one, zero or one, times a scale for each block.

    Biased: zero below 0.7 times the mean absolute value (Li, Zhang, Liu 2016). Unbiased: one with probability |x| over
    the block's maximum (Wen et al. 2017, TernGrad).

    >>> Ternary().bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ternary"] = "ternary"
    block: int = Field(default=4096, ge=16, le=1 << 20, description="values that share one scale")
    unbiased: bool = Field(
        default=False, description="round by chance, so that the mean of many updates is right"
    )

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Promises whole numbers."""
        size, after = _bound(self.kind, bound)
        return (
            _Grid(size, self.block, 1, True) if self.unbiased else _Ternary(size, self.block)
        ), after


def _bound(kind: str, bound: Bound) -> tuple[int, Bound]:
    if bound.integer:
        raise RecipeError(
            "the values before it are whole numbers already",
            place="kind",
            cure=f"put '{kind}' first",
        )
    return bound.size, Bound(bound.size, integer=True, decoded_l2=bound.decoded_l2)


@dataclass(frozen=True)
class _Grid:
    """`top` levels on each side of zero and a scale for each block; unbiased by rounding at random."""

    size: int
    block: int
    top: int
    unbiased: bool
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        values, _ = as_array(x, self.size)
        peaks = over_blocks(np.maximum, np.abs(values), self.block)
        scales = (peaks / np.float32(self.top)).astype(np.float32)
        scales[scales * np.float64(self.top) < peaks] = np.nextafter(
            scales[scales * np.float64(self.top) < peaks], np.float32(np.inf)
        )
        q = np.empty(self.size, smallest_type(self.top))
        noise = uniform(key, self.size) if self.unbiased else None
        for at, end, scale in chunks(self.size, self.block, scales):
            part = np.divide(
                values[at:end], scale, out=np.zeros(end - at, np.float32), where=scale > 0
            )
            if noise is None:
                np.rint(part, out=part)
            else:
                part += noise[at:end]
                np.floor(part, out=part)
            q[at:end] = np.clip(part, -self.top, self.top)
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        return torch.from_numpy(scaled(x, self.size, self.block, self.top))


@dataclass(frozen=True)
class _Sign:
    """The sign of each value and the mean absolute value of each block."""

    size: int
    block: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        values, _ = as_array(x, self.size)
        scales = block_means(np.abs(values), self.block)
        q = np.where(np.signbit(values), np.int8(-1), np.int8(1))
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        return torch.from_numpy(scaled(x, self.size, self.block, 1))


@dataclass(frozen=True)
class _Ternary:
    """Zero below a threshold; the others become the mean of their absolute values."""

    size: int
    block: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        values, _ = as_array(x, self.size)
        sizes = np.abs(values)
        threshold = np.float32(0.7) * block_means(sizes, self.block)
        q = np.zeros(self.size, np.int8)
        for at, end, limit in chunks(self.size, self.block, threshold):
            q[at:end] = np.sign(values[at:end]) * (sizes[at:end] > limit)
        kept = block_means(sizes * np.abs(q), self.block).astype(np.float64)
        share = block_means(np.abs(q).astype(np.float32), self.block)
        scales = np.divide(kept, share, out=np.zeros_like(kept), where=share > 0).astype(np.float32)
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        return torch.from_numpy(scaled(x, self.size, self.block, 1))
