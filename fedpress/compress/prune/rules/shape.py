"""Operations that move, join, copy and make axes. Sizes that the code says are noted, so that they can be corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, Ids, Ints, Value
from fedpress.compress.prune.rules.table import Axes, Shape, elementwise, rule, tie


@rule("cat")
def concatenate(ids: Ids, shape: Shape, values: Sequence[Value], dim: int = 0) -> Axes:
    """Ids stand one after the other along `dim` and are tied along the other axes."""
    dim %= len(shape)
    values = [
        v for v in values if v.shape != (0,) or len(shape) == 1
    ]  # the empty beginning of a list: torch skips it
    axes = list(
        elementwise(
            ids, tuple(-1 if i == dim else n for i, n in enumerate(shape)), *_hide_axis(values, dim)
        )
    )
    parts = [v.axes[dim] for v in values]
    if any(part is not None for part in parts):
        axes[dim] = np.concatenate([_ids_or_new(ids, v, dim) for v in values])
    return tuple(axes)


@rule("stack")
def stack(ids: Ids, shape: Shape, values: Sequence[Value], dim: int = 0) -> Axes:
    """A new axis that never changes; the others are tied."""
    dim %= len(shape)
    axes = list(elementwise(ids, values[0].shape, *values))
    return (*axes[:dim], None, *axes[dim:])


@rule("pad", "constant_pad_nd")
def pad(ids: Ids, shape: Shape, x: Value, widths: Sequence[int], *rest: Any) -> Axes:
    """Added channels have ids of their own and can go with what they meet; the numbers are put right."""
    axes: list[Axis] = []
    for i, axis in enumerate(x.axes):
        k = 2 * (len(shape) - 1 - i)
        before, after = (widths[k], widths[k + 1]) if k < len(widths) else (0, 0)
        if axis is None or before == after == 0:
            axes.append(axis)
        elif before < 0 or after < 0 or (rest and rest[0] not in ("constant", 0, 0.0)):
            ids.keep(axis, "channels are cut or repeated by a fixed number")
            axes.append(None)
        else:
            new = ids.fresh(before + after)
            if ids.call is None:
                ids.keep(new, "channels are added by a fixed number")
            ids.note_size(k, new[:before])
            ids.note_size(k + 1, new[before:])
            axes.append(np.concatenate([new[:before], axis, new[before:]]))
    return tuple(axes)


@rule("permute", "transpose.int", "t", "numpy_T", "mT", "movedim.int", "swapaxes", "adjoint")
def permute(ids: Ids, shape: Shape, x: Value, *dims: Any) -> Axes:
    """Axes change places and take their ids along."""
    order = list(range(len(x.shape)))
    name = ids.operation.split(".")[1]
    if len(dims) == 2:
        if name == "movedim":
            order.insert(dims[1] % len(order), order.pop(dims[0]))
        else:
            order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    elif len(dims) == 1:
        order = list(dims[0])
    elif name in ("mT", "adjoint"):
        order[-2:] = order[:-3:-1]
    else:
        order.reverse()
    return tuple(x.axes[d] for d in order)


@rule("expand", "expand_as", "broadcast_to")
def expand(ids: Ids, shape: Shape, x: Value, sizes: Any = (), **options: Any) -> Axes:
    """Copies along new axes and axes of size 1, which may become fewer copies."""
    new = len(shape) - len(x.shape)
    old = (1,) * new + x.shape
    like = sizes if isinstance(sizes, Value) else None  # `expand_as`
    axes: list[Axis] = list(elementwise(ids, shape, x))
    for i, size in enumerate(shape):
        if like is not None and old[i] == size:
            tie(ids, axes[i], like.axes[i])
        elif like is not None:
            axes[i] = like.axes[i]
        elif old[i] == 1 < size:
            axes[i] = ids.fresh(size)
            if ids.call is None:
                ids.keep(axes[i], "its size is that of another tensor")
        if isinstance(sizes, list | tuple):
            ids.note_size(i, axes[i])
    return tuple(axes)


@rule("broadcast_tensors")
def broadcast(ids: Ids, shape: Shape, values: Sequence[Value]) -> Axes:
    """All get one shape."""
    return elementwise(ids, shape, *values)


@rule("repeat")
def repeat(ids: Ids, shape: Shape, x: Value, times: Sequence[int]) -> Axes:
    """Copies stand one after the other; a channel goes with its copies."""
    new = len(shape) - len(x.shape)
    old = (None,) * new + x.axes
    return tuple(
        None if axis is None else np.tile(axis, n) for axis, n in zip(old, times, strict=True)
    )


@rule("repeat_interleave.self_int")
def interleave(
    ids: Ids, shape: Shape, x: Value, times: int, dim: int | None = None, **options: Any
) -> Axes:
    """Copies stand beside each other; a channel goes with its copies."""
    if dim is None:
        for axis in x.axes:
            ids.keep(axis, "channels are taken by number")
        return (None,) * len(shape)
    dim %= len(x.shape)
    axis = x.axes[dim]
    return (*x.axes[:dim], None if axis is None else np.repeat(axis, times), *x.axes[dim + 1 :])


@rule("pixel_shuffle.default", "pixel_unshuffle.default")
def shuffle_pixels(ids: Ids, shape: Shape, x: Value, factor: int) -> Axes:
    """The channels that become pixels of one channel go together, and the other way round."""
    axis, block = x.axes[-3], factor * factor
    if axis is None:
        return x.axes
    if "unshuffle" in ids.operation:
        return (*x.axes[:-3], np.repeat(axis, block), None, None)
    ids.unite(axis, np.repeat(axis[::block], block))
    return (*x.axes[:-3], axis[::block], None, None)


@rule("channel_shuffle.default", "native_channel_shuffle.default")
def shuffle_channels(ids: Ids, shape: Shape, x: Value, groups: int) -> Axes:
    """Every group loses the same places."""
    axis = x.axes[1]
    if axis is None:
        return x.axes
    table = axis.reshape(groups, -1)
    ids.unite(axis, np.tile(table[0], groups))
    return (x.axes[0], table.T.reshape(-1), *x.axes[2:])


@rule(
    "zeros", "ones", "full", "empty.memory_format", "new_zeros", "new_ones", "new_full", "new_empty"
)
def uniform(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Makes a tensor whose sizes the code says; they are put right."""
    axes: list[Axis] = [
        ids.fresh(size) if ids.call is not None and size > 1 else None for size in shape
    ]
    for i, axis in enumerate(axes):
        ids.note_size(i, axis)
    return tuple(axes)


@rule("arange", "eye", "rand", "randn", "scalar_tensor", "linspace", "tril_indices")
def constant(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Makes a tensor whose sizes must stay."""
    return (None,) * len(shape)


def _ids_or_new(ids: Ids, value: Value, dim: int) -> Ints:
    """Returns the ids of an axis, new frozen ones where it never changes."""
    axis = value.axes[dim]
    if axis is None:
        axis = ids.fresh(value.shape[dim])
        ids.keep(axis, "it stands beside channels")
    return axis


def _hide_axis(values: Sequence[Value], dim: int) -> list[Value]:
    """Hides axis `dim`, so that the other axes can be tied like those of a sum."""

    def hide(v: Value) -> Value:
        shape = tuple(-1 if i == dim else n for i, n in enumerate(v.shape))
        return Value(shape, tuple(None if i == dim else a for i, a in enumerate(v.axes)))

    return [hide(v) for v in values if len(v.shape) > 1 or v.shape[0]]
