"""Applies the pruning rule of one operation in a captured graph to its inputs.

A `Value` describes a tensor of the graph: its shape and the channel ids of its axes. A rule says
which ids must be pruned together and which cannot be pruned (kept).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedpress.compress.prune.ids import Axis, ChannelIds, Value
from fedpress.compress.prune.rules import decompose_operation, find_rule, keeps_zeros

LOOKUPS = (torch.ops.aten.index, torch.ops.aten.index_select)
"""Operations that select rows. Rows selected from weights, such as those of the chosen experts, are
called gathered weights."""
IGNORED = "asked for by `ignore`"
"""Reason for channels that the user wants to keep."""


def apply_operation(
    node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], ids: ChannelIds
) -> Any:
    """Returns the value of an operation's output: applies its rule, or decomposes it first.

    Args:
        node: the operation.
        values: the values of all earlier nodes.
        ids: collects the ids that the rule unites or keeps.
    """
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

    # Whether the output comes from weights is decided by the positional arguments, since captured
    # graphs pass weights by position.
    positional = list(values_in(args))
    every = [*positional, *values_in(list(options.values()))]
    products_before = len(ids.products)
    axes = _apply_rule(ids, shape_of(node), args, options, every)
    if ids.module in ids.ignored:
        for value in every:
            ids.keep_all(value.axes, IGNORED)
        ids.keep_all(_flat_axes(axes), IGNORED)
    # Multiplications that do not depend on the input are done once per batch, so their cost does
    # not grow with the batch size.
    if not any(value.from_input for value in every):
        ids.without_input.update(range(products_before, len(ids.products)))
    constant = _constant_output(node, args, options, every)
    return _output_values(node, axes, constant, _origin(node, positional, every))


def _output_values(
    node: torch.fx.Node, axes: Any, constant: Tensor | None, origin: Mapping[str, bool]
) -> Any:
    """Returns the value of the node's output, or a list of values if it has several."""
    outputs = node.meta.get("val")
    if not isinstance(outputs, list | tuple):
        shape = shape_of(node)
        full = _with_all_axes(axes, shape)
        return Value(shape, full, is_boolean=is_boolean(node), constant=constant, **origin)

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
    """Returns the attributes of `Value` that say from which tensors the output was computed.

    Args:
        node: the operation.
        positional: its positional arguments.
        every: all its arguments.
    """
    from_weights = bool(positional) and all(value.from_weights for value in positional)
    # Operations of Python itself, such as `operator.add` on sizes, have no schema.
    is_aten = hasattr(node.target, "_schema")
    return {
        "zero_when_masked": is_aten and keeps_zeros(node.target, positional),
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
    """Returns whether the output is a norm or a sum, or is computed from such a tensor alone."""
    name = str(node.target).split(".")[1] if "." in str(node.target) else ""
    if name in ("linalg_vector_norm", "norm", "sum"):
        return True
    return len(given) == 1 and given[0].channel_norm


def _is_gathered(node: torch.fx.Node, given: Sequence[Value]) -> bool:
    """Returns whether the output is gathered weights, or a result that is 0 where they are 0."""
    if not given:
        return False
    if getattr(node.target, "overloadpacket", None) in LOOKUPS:
        return given[0].from_weights
    return given[0].gathered_weights and keeps_zeros(node.target, given)


def is_boolean(node: torch.fx.Node) -> bool:
    """Returns whether the output has the type bool."""
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
    keep_everything(ids, every, why)
    return ()


def keep_everything(ids: ChannelIds, given: Sequence[Value], why: str) -> None:
    """Keeps all channels of the given values, and records the operation as one without a rule."""
    axes = []
    for value in given:
        axes += [axis for axis in value.axes if axis is not None]
    ids.keep_all(axes, why)
    ids.without_rule.append((ids.module, f"{why}: {ids.place}", axes))


def _only_checks(operation: Any) -> bool:
    """Returns whether the operation returns nothing and changes nothing.

    Such are the assertions that `torch.export` adds.
    """
    schema = getattr(operation, "_schema", None)
    return schema is not None and not schema.returns and not schema.is_mutable


MOST_CONSTANT = 1 << 20
"""Largest number of entries of a constant that is still computed. Index lists are shorter; causal
masks may be huge."""


def can_be_constant(x: Tensor) -> bool:
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

    Such a tensor may be the index in `x[:, index] = y`. Its values say which channels are written.
    """
    output = node.meta.get("val")
    if not isinstance(output, Tensor) or not can_be_constant(output) or mutates(node):
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
        graph: the graph of these operations.
        given: the values of the graph's placeholders.
        ids: collects the ids that the rules unite or keep.
    """
    values: dict[torch.fx.Node, Any] = {}
    rest = iter(given)

    # Sizes that the user's code writes as numbers must be changed after pruning. A decomposition
    # computes its sizes from its inputs, so none is recorded while its operations are walked.
    call, ids.call = ids.call, None
    # Reasons name the operation that the user's code calls, not one inside it.
    outer, ids.outer = ids.outer, ids.outer or ids.operation
    result = None

    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(rest)
        elif node.op == "get_attr":
            shape = shape_of(node)
            values[node] = Value(shape, (None,) * len(shape))
        elif node.op == "output":
            result = torch.fx.node.map_arg(node.args[0], lambda n: values[n])
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        elif isinstance(node.target, type):  # a named tuple of results
            values[node] = torch.fx.node.map_arg(node.args[0], lambda n: values[n])
        else:
            values[node] = apply_operation(node, values, ids)
    ids.call = call
    ids.outer = outer
    return result


def shape_of(node: torch.fx.Node) -> tuple[int, ...]:
    """Returns the shape of the node's output, or of its first output."""
    # If there are several outputs, rules get the shape of the first.
    first = node.meta.get("val")
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return tuple(getattr(first, "shape", ()))


def values_in(tree: Any) -> Iterator[Value]:
    """Yields the `Value`s in nested lists and tuples of arguments."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from values_in(item)


def mutates(node: torch.fx.Node) -> bool:
    """Returns whether the operation changes one of its inputs in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
