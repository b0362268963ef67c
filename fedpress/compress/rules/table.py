"""The table of rules, and the words that they are written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedpress.compress.ids import Axis, Ids, Value

aten = torch.ops.aten
Axes = tuple[Axis, ...]
Shape = tuple[int, ...]
Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enters a function into `RULES` for every overload "name.overload" (or all overloads of "name") that exists."""

    def enter(function: Rule) -> Rule:
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(aten, packet)
            for each in [overload] if overload else operation.overloads():
                RULES[getattr(operation, each)] = function
        return function

    return enter


def find_rule(operation: Any) -> Rule | None:
    """Returns the rule of an ATen operation, or None if the engine does not know it."""
    known = RULES.get(operation)
    if known is None and torch.Tag.pointwise in getattr(operation, "tags", ()):
        return elementwise
    return known


@rule("relu", "relu_", "relu6", "relu6_", "hardswish", "hardswish_", "selu", "selu_", "dropout", "dropout_")
@rule("feature_dropout", "alpha_dropout", "contiguous", "clone", "alias", "detach", "to.dtype", "to.device", "to.other")
@rule("div", "div_", "add", "add_", "sub", "sub_", "mul", "mul_", "type_as", "_to_copy", "lift_fresh_copy", "celu")
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
@rule("rand_like", "randn_like", "logical_and", "logical_or", "logical_not", "positive", "square", "square_", "where")
def elementwise(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Index by index, with broadcasting: axes that meet are one; an axis of size 1 is spread over the other."""
    axes: list[Axis] = [None] * len(shape)
    for i, size in enumerate(shape):
        meeting = []
        values = [a for a in (*args, *options.values()) if isinstance(a, Value)]
        for value in sorted(values, key=lambda v: (v.shape != shape, not v.trained)):  # the ids are those of the weight
            j = i - len(shape) + len(value.shape)
            if j < 0:
                continue
            if value.shape[j] == size:
                meeting.append(value.axes[j])
            else:
                ids.freeze(value.axes[j], "one channel is spread over many")
        known = [a for a in meeting if a is not None]
        axes[i] = known[0] if known else None
        for other in meeting if known else []:
            if other is not known[0]:
                ids.unite(known[0], other)
    return tuple(axes)


ZERO_STAYS = frozenset(("abs", "square", "pow", "mul", "detach", "alias", "clone", "view", "reshape", "flatten"))
"""Operations that give zero where their first input is zero: what norms of weights are computed with."""


def zero_stays(operation: Any, values: Sequence[Value]) -> bool:
    """Says whether a channel whose weights are zero is zero in the output of the operation on `values`."""
    name = operation._schema.name.removeprefix("aten::")
    return name in ZERO_STAYS and bool(values) and values[0].zero
