"""The table of rules (ATen operation -> rule), and small functions that several rules use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from fedpress.compress.prune.ids import Axis, ChannelIds, Value

aten = torch.ops.aten
Axes = tuple[Axis, ...]
Shape = tuple[int, ...]
Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}
FOREIGN: dict[str, Rule] = {}
"""Rules of other libraries' operations by name: torch knows them once that library is imported."""


def rule(*names: str) -> Callable[[R], R]:
    """Enters a function into `RULES` for each overload "name.overload", or all overloads of "name".

    A name such as "library::operation" is an operation of another library.
    """

    def enter(function: R) -> R:
        for name in names:
            if "::" in name:
                FOREIGN[name] = function
                continue
            packet, _, overload = name.partition(".")
            operation = getattr(aten, packet)
            overloads = [overload] if overload else operation.overloads()
            for each in overloads:
                RULES[getattr(operation, each)] = function
        return function

    return enter


def find_rule(operation: Any) -> Rule | None:
    """Returns the rule of an operation, or None if the engine does not know it."""
    for each in (operation, _functional_form(operation)):
        if each in RULES:
            return RULES[each]
        # ATen tags the operations that work on each value by itself.
        if torch.Tag.pointwise in getattr(each, "tags", ()):
            return elementwise
    schema = getattr(operation, "_schema", None)
    return FOREIGN.get(getattr(schema, "name", ""))


def _functional_form(operation: Any) -> Any:
    """Returns `squeeze` for `squeeze_` or `squeeze_copy`: the overload with the same arguments."""
    schema = getattr(operation, "_schema", None)
    # Operations of Python itself, such as `operator.add` on sizes, have no schema.
    if schema is None or not schema.name.startswith("aten::"):
        return None
    name = schema.name.removeprefix("aten::")
    base = name.removesuffix("_copy") if name.endswith("_copy") else name.removesuffix("_")
    if not base or base == name or not hasattr(aten, base):
        return None

    # Overloads are named differently in the two forms, but their arguments are the same.
    packet = getattr(aten, base)
    wanted = [argument.name for argument in schema.arguments]
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if [argument.name for argument in candidate._schema.arguments] == wanted:
            return candidate
    return None


def arguments_by_name(
    ids: ChannelIds, args: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of the present operation by name, with its defaults."""
    given = dict(options)
    # The schema has the names that positional arguments lack.
    arguments = ids.target._schema.arguments
    for argument, value in zip(arguments, args, strict=False):
        given[argument.name] = value
    for argument in arguments:
        if argument.has_default_value():
            given.setdefault(argument.name, argument.default_value)
    return given


def values_among(arguments: Iterable[Any]) -> list[Value]:
    """Returns the tensors among the arguments of an operation."""
    return [argument for argument in arguments if isinstance(argument, Value)]


def repeat_each(axis: Axis, times: int) -> Axis:
    """Returns each id `times` times in a row: [a, b] -> [a, a, b, b]."""
    if axis is None:
        return None
    return np.repeat(axis, times)


def tile(axis: Axis, times: int) -> Axis:
    """Returns all ids `times` times: [a, b] -> [a, b, a, b]."""
    if axis is None:
        return None
    return np.tile(axis, times)


def take(axis: Axis, start: int | None, stop: int | None) -> Axis:
    """Returns the ids from `start` up to `stop`."""
    if axis is None:
        return None
    return axis[start:stop]


def replaced(entries: Sequence[Any], dim: int, *new: Any) -> tuple[Any, ...]:
    """Returns a shape or axes with `new` in the place of entry `dim`; without `new` it is dropped.

    >>> replaced((2, 3, 4), 1, 5), replaced((2, 3, 4), 1)
    ((2, 5, 4), (2, 4))
    """
    return (*entries[:dim], *new, *entries[dim + 1 :])


def leading(value: Value, count: int) -> Value:
    """Returns `value` as if it had only the axes before its last `count`."""
    return Value(value.shape[:-count], value.axes[:-count])


@rule(
    "relu",
    "relu_",
    "relu6",
    "relu6_",
    "hardswish",
    "hardswish_",
    "selu",
    "selu_",
    "dropout",
    "dropout_",
)
@rule(
    "feature_dropout",
    "alpha_dropout",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "to.dtype",
    "to.device",
    "to.other",
)
@rule(
    "div",
    "div_",
    "add",
    "add_",
    "sub",
    "sub_",
    "mul",
    "mul_",
    "type_as",
    "_to_copy",
    "lift_fresh_copy",
    "celu",
)
@rule(
    "copy",
    "copy_",
    "rsub",
    "fill",
    "fill_",
    "masked_fill",
    "masked_fill_",
    "to.dtype_layout",
    "zeros_like",
    "ones_like",
    "full_like",
)
@rule(
    "empty_like",
    "exponential_",
    "normal_",
    "uniform_",
    "bernoulli_",
    "log_sigmoid",
    "threshold",
    "threshold_",
)
@rule(
    "_conj",
    "resolve_conj",
    "resolve_neg",
    "complex",
    "polar",
    "bucketize.Tensor",
    "rrelu",
    "rrelu_",
    "detach_",
)
@rule(
    "rand_like",
    "randn_like",
    "logical_and",
    "logical_or",
    "logical_not",
    "positive",
    "square",
    "square_",
    "where",
)
def elementwise(ids: ChannelIds, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Unites the axes that meet index by index, with broadcasting, and returns them.

    A channel axis of size 1 that is broadcast over several indices is kept: it cannot be pruned
    without them.
    """
    # A parameter comes first, so that the output has the ids of the weight it is computed from.
    values = values_among((*args, *options.values()))
    values.sort(key=lambda value: (value.shape != shape, not value.has_parameter))

    axes: list[Axis] = []
    for i, size in enumerate(shape):
        result: Axis = None
        meeting = []
        for value in values:
            j = i - len(shape) + len(value.shape)
            # A tensor of lower rank is broadcast over the first axes.
            if j < 0:
                continue
            if value.shape[j] == size:
                meeting.append(value.axes[j])
            else:
                # It meets every index of the other axis, and would have to go with all of them.
                ids.keep(value.axes[j], "one channel is broadcast over many")

        for axis in meeting:
            if axis is not None:
                result = axis
                break
        # An axis without ids that meets channels keeps them: a user's input, for instance.
        if result is not None:
            for axis in meeting:
                ids.unite(result, axis)
        axes.append(result)
    return tuple(axes)


_SAME_VALUES = (
    "detach",
    "alias",
    "clone",
    "contiguous",
    "view",
    "reshape",
    "flatten",
    "transpose",
    "t",
    "permute",
)
_SOME_VALUES = ("expand", "select", "unbind", "index", "index_select", "to", "_to_copy")
_ZERO_OF_ZERO = ("abs", "square", "pow", "mul", "mv")
ZERO_STAYS = frozenset((*_ZERO_OF_ZERO, *_SAME_VALUES, *_SOME_VALUES))
"""Operations that give zero where their first input is zero; norms of weights consist of them."""


def zero_stays(operation: Any, values: Sequence[Value]) -> bool:
    """Returns whether the output for `values` is zero where their channels are masked."""
    name = operation._schema.name.removeprefix("aten::")
    return name in ZERO_STAYS and bool(values) and values[0].zero_when_masked
