"""Captures a model and puts quantize and dequantize around every operation that an integer runtime computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fedpress.core.inputs import Example
from fedpress.deploy.calibrate import ranges
from fedpress.deploy.capture import capture, silence, trace
from fedpress.deploy.examples import Given, as_device, example_of, ordered, take
from fedpress.deploy.qdq.edges import rounded_values
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
    choose_weights_,
    fold_batch_norms_,
    plain_copy,
    with_int32_biases,
)
from fedpress.nn.observers import Observer
from fedpress.nn.quantized import quantized_layers

ANY = IntegerFormat()


@dataclass(frozen=True)
class QuantizedProgram:
    """The graph, and what in it is computed in float: name of the module or operation -> reason.

    `rounds` says whether it rounds values that it computes, and not its weights alone.
    """

    program: torch.export.ExportedProgram
    left: dict[str, str]
    rounds: bool = False


def quantized_program(
    model: nn.Module,
    given: Given,
    batches: Sequence[Example] = (),
    *,
    format: IntegerFormat = ANY,
    observer: Observer = "minmax",
    batch: int | None = None,
) -> QuantizedProgram:
    """Captures `model` with its batch norms folded, and rounds every value that integer arithmetic needs.

    Codes and scales of quantized layers go in unchanged, and so do those of their inputs. With `batches` the rest
    follows: float weights become int8 per output channel, and every input and output of a convolution, linear layer,
    matrix product, addition, product, mean or concatenation is rounded to 8 bits over the range that it has on the
    batches. Without batches nothing is added: a model with 4-bit weights then keeps them small and computes in float.

    Args:
        model: maps a batch to one tensor or more; left as it was.
        given: shape of one float32 example, or a batch of inputs.
        batches: standardised public examples to take the ranges from, such as float32 [n, *input_shape].
        format: what the integers of the runtime are like.
        observer: how ranges are taken from what was seen.
        batch: the batch size of the graph; None leaves it free.

    Raises:
        ExportError: if the model cannot be captured, or a calibration batch does not fit or is not finite.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operations)

    plain, layers = plain_copy(model, format.activations)
    with silence(), torch.no_grad():
        program = capture(plain, given, batch=batch)
        rewrite = Rewrite(program.module(check_guards=False), layers, format, bool(batches))
        for node in rewrite.graph.nodes:
            if node.op == "get_attr" and "val" not in node.meta:
                node.meta["val"] = rewrite.tensor(node)
        fold_batch_norms_(rewrite)
        chosen = choose_weights_(rewrite)
        _insert_(rewrite, chosen, ranges(rewrite.module, batches, observer))
        rewrite.tidy_()
        example = ordered(model, example_of(given))
        done = trace(rewrite.module, take(as_device(example), batch or 2), free=batch is None)
    inputs = [layer.scheme.inputs for _, layer in quantized_layers(model)]
    rounds = bool(batches) or any(each is not None for each in inputs)
    return QuantizedProgram(done, rewrite.left, rounds)


def _insert_(
    rewrite: Rewrite,
    chosen: dict[fx.Node, LayerQuantization],
    seen: dict[fx.Node, tuple[float, float]],
) -> None:
    """Makes the weights of `chosen` layers of their codes, and rounds every value that integers need rounded."""
    edges = rounded_values(rewrite, chosen, seen)
    written: dict[str, fx.Node] = {}
    products: dict[str, list[tuple[float, Tensor | None]]] = {}  # input scale and bias, by weight
    for value, qparams in edges.items():
        rewrite.round_(value, qparams)
    for node, layer in chosen.items():
        inputs = _round_input_(rewrite, node, layer, edges)
        if inputs is not None and layer.group is None:
            bias = node.args[2] if len(node.args) > 2 else None
            added = rewrite.tensor(bias) if isinstance(bias, fx.Node) else None
            name = str(argument(node, 1).target)
            products.setdefault(name, []).append((inputs.scale, added))
    for node, layer in chosen.items():
        weight = argument(node, 1)
        name = str(weight.target)
        if name not in written:
            shift = rewrite.format.four_bit_shift
            fitted = with_int32_biases(layer, products.get(name, ()), shift)
            written[name] = rewrite.dequantize_weight(weight, fitted)
        node.replace_input_with(weight, written[name])
    _insert_others_(rewrite, chosen, written, edges)


def _round_input_(
    rewrite: Rewrite, node: fx.Node, layer: LayerQuantization, edges: Mapping[fx.Node, QParams]
) -> QParams | None:
    """Rounds the input of a layer as the layer says, where it is not rounded so already; returns how it is rounded."""
    given = argument(node, 0)
    now = edges.get(before_rounding(given))
    if layer.inputs is None or layer.inputs == now:
        return now
    rewrite.round_input_(node, given, layer.inputs)
    return layer.inputs


def _insert_others_(
    rewrite: Rewrite,
    chosen: Mapping[fx.Node, LayerQuantization],
    written: Mapping[str, fx.Node],
    edges: Mapping[fx.Node, QParams],
) -> None:
    """Makes the weights of recurrent layers, embeddings and transposed convolutions of their codes.

    No integer kernel computes with them, but the file holds them in few bits, and they are those of the simulation. So
    are the inputs of layers whose inputs are quantized, but whose weights are no whole numbers.
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
                _round_input_(rewrite, node, layer, edges)
