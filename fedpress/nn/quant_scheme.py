"""Grids of a few bits: which values weights and inputs may take, their scales, and rounding to them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
FILE = "file"  # in the context of a validation: what is read was written by some fedpress
BITS = {"int": 8, "ternary": 2, "binary": 1, "codebook": 4}


class WeightGrid(BaseModel):
    """The values that weights may take.

    "int": c * scale with whole c in -(2^(bits-1) - 1) .. 2^(bits-1) - 1; "ternary": {-scale, 0, scale}; "binary":
    {-scale, scale}; "codebook": one of 2^bits values that the layer's weights share. All but binary hold 0 exactly.

    >>> WeightGrid(kind="int", bits=4).highest
    7
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["int", "ternary", "binary", "codebook"] = "int"
    bits: int = Field(8, ge=1, le=8)
    group: int | None = Field(
        None, ge=1, description="one scale per so many input values; None: per output channel"
    )
    centroid_bits: int | None = Field(
        None,
        ge=2,
        le=8,
        description="codebook only: its values are whole numbers of so many bits times one scale",
    )

    @model_validator(mode="before")
    @classmethod
    def _bits_of_kind(cls, given: Any) -> Any:
        if isinstance(given, dict) and "bits" not in given and given.get("kind", "int") in BITS:
            return {**given, "bits": BITS[given.get("kind", "int")]}
        return given

    @model_validator(mode="after")
    def _fits(self) -> WeightGrid:
        if (self.kind == "int" and self.bits < 2) or (
            self.kind in ("ternary", "binary") and self.bits != BITS[self.kind]
        ):
            raise ValueError(
                f"{self.bits} bits do not fit '{self.kind}'; int has 2 to 8, ternary 2, binary 1"
            )
        if self.kind == "codebook" and self.group is not None:
            raise ValueError("a codebook is shared by the whole layer; leave group out")
        if self.kind != "codebook" and self.centroid_bits is not None:
            raise ValueError(
                f"centroid_bits is for a codebook, not for '{self.kind}'; leave it out"
            )
        return self

    @property
    def highest(self) -> int:
        """The largest code; of a codebook the last index less 2^(bits-1), so that every code fits into int8."""
        return {"int": 2 ** (self.bits - 1) - 1, "codebook": 2 ** (self.bits - 1) - 1}.get(
            self.kind, 1
        )

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) if self.kind == "codebook" else -self.highest

    @property
    def has_zero(self) -> bool:
        """Whether a weight can be exactly 0, so that pruned weights stay pruned."""
        return self.kind != "binary"


class InputGrid(BaseModel):
    """The values that a layer's inputs may take: (c - zero_point) * scale with whole c in 0 .. 2^bits - 1.

    One bit is {middle - scale, middle + scale}, on which side of its channel's middle a value lies: behind a ReLU the
    sign itself would always be +1. XNOR-Net takes the middle away by a norm before the sign (Rastegari et al. 2016,
    arXiv:1603.05279, section 3.2), ReActNet learns it (Liu et al. 2020, arXiv:2003.03488, section 4.1), as is done
    here. With `middle=False` one bit is {-scale, scale}, the sign alone.

    `dynamic` takes scale and zero point from each batch; a middle is never taken from a batch.

    >>> InputGrid(bits=1).middle, InputGrid(bits=8).middle
    (True, False)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(8, ge=1, le=8)
    dynamic: bool = False
    middle: bool = Field(
        default=False,
        description="one bit only, and true there by default: compare with a learned middle",
    )

    @model_validator(mode="before")
    @classmethod
    def _middle_of_one_bit(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, dict) and given.get("bits") == 1 and "middle" not in given:
            # Files from before there was a middle hold the sign alone, and so they open.
            return {**given, "middle": not (info.context or {}).get(FILE)}
        return given

    @model_validator(mode="after")
    def _fits(self) -> InputGrid:
        if self.middle and self.bits != 1:
            raise ValueError(
                f"a middle is for inputs of one bit, not of {self.bits}; leave middle out"
            )
        return self

    @property
    def calibrated(self) -> bool:
        """Whether something of it is taken from public examples before it is used."""
        return not self.dynamic or self.middle

    @property
    def highest(self) -> int:
        """The largest code; the smallest is 0 (of one bit: 1 and -1)."""
        return 2**self.bits - 1


class LayerGrids(BaseModel):
    """What is on a grid in one layer; None stays float."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: WeightGrid | None = None
    inputs: InputGrid | None = None


def spread(scale: Tensor, weight: Tensor, group: int | None) -> Tensor:
    """Returns the scales [out] or [out, groups] in a shape that multiplies `weight` [out, ...].

    Groups run over the weights of an output channel as they lie flat; the last one may be shorter.
    """
    if group is None:
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    each = weight[0].numel()
    return scale.repeat_interleave(min(group, each), dim=1)[:, :each].reshape(weight.shape)


def grouped(weight: Tensor, group: int | None) -> Tensor:
    """Returns `weight` [out, ...] as [out, groups, values]; a shorter last group is filled up with zeros.

    >>> grouped(torch.ones(2, 5), 3).shape
    torch.Size([2, 2, 3])
    """
    flat = weight.reshape(len(weight), -1)
    if group is None or group >= flat.shape[1]:
        return flat[:, None]
    return F.pad(flat, (0, -flat.shape[1] % group)).reshape(len(weight), -1, group)


def first_scale(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Returns scales [out] or [out, groups]: the span for "int", the best in L2 for "ternary" and "binary".

    Ternary alternates threshold and scale as Lloyd does, from the threshold 0.7 mean |w| of Ternary Weight Networks
    (Li & Liu 2016, arXiv:1605.04711, section 2.2), whose optimum is a threshold of scale / 2: the nearest grid point.
    Binary is the mean |w| of XNOR-Net (Rastegari et al. 2016, arXiv:1603.05279, section 3.1). A shorter last group
    counts its own weights only. NaN weights give scales of 1.
    """
    size = grouped(weight.detach().float().abs(), grid.group)
    if grid.kind == "int":
        scale = size.amax(-1) / grid.highest
    else:
        there = grouped(torch.ones_like(weight, dtype=torch.float32), grid.group)
        mean = size.sum(-1) / there.sum(-1).clamp_min(1)
        scale = mean if grid.kind == "binary" else _ternary(size, mean)
    scale = scale[:, 0] if grid.group is None else scale
    return (
        mended(scale) if grid.has_zero else scale.nan_to_num(1.0)
    )  # without a 0, zeros need a scale of (nearly) 0


def _ternary(size: Tensor, mean: Tensor) -> Tensor:
    threshold = 0.7 * mean
    scale = mean
    for _ in range(20):
        far = size > threshold[..., None]
        scale = (size * far).sum(-1) / far.sum(-1).clamp_min(1)
        threshold = scale / 2
    return scale


def mended(scale: Tensor) -> Tensor:
    """Returns scales without zeros: those of nothing but zeros become the largest of the layer, or 1 if all are 0."""
    top = scale.detach().amax() if scale.numel() else scale.new_ones(())
    return torch.where(scale > 0, scale, torch.where(top > 0, top, torch.ones_like(top)))


def even_codebook(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Returns 2^bits values evenly over the span of the weights, the nearest to 0 replaced by 0: a first codebook."""
    flat = weight.detach().float().reshape(-1)
    low, high = (
        (flat.amin().clamp(max=0), flat.amax().clamp(min=0))
        if flat.numel()
        else (flat.sum(), flat.sum())
    )
    values = low + (high - low) * torch.linspace(0, 1, 2**grid.bits, device=flat.device)
    values[values.abs().argmin()] = 0
    return values


def affine(low: Tensor, high: Tensor, grid: InputGrid) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point (0-d float32) of an input grid that spans low..high and holds 0 exactly.

    A span of zero width gets the scale 1.

    >>> affine(torch.tensor(-1.0), torch.tensor(4.1), InputGrid())
    (tensor(0.0200), tensor(50.))
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    width = (high - low) / grid.highest
    scale = torch.where(width > TINY, width, torch.ones_like(width))
    return scale, (-low / scale).round().clamp(0, grid.highest)


def positive(scale: Tensor) -> Tensor:
    """Returns the scale that is used: training may push it through zero, the grid is the same with -scale."""
    return scale.abs().clamp_min(TINY)


def through(value: Tensor, x: Tensor) -> Tensor:
    """Returns `value` to the bit with the gradient of `x` (straight-through, Bengio et al. 2013, arXiv:1308.3432)."""
    return value.detach() + (x - x.detach())


def slowed(x: Tensor, factor: float) -> Tensor:
    """Returns `x` to the bit; its gradient is multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor


def pace(x: Tensor, levels: int) -> float:
    """The gradient scale 1 / sqrt(values * levels) of a learned step size, for the inputs of one example."""
    return (
        max(1, math.prod(x.shape[1:])) * levels
    ) ** -0.5  # not by the batch, whose size may be open in an export


def rounded(weight: Tensor, at: Tensor, grid: WeightGrid) -> Tensor:
    """Returns the nearest grid points of `weight` for scales `at` that broadcast, or the ascending codebook `at`.

    >>> rounded(torch.tensor([0.4, -9.0]), torch.tensor(0.5), WeightGrid(bits=3))
    tensor([ 0.5000, -1.5000])
    """
    return value_of(nearest_codes(weight, at, grid), at, grid)


def nearest_codes(weight: Tensor, at: Tensor, grid: WeightGrid) -> Tensor:
    """The codes, as float, of `weight` for the broadcast scale or the ascending codebook `at`."""
    if grid.kind == "binary":
        return torch.where(weight >= 0, 1.0, -1.0)
    if grid.kind != "codebook":
        return (weight / at).round().clamp(grid.lowest, grid.highest)
    above = torch.searchsorted(at, weight.contiguous()).clamp(1, len(at) - 1)
    nearer = above - (weight - at[above - 1] < at[above] - weight).long()
    return nearer.float() + grid.lowest


def value_of(codes: Tensor, at: Tensor, grid: WeightGrid) -> Tensor:
    """Returns the values of `codes`; `at` are the scales, spread over the weights, or the codebook."""
    return at[(codes - grid.lowest).long()] if grid.kind == "codebook" else codes * at
