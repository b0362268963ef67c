"""Computes integer codes and scales of all weights, and int32 biases that do not overflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from fedpress.deploy.qdq.graph import (
    Activations,
    LayerQuantization,
    QParams,
    Rewrite,
    layer_of,
    module_of,
)
from fedpress.deploy.qdq.operations import LAYERS, aten
from fedpress.errors import ExportError
from fedpress.nn.quantized import (
    QuantLayer,
    materialize_,
    quantized_layers,
    remove_quantization_,
    weight_name,
)
from fedpress.nn.resize import copied

# Bits of a weight -> its largest code; the least code is minus this number.
HIGHEST_CODE = {8: 127, 7: 63}

# Largest int32 bias: half of the range of int32, to leave room for the products that are added.
HIGHEST_BIAS = 2.0**30
# Bias of a channel whose weights are all 0, in int32 steps (input scale * weight scale). float32
# represents 2^24 steps exactly.
BIAS_OF_DEAD = 2.0**24
# Least product of input scale and weight scale. Kernels divide it by the scale of the output, and
# the quotient must still be a normal float32.
LEAST_STEP = 1e-36


def plain_copy(
    model: nn.Module, activations: Activations
) -> tuple[nn.Module, dict[str, LayerQuantization]]:
    """Returns a copy of the model with plain torch layers, and the quantization of its layers.

    The quantization is a dictionary by the name of the weight, such as "head.weight".
    """
    model = copied(model).to("cpu", torch.float32).eval()
    materialize_(model)
    layers: dict[str, LayerQuantization] = {}
    for name, layer in [*quantized_layers(model)]:
        for key in layer.keys:
            layers[weight_name(name, key)] = _codes_of(layer, key)
        inputs = layer.scheme.inputs
        found = layers.get(weight_name(name, "weight"), LayerQuantization())
        if inputs is not None and (inputs.dynamic or inputs.bits == 1):
            found.reason = "its inputs are binary (+1 or -1)"
            if inputs.dynamic:
                found.reason = "its inputs are quantized dynamically, with a scale for each batch"
            # No quantize operation can express binary or dynamic inputs. Instead the layer's own
            # rounding runs before it as a hook, and is captured with the graph.
            twin = copied(layer)
            layer.register_forward_pre_hook(
                lambda _, args, twin=twin: (twin.quantized_input(args[0]), *args[1:])
            )
        elif inputs is not None:
            # A learned scale may have become negative; the layer uses its absolute value.
            scale = float(layer.input_scale.detach().abs())
            zero_point = int(layer.input_zero_point)
            found.inputs = QParams.of(scale, zero_point, inputs.highest, activations)
        remove_quantization_(layer)
    return model, layers


def _codes_of(layer: QuantLayer, key: str) -> LayerQuantization:
    """Returns codes and scales of a weight, or the reason why it has none."""
    quantization = layer.scheme.weights
    if quantization is None:
        return LayerQuantization()
    pair = layer.integers(key)
    if pair is None:
        return LayerQuantization(
            reason="its weights are entries of a float codebook, which integer kernels cannot use"
        )
    codes, scales = pair
    if type(layer).rows is QuantLayer.rows:
        return LayerQuantization(codes, scales, quantization.group)
    # A transposed convolution has its output channels on the second axis. Other layouts of scales
    # cannot be written as dequantize_per_channel.
    if quantization.group is not None or len(scales) != codes.shape[1]:
        return LayerQuantization()
    return LayerQuantization(codes, scales, axis=1)


def fold_batch_norms_(rewrite: Rewrite) -> None:
    """Folds every batch norm into the layer before it, if nothing else reads that layer's output.

    With s = gamma / sqrt(var + eps): weight' = weight * s, bias' = (bias - mean) * s + beta.
    """
    graph = rewrite.graph
    for norm in list(graph.nodes):
        if norm.target is not aten.batch_norm.default:
            continue
        layer = norm.args[0]
        if not _can_fold_norm(layer):
            continue
        gamma, beta, mean, var = (None if a is None else rewrite.tensor(a) for a in norm.args[1:5])
        assert mean is not None, "in evaluation mode a batch norm has statistics"
        assert var is not None
        factor = (var + norm.args[7]).rsqrt()
        if gamma is not None:
            factor = factor * gamma
        name = layer.args[1].target
        weight = rewrite.tensor(layer.args[1])
        old: Tensor | float = 0.0
        if len(layer.args) > 2 and layer.args[2] is not None:
            old = rewrite.tensor(layer.args[2])
        bias = (old - mean) * factor
        if beta is not None:
            bias = bias + beta
        rewrite.set_(name, weight * _per_row(factor, weight))
        _scale_codes_(rewrite.layers.get(name), factor)
        with graph.inserting_before(layer):
            folded = graph.get_attr(rewrite.add_(name + "_folded_bias", bias))
        layer.args = (*layer.args[:2], folded, *layer.args[3:])
        norm.replace_all_uses_with(layer)
        graph.erase_node(norm)


def _per_row(factor: Tensor, like: Tensor) -> Tensor:
    """Returns a vector [rows] in the shape [rows, 1, ...] with as many dimensions as `like`."""
    return factor.view(-1, *[1] * (like.dim() - 1))


def _can_fold_norm(layer: fx.Node) -> bool:
    """Returns whether the batch norm after `layer` can be folded into the layer's weight."""
    if layer.target not in LAYERS or len(layer.users) > 1:
        return False
    weight = layer.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) > 1:
        return False
    # A batch norm scales dimension 1 of the output, but the rows of a linear weight belong to the
    # last dimension. These are the same only if there are two dimensions.
    return layer.target is not aten.linear.default or layer.meta["val"].dim() == 2


def _scale_codes_(layer: LayerQuantization | None, factor: Tensor) -> None:
    """Multiplies the scales of output channels by `factor`, which may be negative or 0."""
    if layer is None or layer.codes is None or layer.scales is None:
        return
    # Scales must stay positive, so the sign goes into the codes. Where the factor is 0 the codes
    # become 0, and the scale has no effect: it is set to 1.
    layer.codes = layer.codes * _per_row(factor, layer.codes).sign().to(torch.int8)
    scales = layer.scales * _per_row(factor.abs(), layer.scales)
    layer.scales = torch.where(scales > 0, scales, torch.ones_like(scales))


def quantize_weights_(rewrite: Rewrite) -> dict[fx.Node, LayerQuantization]:
    """Returns the quantization of all layers whose weights are integers times scales.

    Layers whose weight is computed in forward are added to `left_float`. If activations are
    quantized too, so are layers that have a `reason` or several scales per output channel.
    """
    chosen: dict[fx.Node, LayerQuantization] = {}
    # A weight that two layers share must be rounded once, so that both use the same codes.
    rounded: dict[str, LayerQuantization] = {}
    for node in rewrite.graph.nodes:
        if node.target not in LAYERS:
            continue
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            rewrite.left_float[module_of(node)] = (
                "its weight is computed in forward; make it plain first (remove_parametrizations)"
            )
            continue
        name = str(weight.target)
        layer = rewrite.layers.get(name, LayerQuantization())
        if layer.codes is None and not layer.reason:
            layer = rounded[name] = rounded.get(name) or _rounded(rewrite, weight, layer.inputs)
        if layer.codes is not None:
            chosen[node] = layer
        if rewrite.integer and (layer.reason or layer.group is not None):
            several = "its weights have several scales per output channel"
            rewrite.left_float[layer_of(name)] = layer.reason or several
    return chosen


def _rounded(rewrite: Rewrite, weight: fx.Node, inputs: QParams | None) -> LayerQuantization:
    """Quantizes a float weight if activations are quantized too; otherwise keeps it float."""
    layer = LayerQuantization(inputs=inputs)
    if rewrite.integer:
        bits = rewrite.format.weight_bits
        layer.codes, layer.scales = _round_weight(rewrite.tensor(weight), bits, str(weight.target))
    return layer


def _round_weight(weight: Tensor, bits: Literal[7, 8], name: str) -> tuple[Tensor, Tensor]:
    """Returns int8 codes, and one scale per output channel.

    A scale is the largest absolute weight of the channel / the highest code; 1 if all are 0.
    """
    if not bool(weight.isfinite().all()):
        raise ExportError(
            f"{layer_of(name)!r} has NaN or infinite weights",
            place="model",
            cure="load a checkpoint from before training broke",
        )
    highest = HIGHEST_CODE[bits]
    scales = weight.abs().flatten(1).amax(1) / highest
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (weight / _per_row(scales, weight)).round().clamp(-highest, highest)
    return codes.to(torch.int8), scales


def with_int32_biases(
    layer: LayerQuantization,
    products: Sequence[tuple[float, Tensor | None]],
    four_bit_shift: int = 0,
) -> LayerQuantization:
    """Returns the layer with weight scales large enough that every bias fits in int32.

    Kernels store the bias as int32 in steps of input scale * weight scale. If the weights of a
    channel are nearly 0, its scale is so small that the bias does not fit, and the kernel saturates
    silently. Such a channel gets the smallest scale that fits. Its codes are rounded to that scale,
    and become 0 if its weights are negligible compared with the bias.

    Args:
        layer: the layer, with one scale per output channel.
        products: input scale and bias of each operation that reads the weight.
        four_bit_shift: number of bits that a bias loses if the weights have 4 bits (see
            `IntegerFormat`).
    """
    if not products:
        return layer
    fitted = _with_biases_up_to(HIGHEST_BIAS, layer, products)
    assert fitted.codes is not None
    # Checked after the first fit, which may have reduced 8-bit codes so much that they fit 4 bits.
    if four_bit_shift and fits_four_bits(fitted.codes):
        fitted = _with_biases_up_to(HIGHEST_BIAS / 2**four_bit_shift, fitted, products)
    return fitted


def fits_four_bits(codes: Tensor) -> bool:
    """Returns whether there are codes and all of them fit in int4."""
    return codes.numel() > 0 and int(codes.min()) >= -8 and int(codes.max()) <= 7


def _with_biases_up_to(
    highest: float, layer: LayerQuantization, products: Sequence[tuple[float, Tensor | None]]
) -> LayerQuantization:
    """Returns the layer with scales such that no bias is more than `highest` steps."""
    assert layer.codes is not None
    assert layer.scales is not None
    codes, scales = layer.codes, layer.scales.double()
    # Operations that share the weight share its scales, which must fit the largest bias.
    sizes = torch.zeros_like(scales)
    for input_scale, bias in products:
        if bias is not None:
            sizes = torch.maximum(sizes, bias.detach().double().abs() / input_scale)
    dead = codes.flatten(1).count_nonzero(1) == 0
    # The output of a dead channel is its bias alone, so its scale is chosen for an exact bias.
    scales = torch.where(dead & (sizes > 0), sizes / BIAS_OF_DEAD, scales)

    least_step = LEAST_STEP / min(input_scale for input_scale, _ in products)
    least = (sizes / highest).clamp(min=least_step)
    too_small = scales < least
    ratio = _per_row(scales / least, codes)
    rescaled = (codes.double() * ratio).round()
    fitted_codes = torch.where(too_small.view_as(ratio), rescaled, codes.double())
    fitted_scales = torch.where(too_small, least, scales)
    return replace(layer, codes=fitted_codes.to(torch.int8), scales=fitted_scales.float())
