"""Goes through a captured graph and applies each operation's pruning rule to its inputs' ids.

Each index of a channel axis has an id. A rule says which ids must be pruned together (united),
which cannot be pruned (kept), and which ids the axes of the output have.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from fedpress.compress.prune.ids import SETS_OWN_NUMBERS, ChannelIds, ForwardCall, Ints, Value
from fedpress.compress.prune.operations import (
    apply_operation,
    can_be_constant,
    is_boolean,
    keep_everything,
    mutates,
    shape_of,
    values_in,
)
from fedpress.compress.prune.recorder import CALL_TAG

TensorAxis = tuple[str, int, Ints]
"""Name of a parameter or buffer, one of its axes, and the ids of that axis.

The name is "" for an axis of an activation, whose length is needed for multiply-adds or for sizes
in code.
"""


class Walk:
    """Applies the rules to every node of a captured model; the constructor does all the work.

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
        # Each of these properties is computed anew whenever it is read, which takes long.
        signature = exported.graph_signature
        self._parameters = signature.inputs_to_parameters
        self._buffers = signature.inputs_to_buffers
        self._lifted = signature.inputs_to_lifted_tensor_constants
        self._inputs = frozenset(signature.user_inputs)
        self._tensors = {**exported.state_dict, **exported.constants}
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
            # A node's value is a `Value`, or a list of them if the node has several outputs.
            if node.op == "output":
                result = torch.fx.node.map_arg(node.args[0], self._values.get)
            elif node.op == "placeholder" and given is not None:
                self._values[node] = next(rest)
            elif isinstance(node.target, HigherOrderOperator):
                self._values[node] = self._run_inner_graph(node, module)
            else:
                self._visit(node)

        # The model's outputs have fixed sizes; outputs of an inner graph are inputs of later nodes.
        if given is None:
            self._ids.operation = ""
            for value in values_in(result):
                self._ids.keep_all(value.axes, "it is an output of the model")
        return result

    def _run_inner_graph(self, node: torch.fx.Node, module: torch.fx.GraphModule) -> Any:
        """Walks a graph that runs under `torch.no_grad()` or `torch.autocast`.

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
        given = list(values_in(values))
        keep_everything(self._ids, given, "channels are not followed through it")
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
            values[node] = apply_operation(node, values, ids)
            # Writing to a view also changes the tensor that it is a view of.
            if mutates(node):
                from_input = any(value.from_input for value in values_in(values[node]))
                _note_overwritten(node.args[0], values, from_input)

    def _call_of(self, node: torch.fx.Node) -> ForwardCall | None:
        """Returns the call in the forward code that the node comes from, if it has numbers."""
        index = node.meta.get("custom", {}).get(CALL_TAG)
        if index is None:
            return None
        return SETS_OWN_NUMBERS if index < 0 else self._calls[index]

    def _source(self, node: torch.fx.Node) -> Value:
        """Returns the value of a parameter, a buffer, a constant in the code, or an input."""
        shape = shape_of(node)
        stored_name = self._parameters.get(node.name) or self._buffers.get(node.name)
        constant = self._constant(node, stored_name)
        if stored_name is None:
            return Value(
                shape,
                (None,) * len(shape),
                from_input=node.name in self._inputs,
                is_boolean=is_boolean(node),
                constant=constant,
            )

        # Every axis of a stored tensor gets ids; rules keep those that cannot be pruned.
        axes = tuple(self._ids.fresh(size) for size in shape)
        name = self._first_names[stored_name]
        self.tensor_axes += [(name, i, axis) for i, axis in enumerate(axes)]
        is_parameter = node.name in self._parameters
        if is_parameter:
            self._is_used[name] = self._is_used.get(name, False) or bool(node.users)
        return Value(
            shape,
            axes,
            zero_when_masked=True,
            from_weights=True,
            has_parameter=is_parameter,
            is_boolean=is_boolean(node),
            constant=constant,
        )

    def _constant(self, node: torch.fx.Node, stored_name: str | None) -> Tensor | None:
        """Returns a buffer or constant that holds a few integers or booleans, else None."""
        name = stored_name or self._lifted.get(node.name) or ""
        tensor = self._tensors.get(name)
        return tensor if isinstance(tensor, Tensor) and can_be_constant(tensor) else None


def _graph_of(module: torch.fx.GraphModule, argument: Any) -> Any:
    """Returns the graph inside a captured model that an argument names, if it names one."""
    if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
        return getattr(module, str(argument.target), None)
    return None


def _live_nodes(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Returns the nodes that give outputs or change tensors in place, and all that these need."""
    # Backwards, so that the users of a node come before the node.
    live: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live or mutates(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live


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
