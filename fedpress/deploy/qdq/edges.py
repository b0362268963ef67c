"""Which values of a graph are rounded, and to what: where integers save time, and the ranges of what was seen."""

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
    CAT,
    CLIPS,
    ELEMENTWISE,
    LAYERS,
    LINEAR,
    MATRIX,
    MEANS,
    SAME_GRID,
    SPLITS,
    is_float,
    is_item,
    passes_on,
)
from fedpress.errors import ExportError
from fedpress.nn.quant_scheme import InputQuantization, calculate_qparams

STEP_OF_ZEROS = 2.0**-10
"""Where only zeros were seen: in coarser steps the bias of the layer that reads them is lost."""

Chosen = Mapping[fx.Node, LayerQuantization]
Span = tuple[float, float]


def rounded_values(
    rewrite: Rewrite, chosen: Chosen, seen: Mapping[fx.Node, Span]
) -> dict[fx.Node, QParams]:
    """Returns how every value is quantized that all its readers see rounded.

    Args:
        rewrite: its `left` is told what computes in float.
        chosen: the layers whose weights are whole numbers; where all inputs of one were 0, it takes a finer step.
        seen: the least and the largest number of each value on the calibration examples.

    Raises:
        ExportError: if a value was not finite on the calibration examples.
    """
    if not rewrite.integer:
        return {}
    nodes = [node for node in rewrite.graph.nodes if node.op != "output"]
    integer = integer_operations(nodes, chosen)
    grids = _shared_grids(nodes, rewrite.format.activations)
    members = _members(rewrite, nodes, chosen, integer, grids)
    _note_floats_(rewrite, [n for n in nodes if _is_computed_in_float(n, integer.runs)])
    fixed: dict[fx.Node, QParams] = {}
    for node, layer in chosen.items():
        if layer.inputs is not None:
            fixed.setdefault(grids[argument(node, 0)], layer.inputs)
    spans = _spans(members, grids, seen)
    edges = {}
    for value in members:
        span = spans[grids[value]]
        qparams = fixed.get(grids[value]) or _calibrated(span, rewrite.format.activations)
        if span == (0.0, 0.0):
            qparams = replace(qparams, scale=min(qparams.scale, STEP_OF_ZEROS))
        edges[value] = qparams
    for node, layer in chosen.items():
        given = argument(node, 0)
        if layer.inputs is not None and spans.get(grids[given]) == (0.0, 0.0):
            layer.inputs = edges.get(given, layer.inputs)
    return edges


@dataclass(frozen=True)
class IntegerOperations:
    """What is computed on integers.

    Attributes:
        runs: the operations that run on integers.
        feeding: the values that one of those reads, maybe moved or clipped before.
    """

    runs: set[fx.Node]
    feeding: set[fx.Node]


def integer_operations(nodes: Sequence[fx.Node], chosen: Chosen) -> IntegerOperations:
    """Decides what is computed on integers, and whose numbers an integer operation reads.

    Layers and matrix products are, since there integers save time. Additions, products, means and concatenations only
    follow: where an integer operation reads what they give, and what they read is on integers already. So the residual
    stream of a transformer, which layer norms read, keeps its precision, and that of a ResNet stays on integers.
    """
    able = _able(nodes, chosen)
    runs: set[fx.Node] = set()
    feeding: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in runs or (passes_on(user) and user in feeding) for user in node.users):
            feeding.add(node)
        if node in able and (node.target in LAYERS | MATRIX or node in feeding):
            runs.add(node)
    return IntegerOperations(runs, feeding)


def _able(nodes: Sequence[fx.Node], chosen: Chosen) -> set[fx.Node]:
    """Returns the operations with an integer kernel whose operands are on integers, or may be put there."""
    able: set[fx.Node] = set()
    integer: set[fx.Node] = set()  # values that are on integers, or may be at no cost
    for node in nodes:
        if node.op == "placeholder" or (passes_on(node) and argument(node, 0) in integer):
            integer.add(node)
            continue
        saves_time = node.target in LAYERS | MATRIX
        if _has_integer_kernel(node, chosen) and (saves_time or _reads_integers(node, integer)):
            able.add(node)
            integer.add(node)
    return able


def _members(
    rewrite: Rewrite,
    nodes: Sequence[fx.Node],
    chosen: Chosen,
    integer: IntegerOperations,
    grids: Mapping[fx.Node, fx.Node],
) -> list[fx.Node]:
    """Returns the values that are rounded: those of integer operations, what these read, and all that share a grid."""
    runs = integer.runs
    fused = _fused_results(nodes, runs)
    # A linear layer or product hands on unrounded numbers where no integer kernel would read the rounded ones.
    bare: set[fx.Node] = set()
    if rewrite.format.float_output:
        bare = {v for v in runs if v.target in LINEAR | MATRIX and v not in integer.feeding}
    weights = _weights(chosen)
    values = [v for v in nodes if is_float(v) and v not in fused and v not in weights]

    def is_needed(value: fx.Node) -> bool:
        if value in runs and value not in bare:
            return True
        if value.target in CLIPS and value.args[0] in fused - bare:
            return True
        return any(user in runs for user in value.users)

    needed = {grids[value] for value in values if is_needed(value)}
    return [value for value in values if grids[value] in needed and value not in bare]


def _fused_results(nodes: Sequence[fx.Node], runs: Collection[fx.Node]) -> set[fx.Node]:
    """Returns the integer operations that only a clip reads: it is a part of their rounding, and rounded for them."""
    clipped = [argument(node, 0) for node in nodes if node.target in CLIPS]
    return {value for value in clipped if value in runs and len(value.users) == 1}


def _spans(
    members: Sequence[fx.Node], grids: Mapping[fx.Node, fx.Node], seen: Mapping[fx.Node, Span]
) -> dict[fx.Node, Span]:
    """Returns the range of all values that share a grid; 0 lies in each."""
    spans: dict[fx.Node, Span] = {}
    for value in members:
        if value not in seen:
            continue
        least, largest = seen[value]
        if not math.isfinite(largest - least):
            raise ExportError(
                (
                    f"{module_of(value)!r} gives NaN or infinite values on the calibration "
                    "examples, for which integers have no range"
                ),
                place="model",
                cure="look at its weights and inputs",
            )
        low, high = spans.get(grids[value], (0.0, 0.0))
        spans[grids[value]] = min(low, least), max(high, largest)
    return spans


def _weights(chosen: Chosen) -> set[fx.Node]:
    """The tensors that layers bring along: weights and biases are no activations."""
    return {a for node in chosen for a in node.args[1:3] if isinstance(a, fx.Node)}


def _reads_integers(node: fx.Node, integer: Collection[fx.Node]) -> bool:
    """Whether the operands of `node` are on integers; constants, and few numbers for many, may still be put there."""
    parts: Any = node.args[0] if node.target in CAT else node.args
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


def _has_integer_kernel(node: fx.Node, chosen: Chosen) -> bool:
    if node.target in LAYERS:
        return node in chosen and not chosen[node].reason and chosen[node].group is None
    if node.target in ELEMENTWISE | MATRIX:
        tensors = all(isinstance(a, fx.Node) and is_float(a) for a in node.args)
        return tensors and bool(node.kwargs.get("alpha", 1) == 1)
    return node.target in MEANS | CAT and is_float(node)


def _note_floats_(rewrite: Rewrite, nodes: Sequence[fx.Node]) -> None:
    """Writes down which operations compute in float, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for node in nodes:
        reasons.setdefault(module_of(node), {})[_float_reason(node)] = None
    for place, found in reasons.items():
        rewrite.left.setdefault(place, "; ".join(found))


def _shared_grids(nodes: Sequence[fx.Node], activations: Activations) -> dict[fx.Node, fx.Node]:
    """Maps every value to one that stands for all values on the same grid."""
    first: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while first.get(node, node) is not node:
            node = first[node]
        return node

    for node in nodes:
        first[node] = node
        if node.target in SAME_GRID | SPLITS or is_item(node):
            first[node] = find(argument(node, 0))
        elif node.target in CAT and activations == "int8":
            # XNNPACK and LiteRT concatenate values of one grid only.
            parts: Any = node.args[0]
            for part in parts:
                first[find(part)] = node
    return {node: find(node) for node in nodes}


def _calibrated(span: Span, activations: Activations) -> QParams:
    quantization = InputQuantization(bits=8)
    scale, zero = calculate_qparams(torch.tensor(span[0]), torch.tensor(span[1]), quantization)
    return QParams.of(float(scale), int(zero), quantization.highest, activations)


def _is_computed_in_float(node: fx.Node, runs: Collection[fx.Node]) -> bool:
    """Whether `node` is arithmetic on floats that no integer kernel does."""
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if node in runs or node.target in LAYERS or passes_on(node):
        return False
    value = node.meta.get("val")
    results = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in results)


def _float_reason(node: fx.Node) -> str:
    name = str(node.target).removeprefix("aten.").partition(".")[0].removesuffix("_")
    if node.target in ELEMENTWISE | MEANS | CAT:
        return f"{name} stays float between float operations"
    return f"{name} has no integer form"
