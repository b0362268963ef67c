"""Has the table of pruning rules (ATen operation -> rule), and functions that rules share.

Each index of a channel axis has an id. A rule unites the ids of channels that must be pruned
together, keeps the ids of channels that cannot be pruned, and returns the ids of the output's axes.
Its argument `shape` is the shape of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from fedpress.compress.prune.ids import Axis, ChannelIds, Value

aten = torch.ops.aten
# The ids of each axis of a tensor; None for an axis without ids.
Axes = tuple[Axis, ...]
Shape = tuple[int, ...]
Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}
"""Overload of an ATen operation -> its rule; filled by `rule`."""
RULES_OF_OTHER_LIBRARIES: dict[str, Rule] = {}
"""Rules of other libraries' operations, by name: torch has them only if a library is imported."""


def rule(*names: str) -> Callable[[R], R]:
    """Registers a function as the rule of ATen operations.

    Args:
        names: "conv2d" for all overloads of an operation, "add.Tensor" for one overload, or
            "library::operation" for an operation of another library.
    """

    def enter(function: R) -> R:
        for name in names:
            if "::" in name:
                RULES_OF_OTHER_LIBRARIES[name] = function
                continue
            packet, _, overload = name.partition(".")
            operation = getattr(aten, packet)
            overloads = [overload] if overload else operation.overloads()
            for each in overloads:
                RULES[getattr(operation, each)] = function
        return function

    return enter


def find_rule(operation: Any) -> Rule | None:
    """Returns the rule of an operation, or None if it has none."""
    for each in (operation, _functional_form(operation)):
        # The table comes first, so that a rule can replace the default for pointwise operations.
        if each in RULES:
            return RULES[each]
        # ATen tags the operations that compute each entry from entries at the same index.
        if torch.Tag.pointwise in getattr(each, "tags", ()):
            return elementwise
    schema = getattr(operation, "_schema", None)
    return RULES_OF_OTHER_LIBRARIES.get(getattr(schema, "name", ""))


def _functional_form(operation: Any) -> Any:
    """Returns the plain form of an in-place or copying operation: `squeeze` for `squeeze_`.

    The result is the overload with the same arguments, or None if there is none.
    """
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
    """Returns the arguments of the operation `ids.target` by name; missing ones have defaults."""
    given = dict(options)
    # The schema gives positional arguments their names.
    arguments = ids.target._schema.arguments
    for argument, value in zip(arguments, args, strict=False):
        given[argument.name] = value
    for argument in arguments:
        if argument.has_default_value():
            given.setdefault(argument.name, argument.default_value)
    return given


def values_among(arguments: Iterable[Any]) -> list[Value]:
    """Returns the tensors (`Value`s) among the arguments of an operation."""
    return [argument for argument in arguments if isinstance(argument, Value)]


def repeat_each(axis: Axis, times: int) -> Axis:
    """Returns each id `times` times in a row: [a, b] -> [a, a, b, b]."""
    if axis is None:
        return None
    return np.repeat(axis, times)


def tile(axis: Axis, times: int) -> Axis:
    """Returns the whole axis `times` times: [a, b] -> [a, b, a, b]."""
    if axis is None:
        return None
    return np.tile(axis, times)


def slice_axis(axis: Axis, start: int | None, stop: int | None) -> Axis:
    """Returns the ids `axis[start:stop]`; None for an axis without ids."""
    if axis is None:
        return None
    return axis[start:stop]


def replace_entry(entries: Sequence[Any], dim: int, *new: Any) -> tuple[Any, ...]:
    """Returns a shape or axes with entry `dim` replaced by `new`, or dropped without `new`.

    >>> replace_entry((2, 3, 4), 1, 5), replace_entry((2, 3, 4), 1)
    ((2, 5, 4), (2, 4))
    """
    return (*entries[:dim], *new, *entries[dim + 1 :])


def without_last_axes(value: Value, count: int) -> Value:
    """Returns shape and ids of `value` without its last `count` axes."""
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
    """Pointwise operations: the ids of aligned axes (as in broadcasting) are united.

    A channel axis of size 1 that is broadcast over several indices is kept: without its only
    channel all of these indices would be gone.
    """
    # The output gets the ids of the first tensor. A parameter comes first, so that a weight
    # computed from it, such as w / |w|, has the ids of the parameter.
    values = values_among((*args, *options.values()))
    values.sort(key=lambda value: (value.shape != shape, not value.has_parameter))

    axes: list[Axis] = []
    for i, size in enumerate(shape):
        result: Axis = None
        aligned = []
        for value in values:
            j = i - len(shape) + len(value.shape)
            # A tensor of lower rank is broadcast over the first axes.
            if j < 0:
                continue
            if value.shape[j] == size:
                aligned.append(value.axes[j])
            else:
                # Size 1: this channel is combined with every index of the other axis.
                ids.keep(value.axes[j], "one channel is broadcast over many")

        for axis in aligned:
            if axis is not None:
                result = axis
                break
        # `unite` keeps channels that are combined with an axis without ids, such as an input.
        if result is not None:
            for axis in aligned:
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
KEEPS_ZEROS = frozenset((*_ZERO_OF_ZERO, *_SAME_VALUES, *_SOME_VALUES))
"""Operations whose output is zero where their first input is zero.

Norms of weights (weight norm, spectral norm) consist of these operations and of sums.
"""


def keeps_zeros(operation: Any, values: Sequence[Value]) -> bool:
    """Returns whether the output is zero at channels that the parity check sets to 0 (masks)."""
    name = operation._schema.name.removeprefix("aten::")
    return name in KEEPS_ZEROS and bool(values) and values[0].zero_when_masked
