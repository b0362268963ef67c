"""Decides which activations of a graph are quantized, and with which scale and zero point."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fedpress.deploy.qdq.graph import (
    Activations,
    LayerQuantization,
    QParams,
    Rewrite,
    argument,
    module_of,
)
from fedpress.deploy.qdq.operations import (
    CLIPS,
    CONCATENATIONS,
    ELEMENTWISE,
    LAYERS,
    LINEAR,
    MATRIX_PRODUCTS,
    MEANS,
    SAME_GRID,
    SPLITS,
    is_float,
    only_moves_values,
    takes_one_result,
)
from fedpress.errors import ExportError
from fedpress.nn.quant_scheme import InputQuantization, calculate_qparams

# Largest scale of values that were 0 on all calibration examples. The layer that reads them rounds
# its bias to steps of input scale * weight scale: with a larger scale the bias could become 0.
SCALE_OF_ZEROS = 2.0**-10

QuantizedLayers = Mapping[fx.Node, LayerQuantization]
"""Quantization of the layers whose weights are integers, by operation."""

Range = tuple[float, float]
"""The least and the largest value."""


def activation_qparams(
    rewrite: Rewrite, layers: QuantizedLayers, ranges: Mapping[fx.Node, Range]
) -> dict[fx.Node, QParams]:
    """Decides which values are rounded, and with which scale and zero point.

    A value is the result of an operation; its readers are the operations that use the value.

    Args:
        rewrite: the graph; operations that compute in float are added to its `left_float`.
        layers: the layers whose weights are integers. If a layer prescribes the quantization of its
            input (`inputs`), and this input was always 0, `inputs` may get a smaller scale.
        ranges: range of each value on the calibration examples.

    Returns:
        The quantization of each value that is rounded; empty if only weights are quantized.

    Raises:
        ExportError: if a value was not finite on the calibration examples.
    """
    if not rewrite.integer:
        return {}
    nodes = [node for node in rewrite.graph.nodes if node.op != "output"]
    integer = integer_operations(nodes, layers)
    grids = _shared_grids(nodes, rewrite.format.activations)
    values = _values_to_round(rewrite, nodes, layers, integer, grids)
    _note_float_operations_(
        rewrite, [n for n in nodes if _is_computed_in_float(n, integer.operations)]
    )

    # A layer may prescribe the quantization of its input. All values that share scale and zero
    # point with this input get the same quantization.
    prescribed: dict[fx.Node, QParams] = {}
    for node, layer in layers.items():
        if layer.inputs is not None:
            prescribed.setdefault(grids[argument(node, 0)], layer.inputs)

    # Values on one grid need a scale that fits the largest of them.
    joint = _joint_ranges(values, grids, ranges)
    found: dict[fx.Node, QParams] = {}
    for value in values:
        grid = grids[value]
        qparams = prescribed.get(grid) or _calibrated(joint[grid], rewrite.format.activations)
        if joint[grid] == (0.0, 0.0):
            qparams = replace(qparams, scale=min(qparams.scale, SCALE_OF_ZEROS))
        found[value] = qparams

    for node, layer in layers.items():
        read = argument(node, 0)
        if layer.inputs is not None and joint.get(grids[read]) == (0.0, 0.0):
            layer.inputs = found.get(read, layer.inputs)
    return found


@dataclass(frozen=True)
class IntegerOperations:
    """The operations that are computed on integers.

    Attributes:
        operations: the operations.
        read: the values that these operations read, directly or through operations that only move
            or clip values.
    """

    operations: set[fx.Node]
    read: set[fx.Node]


def integer_operations(nodes: Sequence[fx.Node], layers: QuantizedLayers) -> IntegerOperations:
    """Decides which operations run on integers.

    Layers and matrix products run on integers, because this saves time. Additions, products, means
    and concatenations run on integers only if their operands are integers already and an integer
    operation reads their result. Example: the residual stream of a transformer is read by layer
    norms, so it stays float and keeps its precision. The residual stream of a ResNet is computed on
    integers.
    """
    able = _able_operations(nodes, layers)
    operations: set[fx.Node] = set()
    read: set[fx.Node] = set()
    # In reverse order, so that the readers of a value are decided before the value itself.
    for node in reversed(nodes):
        for user in node.users:
            if user in operations or (only_moves_values(user) and user in read):
                read.add(node)
        if node in able and (node.target in LAYERS | MATRIX_PRODUCTS or node in read):
            operations.add(node)
    return IntegerOperations(operations, read)


def _able_operations(nodes: Sequence[fx.Node], layers: QuantizedLayers) -> set[fx.Node]:
    """Returns the operations with an integer kernel whose operands are, or may become, integers."""
    able: set[fx.Node] = set()
    # Values that are integers, or can be quantized at no cost, such as the inputs of the graph.
    integer: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or (only_moves_values(node) and argument(node, 0) in integer):
            integer.add(node)
            continue
        saves_time = node.target in LAYERS | MATRIX_PRODUCTS
        if _has_integer_kernel(node, layers) and (saves_time or _reads_integers(node, integer)):
            able.add(node)
            integer.add(node)
    return able


def _values_to_round(
    rewrite: Rewrite,
    nodes: Sequence[fx.Node],
    layers: QuantizedLayers,
    integer: IntegerOperations,
    grids: Mapping[fx.Node, fx.Node],
) -> list[fx.Node]:
    """Returns the values to round: operands and results of integer operations.

    Also returns all values that must share a scale and zero point (a "grid") with one of these.
    """
    operations = integer.operations
    fused = _fused_results(nodes, operations)
    # With `float_output` a linear layer or matrix product gives floats if no integer kernel reads
    # them.
    unrounded: set[fx.Node] = set()
    if rewrite.format.float_output:
        products = {v for v in operations if v.target in LINEAR | MATRIX_PRODUCTS}
        unrounded = products - integer.read
    weights = _weights(layers)
    values = [v for v in nodes if is_float(v) and v not in fused | weights]

    def is_needed(value: fx.Node) -> bool:
        if value in operations and value not in unrounded:
            return True
        if value.target in CLIPS and value.args[0] in fused - unrounded:
            return True
        return any(user in operations for user in value.users)

    needed = {grids[value] for value in values if is_needed(value)}
    return [value for value in values if grids[value] in needed and value not in unrounded]


def _fused_results(nodes: Sequence[fx.Node], operations: Collection[fx.Node]) -> set[fx.Node]:
    """Returns the integer operations whose only reader is a clip.

    A kernel rounds and clips in one step. So only the result of the clip is rounded, and not the
    result of the operation itself.
    """
    clipped = [argument(node, 0) for node in nodes if node.target in CLIPS]
    return {value for value in clipped if value in operations and len(value.users) == 1}


def _joint_ranges(
    values: Sequence[fx.Node], grids: Mapping[fx.Node, fx.Node], ranges: Mapping[fx.Node, Range]
) -> dict[fx.Node, Range]:
    """Returns for each grid the joint range of its values, enlarged to include 0.

    0 must be an exact step of the grid, because padding and ReLU produce zeros.

    Raises:
        ExportError: if a value was not finite.
    """
    joint: dict[fx.Node, Range] = {}
    for value in values:
        if value not in ranges:
            continue
        least, largest = ranges[value]
        if not math.isfinite(largest - least):
            raise ExportError(
                (
                    f"{module_of(value)!r} gives NaN or infinite values on the calibration "
                    "examples, for which integers have no range"
                ),
                place="model",
                cure="look at its weights and inputs",
            )
        low, high = joint.get(grids[value], (0.0, 0.0))
        joint[grids[value]] = min(low, least), max(high, largest)
    return joint


def _weights(layers: QuantizedLayers) -> set[fx.Node]:
    """Returns the weights and biases of layers, which are not activations."""
    found: set[fx.Node] = set()
    for node in layers:
        found.update(a for a in node.args[1:3] if isinstance(a, fx.Node))
    return found


def _reads_integers(node: fx.Node, integer: Collection[fx.Node]) -> bool:
    """Whether at least one operand of `node` is an integer, and all other operands are cheap.

    Constants are cheap to quantize. So are small operands that are broadcast, such as one number
    for each channel.
    """
    parts: Any = node.args[0] if node.target in CONCATENATIONS else node.args
    operands = [a for a in parts if isinstance(a, fx.Node) and a.op != "get_attr"]
    size = node.meta["val"].numel()
    if not any(operand in integer for operand in operands):
        return False
    for operand in operands:
        if operand in integer:
            continue
        if node.target not in ELEMENTWISE or operand.meta["val"].numel() >= size:
            return False
    return True


def _has_integer_kernel(node: fx.Node, layers: QuantizedLayers) -> bool:
    if node.target in LAYERS:
        return node in layers and not layers[node].reason and layers[node].group is None
    if node.target in ELEMENTWISE | MATRIX_PRODUCTS:
        tensors = all(isinstance(a, fx.Node) and is_float(a) for a in node.args)
        # add(x, y, alpha=a) computes x + a * y, and integer kernels support only a = 1.
        return tensors and bool(node.kwargs.get("alpha", 1) == 1)
    return node.target in MEANS | CONCATENATIONS and is_float(node)


def _note_float_operations_(rewrite: Rewrite, nodes: Sequence[fx.Node]) -> None:
    """Adds the operations that compute in float to `left_float`, with the reasons."""
    # Dictionaries instead of sets, because they keep the order: reports must be reproducible.
    reasons: dict[str, dict[str, None]] = {}
    for node in nodes:
        reasons.setdefault(module_of(node), {})[_float_reason(node)] = None
    for place, found in reasons.items():
        rewrite.left_float.setdefault(place, "; ".join(found))


def _shared_grids(nodes: Sequence[fx.Node], activations: Activations) -> dict[fx.Node, fx.Node]:
    """Maps every value to its grid: all values with one scale and zero point.

    A grid is represented by one of its values. The grids are found by union-find: `parent` points
    from a value towards the representative of its grid.
    """
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while parent.get(node, node) is not node:
            node = parent[node]
        return node

    for node in nodes:
        parent[node] = node
        if node.target in SAME_GRID | SPLITS or takes_one_result(node):
            parent[node] = find(argument(node, 0))
        elif node.target in CONCATENATIONS and activations == "int8":
            # XNNPACK and LiteRT concatenate only values with the same scale and zero point.
            parts: Any = node.args[0]
            for part in parts:
                parent[find(part)] = node
    return {node: find(node) for node in nodes}


def _calibrated(found: Range, activations: Activations) -> QParams:
    quantization = InputQuantization(bits=8)
    low, high = torch.tensor(found[0]), torch.tensor(found[1])
    scale, zero_point = calculate_qparams(low, high, quantization)
    return QParams.of(float(scale), int(zero_point), quantization.highest, activations)


def _is_computed_in_float(node: fx.Node, operations: Collection[fx.Node]) -> bool:
    """Returns whether `node` is arithmetic on floats that is not in the integer `operations`.

    Layers do not count, because `quantize_weights_` reports them.
    """
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if node in operations or node.target in LAYERS or only_moves_values(node):
        return False
    value = node.meta.get("val")
    results = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in results)


def _float_reason(node: fx.Node) -> str:
    name = str(node.target).removeprefix("aten.").partition(".")[0].removesuffix("_")
    if node.target in ELEMENTWISE | MEANS | CONCATENATIONS:
        return f"{name} stays float between float operations"
    return f"{name} has no integer form"
