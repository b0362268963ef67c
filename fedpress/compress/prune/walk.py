"""Walks through a captured graph: applies the rule of each operation to the ids of its inputs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves

from fedpress.compress.prune.ids import SETS_OWN_NUMBERS, Axis, ChannelIds, ForwardCall, Ints, Value
from fedpress.compress.prune.recorder import CALL_TAG
from fedpress.compress.prune.rules import decompose_operation, find_rule, keeps_zeros

LOOKUPS = (torch.ops.aten.index, torch.ops.aten.index_select)
IGNORED = "asked for by `ignore`"
TensorAxis = tuple[str, int, Ints]
"""Name of a parameter or buffer, one of its axes, and the ids of that axis.

The name is "" for an axis of an activation, whose length is needed for multiply-adds or for sizes
in code.
"""


class Walk:
    """Applies the rules to every node of a captured model, when it is created.

    Nodes that no output depends on are visited too: forward runs them, so they must not fail with
    the pruned tensors.

    Attributes:
        tensor_axes: the ids of each axis of each parameter and buffer.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        ids: ChannelIds,
        first_names: Mapping[str, str],
        calls: Sequence[ForwardCall],
    ) -> None:
        self.tensor_axes: list[TensorAxis] = []
        self._exported = exported
        self._ids = ids
        self._calls = calls
        self._first_names = first_names
        # A shared parameter appears once for each of its names; it is used if any of them is.
        self._is_used: dict[str, bool] = {}
        self._values: dict[torch.fx.Node, Any] = {}
        self._run(exported.graph_module, None, is_used=True)

    def unused(self) -> list[str]:
        """Returns the names of the parameters that forward does not use."""
        return [name for name, is_used in self._is_used.items() if not is_used]

    def _run(
        self, module: torch.fx.GraphModule, given: Sequence[Any] | None, *, is_used: bool
    ) -> Any:
        """Visits the nodes of a graph and returns its outputs.

        Args:
            module: the captured model, or a graph inside it.
            given: the inputs of an inner graph; None for the model itself.
            is_used: whether an output of the model depends on this graph.
        """
        live = _live_nodes(module.graph)
        result = None
        rest = iter(given or ())
        for node in module.graph.nodes:
            self._ids.is_used = is_used and node in live
            if node.op == "output":
                result = torch.fx.node.map_arg(node.args[0], self._values.get)
            elif node.op == "placeholder" and given is not None:
                self._values[node] = next(rest)
            elif isinstance(node.target, HigherOrderOperator):
                self._values[node] = self._run_inner_graph(node, module)
            else:
                self._visit(node)

        if given is None:
            self._ids.operation = ""
            for value in _values(result):
                self._ids.keep_all(value.axes, "it is an output of the model")
        return result

    def _run_inner_graph(self, node: torch.fx.Node, module: torch.fx.GraphModule) -> Any:
        """Walks a graph under `torch.no_grad()` or `torch.autocast`.

        Other inner graphs, such as the branches of `torch.cond`, are not walked: all channels that
        reach them are kept.
        """
        values = torch.fx.node.map_arg(node.args, self._values.get)
        for position, argument in enumerate(node.args):
            inner = _graph_of(module, argument)
            if isinstance(inner, torch.fx.GraphModule):
                # `wrap_with_set_grad_enabled` and `wrap_with_autocast` run their graph once, so its
                # operations can be walked like those around it.
                if str(node.target).startswith("wrap_with_"):
                    return self._run(inner, values[position + 1 :], is_used=self._ids.is_used)
                break

        self._ids.module = _module_of(node)
        self._ids.operation = str(node.target)
        given = list(_values(values))
        _keep_everything(self._ids, given, "channels are not followed through it")
        from_input = any(value.from_input for value in given)
        outputs = node.meta.get("val")
        results = []
        for output in outputs if isinstance(outputs, list | tuple) else [outputs]:
            shape = tuple(getattr(output, "shape", ()))
            results.append(Value(shape, (None,) * len(shape), from_input=from_input))
        return results if isinstance(outputs, list | tuple) else results[0]

    def _visit(self, node: torch.fx.Node) -> None:
        """Gives a node its value, by the rule of its operation."""
        ids = self._ids
        values = self._values
        if node.op in ("placeholder", "get_attr"):
            values[node] = self._source(node)
        elif node.target is operator.getitem:
            # An operation with several outputs, of which one is taken.
            source, which = node.args
            values[node] = values[source][which]  # type: ignore[index]
        else:
            ids.call = self._call_of(node)
            ids.module = _module_of(node)
            values[node] = _apply_operation(node, values, ids)
            # Writing to a view also changes the tensor that it is a view of.
            if _mutates(node):
                from_input = any(value.from_input for value in _values(values[node]))
                _note_overwritten(node.args[0], values, from_input)

    def _call_of(self, node: torch.fx.Node) -> ForwardCall | None:
        """Returns the call in the forward code that the node comes from, if it has numbers."""
        index = node.meta.get("custom", {}).get(CALL_TAG)
        if index is None:
            return None
        return SETS_OWN_NUMBERS if index < 0 else self._calls[index]

    def _source(self, node: torch.fx.Node) -> Value:
        """Returns the value of a parameter, a buffer, a constant in the code, or an input."""
        signature = self._exported.graph_signature
        shape = _shape(node)
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        stored_name = stored.get(node.name)
        constant = self._constant(node, stored_name)
        if stored_name is None:
            return Value(
                shape,
                (None,) * len(shape),
                from_input=node.name in signature.user_inputs,
                is_boolean=_is_boolean(node),
                constant=constant,
            )

        axes = tuple(self._ids.fresh(size) for size in shape)
        name = self._first_names[stored_name]
        self.tensor_axes += [(name, i, axis) for i, axis in enumerate(axes)]
        is_parameter = node.name in signature.inputs_to_parameters
        if is_parameter:
            self._is_used[name] = self._is_used.get(name, False) or bool(node.users)
        return Value(
            shape,
            axes,
            zero_when_masked=True,
            from_weights=True,
            has_parameter=is_parameter,
            is_boolean=_is_boolean(node),
            constant=constant,
        )

    def _constant(self, node: torch.fx.Node, stored_name: str | None) -> Tensor | None:
        """Returns the tensor of a buffer or constant that holds integers or booleans."""
        lifted = self._exported.graph_signature.inputs_to_lifted_tensor_constants
        name = stored_name or lifted.get(node.name) or ""
        tensor = {**self._exported.state_dict, **self._exported.constants}.get(name)
        return tensor if isinstance(tensor, Tensor) and _can_be_constant(tensor) else None


def _graph_of(module: torch.fx.GraphModule, argument: Any) -> Any:
    """Returns the graph inside a captured model that an argument names, if it names one."""
    if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
        return getattr(module, str(argument.target), None)
    return None


def _live_nodes(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Returns the nodes that an output depends on, and those that change a tensor in place."""
    # Backwards, so that users of a node come before it.
    live: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live or _mutates(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _note_overwritten(node: Any, values: dict[torch.fx.Node, Any], from_input: bool) -> None:
    """Updates the values of a tensor changed in place, and of the tensors that it is a view of."""
    while isinstance(node, torch.fx.Node) and isinstance(values.get(node), Value):
        old = values[node]
        values[node] = replace(old, from_input=old.from_input or from_input, constant=None)
        node = node.args[0] if node.args else None


def _module_of(node: torch.fx.Node) -> str:
    """Returns the name of the module whose forward runs the operation."""
    # The innermost module is the last on the stack.
    stack = node.meta.get("nn_module_stack", {})
    if not stack:
        return ""
    name: str = list(stack.values())[-1][0]
    return name


def _apply_operation(
    node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], ids: ChannelIds
) -> Any:
    """Passes ids through an operation by its rule, or through those that it decomposes into."""
    ids.operation = str(node.target)
    ids.target = node.target
    args, options = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if find_rule(node.target) is None:
        fakes = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        decomposed = decompose_operation(node.target, *fakes)
        if decomposed is not None:
            leaves = tree_leaves((list(args), dict(options)))
            given = []
            for leaf in leaves:
                if isinstance(leaf, Value):
                    given.append(leaf)
            return _run_decomposed(decomposed, given, ids)

    # The origin of the output (weights or input) is judged by positional arguments: weights are
    # never passed by name.
    positional = list(_values(args))
    every = [*positional, *_values(list(options.values()))]
    products_before = len(ids.products)
    axes = _apply_rule(ids, _shape(node), args, options, every)
    if ids.module in ids.ignored:
        for value in every:
            ids.keep_all(value.axes, IGNORED)
        ids.keep_all(_flat_axes(axes), IGNORED)
    # Products of weights alone cost the same for every batch size.
    if not any(value.from_input for value in every):
        ids.without_input.update(range(products_before, len(ids.products)))
    constant = _constant_output(node, args, options, every)
    return _outputs(node, axes, constant, _origin(node, positional, every))


def _outputs(
    node: torch.fx.Node, axes: Any, constant: Tensor | None, origin: Mapping[str, bool]
) -> Any:
    """Returns the value of the node's output, or a list of values if it has several."""
    outputs = node.meta.get("val")
    if not isinstance(outputs, list | tuple):
        shape = _shape(node)
        full = _with_all_axes(axes, shape)
        return Value(shape, full, is_boolean=_is_boolean(node), constant=constant, **origin)

    # If a rule returns a single tuple of axes, all outputs have these axes.
    axes_of_each = axes if isinstance(axes, list) else [axes] * len(outputs)
    results = []
    for output, own in zip(outputs, axes_of_each, strict=True):
        shape = tuple(getattr(output, "shape", ()))
        results.append(Value(shape, _with_all_axes(own, shape), **origin))
    return results


def _origin(
    node: torch.fx.Node, positional: Sequence[Value], every: Sequence[Value]
) -> dict[str, bool]:
    """Returns the attributes of `Value` that say what the output was computed from.

    Args:
        node: the operation.
        positional: its positional arguments.
        every: all its arguments.
    """
    from_weights = bool(positional) and all(value.from_weights for value in positional)
    return {
        "zero_when_masked": hasattr(node.target, "_schema")
        and keeps_zeros(node.target, positional),
        "from_weights": from_weights,
        "has_parameter": from_weights and any(value.has_parameter for value in positional),
        "from_input": any(value.from_input for value in every),
        "channel_norm": _is_channel_norm(node, positional),
        "gathered_weights": _is_gathered(node, positional),
    }


def _flat_axes(axes: Any) -> list[Axis]:
    """Returns all axes that a rule returned, for one output or several, as one list."""
    if not isinstance(axes, list):
        return list(axes)
    flat: list[Axis] = []
    for of_output in axes:
        flat += of_output
    return flat


def _is_channel_norm(node: torch.fx.Node, given: Sequence[Value]) -> bool:
    """Returns whether the output is a norm of each channel, or computed from such a norm alone."""
    name = str(node.target).split(".")[1] if "." in str(node.target) else ""
    if name in ("linalg_vector_norm", "norm", "sum"):
        return True
    return len(given) == 1 and given[0].channel_norm


def _is_gathered(node: torch.fx.Node, given: Sequence[Value]) -> bool:
    """Returns whether the output is selected weights, or computed from them."""
    if not given:
        return False
    if getattr(node.target, "overloadpacket", None) in LOOKUPS:
        return given[0].from_weights
    return given[0].gathered_weights and keeps_zeros(node.target, given)


def _is_boolean(node: torch.fx.Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) == torch.bool


def _apply_rule(
    ids: ChannelIds, shape: tuple[int, ...], args: Any, options: Any, every: Sequence[Value]
) -> Any:
    """Returns the axes of the output by the present operation's rule.

    Without a rule, or where it fails on these arguments, all channels that reach the operation are
    kept.
    """
    rule = find_rule(ids.target)
    if rule is not None:
        try:
            return rule(ids, shape, *args, **options)
        except Exception as error:
            # A rule may not cover some arguments. Keeping the channels is always correct, and the
            # reason names the operation to the user.
            why = f"its rule does not cover this use ({type(error).__name__}: {error})"
    elif _only_checks(ids.target):
        return ()
    else:
        why = "there is no rule for it"
    _keep_everything(ids, every, why)
    return ()


def _keep_everything(ids: ChannelIds, given: Sequence[Value], why: str) -> None:
    """Keeps all channels of the given values, and records the operation as one without a rule."""
    axes = []
    for value in given:
        axes += [axis for axis in value.axes if axis is not None]
    ids.keep_all(axes, why)
    ids.without_rule.append((ids.module, f"{why}: {ids.place}", axes))


def _only_checks(operation: Any) -> bool:
    """Returns whether the operation is an assertion, as `torch.export` adds them: no output."""
    schema = getattr(operation, "_schema", None)
    return schema is not None and not schema.returns and not schema.is_mutable


MOST_CONSTANT = 1 << 20
"""Most entries of a constant that is computed: index lists are short, causal masks may be huge."""


def _can_be_constant(x: Tensor) -> bool:
    """Returns whether a tensor can be a list of indices or a mask, and is small enough."""
    return (
        not x.is_floating_point()
        and not x.is_complex()
        and x.numel() <= MOST_CONSTANT
        and x.device.type != "meta"
    )


@torch.no_grad()
def _constant_output(
    node: torch.fx.Node, args: Any, options: Any, given: Sequence[Value]
) -> Tensor | None:
    """Computes the output if it is an integer or boolean tensor that depends on constants alone.

    It may be the index in `x[:, index] = y`, which must be known to follow the channels.
    """
    output = node.meta.get("val")
    if not isinstance(output, Tensor) or not _can_be_constant(output) or _mutates(node):
        return None
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    # Random draws differ from run to run.
    if is_random or any(value.from_input or value.constant is None for value in given):
        return None
    constant_args, constant_options = _with_constants((args, options))
    try:
        result: Tensor = node.target(*constant_args, **constant_options)  # type: ignore[operator]
        return result
    except Exception:
        # Without the indices the channels are kept, with a reason in the plan.
        return None


def _with_constants(tree: Any) -> Any:
    """Replaces each `Value` by its constant."""
    if isinstance(tree, Value):
        return tree.constant
    if isinstance(tree, dict):
        return {key: _with_constants(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_with_constants(item) for item in tree)
    return tree


def _with_all_axes(axes: tuple[Axis, ...], shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """Returns one entry for each axis of `shape`; axes that a rule left off at the end are None."""
    return (*axes, *[None] * (len(shape) - len(axes)))


def _run_decomposed(graph: torch.fx.Graph, given: Sequence[Value], ids: ChannelIds) -> Any:
    """Applies the rules to the operations that one operation decomposes into.

    Args:
        graph: of these operations.
        given: the values of its placeholders.
        ids: where the ids are collected.
    """
    values: dict[torch.fx.Node, Any] = {}
    rest = iter(given)

    # The decomposition takes its sizes from its inputs: there is no number to correct in the code.
    call, ids.call = ids.call, None
    # Reasons name the operation that the user's code calls, not one inside it.
    outer, ids.outer = ids.outer, ids.outer or ids.operation
    result = None

    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(rest)
        elif node.op == "get_attr":
            shape = _shape(node)
            values[node] = Value(shape, (None,) * len(shape))
        elif node.op == "output":
            result = torch.fx.node.map_arg(node.args[0], lambda n: values[n])
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        elif isinstance(node.target, type):  # a named tuple of results
            values[node] = torch.fx.node.map_arg(node.args[0], lambda n: values[n])
        else:
            values[node] = _apply_operation(node, values, ids)
    ids.call = call
    ids.outer = outer
    return result


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    """Returns the shape of the node's output, or of its first output."""
    # Of several outputs the first has the shape that rules are given.
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
