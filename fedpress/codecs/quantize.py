"""Quantize: sends few levels instead of floats, at a given number of bits per value.

`rate` is a target in bits per value *after* packing: the grid is uniform, and just so coarse that
entropy coding takes that many bits. For the same error this takes fewer bits than a fixed number of
levels; at high rates it is 0.25 bits above Shannon's limit (Gish & Pierce 1968). The unbiased form
adds a dither that both sides draw from the key and the receiver subtracts (Roberts 1962; Zamir &
Feder 1992).
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
    smallest_type,
    times_scales,
    uniform,
)
from fedpress.codecs.rate import Centroids
from fedpress.errors import Argument, RecipeError, SettingError


class Quantize(BaseModel):
    """Rounds an update to a grid.

    Either `rate` bits per value after packing, or `bits` bits with a scale for each block.

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
        description="bits of each value before packing, with a scale for each block; give it or "
        "rate",
    )
    unbiased: bool = Field(
        default=False, description="round at random, so that the mean of many updates is right"
    )
    block: int = Field(default=256, ge=16, le=1 << 20, description="values that share one scale")

    @model_validator(mode="after")
    def _either_rate_or_bits(self) -> Quantize:
        if self.rate is None and self.bits is None:
            raise SettingError(
                "it needs either rate (bits per value after packing) or bits (levels of a fixed "
                "grid)",
                cure=("give ", Argument("rate", 2.0), " or ", Argument("bits", 8)),
            )
        if self.rate is not None and self.bits is not None:
            raise SettingError("rate and bits are both given", cure="leave one of them out")
        return self

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Returns the transform, and a bound with whole numbers.

        Their norm has no bound: they count steps whose width depends on the update.

        Raises:
            RecipeError: if the input is whole numbers already.
        """
        after = _whole_numbers(self.kind, bound)
        if self.bits is not None:
            # Symmetric around zero, so one of the 2^bits codes is not used.
            top = (1 << (self.bits - 1)) - 1
            return _Uniform(bound.size, self.block, top, self.unbiased), after
        assert self.rate is not None
        if self.unbiased:
            return Dithered(bound.size, self.block, self.rate), after
        return Centroids(bound.size, self.rate), after


class Sign(BaseModel):
    """One bit a value: its sign, times the mean absolute value of its block.

    signSGD (Bernstein et al. 2018, arXiv:1802.04434) with a scale. Biased: use it with error
    feedback.

    >>> Sign().bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sign"] = "sign"
    block: int = Field(default=4096, ge=16, le=1 << 20, description="values that share one scale")

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Returns the transform, and a bound with whole numbers.

        Raises:
            RecipeError: if the input is whole numbers already.
        """
        return _Sign(bound.size, self.block), _whole_numbers(self.kind, bound)


class Ternary(BaseModel):
    """Minus one, zero or one, times a scale for each block.

    Biased: zero below 0.7 times the block's mean absolute value (Li, Zhang & Liu 2016,
    arXiv:1605.04711). Unbiased: not zero with probability |x| / the block's largest absolute value
    (TernGrad: Wen et al. 2017, arXiv:1705.07878).

    >>> Ternary().bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ternary"] = "ternary"
    block: int = Field(default=4096, ge=16, le=1 << 20, description="values that share one scale")
    unbiased: bool = Field(
        default=False, description="round at random, so that the mean of many updates is right"
    )

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Returns the transform, and a bound with whole numbers.

        Raises:
            RecipeError: if the input is whole numbers already.
        """
        after = _whole_numbers(self.kind, bound)
        if self.unbiased:
            return _Uniform(bound.size, self.block, 1, True), after
        return _Ternary(bound.size, self.block), after


def _whole_numbers(kind: str, bound: Bound) -> Bound:
    """Returns the bound of a quantizer's output; RecipeError if its input is whole already."""
    if bound.integer:
        raise RecipeError(
            "the values before it are whole numbers already",
            place="kind",
            cure=f"put '{kind}' first",
        )
    # The server cuts what it decodes back to `decoded_l2`, so rounding cannot lengthen an update.
    return Bound(bound.size, integer=True, decoded_l2=bound.decoded_l2)


@dataclass(frozen=True)
class _Uniform:
    """A uniform grid of 2 `top` + 1 levels around zero, with a scale for each block.

    Attributes:
        size: number of values.
        block: values with one scale.
        top: the largest level.
        unbiased: whether values are rounded up or down at random, so that the expectation stays.
    """

    size: int
    block: int
    top: int
    unbiased: bool
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the level of each value, and the scale of each block as `scales`."""
        values, _ = as_array(x, self.size)
        peaks = over_blocks(np.maximum, np.abs(values), self.block)
        scales = (peaks / np.float32(self.top)).astype(np.float32)
        # Rounded up, so that the largest value of a block is not beyond the largest level.
        too_small = scales * np.float64(self.top) < peaks
        scales[too_small] = np.nextafter(scales[too_small], np.float32(np.inf))
        q = np.empty(self.size, smallest_type(self.top))
        noise = uniform(key, self.size) if self.unbiased else None
        for at, end, scale in chunks(self.size, self.block, scales):
            # Blocks of zeros have scale 0.
            zeros = np.zeros(end - at, np.float32)
            part = np.divide(values[at:end], scale, out=zeros, where=scale > 0)
            if noise is None:
                np.rint(part, out=part)
            else:
                part += noise[at:end]
                np.floor(part, out=part)
            # The division may round up past the largest level.
            q[at:end] = np.clip(part, -self.top, self.top)
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]."""
        return torch.from_numpy(times_scales(x, self.size, self.block, self.top))


@dataclass(frozen=True)
class _Sign:
    """The sign of each value and the mean absolute value of each block."""

    size: int
    block: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns -1 or 1 for each value, and the scale of each block as `scales`."""
        values, _ = as_array(x, self.size)
        scales = block_means(np.abs(values), self.block)
        # One bit has no code for zero, which counts as positive.
        q = np.where(np.signbit(values), np.int8(-1), np.int8(1))
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]."""
        return torch.from_numpy(times_scales(x, self.size, self.block, 1))


@dataclass(frozen=True)
class _Ternary:
    """Values below a threshold become zero, the others the mean of their absolute values."""

    size: int
    block: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns -1, 0 or 1 for each value, and the scale of each block as `scales`."""
        values, _ = as_array(x, self.size)
        magnitudes = np.abs(values)
        threshold = np.float32(0.7) * block_means(magnitudes, self.block)
        q = np.zeros(self.size, np.int8)
        for at, end, limit in chunks(self.size, self.block, threshold):
            q[at:end] = np.sign(values[at:end]) * (magnitudes[at:end] > limit)
        # Mean over the kept values = mean over the block / share that is kept.
        kept = block_means(magnitudes * np.abs(q), self.block).astype(np.float64)
        share = block_means(np.abs(q).astype(np.float32), self.block)
        scales = np.divide(kept, share, out=np.zeros_like(kept), where=share > 0).astype(np.float32)
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]."""
        return torch.from_numpy(times_scales(x, self.size, self.block, 1))
