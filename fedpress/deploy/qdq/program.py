"""Captures a model as a graph, and inserts quantize and dequantize around integer operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fedpress.core.inputs import Example
from fedpress.deploy.calibrate import ranges
from fedpress.deploy.capture import capture, silence, trace
from fedpress.deploy.examples import InputSpec, as_device, example_of, ordered, take_rows
from fedpress.deploy.qdq.activations import activation_qparams
from fedpress.deploy.qdq.graph import (
    IntegerFormat,
    LayerQuantization,
    QParams,
    Rewrite,
    argument,
    before_rounding,
)
from fedpress.deploy.qdq.operations import LAYERS, TRANSPOSED
from fedpress.deploy.qdq.weights import (
    fold_batch_norms_,
    plain_copy,
    quantize_weights_,
    with_int32_biases,
)
from fedpress.nn.observers import Observer
from fedpress.nn.quantized import quantized_layers

ANY = IntegerFormat()
"""The format if none is given: uint8 activations and 8-bit weights."""


@dataclass(frozen=True)
class QuantizedProgram:
    """A quantized graph.

    Attributes:
        program: the graph, which runs in torch.
        left_float: module or operation that computes in float -> the reason.
        rounds: whether the graph rounds activations, not only weights.
    """

    program: torch.export.ExportedProgram
    left_float: dict[str, str]
    rounds: bool = False


def quantized_program(
    model: nn.Module,
    given: InputSpec,
    batches: Sequence[Example] = (),
    *,
    format: IntegerFormat = ANY,
    observer: Observer = "minmax",
    batch: int | None = None,
) -> QuantizedProgram:
    """Captures `model`, folds its batch norms, and quantizes what integer arithmetic needs.

    Layers that are quantized already keep their codes, scales and input quantization; these
    change only for folded batch norms, large biases and inputs that were always 0. With
    `batches`, float weights are quantized to int8 per output channel. The inputs and outputs of
    convolutions, linear layers, matrix products, additions, multiplications, means and
    concatenations are quantized to 8 bits, over their ranges on the batches. Without batches,
    nothing more is quantized. Example: a model with 4-bit weights is stored in 4 bits and computes
    in float.

    Args:
        model: the model, which maps a batch to one tensor or more; it is not changed.
        given: shape of one float32 example, or a batch of inputs.
        batches: standardised public examples for calibration, such as float32 [n, *input_shape].
        format: the integers of the runtime.
        observer: name of the rule that computes value ranges from the calibration.
        batch: the batch size of the graph; None: any.

    Raises:
        ExportError: if the model cannot be captured, or a calibration batch does not fit or is not
            finite.
    """
    # This import registers the operations `quantized_decomposed.*`.
    from torch.ao.quantization.fx import _decomposed  # noqa: F401

    plain, layers = plain_copy(model, format.activations)
    with silence(), torch.no_grad():
        program = capture(plain, given, batch=batch)
        rewrite = Rewrite(program.module(check_guards=False), layers, format, bool(batches))
        for node in rewrite.graph.nodes:
            # Later steps read the shape of every value, and parameters have none in the captured
            # graph.
            if node.op == "get_attr" and "val" not in node.meta:
                node.meta["val"] = rewrite.tensor(node)
        fold_batch_norms_(rewrite)
        chosen = quantize_weights_(rewrite)
        _insert_(rewrite, chosen, ranges(rewrite.module, batches, observer))
        rewrite.remove_unread_()
        # The changed graph is only a module. Capturing it makes it an exported program.
        example = ordered(model, example_of(given))
        done = trace(rewrite.module, take_rows(as_device(example), batch or 2), free=batch is None)
    inputs = [layer.scheme.inputs for _, layer in quantized_layers(model)]
    rounds = bool(batches) or any(each is not None for each in inputs)
    return QuantizedProgram(done, rewrite.left_float, rounds)


def _insert_(
    rewrite: Rewrite,
    chosen: dict[fx.Node, LayerQuantization],
    seen: dict[fx.Node, tuple[float, float]],
) -> None:
    """Rounds activations, and replaces the weights of `chosen` layers by codes and scales.

    `seen` is the range of each value on the calibration examples.
    """
    rounded = activation_qparams(rewrite, chosen, seen)
    for value, qparams in rounded.items():
        rewrite.round_(value, qparams)

    # Input scale and bias of each operation, by the name of the weight.
    products: dict[str, list[tuple[float, Tensor | None]]] = {}
    for node, layer in chosen.items():
        inputs = _round_input_(rewrite, node, layer, rounded)
        if inputs is not None and layer.group is None:
            bias = node.args[2] if len(node.args) > 2 else None
            added = rewrite.tensor(bias) if isinstance(bias, fx.Node) else None
            name = str(argument(node, 1).target)
            products.setdefault(name, []).append((inputs.scale, added))

    # A second loop, because the scales of a shared weight must fit the biases of all operations
    # that read it, and the first loop collects these.
    written: dict[str, fx.Node] = {}
    for node, layer in chosen.items():
        weight = argument(node, 1)
        name = str(weight.target)
        if name not in written:
            shift = rewrite.format.four_bit_shift
            fitted = with_int32_biases(layer, products.get(name, ()), shift)
            written[name] = rewrite.dequantize_weight(weight, fitted)
        node.replace_input_with(weight, written[name])
    _insert_others_(rewrite, chosen, written, rounded)


def _round_input_(
    rewrite: Rewrite, node: fx.Node, layer: LayerQuantization, rounded: Mapping[fx.Node, QParams]
) -> QParams | None:
    """Rounds the input of a layer with the layer's own scale, unless this was done already.

    Returns:
        The quantization of the input; None if it is not quantized.
    """
    value = argument(node, 0)
    now = rounded.get(before_rounding(value))
    if layer.inputs is None or layer.inputs == now:
        return now
    rewrite.round_input_(node, value, layer.inputs)
    return layer.inputs


def _insert_others_(
    rewrite: Rewrite,
    chosen: Mapping[fx.Node, LayerQuantization],
    written: Mapping[str, fx.Node],
    rounded: Mapping[fx.Node, QParams],
) -> None:
    """Writes codes and scales for recurrent layers, embeddings and transposed convolutions.

    No integer kernel computes with these weights. But the file stores them in few bits, and the
    outputs of these layers are the same as in the quantized model. This function also rounds the
    inputs of layers whose inputs are quantized but whose weights are not integers.
    """
    for weight in [node for node in rewrite.graph.nodes if node.op == "get_attr"]:
        name = str(weight.target)
        layer = rewrite.layers.get(name)
        if layer is None or not weight.users:
            continue
        readers = [*weight.users]
        if layer.codes is not None:
            made = written.get(name) or rewrite.dequantize_weight(weight, layer)
            weight.replace_all_uses_with(made)
        for node in readers:
            if node not in chosen and node.target in TRANSPOSED | LAYERS:
                _round_input_(rewrite, node, layer, rounded)
