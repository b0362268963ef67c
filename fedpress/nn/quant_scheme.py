"""Quantization schemes: which values weights and inputs may take, their scales, quantize and dequantize.

The words are those of compressed-tensors. A *grid* is the set of values that can be represented, a *code* the whole
number that stands for one of them: value = code * scale, for inputs (code - zero_point) * scale.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from torch import Tensor

from fedpress.errors import SettingError

TINY = torch.finfo(torch.float32).tiny
FILE = "file"  # in the context of a validation: what is read was written by some fedpress
BITS = {"int": 8, "ternary": 2, "binary": 1, "codebook": 4}


class WeightQuantization(BaseModel):
    """The values that weights may take.

    "int": c * scale with whole c in -(2^(bits-1) - 1) .. 2^(bits-1) - 1; "ternary": {-scale, 0, scale}; "binary":
    {-scale, scale}; "codebook": one of 2^bits values that the layer's weights share. All but binary hold 0 exactly.

    >>> WeightQuantization(kind="int", bits=4).highest
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
    def _fits(self) -> WeightQuantization:
        if (self.kind == "int" and self.bits < 2) or (
            self.kind in ("ternary", "binary") and self.bits != BITS[self.kind]
        ):
            raise SettingError(
                f"{self.bits} bits do not fit '{self.kind}'",
                place="bits",
                cure="int has 2 to 8, ternary 2, binary 1",
            )
        if self.kind == "codebook" and self.group is not None:
            raise SettingError(
                "a codebook is shared by the whole layer", place="group", cure="leave group out"
            )
        if self.kind != "codebook" and self.centroid_bits is not None:
            raise SettingError(
                f"it is for a codebook, not for '{self.kind}'",
                place="centroid_bits",
                cure="leave centroid_bits out",
            )
        return self

    @property
    def highest(self) -> int:
        """The largest code; of a codebook the last index less 2^(bits-1), so that every code fits into int8."""
        if self.kind in ("int", "codebook"):
            return (1 << (self.bits - 1)) - 1
        return 1

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) if self.kind == "codebook" else -self.highest

    @property
    def has_zero(self) -> bool:
        """Whether a weight can be exactly 0, so that pruned weights stay pruned."""
        return self.kind != "binary"


class InputQuantization(BaseModel):
    """The values that a layer's inputs may take: (c - zero_point) * scale with whole c in 0 .. 2^bits - 1.

    One bit is {middle - scale, middle + scale}, on which side of its channel's middle a value lies: behind a ReLU the
    sign itself would always be +1. XNOR-Net takes the middle away by a norm before the sign (Rastegari et al. 2016,
    arXiv:1603.05279, section 3.2), ReActNet learns it (Liu et al. 2020, arXiv:2003.03488, section 4.1), as is done
    here. With `middle=False` one bit is {-scale, scale}, the sign alone.

    `dynamic` takes scale and zero point from each batch; a middle is never taken from a batch.

    >>> InputQuantization(bits=1).middle, InputQuantization(bits=8).middle
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
    def _fits(self) -> InputQuantization:
        if self.middle and self.bits != 1:
            raise SettingError(
                f"it is for inputs of one bit, not of {self.bits}",
                place="middle",
                cure="leave middle out",
            )
        return self

    @property
    def calibrated(self) -> bool:
        """Whether something of it is taken from public examples before it is used."""
        return not self.dynamic or self.middle

    @property
    def highest(self) -> int:
        """The largest code; the smallest is 0 (of one bit: 1 and -1)."""
        return (1 << self.bits) - 1


class QuantizationScheme(BaseModel):
    """How one layer is quantized; None stays float.

    >>> QuantizationScheme(weights=WeightQuantization(bits=4)).inputs is None
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: WeightQuantization | None = None
    inputs: InputQuantization | None = None


def expand_scale(scale: Tensor, weight: Tensor, group: int | None) -> Tensor:
    """Returns the scales [out] or [out, groups] in a shape that multiplies `weight` [out, ...].

    Groups run over the weights of an output channel as they lie flat; the last one may be shorter.
    """
    if group is None:
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    values = weight[0].numel()  # of one output channel
    return scale.repeat_interleave(min(group, values), dim=1)[:, :values].reshape(weight.shape)


def in_groups(weight: Tensor, group: int | None) -> Tensor:
    """Returns `weight` [out, ...] as [out, groups, values]; a shorter last group is filled up with zeros.

    >>> in_groups(torch.ones(2, 5), 3).shape
    torch.Size([2, 2, 3])
    """
    flat = weight.reshape(len(weight), -1)
    if group is None or group >= flat.shape[1]:
        return flat[:, None]
    return F.pad(flat, (0, -flat.shape[1] % group)).reshape(len(weight), -1, group)


def initial_scale(weight: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns scales [out] or [out, groups]: the span for "int", the best in L2 for "ternary" and "binary".

    Ternary alternates threshold and scale as Lloyd does, from the threshold 0.7 mean |w| of Ternary Weight Networks
    (Li & Liu 2016, arXiv:1605.04711, section 2.2), whose optimum is a threshold of scale / 2: the nearest grid point.
    Binary is the mean |w| of XNOR-Net (Rastegari et al. 2016, arXiv:1603.05279, section 3.1). A shorter last group
    counts its own weights only. NaN weights give scales of 1.
    """
    size = in_groups(weight.detach().float().abs(), quantization.group)
    if quantization.kind == "int":
        scale = size.amax(-1) / quantization.highest
    else:
        there = in_groups(torch.ones_like(weight, dtype=torch.float32), quantization.group)
        mean = size.sum(-1) / there.sum(-1).clamp_min(1)
        scale = mean if quantization.kind == "binary" else _ternary(size, mean)
    scale = scale[:, 0] if quantization.group is None else scale
    if quantization.has_zero:
        return fill_zero_scales(scale)
    # Without a 0 among the values, weights of nothing but zeros need a scale of (nearly) 0.
    return scale.nan_to_num(1.0)


def _ternary(size: Tensor, mean: Tensor) -> Tensor:
    threshold = 0.7 * mean
    scale = mean
    for _ in range(20):
        far = size > threshold[..., None]
        scale = (size * far).sum(-1) / far.sum(-1).clamp_min(1)
        threshold = scale / 2
    return scale


def fill_zero_scales(scale: Tensor) -> Tensor:
    """Returns scales without zeros: those of nothing but zeros become the largest of the layer, or 1 if all are 0."""
    top = scale.detach().amax() if scale.numel() else scale.new_ones(())
    return torch.where(scale > 0, scale, torch.where(top > 0, top, torch.ones_like(top)))


def initial_codebook(weight: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns 2^bits values evenly over the span of the weights, the nearest to 0 replaced by 0: a first codebook."""
    flat = weight.detach().float().reshape(-1)
    if flat.numel():
        low, high = flat.amin().clamp(max=0), flat.amax().clamp(min=0)
    else:
        low = high = flat.new_zeros(())
    values = low + (high - low) * torch.linspace(0, 1, 2**quantization.bits, device=flat.device)
    values[values.abs().argmin()] = 0
    return values


def calculate_qparams(
    low: Tensor, high: Tensor, quantization: InputQuantization
) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point (0-d float32) of an input grid that spans low..high and holds 0 exactly.

    A span of zero width gets the scale 1.

    >>> calculate_qparams(torch.tensor(-1.0), torch.tensor(4.1), InputQuantization())
    (tensor(0.0200), tensor(50.))
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    width = (high - low) / quantization.highest
    scale = torch.where(width > TINY, width, torch.ones_like(width))
    return scale, (-low / scale).round().clamp(0, quantization.highest)


def positive_scale(scale: Tensor) -> Tensor:
    """Returns the scale that is used: training may push it through zero, the grid is the same with -scale."""
    return scale.abs().clamp_min(TINY)


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """Returns `value` to the bit with the gradient of `x` (straight-through, Bengio et al. 2013, arXiv:1308.3432)."""
    return value.detach() + (x - x.detach())


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns `x` to the bit; its gradient is multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor


def gradient_scale(x: Tensor, levels: int) -> float:
    """The gradient scale 1 / sqrt(values * levels) of a learned step size, for the inputs of one example."""
    # The batch does not count: its size may be open in an export.
    return float((max(1, math.prod(x.shape[1:])) * levels) ** -0.5)


def fake_quantize(weight: Tensor, scale: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns the nearest grid point of every entry of `weight`.

    Args:
        weight: any shape.
        scale: broadcasts with `weight`; of a codebook its values, ascending.
        quantization: which values there are.

    >>> fake_quantize(torch.tensor([0.4, -9.0]), torch.tensor(0.5), WeightQuantization(bits=3))
    tensor([ 0.5000, -1.5000])
    """
    return dequantize(quantize(weight, scale, quantization), scale, quantization)


def quantize(weight: Tensor, scale: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns the codes of `weight`, as float; the arguments are those of `fake_quantize`."""
    if quantization.kind == "binary":
        return torch.where(weight >= 0, 1.0, -1.0)
    if quantization.kind != "codebook":
        return (weight / scale).round().clamp(quantization.lowest, quantization.highest)
    values = scale
    above = torch.searchsorted(values, weight.contiguous()).clamp(1, len(values) - 1)
    is_below_nearer = weight - values[above - 1] < values[above] - weight
    index = above - is_below_nearer.long()
    return index.float() + quantization.lowest


def dequantize(codes: Tensor, scale: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns the values of `codes`; `scale` is that of `fake_quantize`."""
    if quantization.kind == "codebook":
        return scale[(codes - quantization.lowest).long()]
    return codes * scale
