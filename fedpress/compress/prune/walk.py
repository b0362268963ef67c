"""Passes channel ids through every operation of a captured model, by the table of rules."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves

from fedpress.compress.prune.ids import REBUILT, Axis, Call, Ids, Ints, Value
from fedpress.compress.prune.recorder import TAG
from fedpress.compress.prune.rules import find_rule, parts_of, zero_stays

LOOKUPS = (torch.ops.aten.index, torch.ops.aten.index_select)
IGNORED = "asked for by `ignore`"
Owner = tuple[str, int, Ints]
"""A tensor's name, one of its axes, and the ids of that axis; a name of "" for an axis that is only counted."""


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
        self._exported = exported
        self._ids = ids
        self._calls = calls
        self._first_names = first_names
        self._used: dict[str, bool] = {}  # a shared parameter comes once for each of its names
        self._values: dict[torch.fx.Node, Any] = {}
        self._run(exported.graph_module, None, is_used=True)

    def unused(self) -> list[str]:
        """Returns the names of the parameters that forward does not use."""
        return [name for name, use in self._used.items() if not use]

    def _run(
        self, module: torch.fx.GraphModule, given: Sequence[Any] | None, *, is_used: bool
    ) -> Any:
        """Visits the nodes of the model, or of a part of it that is `given` values, and returns its outputs."""
        live, result = _live(module.graph), None
        rest = iter(given or ())
        for node in module.graph.nodes:
            self._ids.is_used = is_used and node in live
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
                    self._ids.keep(axis, "it is an output of the model")
        return result

    def _region(self, node: torch.fx.Node, module: torch.fx.GraphModule) -> Any:
        """Walks code under `torch.no_grad()` or `torch.autocast`; what other functions are given is kept."""
        values = torch.fx.node.map_arg(node.args, self._values.get)
        for position, argument in enumerate(node.args):
            part = _part_of(module, argument)
            if isinstance(part, torch.fx.GraphModule):
                if str(node.target).startswith("wrap_with_"):
                    return self._run(part, values[position + 1 :], is_used=self._ids.is_used)
                break
        self._ids.module, self._ids.operation = _module_of(node), str(node.target)
        given = list(_values(values))
        _keep_all(self._ids, given, "channels are not followed through it")
        from_input = any(value.from_input for value in given)
        outputs = node.meta.get("val")
        results = []
        for output in outputs if isinstance(outputs, list | tuple) else [outputs]:
            shape = tuple(getattr(output, "shape", ()))
            results.append(Value(shape, (None,) * len(shape), from_input=from_input))
        return results if isinstance(outputs, list | tuple) else results[0]

    def _visit(self, node: torch.fx.Node) -> None:
        ids, values = self._ids, self._values
        if node.op in ("placeholder", "get_attr"):
            values[node] = self._source(node)
        elif node.target is operator.getitem:
            source, which = node.args
            values[node] = values[source][which]  # type: ignore[index]
        else:
            ids.call = self._call_of(node)
            ids.module = _module_of(node)
            values[node] = _operate(node, values, ids)
            if _mutates(node):
                from_input = any(v.from_input for v in _values(values[node]))
                _mark_written(node.args[0], values, from_input)

    def _call_of(self, node: torch.fx.Node) -> Call | None:
        index = node.meta.get("custom", {}).get(TAG)
        if index is None:
            return None
        return REBUILT if index < 0 else self._calls[index]

    def _source(self, node: torch.fx.Node) -> Value:
        """Returns what the model holds or is given: a parameter, a buffer, a constant in the code, or an input."""
        signature, shape = self._exported.graph_signature, _shape(node)
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(node.name)
        constant = held or signature.inputs_to_lifted_tensor_constants.get(node.name)
        known = {**self._exported.state_dict, **self._exported.constants}.get(constant or "")
        known = known if isinstance(known, Tensor) and _countable(known) else None
        if held is None:
            return Value(
                shape,
                (None,) * len(shape),
                from_input=node.name in signature.user_inputs,
                boolean=_boolean(node),
                known=known,
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


def _mark_written(node: Any, values: dict[torch.fx.Node, Any], from_input: bool) -> None:
    """Notes what an operation in place wrote into, and what that is a part of: its values are others now."""
    while isinstance(node, torch.fx.Node) and isinstance(values.get(node), Value):
        old = values[node]
        values[node] = replace(old, from_input=old.from_input or from_input, known=None)
        node = node.args[0] if node.args else None


def _module_of(node: torch.fx.Node) -> str:
    """Returns the name of the module whose forward runs the operation."""
    path = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return path[-1] if path else ""


def _operate(node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], ids: Ids) -> Any:
    """Passes ids through one operation by its rule, or through the operations that it can be taken apart into."""
    ids.operation, ids.target = str(node.target), node.target
    args, options = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if find_rule(node.target) is None:
        fakes = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        parts = parts_of(node.target, *fakes)
        if parts is not None:
            leaves = tree_leaves((list(args), dict(options)))
            return _run_parts(parts, [leaf for leaf in leaves if isinstance(leaf, Value)], ids)
    every = [*_values(args), *_values(list(options.values()))]
    counted = len(ids.products)
    axes = _apply_rule(ids, _shape(node), args, options, every)
    if ids.module in ids.ignored:
        for axis in [*(axis for value in every for axis in value.axes), *_flat_axes(axes)]:
            ids.keep(axis, IGNORED)
    if not any(value.from_input for value in every):
        ids.without_input.update(range(counted, len(ids.products)))
    origin = _origin(node, list(_values(args)), every)
    outputs = node.meta.get("val")
    if isinstance(outputs, list | tuple):
        each = axes if isinstance(axes, list) else [axes] * len(outputs)  # one for all results
        results = []
        for output, own in zip(outputs, each, strict=True):
            shape = tuple(getattr(output, "shape", ()))
            results.append(Value(shape, _filled(own, shape), **origin))
        return results
    return Value(
        _shape(node),
        _filled(axes, _shape(node)),
        boolean=_boolean(node),
        known=_known(node, args, options, every),
        **origin,
    )


def _origin(node: torch.fx.Node, given: Sequence[Value], every: Sequence[Value]) -> dict[str, bool]:
    """Says of what the output is made; `given` are the positional arguments, `every` the named ones too."""
    weights = bool(given) and all(value.weights for value in given)
    return {
        "zero": hasattr(node.target, "_schema") and zero_stays(node.target, given),
        "weights": weights,
        "trained": weights and any(value.trained for value in given),
        "from_input": any(value.from_input for value in every),
        "pooled": _pooled(node, given),
        "selected": _selected(node, given),
    }


def _flat_axes(axes: Any) -> list[Axis]:
    """Returns the axes that a rule gave, of one output or of several."""
    return [axis for each in axes for axis in each] if isinstance(axes, list) else list(axes)


def _pooled(node: torch.fx.Node, given: Sequence[Value]) -> bool:
    """Says whether the output is a norm of each channel, or made of one alone (its root)."""
    name = str(node.target).split(".")[1] if "." in str(node.target) else ""
    return name in ("linalg_vector_norm", "norm", "sum") or (len(given) == 1 and given[0].pooled)


def _selected(node: torch.fx.Node, given: Sequence[Value]) -> bool:
    """Says whether the output is a selection of weights, such as those of each token's experts, or made of one."""
    if getattr(node.target, "overloadpacket", None) in LOOKUPS:
        return bool(given) and given[0].weights
    return bool(given) and given[0].selected and zero_stays(node.target, given)


def _boolean(node: torch.fx.Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) == torch.bool


def _apply_rule(
    ids: Ids, shape: tuple[int, ...], args: Any, options: Any, every: Sequence[Value]
) -> Any:
    """Returns the axes of the output by the present operation's rule.

    Without one, or where that fails on what it is given, all that the operation touches is kept.
    """
    rule = find_rule(ids.target)
    why = "there is no rule for it"
    if rule is not None:
        try:
            return rule(ids, shape, *args, **options)
        except Exception as error:  # a rule may meet arguments that it was not written for
            why = f"its rule does not cover this use ({type(error).__name__}: {error})"
    elif _only_checks(ids.target):
        return ()
    _keep_all(ids, every, why)
    return ()


def _keep_all(ids: Ids, given: Sequence[Value], why: str) -> None:
    axes = [axis for value in given for axis in value.axes if axis is not None]
    for axis in axes:
        ids.keep(axis, why)
    ids.without_rule.append((ids.module, f"{why}: {ids.place}", axes))


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
    if random or any(value.from_input or value.known is None for value in given):
        return None
    plain = _without_ids((args, options))
    try:
        result: Tensor = node.target(*plain[0], **plain[1])  # type: ignore[operator]
        return result
    except Exception:  # then channels that it places are kept, and the plan says so
        return None


def _without_ids(tree: Any) -> Any:
    """Replaces each `Value` by the tensor that it stands for."""
    if isinstance(tree, Value):
        return tree.known
    if isinstance(tree, dict):
        return {key: _without_ids(item) for key, item in tree.items()}
    return (
        type(tree)(_without_ids(item) for item in tree) if isinstance(tree, list | tuple) else tree
    )


def _filled(axes: tuple[Axis, ...], shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """Adds the axes that a rule left off at the end: they never change."""
    return (*axes, *[None] * (len(shape) - len(axes)))


def _run_parts(graph: torch.fx.Graph, given: Sequence[Value], ids: Ids) -> Any:
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
