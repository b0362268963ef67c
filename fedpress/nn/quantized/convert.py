"""Converts layers to quantized layers and back, and writes rounded values into their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fedpress.errors import ModelError, placing
from fedpress.nn.quant_scheme import (
    InputQuantization,
    QuantizationScheme,
    WeightQuantization,
    fill_zero_scales,
    initial_codebook,
    initial_scale,
    positive_scale,
)
from fedpress.nn.quantized.classes import quantized_class, why_not_quantizable
from fedpress.nn.quantized.layer import QuantLayer, quantized_layers
from fedpress.nn.quantized.layers import INPUT_QUANTIZED
from fedpress.nn.quantized.names import codebook_name, is_qparam, kept_zeros_name, scale_name


@torch.no_grad()
def quantize_layers_(model: nn.Module, table: Mapping[str, QuantizationScheme]) -> None:
    """Converts the named layers to quantized layers; their float weights are not changed.

    Scales are set for the current weights (see `initial_scale`). A layer that is quantized already
    gets the new scheme. Create the optimizer after this call, since scales are parameters.

    Args:
        model: changed in place.
        table: name of each layer -> its scheme.

    Raises:
        ModelError: if a name is not in the model, or its layer cannot be quantized.
    """
    for name, scheme in table.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"the model has no layer '{name}'",
                place="spec.quantized",
                cure="load the spec that was saved with this model",
            ) from error
        reason = why_not_quantizable(module)
        if reason is not None:
            raise ModelError(
                f"'{name}' cannot be quantized: {reason}",
                place="spec.quantized",
                cure="leave it out",
            )

        # Scales of an earlier scheme may have other shapes.
        _drop_qparams_(module)
        if not isinstance(module, QuantLayer):
            # The object itself changes its class, because several modules may share it.
            module.__class__ = quantized_class(type(module))

        assert isinstance(module, QuantLayer)
        if not issubclass(module.plain, INPUT_QUANTIZED) and scheme.inputs is not None:
            raise ModelError(
                f"'{name}' is a {module.plain.__name__}, whose inputs cannot be quantized",
                place="spec.quantized",
                cure="leave its inputs out",
            )

        module.scheme = scheme
        _register_(module, scheme)
    _disable_fast_paths_(model)


def _disable_fast_paths_(model: nn.Module) -> None:
    """Disables the fast paths of transformer encoders, which use weights without calling layers."""
    for module in model.modules():
        if not any(isinstance(m, QuantLayer) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            # 0 stands for an activation without a fast path; torch then calls `activation`.
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def remove_quantization_(layer: QuantLayer) -> nn.Module:
    """Turns a layer back into its class before quantization; its weights stay as they are."""
    _drop_qparams_(layer)
    _drop_kept_zeros_(layer)
    # A plain layer has no attribute `scheme`.
    layer.__dict__.pop("scheme", None)
    layer.__class__ = layer.plain  # type: ignore[assignment]
    return layer


def _drop_qparams_(module: nn.Module) -> None:
    if not isinstance(module, QuantLayer):
        return
    for table in (module._parameters, module._buffers):
        for name in [name for name in table if is_qparam(name)]:
            table.pop(name)


def _drop_kept_zeros_(layer: QuantLayer) -> None:
    for key in layer.keys:
        layer._buffers.pop(kept_zeros_name(key), None)


def _register_(layer: QuantLayer, scheme: QuantizationScheme) -> None:
    """Adds the tensors of the scheme to the layer: scales, codebooks, zero point, middle."""
    if scheme.weights is not None:
        for key in layer.keys:
            _register_weight_(layer, key, scheme.weights)
    if scheme.inputs is not None:
        _register_inputs_(layer, scheme.inputs)


def _register_weight_(layer: QuantLayer, key: str, quantization: WeightQuantization) -> None:
    """Adds the scale or codebook of one weight to the layer."""
    # Each output channel gets its own scale, so the outputs must be on axis 0.
    weight = layer.rows(getattr(layer, key).detach())
    if quantization.kind != "codebook":
        scale = nn.Parameter(initial_scale(weight, quantization))
        layer.register_parameter(scale_name(key), scale)
        return
    codebook = nn.Parameter(initial_codebook(weight, quantization))
    layer.register_parameter(codebook_name(key), codebook)
    if quantization.centroid_bits is not None:
        largest_code = 2 ** (quantization.centroid_bits - 1) - 1
        largest = weight.abs().amax().float() / largest_code
        # Not trained: `codebook_values` detaches it, and the codebook itself is trained.
        scale = nn.Parameter(fill_zero_scales(largest), requires_grad=False)
        layer.register_parameter(scale_name(key), scale)


def _register_inputs_(layer: QuantLayer, quantization: InputQuantization) -> None:
    """Adds the scale, zero point and middle of the inputs to the layer; calibration sets them."""
    weight = layer.weight.detach()
    if not quantization.dynamic:
        scale = nn.Parameter(weight.new_ones((), dtype=torch.float32))
        layer.register_parameter("input_scale", scale)
        layer.register_buffer("input_zero_point", weight.new_zeros((), dtype=torch.float32))
    if quantization.middle:
        channels = int(getattr(layer, "in_channels", weight.shape[1]))
        middle = nn.Parameter(weight.new_zeros(channels, dtype=torch.float32))
        layer.register_parameter("input_middle", middle)


@torch.no_grad()
def materialize_(model: nn.Module) -> nn.Module:
    """Rounds the quantized weights of `model` to the grid, in place; returns the model.

    The outputs stay exactly the same. Afterwards `weight == dequantize(quantize())`.

    Raises:
        ModelError: if a weight is not finite; the error names the layer.
    """
    for name, layer in quantized_layers(model):
        if layer.scheme.weights is None:
            continue
        for key in layer.keys:
            with placing(f"'{name}'"):
                codes = layer.quantize(key)
            # In place: other modules or an optimizer may hold the same tensor.
            getattr(layer, key).copy_(layer.dequantize(codes, key))
            if layer.scheme.weights.kind == "codebook":
                layer.codebook_of(key).copy_(layer.codebook_values(key))
            if scale_name(key) in layer._parameters:
                layer.scale(key).copy_(positive_scale(layer.scale(key)))
    return model
