"""Rounds each value of an update to one of a few levels: `quantize`, `sign`, `ternary`.

Packing is the lossless entropy coding of a message (`fedpress.wire`). The setting `rate` is the
number of bits per value *after* packing. The grid is uniform, and its step is chosen so that the
entropy coder takes that many bits. For the same error this takes fewer bits than a fixed number of
levels; at high rates it is 0.25 bits above Shannon's limit (Gish & Pierce 1968). The unbiased form
uses subtractive dither (Roberts 1962; Zamir & Feder 1992).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, Transform
from fedpress.codecs.dithered import DitheredQuantizer
from fedpress.codecs.levels import (
    as_array,
    block_means,
    chunks,
    dequantize_blocks,
    reduce_blocks,
    smallest_type,
    uniform,
)
from fedpress.codecs.rate import RateQuantizer
from fedpress.core.settings import SETTINGS
from fedpress.errors import Argument, RecipeError, SettingError


class Quantize(BaseModel):
    """Rounds an update to a uniform grid.

    Give either `rate` (bits per value after packing) or `bits` (bits per value before packing: the
    grid has a fixed number of levels and a scale for each block). Example: 8 bits are the levels
    from -127 to 127.

    >>> Quantize(rate=1.0).bind(Bound(size=3))[1].integer
    True
    """

    model_config = SETTINGS

    kind: Literal["quantize"] = "quantize"
    rate: float | None = Field(
        default=None,
        ge=0.05,
        le=8,
        allow_inf_nan=False,
        description="bits per value after packing, such as 1.5; the step of the grid is chosen to "
        "meet it",
    )
    bits: int | None = Field(
        default=None,
        ge=2,
        le=16,
        description="bits per value before packing, with a scale for each block; in place of rate",
    )
    unbiased: bool = Field(
        default=False, description="round at random, so that the expectation is right"
    )
    block: int = Field(
        default=256, ge=16, le=1 << 20, description="number of values that share one scale"
    )

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
        """Returns the transform, and a bound that says that its output is integers.

        The bound has no norm of these integers, because the width of a step depends on the update.

        Raises:
            RecipeError: if the input is already integers.
        """
        after = _integer_bound(self.kind, bound)
        if self.bits is not None:
            # Symmetric around zero, so one of the 2^bits codes is not used.
            top = (1 << (self.bits - 1)) - 1
            return _Uniform(bound.size, self.block, top, self.unbiased), after
        assert self.rate is not None
        if self.unbiased:
            return DitheredQuantizer(bound.size, self.block, self.rate), after
        return RateQuantizer(bound.size, self.rate), after


class Sign(BaseModel):
    """Sends the sign of each value (one bit), which decodes to sign times the block's mean |x|.

    Example: the block (0.3, -0.1) decodes to (0.2, -0.2). This is signSGD (Bernstein et al. 2018,
    arXiv:1802.04434) with a scale. The result is biased, so use error feedback: it adds what was
    lost to the client's next update.

    >>> Sign().bind(Bound(size=3))[1].integer
    True
    """

    model_config = SETTINGS

    kind: Literal["sign"] = "sign"
    block: int = Field(default=4096, ge=16, le=1 << 20, description="values that share one scale")

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Returns the transform, and a bound that says that its output is integers.

        Raises:
            RecipeError: if the input is already integers.
        """
        return _Sign(bound.size, self.block), _integer_bound(self.kind, bound)


class Ternary(BaseModel):
    """Sends -1, 0 or 1 for each value, and a scale for each block.

    Default (biased): values of size up to 0.7 times the block's mean |x| become 0 (Li, Zhang & Liu
    2016, arXiv:1605.04711). With `unbiased`: x becomes its sign with probability |x| / the block's
    largest |x|, else 0 (TernGrad: Wen et al. 2017, arXiv:1705.07878).

    >>> Ternary().bind(Bound(size=3))[1].integer
    True
    """

    model_config = SETTINGS

    kind: Literal["ternary"] = "ternary"
    block: int = Field(default=4096, ge=16, le=1 << 20, description="values that share one scale")
    unbiased: bool = Field(
        default=False, description="round at random, so that the mean of many updates is right"
    )

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Returns the transform, and a bound that says that its output is integers.

        Raises:
            RecipeError: if the input is already integers.
        """
        after = _integer_bound(self.kind, bound)
        if self.unbiased:
            # A uniform grid with largest level 1 has the levels -1, 0 and 1.
            return _Uniform(bound.size, self.block, 1, True), after
        return _Ternary(bound.size, self.block), after


def _integer_bound(kind: str, bound: Bound) -> Bound:
    """Returns the bound of a quantizer's output; RecipeError if its input is already integers."""
    if bound.integer:
        raise RecipeError(
            "its input is already integers",
            place="kind",
            cure=f"leave '{kind}' or the quantizer before it out",
        )
    # Rounding may make an update longer, but the server scales it down to `decoded_l2`.
    return Bound(bound.size, integer=True, decoded_l2=bound.decoded_l2)


@dataclass(frozen=True)
class _Uniform:
    """A uniform grid of 2 * `top` + 1 levels around zero, with a scale for each block.

    Attributes:
        size: number of values.
        block: number of values that share one scale.
        top: the largest level, such as 127 for 8 bits.
        unbiased: whether values are rounded up or down at random, so that the expectation is right.
    """

    size: int
    block: int
    top: int
    unbiased: bool
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the level of each value, and the scale of each block as `scales`."""
        values, _ = as_array(x, self.size)
        peaks = reduce_blocks(np.maximum, np.abs(values), self.block)
        scales = (peaks / np.float32(self.top)).astype(np.float32)
        # Rounded up to the next float32: with a scale rounded down, the largest value of a block
        # would exceed the largest level.
        too_small = scales * np.float64(self.top) < peaks
        scales[too_small] = np.nextafter(scales[too_small], np.float32(np.inf))
        q = np.empty(self.size, smallest_type(self.top))
        noise = uniform(key, self.size) if self.unbiased else None
        for at, end, scale in chunks(self.size, self.block, scales):
            # A block of zeros has scale 0: `where` leaves its levels 0 instead of 0 / 0.
            zeros = np.zeros(end - at, np.float32)
            part = np.divide(values[at:end], scale, out=zeros, where=scale > 0)
            if noise is None:
                np.rint(part, out=part)
            else:
                part += noise[at:end]
                np.floor(part, out=part)
            # The division may round up beyond the largest level.
            q[at:end] = np.clip(part, -self.top, self.top)
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]."""
        return torch.from_numpy(dequantize_blocks(x, self.size, self.block, self.top))


@dataclass(frozen=True)
class _Sign:
    """Sends the sign of each value and the mean absolute value of each block."""

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
        return torch.from_numpy(dequantize_blocks(x, self.size, self.block, 1))


@dataclass(frozen=True)
class _Ternary:
    """Rounds small values to 0, and the rest of a block to plus or minus the mean |x| of the rest.

    A value is small if |x| is at most 0.7 times the mean |x| of the block.
    """

    size: int
    block: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns -1, 0 or 1 for each value, and the scale of each block as `scales`."""
        values, _ = as_array(x, self.size)
        magnitudes = np.abs(values)
        # 0.7 is between the best factors for uniform and for Gaussian values (2/3 and 0.75; Li,
        # Zhang & Liu 2016).
        threshold = np.float32(0.7) * block_means(magnitudes, self.block)
        q = np.zeros(self.size, np.int8)
        for at, end, limit in chunks(self.size, self.block, threshold):
            q[at:end] = np.sign(values[at:end]) * (magnitudes[at:end] > limit)
        # The mean over the nonzero levels is the mean over the block / the share of nonzero levels.
        kept = block_means(magnitudes * np.abs(q), self.block).astype(np.float64)
        share = block_means(np.abs(q).astype(np.float32), self.block)
        scales = np.divide(kept, share, out=np.zeros_like(kept), where=share > 0).astype(np.float32)
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]."""
        return torch.from_numpy(dequantize_blocks(x, self.size, self.block, 1))
