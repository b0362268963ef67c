"""Codes and scales of weights: those that quantized layers bring along, and rounded float ones."""

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
)
from fedpress.nn.resize import copied

HIGHEST_CODE = {8: 127, 7: 63}
HIGHEST_BIAS = 2.0**30
"""Half of what int32 holds: the products of a layer are added to it."""

BIAS_OF_DEAD = 2.0**24
"""More steps than float32 tells apart."""

LEAST_STEP = 1e-36
"""Of a product: a normal float32, also after it was divided by the step of the output."""


def plain_copy(
    model: nn.Module, activations: Activations
) -> tuple[nn.Module, dict[str, LayerQuantization]]:
    """Returns a copy with ordinary layers in the place of quantized ones, and what those bring along, by weight."""
    model = copied(model).to("cpu", torch.float32).eval()
    materialize_(model)
    layers: dict[str, LayerQuantization] = {}
    for name, layer in [*quantized_layers(model)]:
        for key in layer.keys:
            layers[f"{name}.{key}"] = _codes_of(layer, key)
        inputs = layer.scheme.inputs
        found = layers.get(f"{name}.weight", LayerQuantization())
        if inputs is not None and (inputs.dynamic or inputs.bits == 1):
            found.reason = "its inputs are signs"
            if inputs.dynamic:
                found.reason = "its inputs are rounded by the values of each batch"
            twin = copied(layer)
            layer.register_forward_pre_hook(
                lambda _, args, twin=twin: (twin.quantized_input(args[0]), *args[1:])
            )
        elif inputs is not None:
            scale, zero = float(layer.input_scale.detach().abs()), int(layer.input_zero_point)
            found.inputs = QParams.of(scale, zero, inputs.highest, activations)
        remove_quantization_(layer)
    return model, layers


def _codes_of(layer: QuantLayer, key: str) -> LayerQuantization:
    """Returns codes and scales of a weight, or why it has none."""
    quantization = layer.scheme.weights
    if quantization is None:
        return LayerQuantization()
    pair = layer.integers(key)
    if pair is None:
        return LayerQuantization(
            reason="its weights are a codebook of any values, which integers cannot multiply"
        )
    codes, scales = pair
    if type(layer).rows is QuantLayer.rows:
        return LayerQuantization(codes, scales, quantization.group)
    # Rows are not the first axis (a transposed convolution): one scale for each place of the second, or none at all.
    if quantization.group is not None or len(scales) != codes.shape[1]:
        return LayerQuantization()
    return LayerQuantization(codes, scales, axis=1)


def fold_batch_norms_(rewrite: Rewrite) -> None:
    """Takes every batch norm into the layer whose output it alone reads: w' = w s, b' = (b - mean) s + beta."""
    graph = rewrite.graph
    for norm in [node for node in graph.nodes if node.target is aten.batch_norm.default]:
        layer = norm.args[0]
        if not _takes_norms(layer):
            continue
        gamma, beta, mean, var = (None if a is None else rewrite.tensor(a) for a in norm.args[1:5])
        assert mean is not None, "in evaluation mode a batch norm has statistics"
        assert var is not None
        factor = (var + norm.args[7]).rsqrt() * (1.0 if gamma is None else gamma)
        name = layer.args[1].target
        weight = rewrite.tensor(layer.args[1])
        old: Tensor | float = 0.0
        if len(layer.args) > 2 and layer.args[2] is not None:
            old = rewrite.tensor(layer.args[2])
        bias = (old - mean) * factor + (0.0 if beta is None else beta)
        rewrite.set_(name, weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        _scale_codes_(rewrite.layers.get(name), factor)
        with graph.inserting_before(layer):
            folded = graph.get_attr(rewrite.add_(name + "_folded_bias", bias))
        layer.args = (*layer.args[:2], folded, *layer.args[3:])
        norm.replace_all_uses_with(layer)
        graph.erase_node(norm)


def _takes_norms(layer: fx.Node) -> bool:
    """Whether the batch norm behind an operation can go into its weight."""
    if layer.target not in LAYERS or len(layer.users) > 1:
        return False
    weight = layer.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) > 1:
        return False
    # Of more dimensions a linear layer writes the last axis, and a batch norm scales the second.
    return layer.target is not aten.linear.default or layer.meta["val"].dim() == 2


def _scale_codes_(layer: LayerQuantization | None, factor: Tensor) -> None:
    """Multiplies the scales by `factor`; codes change sign where it is negative, and are 0 where it is."""
    if layer is None or layer.codes is None or layer.scales is None:
        return
    rows = factor.view(-1, *[1] * (layer.codes.dim() - 1))
    layer.codes = layer.codes * rows.sign().to(torch.int8)
    scales = layer.scales * factor.abs().view(-1, *[1] * (layer.scales.dim() - 1))
    layer.scales = torch.where(scales > 0, scales, torch.ones_like(scales))


def choose_weights_(rewrite: Rewrite) -> dict[fx.Node, LayerQuantization]:
    """Returns the layers whose weights are whole numbers times scales; the others are left, with the reason."""
    chosen: dict[fx.Node, LayerQuantization] = {}
    rounded: dict[str, LayerQuantization] = {}  # a weight that two layers share is rounded once
    for node in rewrite.graph.nodes:
        if node.target not in LAYERS:
            continue
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            rewrite.left[module_of(node)] = (
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
            rewrite.left[layer_of(name)] = layer.reason or several
    return chosen


def _rounded(rewrite: Rewrite, weight: fx.Node, inputs: QParams | None) -> LayerQuantization:
    """Returns the codes of a float weight, or none where only weights that bring their own are on integers."""
    layer = LayerQuantization(inputs=inputs)
    if rewrite.integer:
        bits = rewrite.format.weight_bits
        layer.codes, layer.scales = _round_weight(rewrite.tensor(weight), bits, str(weight.target))
    return layer


def _round_weight(weight: Tensor, bits: Literal[7, 8], name: str) -> tuple[Tensor, Tensor]:
    """Returns int8 codes and one scale per output channel that spans it."""
    if not bool(weight.isfinite().all()):
        raise ExportError(
            f"{layer_of(name)!r} has NaN or infinite weights",
            place="model",
            cure="load a checkpoint from before training broke",
        )
    highest = HIGHEST_CODE[bits]
    scales = weight.abs().flatten(1).amax(1) / highest
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    rows = scales.view(-1, *[1] * (weight.dim() - 1))
    return (weight / rows).round().clamp(-highest, highest).to(torch.int8), scales


def with_int32_biases(
    layer: LayerQuantization,
    products: Sequence[tuple[float, Tensor | None]],
    four_bit_shift: int = 0,
) -> LayerQuantization:
    """Returns the layer with weight scales that integer kernels can multiply and add a bias to.

    Kernels write the bias as int32 in steps of input scale times weight scale. A channel of zero or nearly zero
    weights has a scale so small that its bias does not fit, and the kernel saturates without a word. Such channels get
    the least scale that fits; their codes follow, and become 0 where the weights are nothing beside the bias.

    Args:
        layer: has one scale per output channel.
        products: input scale and bias of each operation that reads the weight.
        four_bit_shift: of the format; codes of four bits leave so much less room for the bias.
    """
    if not products:
        return layer
    fitted = _with_biases_up_to(HIGHEST_BIAS, layer, products)
    assert fitted.codes is not None
    # Codes are looked at after they were fitted: those of 8 bits may have become so small that four hold them.
    if four_bit_shift and fits_four_bits(fitted.codes):
        fitted = _with_biases_up_to(HIGHEST_BIAS / 2**four_bit_shift, fitted, products)
    return fitted


def fits_four_bits(codes: Tensor) -> bool:
    """Whether int4 holds all of these whole numbers."""
    return codes.numel() > 0 and int(codes.min()) >= -8 and int(codes.max()) <= 7


def _with_biases_up_to(
    highest: float, layer: LayerQuantization, products: Sequence[tuple[float, Tensor | None]]
) -> LayerQuantization:
    """Returns the layer with scales in which no bias is more than `highest` steps."""
    assert layer.codes is not None
    assert layer.scales is not None
    codes, scales = layer.codes, layer.scales.double()
    # Operations that share the weight share its scales: these fit the largest bias of each channel.
    sizes = torch.zeros_like(scales)
    for input_scale, bias in products:
        if bias is not None:
            sizes = torch.maximum(sizes, bias.detach().double().abs() / input_scale)
    dead = codes.flatten(1).count_nonzero(1) == 0
    # Nothing but the bias comes out of a dead channel: a fine step of its own keeps it to the last bit.
    scales = torch.where(dead & (sizes > 0), sizes / BIAS_OF_DEAD, scales)
    least_step = LEAST_STEP / min(input_scale for input_scale, _ in products)
    least = (sizes / highest).clamp(min=least_step)
    small = scales < least
    rows = (scales / least).view(-1, *[1] * (codes.dim() - 1))
    moved = torch.where(small.view_as(rows), (codes.double() * rows).round(), codes.double())
    return replace(
        layer, codes=moved.to(torch.int8), scales=torch.where(small, least, scales).float()
    )
