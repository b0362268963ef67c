"""The table of rules, and the words that they are written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from fedpress.compress.prune.ids import Axis, Ids, Value

aten = torch.ops.aten
Axes = tuple[Axis, ...]
Shape = tuple[int, ...]
Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[Any, Rule] = {}
FOREIGN: dict[str, Rule] = {}
"""Rules of operations that other libraries define, by name: these are not there until the library is imported."""


def rule(*names: str) -> Callable[[R], R]:
    """Enters a function into `RULES` for each overload "name.overload", or all overloads of "name".

    A name such as "library::operation" is one of another library.
    """

    def enter(function: R) -> R:
        for name in names:
            if "::" in name:
                FOREIGN[name] = function
                continue
            packet, _, overload = name.partition(".")
            operation = getattr(aten, packet)
            for each in [overload] if overload else operation.overloads():
                RULES[getattr(operation, each)] = function
        return function

    return enter


def find_rule(operation: Any) -> Rule | None:
    """Returns the rule of an ATen operation, or None if the engine does not know it."""
    for each in (operation, _plain(operation)):
        if each in RULES:
            return RULES[each]
        if torch.Tag.pointwise in getattr(each, "tags", ()):
            return elementwise
    return FOREIGN.get(getattr(getattr(operation, "_schema", None), "name", ""))


def _plain(operation: Any) -> Any:
    """Returns the overload that gives what `operation` writes in place or copies: `squeeze` of `squeeze_`."""
    schema = getattr(operation, "_schema", None)
    if schema is None or not schema.name.startswith("aten::"):
        return None
    name = schema.name.removeprefix("aten::")
    base = name.removesuffix("_copy") if name.endswith("_copy") else name.removesuffix("_")
    if not base or base == name or not hasattr(aten, base):
        return None
    packet, wanted = getattr(aten, base), [argument.name for argument in schema.arguments]
    like = (getattr(packet, each) for each in packet.overloads())
    return next((each for each in like if [a.name for a in each._schema.arguments] == wanted), None)


def tie(ids: Ids, a: Axis, b: Axis) -> None:
    """Says that two axes are one; two that never change need no word."""
    if a is not None or b is not None:
        ids.unite(a, b)


def named(ids: Ids, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the present operation by name, with its defaults."""
    given = dict(options)
    for argument, value in zip(ids.target._schema.arguments, args, strict=False):
        given[argument.name] = value
    for argument in ids.target._schema.arguments:
        if argument.has_default_value():
            given.setdefault(argument.name, argument.default_value)
    return given


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
def elementwise(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Index by index, with broadcasting: axes that meet are one; an axis of size 1 is spread over the other."""
    axes: list[Axis] = [None] * len(shape)
    for i, size in enumerate(shape):
        meeting = []
        values = [a for a in (*args, *options.values()) if isinstance(a, Value)]
        for value in sorted(
            values, key=lambda v: (v.shape != shape, not v.trained)
        ):  # the ids are those of the weight
            j = i - len(shape) + len(value.shape)
            if j < 0:
                continue
            if value.shape[j] == size:
                meeting.append(value.axes[j])
            else:
                ids.keep(value.axes[j], "one channel is spread over many")
        known = [a for a in meeting if a is not None]
        axes[i] = known[0] if known else None
        for other in meeting if known else []:
            if other is not known[0]:
                ids.unite(known[0], other)
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
ZERO_STAYS = frozenset(("abs", "square", "pow", "mul", "mv", *_SAME_VALUES, *_SOME_VALUES))
"""Operations that give zero where their first input is zero: what norms of weights are computed with."""


def zero_stays(operation: Any, values: Sequence[Value]) -> bool:
    """Says whether a channel whose weights are zero is zero in the output of the operation on `values`."""
    name = operation._schema.name.removeprefix("aten::")
    return name in ZERO_STAYS and bool(values) and values[0].zero
