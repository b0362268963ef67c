"""From a model and an example to its channels: ids are passed along the graph that `torch.export` captures."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import traceback
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedpress.compress.prune.approximate import check_names
from fedpress.compress.prune.graph import (
    ChannelGraph,
    Example,
    Layer,
    Length,
    Product,
    Site,
    SizedNumber,
    Slice,
    WrittenIndex,
    export,
    inputs,
)
from fedpress.compress.prune.ids import REBUILT, Axis, Call, Ids, Ints, Value
from fedpress.compress.prune.ignoring import ignored
from fedpress.compress.prune.rules import find_rule, parts_of, zero_stays
from fedpress.compress.prune.trials import layers_that_fail, without_followers
from fedpress.errors import ModelError
from fedpress.nn.forward_sizes import INDEXING, SIZED, caller, indices_of, numbers_of

TAG = "fedpress_call"
TRIALS = 3  # layers are kept whole whose channels the code cannot run without, and what is left is tried again
LOOKUPS = (torch.ops.aten.index, torch.ops.aten.index_select)
IGNORED = "asked for by `ignore`"
Owner = tuple[str, int, Ints]
"""A tensor's name, one of its axes, and the ids of that axis; a name of "" for an axis that is only counted."""


def trace(
    model: nn.Module,
    example: Example,
    *,
    whole: Sequence[str] = (),
    ignore: Sequence[str] = (),
    approximate: Sequence[str] = (),
) -> ChannelGraph:
    """Finds the channels of `model` that can be removed, from the operations that run on `example`.

    Args:
        model: any module that `torch.export` can capture; it is left in its mode.
        example: its input [n, ...] or a tuple of inputs; a batch of two is a good choice.
        whole: names of modules (or name prefixes) that must keep all their outputs.
        ignore: names or patterns ("block.3.*") of modules or weights of which nothing is cut, their inputs neither.
        approximate: kinds of norms that channels may be cut through, though that is not exact: "layer_norm" (also RMS
            norms, and those written by hand), "grn" (global response norm); see `fedpress.compress.prune.approximate`.

    Raises:
        ModelError: if the model cannot be captured.
        RecipeError: if a pattern of `ignore` matches nothing, or there is no such kind of norm.
    """
    arguments = inputs(example)
    recorder = Recorder(model)
    with recorder, traceback.preserve_node_meta(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*assigned during export.*"
        )  # the flat weights of recurrent layers
        exported = export(model, arguments)
    ids = Ids()
    ids.approximate = check_names(approximate)
    ids.ignored = ignored(model, ignore)
    walk = Walk(exported, ids, _first_names(model), recorder.calls)
    owners, unused = walk.owners, walk.unused()
    _freeze_unsaved(ids, owners, model)
    ids.module = ids.operation = ""
    _freeze_named(ids, whole)
    _freeze_ignored(ids, owners, model)
    ids.settle()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    turns: dict[tuple[str, str], int] = {}
    for call in (
        recorder.calls
    ):  # of a module that runs several times, the run with the most calls at the place
        turns[call.module, call.place] = max(turns.get((call.module, call.place), 0), call.turn + 1)
    for _ in range(TRIALS):
        graph = _graph(ids, owners, shapes, unused, arguments)
        graph = replace(graph, turns=turns, approximate=tuple(ids.approximated))
        graph = without_followers(model, graph, arguments)
        failing = layers_that_fail(
            model, graph, arguments, compare=not (_coarse(exported) or _branches(exported))
        )
        if not failing:
            break
        for layer, reason in failing.items():
            _freeze_layer(ids, owners, graph.layers[layer], reason)
    return graph


def _coarse(exported: torch.export.ExportedProgram) -> bool:
    """Says whether anything is computed in half precision."""
    half = (torch.float16, torch.bfloat16)
    return any(
        getattr(node.meta.get("val"), "dtype", None) in half for node in exported.graph.nodes
    )


def _branches(exported: torch.export.ExportedProgram) -> bool:
    """Says whether code is run by torch.cond or its like, which torch compiles anew for each way it is looked at."""
    return any(node.target is torch.ops.higher_order.cond for node in exported.graph.nodes)


class Recorder(TorchFunctionMode):
    """Notes the calls with numbers in each module's forward, and tags the nodes that come from them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        # By what a module holds: `torch.export` may run a shallow copy of one.
        self._names = {id(module._parameters): name for name, module in model.named_modules()}
        self._turns: dict[int, Counter[str]] = {}
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
        self._turns[id(module._parameters)] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`."""
        if func is F.multi_head_attention_forward:
            with traceback.annotate({TAG: -1}):
                return func(*args, **(kwargs or {}))
        by = caller(func) if func in SIZED else None
        name = None if by is None else self._names.get(id(by.module._parameters))
        if by is None or name is None or id(by.module._parameters) not in self._turns:
            return func(*args, **(kwargs or {}))
        turns = self._turns[id(by.module._parameters)]
        slices = _slice_positions(*args[:2]) if func in INDEXING else []
        numbers = numbers_of(func, args, kwargs or {})
        indices = len(indices_of(func, args, kwargs or {}))
        self.calls.append(Call(name, by.place, turns[by.place], numbers, slices, indices))
        turns[by.place] += 1
        with traceback.annotate({TAG: len(self.calls) - 1}):
            return func(*args, **(kwargs or {}))


def _slice_positions(x: Tensor, index: Any) -> list[int]:
    """Returns at which of the numbers of an indexing each slice begins that takes only a part of its axis."""
    items = index if isinstance(index, tuple) else (index,)
    indices = [
        item
        for item in items
        if item is not None and item is not Ellipsis and not isinstance(item, bool)
    ]
    wide = sum(
        item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1
        for item in indices
    )
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
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


class Walk:
    """Passes ids through every node of a captured model, whether or not an output depends on it: forward runs it.

    Attributes:
        owners: the ids of each axis of each parameter and buffer.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        ids: Ids,
        first_names: Mapping[str, str],
        calls: Sequence[Call],
    ) -> None:
        self.owners: list[Owner] = []
        self._exported, self._ids, self._calls, self._first_names = (
            exported,
            ids,
            calls,
            first_names,
        )
        self._used: dict[str, bool] = {}  # a shared parameter comes once for each of its names
        self._values: dict[torch.fx.Node, Any] = {}
        self._run(exported.graph_module, None, read=True)

    def unused(self) -> list[str]:
        """Returns the names of the parameters that forward does not use."""
        return [name for name, use in self._used.items() if not use]

    def _run(self, module: torch.fx.GraphModule, given: Sequence[Any] | None, *, read: bool) -> Any:
        """Visits the nodes of the model, or of a part of it that is `given` values, and returns its outputs."""
        live, result = _live(module.graph), None
        rest = iter(given or ())
        for node in module.graph.nodes:
            self._ids.read = read and node in live
            if node.op == "output":
                result = torch.fx.node.map_arg(node.args[0], self._values.get)
            elif node.op == "placeholder" and given is not None:
                self._values[node] = next(rest)
            elif isinstance(node.target, HigherOrderOperator):
                self._values[node] = self._region(node, module)
            else:
                self._visit(node)
        if given is None:
            self._ids.operation = ""
            for value in _values(result):
                for axis in value.axes:
                    self._ids.freeze(axis, "it is an output of the model")
        return result

    def _region(self, node: torch.fx.Node, module: torch.fx.GraphModule) -> Any:
        """Walks code under `torch.no_grad()` or `torch.autocast`; what other functions are given stays whole."""
        at = next(
            (
                i
                for i, a in enumerate(node.args)
                if isinstance(_part_of(module, a), torch.fx.GraphModule)
            ),
            None,
        )
        values = torch.fx.node.map_arg(node.args, self._values.get)
        if at is not None and str(node.target).startswith("wrap_with_"):
            return self._run(_part_of(module, node.args[at]), values[at + 1 :], read=self._ids.read)
        path = [fqn for fqn, _ in node.meta.get("nn_module_stack", {}).values()]
        self._ids.module, self._ids.operation = path[-1] if path else "", str(node.target)
        given = list(_values(values))
        _stay_whole(self._ids, given, "channels are not followed through it")
        outputs = node.meta.get("val")
        shapes = [
            tuple(getattr(v, "shape", ()))
            for v in (outputs if isinstance(outputs, list | tuple) else [outputs])
        ]
        results = [
            Value(shape, (None,) * len(shape), given=any(v.given for v in given))
            for shape in shapes
        ]
        return results if isinstance(outputs, list | tuple) else results[0]

    def _visit(self, node: torch.fx.Node) -> None:
        ids, values = self._ids, self._values
        if node.op in ("placeholder", "get_attr"):
            values[node] = self._given(node)
        elif node.target is operator.getitem:
            source, which = node.args
            values[node] = values[source][which]  # type: ignore[index]
        else:
            at = node.meta.get("custom", {}).get(TAG)
            ids.call = None if at is None else REBUILT if at < 0 else self._calls[at]
            values[node] = _call(node, values, ids)
            if _mutates(node):
                given = any(v.given for v in _values(values[node]))
                _mark_written(node.args[0], values, given)

    def _given(self, node: torch.fx.Node) -> Value:
        """Returns what the model holds or is given: a parameter, a buffer, a constant in the code, or an input."""
        signature, shape = self._exported.graph_signature, _shape(node)
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(node.name)
        constant = held or signature.inputs_to_lifted_tensor_constants.get(node.name)
        known = {**self._exported.state_dict, **self._exported.constants}.get(constant or "")
        known = known if isinstance(known, Tensor) and _countable(known) else None
        if held is None:
            given = node.name in signature.user_inputs
            return Value(
                shape, (None,) * len(shape), given=given, boolean=_boolean(node), known=known
            )
        axes = tuple(self._ids.fresh(size) for size in shape)
        name = self._first_names[held]
        self.owners += [(name, i, axis) for i, axis in enumerate(axes)]
        trained = node.name in signature.inputs_to_parameters
        if trained:
            self._used[name] = self._used.get(name, False) or bool(node.users)
        return Value(
            shape,
            axes,
            zero=True,
            weights=True,
            trained=trained,
            boolean=_boolean(node),
            known=known,
        )


def _part_of(module: torch.fx.GraphModule, argument: Any) -> Any:
    """Returns the part of a captured model that an argument stands for, if it stands for one."""
    if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
        return getattr(module, str(argument.target), None)
    return None


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


def _mark_written(node: Any, values: dict[torch.fx.Node, Any], given: bool) -> None:
    """Notes what an operation in place wrote into, and what that is a part of: its values are others now."""
    while isinstance(node, torch.fx.Node) and isinstance(values.get(node), Value):
        old = values[node]
        values[node] = replace(old, given=old.given or given, known=None)
        node = node.args[0] if node.args else None


def _call(node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], ids: Ids) -> Any:
    path = [fqn for fqn, _ in node.meta.get("nn_module_stack", {}).values()]
    ids.module = path[-1] if path else ""
    return _operate(node, values, ids)


def _operate(node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], ids: Ids) -> Any:
    """Passes ids through one operation by its rule, or through the operations that it can be taken apart into."""
    ids.operation, ids.target = str(node.target), node.target
    args, options = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    every = [*_values(args), *_values(list(options.values()))]
    if find_rule(node.target) is None:
        fakes = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        parts = parts_of(node.target, *fakes)
        if parts is not None:
            tensors = [v for v in tree_leaves((list(args), dict(options))) if isinstance(v, Value)]
            return _through(parts, tensors, ids)
    given = list(_values(args))
    counted = len(ids.products)
    outputs = node.meta.get("val")
    axes = _apply(node.target, ids, _shape(node), args, options, every)
    if ids.module in ids.ignored:
        for axis in [*(axis for value in every for axis in value.axes), *_flat_axes(axes)]:
            ids.freeze(axis, IGNORED)
    weights = bool(given) and all(v.weights for v in given)
    dependent = any(v.given for v in every)
    if not dependent:
        ids.alone.update(range(counted, len(ids.products)))
    common: dict[str, Any] = {
        "zero": hasattr(node.target, "_schema") and zero_stays(node.target, given),
        "weights": weights,
        "trained": weights and any(v.trained for v in given),
        "given": dependent,
        "pooled": _pooled(node, given),
        "chosen": _chosen(node, given),
    }
    if isinstance(outputs, list | tuple):
        shapes = [tuple(getattr(output, "shape", ())) for output in outputs]
        each = axes if isinstance(axes, list) else [axes] * len(shapes)  # one for all results
        return [
            Value(shape, _filled(a, shape), **common) for shape, a in zip(shapes, each, strict=True)
        ]
    return Value(
        _shape(node),
        _filled(axes, _shape(node)),
        boolean=_boolean(node),
        known=_known(node, args, options, every),
        **common,
    )


def _flat_axes(axes: Any) -> list[Axis]:
    """Returns the axes that a rule gave, of one output or of several."""
    return [axis for each in axes for axis in each] if isinstance(axes, list) else list(axes)


def _pooled(node: torch.fx.Node, given: Sequence[Value]) -> bool:
    """Says whether the output is a norm of each channel, or made of one alone (its root)."""
    name = str(node.target).split(".")[1] if "." in str(node.target) else ""
    return name in ("linalg_vector_norm", "norm", "sum") or (len(given) == 1 and given[0].pooled)


def _chosen(node: torch.fx.Node, given: Sequence[Value]) -> bool:
    """Says whether the output is a choice of weights, such as those of the experts of each token, or a form of one."""
    if getattr(node.target, "overloadpacket", None) in LOOKUPS:
        return bool(given) and given[0].weights
    return bool(given) and given[0].chosen and zero_stays(node.target, given)


def _boolean(node: torch.fx.Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) == torch.bool


def _apply(
    operation: Any,
    ids: Ids,
    shape: tuple[int, ...],
    args: Any,
    options: Any,
    given: Sequence[Value],
) -> Any:
    """Returns the axes of the output by the operation's rule.

    Without one, or where that fails on what it is given, all that the operation touches stays whole.
    """
    apply = find_rule(operation)
    why = "there is no rule for it"
    if apply is not None:
        try:
            return apply(ids, shape, *args, **options)
        except Exception as error:  # a rule may meet arguments that it was not written for
            why = f"its rule does not cover this use ({type(error).__name__}: {error})"
    elif _only_checks(operation):
        return ()
    _stay_whole(ids, given, why)
    return ()


def _stay_whole(ids: Ids, given: Sequence[Value], why: str) -> None:
    axes = [axis for value in given for axis in value.axes if axis is not None]
    for axis in axes:
        ids.freeze(axis, why)
    ids.ruleless.append((ids.module, f"{why}: {ids.place}", axes))


def _only_checks(operation: Any) -> bool:
    """Says whether the operation gives nothing and changes nothing, as those that `torch.export` adds to assert."""
    schema = getattr(operation, "_schema", None)
    return schema is not None and not schema.returns and not schema.is_mutable


MOST_KNOWN = 1 << 20  # values of a constant that are kept to see where channels are written


def _countable(x: Tensor) -> bool:
    return (
        not x.is_floating_point()
        and not x.is_complex()
        and x.numel() <= MOST_KNOWN
        and x.device.type != "meta"
    )


@torch.no_grad()
def _known(node: torch.fx.Node, args: Any, options: Any, given: Sequence[Value]) -> Tensor | None:
    """Returns a tensor of whole numbers or booleans that is made of such alone, so that every input sees the same."""
    output = node.meta.get("val")
    if not isinstance(output, Tensor) or not _countable(output) or _mutates(node):
        return None
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if random or any(value.given or value.known is None for value in given):
        return None
    plain = _plain((args, options))
    try:
        return node.target(*plain[0], **plain[1])  # type: ignore[operator]
    except Exception:  # then channels that it places stay whole, and the plan says so
        return None


def _plain(tree: Any) -> Any:
    if isinstance(tree, Value):
        return tree.known
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    return type(tree)(_plain(item) for item in tree) if isinstance(tree, list | tuple) else tree


def _filled(axes: tuple[Axis, ...], shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """Adds the axes that a rule left off at the end: they never change."""
    return (*axes, *[None] * (len(shape) - len(axes)))


def _through(graph: torch.fx.Graph, given: Sequence[Value], ids: Ids) -> Any:
    """Passes ids through the operations that one was taken apart into; their sizes follow those of their inputs."""
    values: dict[torch.fx.Node, Any] = {}
    rest = iter(given)
    call, ids.call = ids.call, None
    outer, ids.outer = ids.outer, ids.outer or ids.operation
    result = None
    for node in graph.nodes:
        shape = _shape(node)
        if node.op == "placeholder":
            values[node] = next(rest)
        elif node.op == "get_attr":
            values[node] = Value(shape, (None,) * len(shape))
        elif node.op == "output":
            result = torch.fx.node.map_arg(node.args[0], lambda n: values[n])
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        elif isinstance(node.target, type):  # a named tuple of results
            values[node] = torch.fx.node.map_arg(node.args[0], lambda n: values[n])
        else:
            values[node] = _operate(node, values, ids)
    ids.call, ids.outer = call, outer
    return result


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
            ids.freeze(
                axis, f"the buffer '{name}' goes with it and is not saved (persistent=False)"
            )


def _freeze_layer(ids: Ids, owners: Sequence[Owner], layer: Layer, reason: str) -> None:
    axes = {(name, at): axis for name, at, axis in owners}
    for part in layer.slices:
        channels = axes[part.tensor, part.axis][part.index.flatten().numpy()]
        ids.freeze(channels, reason)


def _freeze_named(ids: Ids, whole: Sequence[str]) -> None:
    for name in whole:
        hits = [
            axis
            for axis, role, m in ids.roles
            if role == "write" and (m == name or m.startswith(name + "."))
        ]
        if not hits:
            known = ", ".join(sorted({m for _, role, m in ids.roles if role == "write"}))
            raise ModelError(
                f"no module '{name}' with channels to keep whole; the model has: {known}"
            )
        for axis in hits:
            ids.freeze(axis, "asked for by `whole`")


def _freeze_ignored(ids: Ids, owners: Sequence[Owner], model: nn.Module) -> None:
    """Keeps the weights whole that are ignored themselves; what ignored modules touch has been frozen on the way."""
    first = _first_names(model)
    names = {first[name] for name in ids.ignored if name in first}
    for name, _, axis in owners:
        if name in names:
            ids.freeze(axis, IGNORED)


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
    counted = {id(axis): axis for p in ids.products for axis in p.axes} | {
        id(s.axis): s.axis for s in ids.sized
    }
    extra: list[Owner] = [("", 0, axis) for key, axis in counted.items() if key not in known]
    layers, whole, layer_of, channel_of = _layers(ids, labels, [*owners, *extra])
    written = {
        int(i) for axis, role, _ in ids.roles if role == "write" for i in np.unique(labels[axis])
    }
    for module, why, axes in ids.ruleless:
        if any(written.intersection(labels[axis].tolist()) for axis in axes):
            whole.setdefault(module or "the model itself", why)
    lengths = {key: _length(labels[axis], layer_of, layers) for key, axis in counted.items()}
    examples = next((x.shape[0] for x in example if x.dim()), 1)
    return ChannelGraph(
        layers=tuple(layers),
        shapes=shapes,
        whole=whole | dict.fromkeys(unused, "forward does not use it"),
        products=tuple(
            Product(
                p.times * (examples if i in ids.alone else 1), tuple(lengths[id(a)] for a in p.axes)
            )
            for i, p in enumerate(ids.products)
        ),
        examples=examples,
        numbers=tuple(
            SizedNumber(
                _site(s.call, s.position),
                s.call.numbers[s.position],
                lengths[id(s.axis)],
                s.multiple,
            )
            for s in ids.sized
            if s.call.numbers[s.position] != -1 and len(s.axis)
        ),
        indices=tuple(
            WrittenIndex(
                _site(w.call, -1),
                w.dim,
                w.places,
                layer_of[labels[w.axis]],
                channel_of[labels[w.axis]],
            )
            for w in ids.written
        ),
    )


def _site(call: Call, position: int) -> Site:
    return Site(call.module, call.place, call.turn, position)


def _length(labels: Ints, layer_of: Ints, layers: Sequence[Layer]) -> Length:
    owner = layer_of[labels]
    which, count = np.unique(owner[owner >= 0], return_counts=True)
    times = tuple((int(i), int(n) // layers[i].channels) for i, n in zip(which, count, strict=True))
    return Length(len(labels), times)


def _layers(
    ids: Ids, labels: Ints, owners: Sequence[Owner]
) -> tuple[list[Layer], dict[str, str], Ints, Ints]:
    """Returns the layers, the modules that stay whole, and of every class the layer (or -1) and its channel there."""
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
    members: dict[int, list[tuple[int, int]]] = {
        label: [] for label in names if label not in frozen
    }
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
    layer_of, channel_of = (np.full(ids.count, -1, dtype=np.int64) for _ in range(2))
    for touched_axes, classes in groups.items():
        table = np.array([[i for _, i in members[label]] for label in classes], dtype=np.int64)
        order = np.argsort(table[:, 0], kind="stable")
        name = names[classes[0]]
        seen[name] = seen.get(name, 0) + 1
        layer_of[classes] = len(layers)
        channel_of[np.array(classes)[order]] = np.arange(len(classes))
        layers.append(
            Layer(
                name if seen[name] == 1 else f"{name}#{seen[name]}",
                tuple(_slices(touched_axes, table[order], owners, roles)),
            )
        )
    return layers, whole, layer_of, channel_of


def _slices(
    touched: tuple[int, ...], table: Ints, owners: Sequence[Owner], roles: Mapping[int, str]
) -> Iterator[Slice]:
    columns = np.array(touched)
    for k in dict.fromkeys(touched):
        tensor, axis, own = owners[k]
        if tensor:
            index = torch.from_numpy(table[:, columns == k].copy())
            yield Slice(tensor, axis, roles.get(int(own[0]), "follow"), index)
