"""The base class of quantized layers: scales, codebooks, rounding, and the gradient of rounding.

A grid point is a value that can be represented, such as 3 * scale; its code is the integer 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.errors import ModelError
from fedpress.nn.quant_scheme import (
    TINY,
    InputQuantization,
    QuantizationScheme,
    WeightQuantization,
    calculate_qparams,
    dequantize,
    expand_scale,
    gradient_scale,
    positive_scale,
    quantize,
    scale_gradient,
    straight_through,
)
from fedpress.nn.quantized.names import (
    codebook_name,
    is_qparam,
    scale_name,
    weight_keys,
    weight_name,
)

GRADIENT_WINDOW = 1.25
"""Half-width of the window around the middle in which one-bit inputs have a gradient.

The unit is the mean distance from the middle. A Gaussian has a mean distance of sqrt(2 / pi) = 0.8
standard deviations, so 1.25 mean distances are about one standard deviation.
"""


class QuantLayer(nn.Module):
    """Base class of quantized layers; `quantize_layers_` converts plain layers to them.

    A layer has one weight, `weight`, or several weights, such as `weight_ih_l0` and `weight_hh_l0`
    of an LSTM; `keys` are their names. Quantization parameters are in the state dict:

    - `weight_scale`: [out] or [out, groups] float32; 0-d for a codebook with `centroid_bits`
    - `codebook`: [2^bits] float32
    - `KEY_scale`, `KEY_codebook`: the same for a weight with the name KEY
    - `input_scale`: 0-d float32
    - `input_zero_point`: 0-d float32 with an integer value
    - `input_middle`: [channels] float32, the threshold of one-bit inputs

    Scales are parameters, trained as learned step sizes (Esser et al. 2020, arXiv:1902.08153,
    section 2).
    """

    weight: Tensor
    weight_scale: Tensor
    codebook: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_middle: Tensor
    scheme: QuantizationScheme = QuantizationScheme()
    plain: type[nn.Module] = nn.Module
    """The class of the layer before it was quantized."""
    channel_axis = -1
    """The channel axis of the inputs, counted from the end: -3 for images [n, C, H, W]."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the weights that are quantized."""
        return weight_keys(self)

    @property
    def size(self) -> int:
        """Number of entries of all weights that are quantized."""
        return sum(getattr(self, key).numel() for key in self.keys)

    def rows(self, weight: Tensor) -> Tensor:
        """Returns `weight` with the axes [out, in, ...], because each output has its own scale.

        Transposed convolutions override this method: their weights are [in, out, ...].
        """
        return weight

    def unrows(self, rows: Tensor) -> Tensor:
        """Undoes `rows`: returns the tensor in the shape of the layer's weight."""
        return rows

    def scale(self, key: str = "weight") -> nn.Parameter:
        """Returns the scale parameter of a weight; the layer itself uses `positive_scale` of it."""
        found: nn.Parameter = getattr(self, scale_name(key))
        return found

    def codebook_of(self, key: str = "weight") -> nn.Parameter:
        """Returns the codebook parameter of a weight: the values that its entries share."""
        found: nn.Parameter = getattr(self, codebook_name(key))
        return found

    def quantize(self, key: str = "weight") -> Tensor:
        """Returns the int8 codes of the grid points nearest to a weight, in the weight's shape.

        Raises:
            ModelError: if the weights are float, or an entry is not finite.
        """
        quantization = self.weight_quantization()
        weight = self.rows(getattr(self, key).detach().float())
        if not bool(weight.isfinite().all()):
            raise ModelError(
                "a weight is NaN or infinite and has no code",
                place=key,
                cure="load a checkpoint from before training broke",
            )
        return self.unrows(quantize(weight, self.expanded_scale(key), quantization)).to(torch.int8)

    def dequantize(self, codes: Tensor, key: str = "weight") -> Tensor:
        """Returns the float32 weights of `codes`.

        Raises:
            ModelError: if the weights are float, or a code is outside the grid.
        """
        quantization = self.weight_quantization()
        lowest, highest = quantization.lowest, quantization.highest
        # Codes may come from a damaged file.
        if codes.numel() and (int(codes.min()) < lowest or int(codes.max()) > highest):
            raise ModelError(
                (
                    f"codes are in {int(codes.min())}..{int(codes.max())}, but weights of kind "
                    f"'{quantization.kind}' with {quantization.bits} bits have {lowest}..{highest}"
                ),
                place="codes",
                cure="they belong to another model",
            )
        values = dequantize(self.rows(codes.float()), self.expanded_scale(key), quantization)
        return self.unrows(values).detach()

    def integers(self, key: str = "weight") -> tuple[Tensor, Tensor] | None:
        """Returns int8 integers and scales [out] or [out, groups] whose product is the weight.

        Returns None for float weights, and for codebooks whose values are arbitrary floats.
        """
        quantization = self.scheme.weights
        if quantization is None:
            return None
        if quantization.kind == "codebook" and quantization.centroid_bits is None:
            return None
        scale = positive_scale(self.scale(key).detach())
        if quantization.kind != "codebook":
            return self.quantize(key), scale
        integers = torch.round(self.dequantize(self.quantize(key), key) / scale).to(torch.int8)
        return integers, scale.expand(len(self.rows(integers))).clone()

    def quantized_weight(self, key: str = "weight") -> Tensor:
        """Returns the weight rounded to the grid, differentiable in weight, scale and codebook."""
        quantization = self.scheme.weights
        if quantization is None:
            latent: Tensor = getattr(self, key)
            return latent

        weight = self.rows(getattr(self, key).float())
        if quantization.kind == "codebook":
            values = self.codebook_values(key)
            code = quantize(weight.detach(), values.detach(), quantization)
            # Weights and centroids are trained. A weight may change its cluster. A centroid gets
            # the sum of its weights' gradients (Han et al. 2016, arXiv:1510.00149, section 3.3).
            # Here the sum is multiplied by the number of clusters / the number of weights. If all
            # clusters are equally large, this gives the mean.
            centroids = scale_gradient(values, len(values) / weight.numel())
            chosen = centroids[(code - quantization.lowest).long()]
            return self.unrows(chosen + (weight - weight.detach()))

        scale = self.expanded_scale(key, slow_gradient=True)
        if quantization.kind == "binary":
            sign = quantize(weight.detach(), scale.detach(), quantization)
            return self.unrows(sign * scale + (weight - weight.detach()))
        steps = (weight / scale).clamp(quantization.lowest, quantization.highest)
        return self.unrows(straight_through(steps.detach().round(), steps) * scale)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Returns the inputs `x` rounded to the grid, differentiable in `x`, scale and middle."""
        quantization = self.scheme.inputs
        if quantization is None or x.numel() == 0:
            return x  # an empty batch has no range
        x = x.float()
        if quantization.bits == 1:
            return self._one_bit_input(x, quantization)
        if quantization.dynamic:
            all_axes = [*range(x.dim())]  # the ONNX export needs axes to be given
            low = x.detach().amin(all_axes)
            high = x.detach().amax(all_axes)
            scale, zero = calculate_qparams(low, high, quantization)
        else:
            factor = gradient_scale(x, quantization.highest)
            scale = scale_gradient(positive_scale(self.input_scale), factor)
            zero = self.input_zero_point
        steps = (x / scale).clamp(-zero, quantization.highest - zero)
        return straight_through(steps.detach().round(), steps) * scale

    def _one_bit_input(self, x: Tensor, quantization: InputQuantization) -> Tensor:
        """Returns middle + scale for values above the middle, middle - scale for values below."""
        middle = self.middle() if quantization.middle else None
        distance = x if middle is None else x - middle
        if quantization.dynamic:
            scale = distance.detach().abs().mean()
        else:
            scale = scale_gradient(positive_scale(self.input_scale), gradient_scale(x, 1))
        # Without a middle the inputs are assumed to be normalised, and the gradient is the one of
        # hard tanh: 1 where |x| <= 1 (Hubara et al. 2016, arXiv:1602.02830, eq. 4). With a middle
        # the window is relative to `scale`, the mean distance from the middle.
        if middle is None:
            near = distance.clamp(-1, 1)
        else:
            near = (distance / (GRADIENT_WINDOW * scale.detach().clamp_min(TINY))).clamp(-1, 1)
        sign = torch.where(distance.detach() >= 0, 1.0, -1.0)
        signed_scale = straight_through(sign, near) * scale
        return signed_scale if middle is None else signed_scale + middle

    def middle(self) -> Tensor:
        """Returns the middle of each channel in a shape that broadcasts with inputs."""
        return self.input_middle.view(-1, *[1] * (-1 - self.channel_axis))

    def extra_repr(self) -> str:
        """Returns torch's description of the layer with the scheme, for `print(model)`."""
        parts = [super().extra_repr()]
        if self.scheme.weights is not None:
            parts.append(f"weights={self.scheme.weights.kind}{self.scheme.weights.bits}")
        if self.scheme.inputs is not None:
            parts.append(f"inputs=int{self.scheme.inputs.bits}")
        return ", ".join(parts)

    def weight_quantization(self) -> WeightQuantization:
        """Returns the settings for the quantization of the weights.

        Raises:
            ModelError: if the weights are float.
        """
        if self.scheme.weights is None:
            raise ModelError(
                "the weights of this layer are float and have no codes",
                place="scheme.weights",
                cure="ask only layers with scheme.weights",
            )
        return self.scheme.weights

    def codebook_values(self, key: str = "weight") -> Tensor:
        """Returns the codebook, ascending; with `centroid_bits` its values are quantized too."""
        quantization = self.weight_quantization()
        # Training may change the order, but the nearest value is found by bisection.
        values = self.codebook_of(key).float().sort().values
        # The value 0 has no gradient, so that it stays 0 and pruned weights stay pruned.
        values = values * (values.detach() != 0)
        if quantization.centroid_bits is None:
            return values
        largest_code = 2 ** (quantization.centroid_bits - 1) - 1
        scale = positive_scale(self.scale(key)).detach()
        steps = (values / scale).clamp(-largest_code, largest_code)
        return straight_through(steps.detach().round(), steps) * scale

    def expanded_scale(self, key: str = "weight", *, slow_gradient: bool = False) -> Tensor:
        """Returns the scales in a shape that broadcasts with `rows(weight)`.

        For a codebook, returns its values. With `slow_gradient` the gradient of the scale is
        multiplied by the factor for learned step sizes (Esser et al. 2020, arXiv:1902.08153,
        section 2.2).
        """
        quantization = self.weight_quantization()
        if quantization.kind == "codebook":
            return self.codebook_values(key)
        scale = positive_scale(self.scale(key))
        weight: Tensor = getattr(self, key)
        if slow_gradient:
            factor = (scale.numel() / (max(1, weight.numel()) * quantization.highest)) ** 0.5
            scale = scale_gradient(scale, factor)
        return expand_scale(scale, self.rows(weight), quantization.group)

    def plain_twin(self, **instead: object) -> Any:
        """Returns a layer of the class `plain` with the attributes of this layer, except `instead`.

        Example: `plain_twin(weight=w)` is a float layer with the weight w. The quantized layer
        itself is not changed, so its gradients, traces and copies are not affected.
        """
        # The constructor is not called, because it would allocate weights.
        twin = object.__new__(self.plain)
        twin.__dict__.update(self.__dict__)
        twin.__dict__.update(instead)
        return twin


def qparam_ids(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters without weight decay: scales, codebooks and middles.

    Weight decay would only shrink the grid and move it away from its optimum.
    """
    found: set[int] = set()
    for _, layer in quantized_layers(model):
        for name, parameter in layer.named_parameters(recurse=False):
            if is_qparam(name):
                found.add(id(parameter))
    return found


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Yields (name, layer) for every quantized layer; a shared layer is yielded once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def quantized_weights(model: nn.Module) -> dict[str, tuple[QuantLayer, str]]:
    """Returns the weights of quantized layers: dotted name -> (layer, name of the weight in it)."""
    found = {}
    for name, layer in quantized_layers(model):
        for key in layer.keys:
            found[weight_name(name, key)] = layer, key
    return found
