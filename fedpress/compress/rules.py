"""One rule per ATen operation: how channel ids pass through it, and which of them it ties or freezes.

A rule takes the collector `ids`, the output's shape, and the operation's own arguments with tensors as `Value`s; it
returns the axes of the output (a list of them if the operation returns several tensors). To teach the engine a new
operation, add a function with `@rule(...)`. Operations that ATen tags as pointwise need none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
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
def elementwise(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Index by index, with broadcasting: axes that meet are one; an axis of size 1 is spread over the other."""
    axes: list[Axis] = [None] * len(shape)
    for i, size in enumerate(shape):
        meeting = []
        for value in (a for a in (*args, *options.values()) if isinstance(a, Value)):
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


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    ids: Ids,
    shape: Shape,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Axes:
    """Reads axis 1 of the weight, writes axis 0; depthwise ties both, groups lose the same place in every group."""
    at = len(x.shape) - len(weight.shape) + 1  # the channel axis, with or without a batch axis
    source, (out, read) = x.axes[at], weight.axes[:2]
    for axis in (*weight.axes[2:], *x.axes[at + 1 :]):
        ids.freeze(axis, "kernel or image size")
    if groups == 1:
        ids.unite(read, source)
        ids.mark(read, "read")
    elif weight.shape[1] == 1:
        ids.freeze(read, "depthwise kernel")
        ids.unite(out, None if source is None else np.repeat(source, weight.shape[0] // groups))
    else:
        for part in _parts(source, groups):
            ids.unite(read, part)
        first, *rest = _parts(out, groups)
        for part in rest:
            ids.unite(first, part)
        ids.mark(read, "read")
    ids.mark(out, "write")
    if bias is not None:
        ids.unite(out, bias.axes[0])
    return (*x.axes[:at], out, *[None] * (len(shape) - at - 1))


@rule("linear.default")
def linear(ids: Ids, shape: Shape, x: Value, weight: Value, bias: Value | None = None) -> Axes:
    """Reads axis 1 of the weight over the last axis of `x`, writes axis 0."""
    out, read = weight.axes
    ids.unite(read, x.axes[-1])
    ids.mark(read, "read")
    ids.mark(out, "write")
    if bias is not None:
        ids.unite(out, bias.axes[0])
    return (*x.axes[:-1], out)


@rule("batch_norm.default", "instance_norm.default")
def batch_norm(ids: Ids, shape: Shape, x: Value, weight: Value | None, bias: Value | None, *rest: Any) -> Axes:
    """Each channel is normalised by its own numbers: parameters and statistics go with it."""
    for vector in (weight, bias, *rest[:2]):
        if isinstance(vector, Value):
            ids.unite(x.axes[1], vector.axes[0])
    if weight is not None:
        ids.mark(weight.axes[0], "scale")
    return x.axes


@rule("group_norm.default")
def group_norm(
    ids: Ids, shape: Shape, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *rest: Any
) -> Axes:
    """Channels of one group share a mean and a variance: only whole groups can go without changing the others."""
    channels = x.axes[1]
    if channels is not None:
        size = len(channels) // groups
        ids.unite(channels, np.repeat(channels[::size], size))
    for vector in (weight, bias):
        if vector is not None:
            ids.unite(channels, vector.axes[0])
    if weight is not None:
        ids.mark(weight.axes[0], "scale")
    return x.axes


@rule("layer_norm.default")
def layer_norm(ids: Ids, shape: Shape, x: Value, normalized: Sequence[int], *rest: Any) -> Axes:
    """All values of the last axes share a mean and a variance: none can go without changing the others."""
    for axis in x.axes[-len(normalized) :]:
        ids.freeze(axis, "a mean over channels")
    for vector in rest[:2]:
        for axis in vector.axes if isinstance(vector, Value) else ():
            ids.freeze(axis, "a mean over channels")
    return x.axes


@rule("softmax", "log_softmax", "cumsum", "flip", "roll", "argmax", "topk")
def along(ids: Ids, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """Mixes or moves the values along some axes: no channel may go."""
    for axis in x.axes:
        ids.freeze(axis, "values are mixed across channels")
    return x.axes if shape == x.shape else (None,) * len(shape)


@rule("mean", "sum", "var", "std", "amax", "amin", "linalg_vector_norm", "norm", "var_mean", "std_mean")
def reduction(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes | list[Axes]:
    """A statistic over channels would change if one went; over other axes the ids pass."""
    given = next((a for a in (options.get("dim"), *args) if isinstance(a, list | tuple)), None)
    dims = {d % len(x.shape) for d in given or range(len(x.shape))}
    for d in dims:
        ids.freeze(x.axes[d], "a statistic over channels")
    keeps = [None if d in dims else axis for d, axis in enumerate(x.axes)]
    drops = [axis for d, axis in enumerate(x.axes) if d not in dims]
    axes = tuple(keeps if len(shape) == len(x.shape) else drops)
    return [axes, axes] if "_mean" in ids.operation else axes


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d")
@rule("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d")
@rule("max_pool2d_with_indices")
def pooling(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes | list[Axes]:
    """Works on the axes whose size it changes, within each channel."""
    space = next(n for n in (1, 2, 3) if f"{n}d" in ids.operation)
    for axis in x.axes[-space:]:
        ids.freeze(axis, "pooling runs over channels")
    axes = (*x.axes[:-space], *[None] * space)
    return [axes, axes] if "with_indices" in ids.operation or "adaptive_max" in ids.operation else axes


@rule("cat")
def concatenate(ids: Ids, shape: Shape, values: Sequence[Value], dim: int = 0) -> Axes:
    """Ids stand one after the other along `dim` and are tied along the other axes."""
    dim %= len(shape)
    axes = list(elementwise(ids, tuple(-1 if i == dim else n for i, n in enumerate(shape)), *_without(values, dim)))
    parts = [v.axes[dim] for v in values]
    if any(part is not None for part in parts):
        axes[dim] = np.concatenate([_solid(ids, v, dim) for v in values])
    return tuple(axes)


@rule("pad", "constant_pad_nd")
def pad(ids: Ids, shape: Shape, x: Value, widths: Sequence[int], *rest: Any) -> Axes:
    """The code says how many channels are added, so those stay; the others keep their ids."""
    axes: list[Axis] = []
    for i, axis in enumerate(x.axes):
        k = 2 * (len(shape) - 1 - i)
        before, after = (widths[k], widths[k + 1]) if k < len(widths) else (0, 0)
        if axis is None or before == after == 0:
            axes.append(axis)
        elif before < 0 or after < 0 or (rest and rest[0] not in ("constant", 0, 0.0)):
            ids.freeze(axis, "channels are cut or repeated by a fixed number")
            axes.append(None)
        else:
            new = ids.fresh(before + after)
            ids.freeze(new, "channels are added by a fixed number")
            axes.append(np.concatenate([new[:before], axis, new[before:]]))
    return tuple(axes)


@rule("slice.Tensor")
def take_slice(
    ids: Ids, shape: Shape, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Axes:
    """The code says which indices are taken, so a sliced channel axis stays whole; an axis taken whole passes."""
    if shape == x.shape:
        return x.axes
    axes, axis = list(x.axes), x.axes[dim]
    if axis is not None:
        ids.freeze(axis, "channels are sliced by number")
        axes[dim] = axis[slice(start, end, step)]
    return tuple(axes)


@rule("select.int", "index_select", "index.Tensor", "gather", "narrow")
def pick(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Takes indices by number: along a channel axis they must stay; `select` drops its axis."""
    if "select.int" not in ids.operation or x.axes[args[0]] is not None:
        for axis in x.axes:
            ids.freeze(axis, "channels are taken by number")
        return (None,) * len(shape)
    return tuple(axis for d, axis in enumerate(x.axes) if d != args[0] % len(x.shape))


@rule("chunk.default")
def chunk(ids: Ids, shape: Shape, x: Value, chunks: int, dim: int = 0) -> list[Axes]:
    """Equal parts stay equal when the same place goes in every part; unequal ones stay whole."""
    dim %= len(x.shape)
    axis, size = x.axes[dim], -(-x.shape[dim] // chunks)
    if axis is not None and x.shape[dim] % chunks:
        ids.freeze(axis, "channels are cut into unequal parts")
    elif axis is not None:
        ids.unite(axis, np.tile(axis[:size], chunks))
    return _split(x, dim, [size] * (x.shape[dim] // size) + ([x.shape[dim] % size] if x.shape[dim] % size else []))


@rule("split.Tensor", "split.sizes", "split_with_sizes")
def split(ids: Ids, shape: Shape, x: Value, sizes: int | Sequence[int], dim: int = 0) -> list[Axes]:
    """The code says how large the parts are, so a split channel axis stays whole."""
    dim %= len(x.shape)
    if isinstance(sizes, int):
        whole, rest = divmod(x.shape[dim], sizes)
        sizes = [sizes] * whole + ([rest] if rest else [])
    if len(sizes) > 1:
        ids.freeze(x.axes[dim], "channels are split by number")
    return _split(x, dim, sizes)


@rule("permute", "transpose.int", "t", "numpy_T", "mT", "movedim.int")
def permute(ids: Ids, shape: Shape, x: Value, *dims: Any) -> Axes:
    """Axes change places and take their ids along."""
    order = list(range(len(x.shape)))
    if len(dims) == 2:
        if "movedim" in ids.operation:
            order.insert(dims[1] % len(order), order.pop(dims[0]))
        else:
            order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    elif len(dims) == 1:
        order = list(dims[0])
    elif "mT" in ids.operation:
        order[-2:] = order[:-3:-1]
    else:
        order.reverse()
    return tuple(x.axes[d] for d in order)


@rule("expand")
def expand(ids: Ids, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """Copies along new axes and axes of size 1."""
    return elementwise(ids, shape, x)


@rule("view.default", "reshape.default", "_unsafe_view.default", "flatten", "unflatten.int", "squeeze", "unsqueeze")
def reshape(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Merged axes repeat ids; of a split axis the part marked -1 (or else the last one) carries the channels."""
    sizes = next((list(a) for a in args if isinstance(a, list | tuple)), [])
    free = sizes.index(-1) + len(shape) - len(sizes) if -1 in sizes and len(sizes) == len(shape) else -1
    axes: list[Axis] = []
    for old, new in _segments(x.shape, shape):
        merged = _merge(ids, [x.shape[i] for i in old], [x.axes[i] for i in old])
        if len(new) == 1 or merged is None:
            axes += [merged] * len(new) if merged is None or len(new) == 1 else []
            continue
        wide = [i for i in new if shape[i] > 1]
        carrier = free if free in new else wide[-1] if wide else new[-1]
        at = new.index(carrier)
        grid = np.moveaxis(merged.reshape([shape[i] for i in new]), at, 0).reshape(shape[carrier], -1)
        for column in range(1, grid.shape[1]):
            ids.unite(grid[:, 0], grid[:, column])
        axes += [grid[:, 0] if i == carrier else None for i in new]
    return tuple(axes)


@rule(
    "arange",
    "zeros",
    "ones",
    "full",
    "eye",
    "new_zeros",
    "new_ones",
    "new_full",
    "zeros_like",
    "ones_like",
    "full_like",
)
def constant(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Makes a tensor whose size the code says."""
    return (None,) * len(shape)


@rule("matmul", "mm")
def matmul(ids: Ids, shape: Shape, x: Value, weight: Value) -> Axes:
    """`x @ w` with a matrix `w` [in, out] reads axis 0 and writes axis 1; a product of activations stays whole."""
    if len(weight.shape) == 2 and x.axes:
        ids.unite(weight.axes[0], x.axes[-1])
        ids.mark(weight.axes[0], "read")
        ids.mark(weight.axes[1], "write")
        return (*x.axes[:-1], weight.axes[1])
    for axis in (*x.axes, *weight.axes):
        ids.freeze(axis, "a product of activations")
    return (None,) * len(shape)


@rule("prelu.default")
def prelu(ids: Ids, shape: Shape, x: Value, weight: Value) -> Axes:
    """One slope for all channels, or one per channel that goes with it."""
    if weight.shape[0] > 1:
        ids.unite(x.axes[1], weight.axes[0])
    else:
        ids.freeze(weight.axes[0], "one slope for all channels")
    return x.axes


def _parts(axis: Axis, groups: int) -> list[Axis]:
    return [None] if axis is None else list(axis.reshape(groups, -1))


def _solid(ids: Ids, value: Value, dim: int) -> Axis:
    """Returns the ids of an axis, new frozen ones where it never changes."""
    axis = value.axes[dim]
    if axis is None:
        axis = ids.fresh(value.shape[dim])
        ids.freeze(axis, "it stands beside channels")
    return axis


def _without(values: Sequence[Value], dim: int) -> list[Value]:
    """Hides axis `dim`, so that the other axes can be tied like those of a sum."""

    def hide(v: Value) -> Value:
        shape = tuple(-1 if i == dim else n for i, n in enumerate(v.shape))
        return Value(shape, tuple(None if i == dim else a for i, a in enumerate(v.axes)))

    return [hide(v) for v in values if len(v.shape) > 1 or v.shape[0]]


def _split(x: Value, dim: int, sizes: Sequence[int]) -> list[Axes]:
    axis, ends = x.axes[dim], np.cumsum(sizes)
    parts = [None if axis is None else axis[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [(*x.axes[:dim], part, *x.axes[dim + 1 :]) for part in parts]


def _segments(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Pairs runs of old axes with runs of new axes that hold the same number of values.

    >>> _segments((2, 8, 4, 4), (2, 2, 4, 16))
    [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    pairs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(a), j + len(b)
        while (left := prod(old[k] for k in a)) != (right := prod(new[k] for k in b)):
            if left < right:
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        pairs.append((a, b))
    return pairs


def _merge(ids: Ids, sizes: Sequence[int], axes: Sequence[Axis]) -> Axis:
    """Returns the ids of axes that become one, C order; two channel axes in one stay whole."""
    known = [i for i, axis in enumerate(axes) if axis is not None and sizes[i] > 1]
    if len(known) != 1:
        for axis in axes:
            if len(known) > 1:
                ids.freeze(axis, "two channel axes become one")
        whole = [axis for axis in axes if axis is not None]
        return whole[0] if not known and whole and prod(sizes) == 1 else None
    axis = axes[known[0]]
    assert axis is not None
    return np.tile(np.repeat(axis, prod(sizes[known[0] + 1 :])), prod(sizes[: known[0]]))
