"""Quantization schemes for weights and inputs of layers, and the functions that apply them.

The terms are those of the library compressed-tensors. A *grid* is the set of values that can be
represented, and a *code* is the integer that stands for one of these values. Weights:
value = code * scale. Inputs: value = (code - zero_point) * scale.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, ValidationInfo, model_validator
from torch import Tensor

from fedpress.core.settings import SETTINGS
from fedpress.errors import SettingError

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32. Scales are not smaller."""
FILE = "file"
"""Key in pydantic's validation context. True means that the settings come from a saved file.

An older version may have written the file. Then the defaults of that version apply.
"""
BITS = {"int": 8, "ternary": 2, "binary": 1, "codebook": 4}
"""Default bits of each kind."""


class WeightQuantization(BaseModel):
    """Settings for the quantization of weights; `kind` and `bits` determine the grid.

    - "int": c * scale with integers c from -(2^(bits-1) - 1) to 2^(bits-1) - 1
    - "ternary": {-scale, 0, scale}
    - "binary": {-scale, scale}
    - "codebook": 2^bits values that all weights of the layer share

    Every grid except "binary" contains 0 exactly.

    >>> WeightQuantization(kind="int", bits=4).highest
    7
    """

    model_config = SETTINGS

    kind: Literal["int", "ternary", "binary", "codebook"] = "int"
    bits: int = Field(8, ge=1, le=8)
    group: int | None = Field(
        None,
        ge=1,
        description="number of consecutive weights of an output channel that share a scale; None: "
        "one scale for each output channel",
    )
    centroid_bits: int | None = Field(
        None,
        ge=2,
        le=8,
        description="codebook only: its values are integers of this many bits times one scale",
    )

    @model_validator(mode="before")
    @classmethod
    def _bits_of_kind(cls, given: Any) -> Any:
        if isinstance(given, dict) and "bits" not in given and given.get("kind", "int") in BITS:
            return {**given, "bits": BITS[given.get("kind", "int")]}
        return given

    @model_validator(mode="after")
    def _fits(self) -> WeightQuantization:
        """Raises an error for settings that contradict the kind."""
        has_fixed_bits = self.kind in ("ternary", "binary")
        too_few = self.kind == "int" and self.bits < 2
        if too_few or (has_fixed_bits and self.bits != BITS[self.kind]):
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
                f"only a codebook has it, not '{self.kind}'",
                place="centroid_bits",
                cure="leave centroid_bits out",
            )
        return self

    @property
    def highest(self) -> int:
        """The largest code.

        Codes of a codebook are indices minus 2^(bits-1), so that they fit into int8.
        """
        if self.kind in ("int", "codebook"):
            return (1 << (self.bits - 1)) - 1
        return 1

    @property
    def lowest(self) -> int:
        """The smallest code."""
        if self.kind == "codebook":
            return -(1 << (self.bits - 1))
        return -self.highest

    @property
    def has_zero(self) -> bool:
        """Whether a weight can be exactly 0, so that pruned weights stay pruned."""
        return self.kind != "binary"


class InputQuantization(BaseModel):
    """Settings for the quantization of a layer's inputs.

    The grid is (c - zero_point) * scale with integers c from 0 to 2^bits - 1.

    One-bit inputs are different. Each channel has a threshold, the `middle`: values below it become
    middle - scale, other values middle + scale. After a ReLU the sign alone would always be +1.
    The middle is learned, as in ReActNet (Liu et al. 2020, arXiv:2003.03488, section 4.1). XNOR-Net
    has a batch norm before the sign instead (Rastegari et al. 2016, arXiv:1603.05279, section 3.2).
    With `middle=False` one-bit inputs are -scale or scale, by their sign.

    With `dynamic=True` scale and zero point are computed for each batch, but never the middle.

    >>> InputQuantization(bits=1).middle, InputQuantization(bits=8).middle
    (True, False)
    """

    model_config = SETTINGS

    bits: int = Field(8, ge=1, le=8)
    dynamic: bool = False
    middle: bool = Field(
        default=False,
        description="one-bit inputs only: compare with a learned middle of each channel instead of "
        "0; the default is true for one bit",
    )

    @model_validator(mode="before")
    @classmethod
    def _middle_of_one_bit(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, dict) and given.get("bits") == 1 and "middle" not in given:
            # Files of versions before `middle` existed quantize by the sign.
            return {**given, "middle": not (info.context or {}).get(FILE)}
        return given

    @model_validator(mode="after")
    def _fits(self) -> InputQuantization:
        """Raises an error for a middle with inputs of several bits."""
        if self.middle and self.bits != 1:
            raise SettingError(
                f"a middle is for inputs of one bit, not of {self.bits}",
                place="middle",
                cure="leave middle out",
            )
        return self

    @property
    def calibrated(self) -> bool:
        """Whether scale or middle must be set from public examples (calibration)."""
        return not self.dynamic or self.middle

    @property
    def highest(self) -> int:
        """The largest code; the smallest is 0. One-bit inputs have the codes -1 and 1 instead."""
        return (1 << self.bits) - 1


class QuantizationScheme(BaseModel):
    """Settings for the quantization of one layer's weights and inputs; None means float.

    >>> QuantizationScheme(weights=WeightQuantization(bits=4)).inputs is None
    True
    """

    model_config = SETTINGS

    weights: WeightQuantization | None = None
    inputs: InputQuantization | None = None


def expand_scale(scale: Tensor, weight: Tensor, group: int | None) -> Tensor:
    """Returns scales [out] or [out, groups] in a shape that broadcasts with `weight` [out, ...].

    A group is `group` consecutive weights of a flattened output channel; the last group may be
    shorter.
    """
    if group is None:
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    values = weight[0].numel()  # of one output channel
    return scale.repeat_interleave(min(group, values), dim=1)[:, :values].reshape(weight.shape)


def in_groups(weight: Tensor, group: int | None) -> Tensor:
    """Returns `weight` [out, ...] as [out, groups, values]; zeros pad a shorter last group.

    >>> in_groups(torch.ones(2, 5), 3).shape
    torch.Size([2, 2, 3])
    """
    flat = weight.reshape(len(weight), -1)
    # A group that is as large as the row, or larger, is the whole row: no padding is needed.
    if group is None or group >= flat.shape[1]:
        return flat[:, None]
    return F.pad(flat, (0, -flat.shape[1] % group)).reshape(len(weight), -1, group)


def initial_scale(weight: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns scales [out] or [out, groups] for the current values of the weights.

    - "int": the largest weight gets the largest code.
    - "ternary": least squared error by Lloyd's iterations on threshold and scale. They start with
      the threshold 0.7 mean |w| of Ternary Weight Networks (Li & Liu 2016, arXiv:1605.04711,
      section 2.2). At the optimum the threshold is scale / 2: each weight has its nearest grid
      point.
    - "binary": the mean absolute weight, which has the least squared error (XNOR-Net, Rastegari et
      al. 2016, arXiv:1603.05279, section 3.1).

    NaN weights give scales of 1.
    """
    size = in_groups(weight.detach().float().abs(), quantization.group)
    if quantization.kind == "int":
        scale = size.amax(-1) / quantization.highest
    else:
        # The zeros that pad a shorter last group are not counted.
        ones = in_groups(torch.ones_like(weight, dtype=torch.float32), quantization.group)
        mean = size.sum(-1) / ones.sum(-1).clamp_min(1)
        scale = mean if quantization.kind == "binary" else _ternary(size, mean)
    if quantization.group is None:
        scale = scale[:, 0]
    if quantization.has_zero:
        return fill_zero_scales(scale)
    # The binary grid has no 0, so a row of zeros keeps its scale of 0.
    return scale.nan_to_num(1.0)


def _ternary(size: Tensor, mean: Tensor) -> Tensor:
    """Returns ternary scales [out, groups] by Lloyd's iterations.

    Args:
        size: absolute weights |w|, [out, groups, values].
        mean: mean of |w|, [out, groups].
    """
    threshold = 0.7 * mean
    scale = mean
    # It converges within a few steps.
    for _ in range(20):
        is_nonzero = size > threshold[..., None]
        scale = (size * is_nonzero).sum(-1) / is_nonzero.sum(-1).clamp_min(1)
        threshold = scale / 2
    return scale


def fill_zero_scales(scale: Tensor) -> Tensor:
    """Replaces scales of 0 by the largest scale of the layer, or by 1 if all scales are 0.

    Weights are divided by their scale, so a scale must not be 0. A row of zeros has the scale 0,
    but every scale represents such a row exactly.
    """
    largest = scale.detach().amax() if scale.numel() else scale.new_ones(())
    replacement = torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.where(scale > 0, scale, replacement)


def initial_codebook(weight: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns 2^bits evenly spaced values, ascending, over the range of the weights and 0.

    The value nearest to 0 is replaced by 0.
    """
    # An empty weight has no smallest value.
    flat = weight.detach().float().reshape(-1)
    if flat.numel():
        low = flat.amin().clamp(max=0)
        high = flat.amax().clamp(min=0)
    else:
        low = high = flat.new_zeros(())
    values = low + (high - low) * torch.linspace(0, 1, 2**quantization.bits, device=flat.device)
    # Exactly 0 must be one of the values, so that pruned weights stay pruned.
    values[values.abs().argmin()] = 0
    return values


def calculate_qparams(
    low: Tensor, high: Tensor, quantization: InputQuantization
) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point (0-d float32) for inputs from `low` to `high`.

    The range is extended to include 0, so that the zeros of a padding are represented exactly. A
    range of zero width has the scale 1.

    >>> calculate_qparams(torch.tensor(-1.0), torch.tensor(4.1), InputQuantization())
    (tensor(0.0200), tensor(50.))
    """
    low = low.float().clamp(max=0)
    high = high.float().clamp(min=0)
    width = (high - low) / quantization.highest
    scale = torch.where(width > TINY, width, torch.ones_like(width))
    zero_point = (-low / scale).round().clamp(0, quantization.highest)
    return scale, zero_point


def positive_scale(scale: Tensor) -> Tensor:
    """Returns |scale|, at least the smallest normal float.

    Training may make a scale negative or 0. The grids of a scale and of -scale are the same.
    """
    return scale.abs().clamp_min(TINY)


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """Returns `value` exactly, but with the gradient of `x` (straight-through estimator).

    Bengio et al. 2013, arXiv:1308.3432.
    """
    return value.detach() + (x - x.detach())


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns `x` unchanged, but with its gradient multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor


def gradient_scale(x: Tensor, levels: int) -> float:
    """Returns the factor on the gradient of a learned step size: 1 / sqrt(entries * levels).

    `entries` is the number of values in one example of `x`, and `levels` is the largest code.
    Esser et al. 2020, arXiv:1902.08153, section 2.2.
    """
    # Not `x.numel()`: in an export the batch size may be symbolic.
    return float((max(1, math.prod(x.shape[1:])) * levels) ** -0.5)


def fake_quantize(weight: Tensor, scale: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns the nearest grid point of every entry of `weight`.

    Args:
        weight: a tensor of any shape.
        scale: scales that broadcast with `weight`. For a codebook: its values, ascending.
        quantization: the grid.

    >>> fake_quantize(torch.tensor([0.4, -9.0]), torch.tensor(0.5), WeightQuantization(bits=3))
    tensor([ 0.5000, -1.5000])
    """
    return dequantize(quantize(weight, scale, quantization), scale, quantization)


def quantize(weight: Tensor, scale: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns the codes of `weight` as floats; the arguments are those of `fake_quantize`."""
    if quantization.kind == "binary":
        # Not `sign`, which is 0 for 0: the binary grid has no 0.
        return torch.where(weight >= 0, 1.0, -1.0)
    if quantization.kind != "codebook":
        # Rounds half to even, as ONNX does.
        return (weight / scale).round().clamp(quantization.lowest, quantization.highest)
    # The nearest value of a codebook is one of the two neighbours of the weight.
    values = scale
    above = torch.searchsorted(values, weight.contiguous()).clamp(1, len(values) - 1)
    is_below_nearer = weight - values[above - 1] < values[above] - weight
    index = above - is_below_nearer.long()
    return index.float() + quantization.lowest


def dequantize(codes: Tensor, scale: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns the values of `codes`; for `scale` see `fake_quantize`."""
    if quantization.kind == "codebook":
        return scale[(codes - quantization.lowest).long()]
    return codes * scale
