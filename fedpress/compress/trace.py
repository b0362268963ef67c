"""From a model and an example to its channels: ids are passed along the graph that `torch.export` captures."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import traceback
from torch.overrides import TorchFunctionMode

from fedpress.calls import INDEXING, SIZED, caller, numbers_in, numbers_of, watch_
from fedpress.compress.graph import (
    ChannelGraph,
    Example,
    Layer,
    Length,
    Product,
    SizedNumber,
    Slice,
    export,
    inputs,
    kept_indices,
)
from fedpress.compress.ids import REBUILT, Call, Ids, Ints, Value
from fedpress.compress.remove import cut_
from fedpress.compress.rules import find_rule, zero_stays
from fedpress.errors import ModelError

TAG = "fedpress_call"
Owner = tuple[str, int, Ints]
"""A tensor's name, one of its axes, and the ids of that axis; a name of "" for an axis that is only counted."""


def trace(model: nn.Module, example: Example, *, whole: Sequence[str] = ()) -> ChannelGraph:
    """Finds the channels of `model` that can be removed, from the operations that run on `example`.

    Args:
        model: any module that `torch.export` can capture; it is left in its mode.
        example: its input [n, ...] or a tuple of inputs; a batch of two is a good choice.
        whole: names of modules (or name prefixes) that must keep all their outputs.

    Raises:
        ModelError: if the model cannot be captured, or an operation has no rule.
    """
    arguments = inputs(example)
    recorder = Recorder(model)
    with recorder, traceback.preserve_node_meta(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assigned during export.*")  # the flat weights of recurrent layers
        exported = export(model, arguments)
    ids = Ids()
    owners, unused = _walk(exported, ids, _first_names(model), recorder.calls)
    _freeze_unsaved(ids, owners, model)
    ids.module = ids.operation = ""
    _freeze_named(ids, whole)
    ids.settle()
    graph = _graph(ids, owners, {name: tuple(p.shape) for name, p in model.named_parameters()}, unused, arguments)
    return _without_followers(model, graph, arguments)


class Recorder(TorchFunctionMode):
    """Notes the calls with numbers in each module's forward, and tags the nodes that come from them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._counts: dict[int, int] = {}
        self._model, self._hooks = model, list[Any]()

    def __enter__(self) -> Recorder:
        """Starts to note."""
        for module in self._model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._begin))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops."""
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._counts[id(module)] = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`."""
        if func is F.multi_head_attention_forward:
            with traceback.annotate({TAG: -1}):
                return func(*args, **(kwargs or {}))
        module = caller() if func in SIZED else None
        if module is None or id(module) not in self._counts:
            return func(*args, **(kwargs or {}))
        index = self._counts[id(module)]
        self._counts[id(module)] += 1
        slices = _slice_positions(*args[:2]) if func in INDEXING else []
        numbers = numbers_of(func, args, kwargs or {})
        self.calls.append(Call(self._names[id(module)], index, numbers, slices))
        with traceback.annotate({TAG: len(self.calls) - 1}):
            return func(*args, **(kwargs or {}))


def _slice_positions(x: Tensor, index: Any) -> list[int]:
    """Returns at which of the numbers of an indexing each slice begins that takes only a part of its axis."""
    items = index if isinstance(index, tuple) else (index,)
    indices = [item for item in items if item is not None and item is not Ellipsis and not isinstance(item, bool)]
    wide = sum(item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1 for item in indices)
    positions, at, dim = [], 0, 0
    for item in items:
        if item is Ellipsis:
            dim += x.dim() - wide
        elif isinstance(item, slice):
            if item.indices(x.shape[dim]) != (0, x.shape[dim], 1):
                positions.append(at)
            at, dim = at + 3, dim + 1
        elif isinstance(item, Tensor):
            dim += item.dim() if item.dtype == torch.bool else 1
        elif isinstance(item, list):
            at, dim = at + len(item), dim + 1
        elif item is not None and not isinstance(item, bool):
            at, dim = at + 1, dim + 1
    return positions


def _first_names(model: nn.Module) -> dict[str, str]:
    """Maps every name of a parameter or buffer to its first one, because shared tensors have several."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _walk(
    exported: torch.export.ExportedProgram, ids: Ids, first_names: Mapping[str, str], calls: Sequence[Call]
) -> tuple[list[Owner], list[str]]:
    """Passes ids through every node; returns the ids of each axis of each tensor, and the parameters without use."""
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    owners: list[Owner] = []
    used: dict[str, bool] = {}  # a shared parameter comes once for each of its names
    values: dict[torch.fx.Node, Any] = {}
    live = _live(exported.graph)
    for node in exported.graph.nodes:
        shape = _shape(node)
        if node.op == "placeholder" and node.name in names:
            axes = tuple(ids.fresh(size) for size in shape)
            name = first_names[names[node.name]]
            owners += [(name, i, axis) for i, axis in enumerate(axes)]
            if node.name in signature.inputs_to_parameters:
                used[name] = used.get(name, False) or node in live
            trained = node.name in signature.inputs_to_parameters
            values[node] = Value(shape, axes, zero=True, weights=True, trained=trained)
        elif node.op in ("placeholder", "get_attr"):
            values[node] = Value(shape, (None,) * len(shape), given=node.name in signature.user_inputs)
        elif node.op == "output":
            ids.operation = ""
            for value in _values(torch.fx.node.map_arg(node.args, values.get)):
                for axis in value.axes:
                    ids.freeze(axis, "it is an output of the model")
        elif node not in live:
            continue
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            at = node.meta.get("custom", {}).get(TAG)
            ids.call = None if at is None else REBUILT if at < 0 else calls[at]
            values[node] = _call(node, shape, values, ids)
            if _mutates(node) and any(v.given for v in _values(values[node])):
                _mark_written(node.args[0], values)
    return owners, [name for name, use in used.items() if not use]


def _live(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Returns the nodes that an output depends on, and those that change a tensor in place."""
    live: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live or _mutates(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _mark_written(node: Any, values: dict[torch.fx.Node, Any]) -> None:
    """Notes that what an operation in place wrote into, and what that is a part of, depends on the inputs now."""
    while isinstance(node, torch.fx.Node) and isinstance(values.get(node), Value):
        values[node] = replace(values[node], given=True)
        node = node.args[0] if node.args else None


def _call(node: torch.fx.Node, shape: tuple[int, ...], values: Mapping[torch.fx.Node, Any], ids: Ids) -> Any:
    path = [fqn for fqn, _ in node.meta.get("nn_module_stack", {}).values()]
    ids.module = path[-1] if path else ""
    ids.operation = str(node.target)
    apply = find_rule(node.target)
    if apply is None:
        raise ModelError(
            f"channel pruning has no rule for {ids.place}; add one to fedpress.compress.rules.RULES, "
            "or write that module with operations it knows"
        )
    args, options = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    counted = len(ids.products)
    axes = apply(ids, shape, *args, **options)
    given = list(_values(args))
    zero = zero_stays(node.target, given)
    weights = bool(given) and all(v.weights for v in given)
    trained = weights and any(v.trained for v in given)
    dependent = any(v.given for v in [*given, *_values(list(options.values()))])
    if not dependent:
        ids.alone.update(range(counted, len(ids.products)))
    if isinstance(axes, list):
        return [
            Value(tuple(v.shape), a, zero, weights, trained, dependent)
            for v, a in zip(node.meta["val"], axes, strict=True)
        ]
    return Value(shape, axes, zero, weights, trained, dependent)


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    """Returns the shape of the node's output, or of its first output."""
    first = node.meta.get("val")
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return tuple(getattr(first, "shape", ()))


def _values(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _values(item)


def _freeze_unsaved(ids: Ids, owners: Sequence[Owner], model: nn.Module) -> None:
    """Keeps whole what a buffer follows that no file of the model holds: it could not be rebuilt."""
    saved = model.state_dict().keys()
    for name, _, axis in owners:
        if name not in saved:
            ids.freeze(axis, f"the buffer '{name}' goes with it and is not saved (persistent=False)")


def _freeze_named(ids: Ids, whole: Sequence[str]) -> None:
    for name in whole:
        hits = [axis for axis, role, m in ids.roles if role == "write" and (m == name or m.startswith(name + "."))]
        if not hits:
            known = ", ".join(sorted({m for _, role, m in ids.roles if role == "write"}))
            raise ModelError(f"no module '{name}' with channels to keep whole; the model has: {known}")
        for axis in hits:
            ids.freeze(axis, "asked for by `whole`")


def _graph(
    ids: Ids,
    owners: list[Owner],
    shapes: Mapping[str, tuple[int, ...]],
    unused: Sequence[str],
    example: Sequence[Tensor],
) -> ChannelGraph:
    """Groups classes of ids by the tensors and axes that they touch, and says what every axis becomes."""
    labels = ids.labels()
    known = {id(axis) for _, _, axis in owners}
    counted = {id(axis): axis for p in ids.products for axis in p.axes} | {id(s.axis): s.axis for s in ids.sized}
    extra: list[Owner] = [("", 0, axis) for key, axis in counted.items() if key not in known]
    layers, whole, layer_of = _layers(ids, labels, [*owners, *extra])
    lengths = {key: _length(labels[axis], layer_of, layers) for key, axis in counted.items()}
    examples = next((x.shape[0] for x in example if x.dim()), 1)
    return ChannelGraph(
        layers=tuple(layers),
        shapes=shapes,
        whole=whole | dict.fromkeys(unused, "forward does not use it"),
        products=tuple(
            Product(p.times * (examples if i in ids.alone else 1), tuple(lengths[id(a)] for a in p.axes))
            for i, p in enumerate(ids.products)
        ),
        examples=examples,
        numbers=tuple(
            SizedNumber(
                s.call.module,
                s.call.index,
                s.position,
                s.call.numbers[s.position],
                lengths[id(s.axis)],
                s.multiple,
            )
            for s in ids.sized
            if s.call.numbers[s.position] != -1
        ),
    )


def _length(labels: Ints, layer_of: Ints, layers: Sequence[Layer]) -> Length:
    owner = layer_of[labels]
    which, count = np.unique(owner[owner >= 0], return_counts=True)
    times = tuple((int(i), int(n) // layers[i].channels) for i, n in zip(which, count, strict=True))
    return Length(len(labels), times)


def _layers(ids: Ids, labels: Ints, owners: Sequence[Owner]) -> tuple[list[Layer], dict[str, str], Ints]:
    """Returns the layers, the modules that stay whole, and the layer (or -1) of every class."""
    frozen: dict[int, str] = {}
    for axis, why in ids.frozen:
        for label in np.unique(labels[axis]).tolist():
            frozen.setdefault(label, why)
    names: dict[int, str] = {}  # class -> the first module that writes it
    whole: dict[str, str] = {}
    for axis, role, module in ids.roles:
        for label in np.unique(labels[axis]).tolist() if role == "write" else ():
            names.setdefault(label, module)
            if label in frozen:
                whole.setdefault(module, frozen[label])
    members: dict[int, list[tuple[int, int]]] = {label: [] for label in names if label not in frozen}
    for k, (_, _, axis) in enumerate(owners):
        for i, label in enumerate(labels[axis].tolist()):
            if label in members:
                members[label].append((k, i))
    groups: dict[tuple[int, ...], list[int]] = {}
    for label, touched in members.items():
        groups.setdefault(tuple(k for k, _ in touched), []).append(label)
    roles = {int(i): role for axis, role, _ in ids.roles for i in axis[:1]}
    seen: dict[str, int] = {}
    layers: list[Layer] = []
    layer_of = np.full(ids.count, -1, dtype=np.int64)
    for touched_axes, classes in groups.items():
        table = np.array([[i for _, i in members[label]] for label in classes], dtype=np.int64)
        order = np.argsort(table[:, 0], kind="stable")
        name = names[classes[0]]
        seen[name] = seen.get(name, 0) + 1
        layer_of[classes] = len(layers)
        layers.append(
            Layer(
                name if seen[name] == 1 else f"{name}#{seen[name]}",
                tuple(_slices(touched_axes, table[order], owners, roles)),
            )
        )
    return layers, whole, layer_of


def _slices(
    touched: tuple[int, ...], table: Ints, owners: Sequence[Owner], roles: Mapping[int, str]
) -> Iterator[Slice]:
    columns = np.array(touched)
    for k in dict.fromkeys(touched):
        tensor, axis, own = owners[k]
        if tensor:
            index = torch.from_numpy(table[:, columns == k].copy())
            yield Slice(tensor, axis, roles.get(int(own[0]), "follow"), index)


@torch.no_grad()
def _without_followers(model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor]) -> ChannelGraph:
    """Drops the numbers that follow the tensors by themselves (`x.shape[1] // 2`): found by running smaller copies."""
    fixed = numbers_in(model)  # an earlier cut has put these right
    wrong = {(m, call, at) for m, calls in fixed.items() for call, right in calls.items() for at in right}
    changed: set[tuple[str, int, int]] = set()  # a number that never had to change says nothing
    for step in (1, 2) if graph.numbers else ():
        gone = [(step * i + step) % layer.channels for i, layer in enumerate(graph.layers)]
        small = deepcopy(model).eval()
        keep = kept_indices(model, graph, [torch.arange(n) for n in gone])
        cut_(small, keep, graph.sizes([layer.channels - n for layer, n in zip(graph.layers, gone, strict=True)]))
        seen = watch_(small, sorted({number.module for number in graph.numbers}))
        with suppress(Exception):  # the parity check of a real cut tells the user; what was noted so far is good
            small(*arguments)
        for number in graph.numbers:
            passed = seen[number.module].get(number.call, [])
            right = number.right(gone)
            if number.position < len(passed):
                wanted = right if isinstance(right, int) else number.was * right[0] // right[1]
                wrong |= {number.place} if passed[number.position] != wanted else set()
                changed |= {number.place} if wanted != number.was else set()
    stay = [n for n in graph.numbers if n.place in wrong or (n.length.times and n.place not in changed)]
    return replace(graph, numbers=tuple(stay))
