"""A model becomes a graph that says where an integer runtime rounds: quantize and dequantize around every operation.

The graph is an ordinary `torch.export` program with the operations `quantized_decomposed.(de)quantize_per_tensor` on
activations and `dequantize_per_channel` (of groups: `dequantize_per_channel_group`) on the int8 codes of weights. It
runs in torch, where it is the oracle of every artifact that is lowered from it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedpress.deploy.calibrate import ranges
from fedpress.deploy.capture import capture, silence, trace
from fedpress.deploy.examples import Example, Given, as_device, example_of, ordered, take
from fedpress.errors import ExportError
from fedpress.nn.observers import Observer
from fedpress.nn.quant_scheme import InputQuantization, calculate_qparams
from fedpress.nn.quantized import QuantLayer, materialize_, quantized_layers, remove_quantization_
from fedpress.nn.resize import copied

Activations = Literal["uint8", "int8"]
aten = torch.ops.aten

CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
}
LINEAR = {aten.linear.default}
LAYERS = LINEAR | CONVOLUTIONS
"""Operations with a weight at argument 1, output channels first, and a bias at argument 2."""

TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
MATRIX = {aten.matmul.default, aten.bmm.default}
ELEMENTWISE = {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor}
MEANS = {
    *(aten.mean.dim, aten.avg_pool1d.default, aten.avg_pool2d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
}
CAT = {aten.cat.default}
SAME_GRID = {  # what comes out is among what goes in (or 0): both share one grid
    *(
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.adaptive_max_pool2d.default,
        aten.flatten.using_ints,
    ),
    *(
        aten.view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
    ),
    *(
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.pixel_shuffle.default,
    ),
    *(
        aten.upsample_nearest2d.vec,
        aten.channel_shuffle.default,
        aten.dropout.default,
        aten.clone.default,
    ),
    *(aten.contiguous.default, aten.expand.default),
}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
CLIPS = {
    aten.relu.default,
    aten.relu_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.relu6.default,
}
"""Runtimes do these while they round, so nothing is rounded between them and the layer before."""

INTEGER = LAYERS | MATRIX | ELEMENTWISE | MEANS | CAT
WEIGHT_HIGHEST = {8: 127, 7: 63}
HIGHEST_BIAS = 2.0**30  # half of what int32 holds: the products of a layer are added to it
BIAS_OF_DEAD = 2.0**24  # more steps than float32 tells apart
STEP_OF_ZEROS = (
    2.0**-10
)  # where only zeros were seen: in coarser steps the bias of the layer that reads them is lost
LEAST_STEP = (
    1e-36  # of a product: a normal float32, also after it was divided by the step of the output
)


@dataclass(frozen=True)
class QuantizedProgram:
    """The graph, and what in it is computed in float: name of the module or operation -> reason.

    `rounds` says whether it rounds values that it computes, and not its weights alone.
    """

    program: torch.export.ExportedProgram
    left: dict[str, str]
    rounds: bool = False


@dataclass(frozen=True)
class _Grid:
    """Values (c - zero) * scale with whole c in low..high."""

    scale: float
    zero: int
    low: int
    high: int


@dataclass
class _Layer:
    """What a quantized layer brings along: whole numbers and scales of its weight, and its input's grid."""

    codes: Tensor | None = None
    scales: Tensor | None = None
    group: int | None = None
    axis: int = 0  # of the codes, along which scales go
    grid: _Grid | None = None
    reason: str = ""


@dataclass
class _Work:
    """The graph while it is rewritten."""

    graph: fx.GraphModule
    layers: dict[str, _Layer]
    activations: Activations
    integer: bool
    weight_bits: Literal[7, 8]
    float_output: bool
    left: dict[str, str] = field(default_factory=dict)


def quantized_program(
    model: nn.Module,
    given: Given,
    batches: Sequence[Example] = (),
    *,
    activations: Activations = "uint8",
    observer: Observer = "minmax",
    weight_bits: Literal[7, 8] = 8,
    float_output: bool = False,
    batch: int | None = None,
) -> QuantizedProgram:
    """Captures `model` with its batch norms folded, and puts every value that integer arithmetic needs on a grid.

    Codes and scales of quantized layers go in unchanged, and so do the grids of their inputs. With `batches` the rest
    follows: float weights become int8 per output channel, and every input and output of a convolution, linear layer,
    matrix product, addition, product, mean or concatenation is rounded to 8 bits over the range that it has on the
    batches. Without batches nothing is added: a model with 4-bit weights then keeps them small and computes in float.

    Args:
        model: maps a batch to one tensor or more; left as it was.
        given: shape of one float32 example, or a batch of inputs.
        batches: standardised public examples to take the ranges from, such as float32 [n, *input_shape].
        activations: "uint8" (onnxruntime) or "int8" (XNNPACK, LiteRT); the values are the same.
        observer: how ranges are taken from what was seen.
        weight_bits: 7 where the processor adds products of bytes in 16 bits (AVX2 without VNNI), which may overflow.
        float_output: whether the output of a linear layer or matrix product stays unrounded where no integer
            operation reads it.
        batch: the batch size of the graph; None leaves it free.

    Raises:
        ExportError: if the model cannot be captured, or a calibration batch does not fit or is not finite.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operations)

    copied, layers = _plain(model, activations)
    with silence(), torch.no_grad():
        program = capture(copied, given, batch=batch)
        work = _Work(
            program.module(check_guards=False),
            layers,
            activations,
            bool(batches),
            weight_bits,
            float_output,
        )
        for node in work.graph.graph.nodes:
            if node.op == "get_attr" and "val" not in node.meta:
                node.meta["val"] = _tensor(work, node)
        _fold_batch_norms_(work)
        chosen = _choose_weights_(work)
        _insert_(work, chosen, ranges(work.graph, batches, observer))
        _tidy_(work.graph)
        example = ordered(model, example_of(given))
        done = trace(work.graph, take(as_device(example), batch or 2), free=batch is None)
    own = (layer.scheme.inputs for _, layer in quantized_layers(model))
    return QuantizedProgram(
        done, work.left, rounds=bool(batches) or any(grid is not None for grid in own)
    )


def _plain(model: nn.Module, activations: Activations) -> tuple[nn.Module, dict[str, _Layer]]:
    """Returns a copy with ordinary layers in the place of quantized ones, and what those bring along, by weight."""
    model = copied(model).to("cpu", torch.float32).eval()
    materialize_(model)
    layers: dict[str, _Layer] = {}
    for name, layer in [*quantized_layers(model)]:
        for key in layer.keys:
            layers[f"{name}.{key}"] = _weights_of(layer, key)
        grid = layer.scheme.inputs
        found = layers.get(f"{name}.weight", _Layer())
        if grid is not None and (grid.dynamic or grid.bits == 1):
            found.reason = (
                "its inputs are rounded by the values of each batch"
                if grid.dynamic
                else "its inputs are signs"
            )
            twin = copied(layer)
            layer.register_forward_pre_hook(
                lambda _, args, twin=twin: (twin.quantized_input(args[0]), *args[1:])
            )
        elif grid is not None:
            scale, zero = float(layer.input_scale.detach().abs()), int(layer.input_zero_point)
            found.grid = _grid(scale, zero, grid.highest, activations)
        remove_quantization_(layer)
    return model, layers


def _weights_of(layer: QuantLayer, key: str) -> _Layer:
    """Returns codes and scales of a weight, or why it has none."""
    grid = layer.scheme.weights
    if grid is None:
        return _Layer()
    pair = layer.integers(key)
    if pair is None:
        return _Layer(
            reason="its weights are a codebook of any values, which integers cannot multiply"
        )
    codes, scales = pair
    if type(layer).rows is QuantLayer.rows:
        return _Layer(codes, scales, grid.group)
    # Rows are not the first axis (a transposed convolution): one scale for each place of the second, or none at all.
    if grid.group is not None or len(scales) != codes.shape[1]:
        return _Layer()
    return _Layer(codes, scales, axis=1)


def _grid(scale: float, zero: int, highest: int, activations: Activations) -> _Grid:
    """Moves codes 0..highest to -128..highest-128 where a runtime wants int8: the values stay the same."""
    shift = 0 if activations == "uint8" else 128
    return _Grid(scale, zero - shift, -shift, highest - shift)


def _fold_batch_norms_(work: _Work) -> None:
    """Takes every batch norm into the layer whose output it alone reads: w' = w s, b' = (b - mean) s + beta."""
    graph = work.graph.graph
    for norm in [n for n in graph.nodes if n.target is aten.batch_norm.default]:
        layer = norm.args[0]
        if layer.target not in LAYERS or len(layer.users) > 1 or not _owned(layer.args[1]):
            continue
        if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
            continue
        gamma, beta, mean, var = (None if a is None else _tensor(work, a) for a in norm.args[1:5])
        assert mean is not None, "in evaluation mode a batch norm has statistics"
        assert var is not None
        factor = (var + norm.args[7]).rsqrt() * (1.0 if gamma is None else gamma)
        name = layer.args[1].target
        weight = _tensor(work, layer.args[1])
        old = (
            _tensor(work, layer.args[2])
            if len(layer.args) > 2 and layer.args[2] is not None
            else 0.0
        )
        bias = (old - mean) * factor + (0.0 if beta is None else beta)
        _set_(work, name, weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        _scale_codes_(work.layers.get(name), factor)
        with graph.inserting_before(layer):
            folded = graph.get_attr(_add_(work, name + "_folded_bias", bias))
        layer.args = (*layer.args[:2], folded, *layer.args[3:])
        norm.replace_all_uses_with(layer)
        graph.erase_node(norm)


def _scale_codes_(layer: _Layer | None, factor: Tensor) -> None:
    """Multiplies the scales by `factor`; codes change sign where it is negative, and are 0 where it is."""
    if layer is None or layer.codes is None or layer.scales is None:
        return
    rows = factor.view(-1, *[1] * (layer.codes.dim() - 1))
    layer.codes = layer.codes * rows.sign().to(torch.int8)
    scales = layer.scales * factor.abs().view(-1, *[1] * (layer.scales.dim() - 1))
    layer.scales = torch.where(scales > 0, scales, torch.ones_like(scales))


def _choose_weights_(work: _Work) -> dict[fx.Node, _Layer]:
    """Returns the layers whose weights are whole numbers times scales; the others are left, with the reason."""
    chosen: dict[fx.Node, _Layer] = {}
    made: dict[str, _Layer] = {}
    for node in work.graph.graph.nodes:
        if node.target not in LAYERS:
            continue
        if not isinstance(node.args[1], fx.Node) or node.args[1].op != "get_attr":
            work.left[_where(node)] = (
                "its weight is computed in forward; make it plain first (remove_parametrizations)"
            )
            continue
        name = str(node.args[1].target)
        layer = work.layers.get(name)
        if layer is None or (layer.codes is None and not layer.reason):
            layer = made.get(name) or _Layer(grid=layer.grid if layer else None)
            if work.integer:
                layer.codes, layer.scales = _round_weight(
                    _tensor(work, node.args[1]), work.weight_bits, name
                )
                made[name] = layer
        if layer.codes is not None:
            chosen[node] = layer
        if work.integer and (layer.reason or layer.group is not None):
            work.left[_module_name(name)] = (
                layer.reason or "its weights have several scales per output channel"
            )
    return chosen


def _round_weight(weight: Tensor, bits: Literal[7, 8], name: str) -> tuple[Tensor, Tensor]:
    """Returns int8 codes and one scale per output channel that spans it."""
    if not bool(weight.isfinite().all()):
        raise ExportError(
            f"export: {_module_name(name)!r} has NaN or infinite weights; load a checkpoint from before training broke"
        )
    highest = WEIGHT_HIGHEST[bits]
    scales = weight.abs().flatten(1).amax(1) / highest
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    rows = scales.view(-1, *[1] * (weight.dim() - 1))
    return (weight / rows).round().clamp(-highest, highest).to(torch.int8), scales


def _insert_(
    work: _Work, chosen: dict[fx.Node, _Layer], seen: dict[fx.Node, tuple[float, float]]
) -> None:
    """Puts the weights of `chosen` layers on their codes, and every edge that integers need on its grid."""
    edges = _edges(work, chosen, seen)
    written: dict[str, fx.Node] = {}
    products: dict[str, list[tuple[float, Tensor | None]]] = {}
    for value, grid in edges.items():
        _round_(work, value, grid)
    for node, layer in chosen.items():
        given, weight = _given(node, 0), _given(node, 1)
        own = layer.grid or edges.get(_behind(given))
        if layer.grid is not None and edges.get(_behind(given)) != layer.grid:
            with work.graph.graph.inserting_before(node):
                node.replace_input_with(given, _pair(work, given, layer.grid)[1])
        name = str(weight.target)
        if own is not None and layer.group is None:
            bias = node.args[2] if len(node.args) > 2 else None
            added = _tensor(work, bias) if isinstance(bias, fx.Node) else None
            products.setdefault(name, []).append((own.scale, added))
    for node, layer in chosen.items():
        weight = _given(node, 1)
        name = str(weight.target)
        if name not in written:
            fitted = layer
            for input_scale, bias in products.get(name, ()):
                fitted = _with_whole_biases(fitted, input_scale, bias)
            written[name] = _weight(work, weight, fitted)
        node.replace_input_with(weight, written[name])
    _insert_others_(work, chosen, written, edges)


def _insert_others_(
    work: _Work,
    chosen: dict[fx.Node, _Layer],
    written: dict[str, fx.Node],
    edges: dict[fx.Node, _Grid],
) -> None:
    """Puts the weights of recurrent layers, embeddings and transposed convolutions on their codes.

    No integer kernel computes with them, but the file holds them in few bits, and they are those of the simulation. So
    are the inputs of layers that have an input grid, but weights that are no whole numbers.
    """
    for weight in [n for n in work.graph.graph.nodes if n.op == "get_attr"]:
        name = str(weight.target)
        layer = work.layers.get(name)
        if layer is None or not weight.users:
            continue
        readers = [*weight.users]
        if layer.codes is not None:
            weight.replace_all_uses_with(written.get(name) or _weight(work, weight, layer))
        for node in readers:
            if layer.grid is None or node in chosen or node.target not in TRANSPOSED | LAYERS:
                continue
            given = _given(node, 0)
            if edges.get(_behind(given)) != layer.grid:
                with work.graph.graph.inserting_before(node):
                    node.replace_input_with(given, _pair(work, given, layer.grid)[1])


def _with_whole_biases(layer: _Layer, input_scale: float, bias: Tensor | None) -> _Layer:
    """Returns the layer with weight scales that integer kernels can multiply and add a bias to.

    Kernels write the bias as int32 in steps of input scale times weight scale. A channel of zero or nearly zero
    weights has a scale so small that its bias does not fit, and the kernel saturates without a word. Such channels get
    the least scale that fits; their codes follow, and become 0 where the weights are nothing beside the bias.
    """
    assert layer.codes is not None
    assert layer.scales is not None
    codes, scales = layer.codes, layer.scales.double()
    sizes = torch.zeros_like(scales) if bias is None else bias.detach().double().abs()
    dead = codes.flatten(1).count_nonzero(1) == 0
    # Nothing but the bias comes out of a dead channel: a fine step of its own keeps it to the last bit.
    fine = sizes / (input_scale * BIAS_OF_DEAD)
    scales = torch.where(dead & (sizes > 0), fine, scales)
    least = torch.maximum(
        sizes / (input_scale * HIGHEST_BIAS), torch.full_like(scales, LEAST_STEP / input_scale)
    )
    small = scales < least
    rows = (scales / least).view(-1, *[1] * (codes.dim() - 1))
    moved = torch.where(small.view_as(rows), (codes.double() * rows).round(), codes.double()).to(
        torch.int8
    )
    return replace(layer, codes=moved, scales=torch.where(small, least, scales).float())


def _edges(
    work: _Work, chosen: dict[fx.Node, _Layer], seen: dict[fx.Node, tuple[float, float]]
) -> dict[fx.Node, _Grid]:
    """Returns the grid of every value that is rounded for more than one reader."""
    nodes = [n for n in work.graph.graph.nodes if n.op != "output"]
    if not work.integer:
        return {}
    runs, feeding = _integer_operations(nodes, chosen)
    fused = {
        n.args[0]
        for n in nodes
        if n.target in CLIPS and n.args[0] in runs and len(n.args[0].users) == 1
    }
    # A linear layer or product hands on unrounded numbers where no integer kernel would read the rounded ones.
    bare = {
        v for v in runs if work.float_output and v.target in LINEAR | MATRIX and v not in feeding
    }
    classes = _classes(nodes, work.activations)
    needed = {
        classes[v]
        for v in nodes
        if _is_float(v) and v not in fused and v not in _weights(chosen)
        if v in runs - bare
        or (v.target in CLIPS and v.args[0] in fused - bare)
        or any(u in runs for u in v.users)
    }
    members = [v for v in nodes if classes[v] in needed and _is_float(v) and v not in fused]
    members = [v for v in members if v not in _weights(chosen) and v not in bare]
    _tell_floats_(work, [n for n in nodes if _is_computed_in_float(n, runs)])
    fixed: dict[fx.Node, _Grid] = {}
    for node, layer in chosen.items():
        if layer.grid is not None:
            fixed.setdefault(classes[_given(node, 0)], layer.grid)
    spans: dict[fx.Node, tuple[float, float]] = {}
    for v in members:
        low, high = spans.get(classes[v], (0.0, 0.0))
        if v in seen and not math.isfinite(seen[v][1] - seen[v][0]):
            raise ExportError(
                f"export: {_where(v)!r} gives NaN or infinite values on the calibration examples, for which integers "
                "have no range; look at its weights and inputs"
            )
        if v in seen:
            spans[classes[v]] = min(low, seen[v][0]), max(high, seen[v][1])
    edges = {
        v: fixed.get(classes[v]) or _calibrated(spans[classes[v]], work.activations)
        for v in members
    }
    for v in members:
        if spans[classes[v]] == (0.0, 0.0):
            edges[v] = replace(edges[v], scale=min(edges[v].scale, STEP_OF_ZEROS))
    for node, layer in chosen.items():
        given = _given(node, 0)
        if layer.grid is not None and spans.get(classes[given]) == (0.0, 0.0):
            layer.grid = edges.get(given, layer.grid)
    return edges


def _weights(chosen: dict[fx.Node, _Layer]) -> set[fx.Node]:
    """The tensors that layers bring along: weights and biases are no activations."""
    return {a for node in chosen for a in node.args[1:3] if isinstance(a, fx.Node)}


def _integer_operations(
    nodes: Sequence[fx.Node], chosen: dict[fx.Node, _Layer]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Decides what is computed on integers, and whose numbers an integer operation reads.

    Layers and matrix products are, since there integers save time. Additions, products, means and concatenations only
    follow: where an integer operation reads what they give, and what they read is on integers already. So the residual
    stream of a transformer, which layer norms read, keeps its precision, and that of a ResNet stays on integers.

    Returns:
        The operations that run on integers; and the values that one of those reads, maybe moved or clipped before.
    """
    able: set[fx.Node] = set()
    whole: set[fx.Node] = set()  # values that are on integers, or may be at no cost
    for n in nodes:
        if n.op == "placeholder" or (_passes_on(n) and _given(n, 0) in whole):
            whole.add(n)
        elif _can_run_on_integers(n, chosen) and (
            n.target in LAYERS | MATRIX or _reads_integers(n, whole)
        ):
            able.add(n)
            whole.add(n)
    runs: set[fx.Node] = set()
    feeding: set[fx.Node] = set()
    for n in reversed(nodes):
        if any(user in runs or (_passes_on(user) and user in feeding) for user in n.users):
            feeding.add(n)
        if n in able and (n.target in LAYERS | MATRIX or n in feeding):
            runs.add(n)
    return runs, feeding


def _passes_on(n: fx.Node) -> bool:
    """Whether what comes out of `n` are numbers that went in, moved or clipped."""
    return n.target in SAME_GRID | CLIPS | SPLITS or (
        n.op == "call_function" and n.target is operator.getitem
    )


def _reads_integers(n: fx.Node, whole: set[fx.Node]) -> bool:
    """Whether the operands of `n` are on integers; constants, and few numbers for many, may still be put there."""
    parts = n.args[0] if n.target in CAT else n.args
    operands = [a for a in parts if isinstance(a, fx.Node) and a.op != "get_attr"]  # type: ignore[union-attr]
    size = n.meta["val"].numel()
    few = [
        a
        for a in operands
        if a not in whole and n.target in ELEMENTWISE and a.meta["val"].numel() < size
    ]
    return any(a in whole for a in operands) and all(a in whole or a in few for a in operands)


def _can_run_on_integers(node: fx.Node, chosen: dict[fx.Node, _Layer]) -> bool:
    if node.target in LAYERS:
        return node in chosen and not chosen[node].reason and chosen[node].group is None
    if node.target in ELEMENTWISE | MATRIX:
        return all(isinstance(a, fx.Node) and _is_float(a) for a in node.args) and bool(
            node.kwargs.get("alpha", 1) == 1
        )
    return node.target in MEANS | CAT and _is_float(node)


def _tell_floats_(work: _Work, nodes: Sequence[fx.Node]) -> None:
    """Writes down which operations compute in float, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for n in nodes:
        reasons.setdefault(_where(n), {})[_float_reason(n)] = None
    for place, found in reasons.items():
        work.left.setdefault(place, "; ".join(found))


def _classes(nodes: Sequence[fx.Node], activations: Activations) -> dict[fx.Node, fx.Node]:
    """Maps every value to one that stands for all values on the same grid."""
    first: dict[fx.Node, fx.Node] = {}

    def find(n: fx.Node) -> fx.Node:
        while first.get(n, n) is not n:
            n = first[n]
        return n

    for n in nodes:
        first[n] = n
        if (
            n.target in SAME_GRID
            or n.target in SPLITS
            or (n.op == "call_function" and n.target is operator.getitem)
        ):
            first[n] = find(_given(n, 0))
        elif (
            n.target in CAT and activations == "int8"
        ):  # XNNPACK and LiteRT concatenate values of one grid only
            parts: Any = n.args[0]
            for part in parts:
                first[find(part)] = n
    return {n: find(n) for n in nodes}


def _calibrated(span: tuple[float, float], activations: Activations) -> _Grid:
    grid = InputQuantization(bits=8)
    scale, zero = calculate_qparams(torch.tensor(span[0]), torch.tensor(span[1]), grid)
    return _grid(float(scale), int(zero), grid.highest, activations)


def _is_computed_in_float(n: fx.Node, runs: set[fx.Node]) -> bool:
    """Whether `n` is arithmetic on floats that no integer kernel does."""
    value = n.meta.get("val")
    gives = value if isinstance(value, tuple | list) else [value]
    floats = any(isinstance(v, Tensor) and v.is_floating_point() for v in gives)
    if (
        n.op != "call_function"
        or not floats
        or not n.all_input_nodes
        or n in runs
        or n.target in LAYERS
    ):
        return False
    return n.target not in SAME_GRID | CLIPS | SPLITS and n.target is not operator.getitem


def _float_reason(n: fx.Node) -> str:
    name = str(n.target).removeprefix("aten.").partition(".")[0].removesuffix("_")
    follows = n.target in ELEMENTWISE | MEANS | CAT
    return (
        f"{name} stays float between float operations" if follows else f"{name} has no integer form"
    )


def _round_(work: _Work, value: fx.Node, grid: _Grid) -> None:
    """Lets everybody read `value` from its grid."""
    with work.graph.graph.inserting_after(value):
        pair = _pair(work, value, grid)
    value.replace_all_uses_with(pair[1], delete_user_cb=lambda user: user is not pair[0])


def _pair(work: _Work, value: fx.Node, grid: _Grid) -> tuple[fx.Node, fx.Node]:
    ops = torch.ops.quantized_decomposed
    kind = torch.uint8 if work.activations == "uint8" else torch.int8
    how = (grid.scale, grid.zero, grid.low, grid.high, kind)
    graph = work.graph.graph
    rounded = graph.call_function(ops.quantize_per_tensor.default, (value, *how))
    rounded.append(
        back := graph.create_node(
            "call_function", ops.dequantize_per_tensor.default, (rounded, *how)
        )
    )
    return rounded, back


def _behind(node: fx.Node) -> fx.Node:
    """Looks through a rounding at the value that it rounds."""
    ops = torch.ops.quantized_decomposed
    return _given(_given(node, 0), 0) if node.target is ops.dequantize_per_tensor.default else node


def _weight(work: _Work, weight: fx.Node, layer: _Layer) -> fx.Node:
    """Writes codes and scales as buffers beside the weight, and the operation that makes the weight of them."""
    assert layer.codes is not None
    assert layer.scales is not None
    ops, graph, name = torch.ops.quantized_decomposed, work.graph.graph, str(weight.target)
    codes, each = layer.codes, layer.codes[0].numel()
    if layer.group is not None:
        codes = F.pad(codes.reshape(len(codes), -1), (0, -each % layer.group))
    with graph.inserting_after(weight):
        held = graph.get_attr(_add_(work, name + "_codes", codes.contiguous()))
    zeros = torch.zeros(layer.scales.shape, dtype=torch.int64)
    with graph.inserting_after(held):
        scales = graph.get_attr(_add_(work, name + "_scales", layer.scales.contiguous()))
    with graph.inserting_after(scales):
        zero = graph.get_attr(_add_(work, name + "_zeros", zeros))
    with graph.inserting_after(zero):
        if layer.group is None:
            how: tuple[Any, ...] = (held, scales, zero, layer.axis, -127, 127, torch.int8)
            return graph.call_function(ops.dequantize_per_channel.default, how)
        how = (held, scales, zero, -127, 127, torch.int8, layer.group, torch.float32)
        whole = graph.call_function(ops.dequantize_per_channel_group.default, how)
    if each % layer.group:
        with graph.inserting_after(whole):
            whole = graph.call_function(aten.slice.Tensor, (whole, 1, 0, each))
    with graph.inserting_after(whole):
        return graph.call_function(aten.view.default, (whole, list(layer.codes.shape)))


def _tidy_(graph: fx.GraphModule) -> None:
    """Drops tensors that nothing reads any more: the artifact must not hold a weight twice."""
    graph.graph.eliminate_dead_code()
    read = {n.target for n in graph.graph.nodes if n.op == "get_attr"}
    for name, _ in [
        *graph.named_parameters(remove_duplicate=False),
        *graph.named_buffers(remove_duplicate=False),
    ]:
        if name not in read:
            owner, _, key = name.rpartition(".")
            delattr(graph.get_submodule(owner), key)
    graph.recompile()


def _owned(node: Any) -> bool:
    """Whether `node` is a tensor of the model that one operation alone reads."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1


def _given(node: fx.Node, at: int) -> fx.Node:
    """Returns the operation or tensor that argument `at` is."""
    found = node.args[at]
    assert isinstance(found, fx.Node)
    return found


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _tensor(work: _Work, node: fx.Node) -> Tensor:
    owner, _, key = str(node.target).rpartition(".")
    found: Tensor = getattr(work.graph.get_submodule(owner), key)
    return found.detach()


def _set_(work: _Work, name: str, value: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(work.graph.get_submodule(owner), key, nn.Parameter(value, requires_grad=False))


def _add_(work: _Work, name: str, value: Tensor) -> str:
    owner, _, key = name.rpartition(".")
    work.graph.get_submodule(owner).register_buffer(key, value)
    return name


def _module_name(tensor: str) -> str:
    """The layer whose weight this is."""
    return tensor.rpartition(".")[0]


def _where(node: fx.Node) -> str:
    """Names the module in whose forward `node` stands; of a layer, the layer."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(name) for name, _ in reversed(list(stack.values())) if name), "")
    return path or node.name
