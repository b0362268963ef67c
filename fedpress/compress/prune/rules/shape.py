"""Pruning rules of `cat`, `stack`, `pad`, `permute`, `expand`, `repeat`, `zeros` and similar ones.

Each index of a channel axis has an id. A rule unites the ids of channels that must be pruned
together, marks the ids of channels that must not be pruned (`ids.keep`), and returns the ids of the
output's axes.
Its argument `shape` is the shape of the output. Sizes in the user's code, such as 16 in
`zeros(n, 16)`, are recorded, so that they can be corrected after pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, ChannelIds, Ints, Value
from fedpress.compress.prune.rules.table import (
    Axes,
    Shape,
    elementwise,
    repeat_each,
    replace_entry,
    rule,
    tile,
)


@rule("cat")
def concatenate(ids: ChannelIds, shape: Shape, values: Sequence[Value], dim: int = 0) -> Axes:
    """`cat`: ids are concatenated along `dim` and united along the other axes."""
    dim %= len(shape)
    if len(shape) > 1:
        # torch skips empty tensors of shape (0,), whatever the shape of the others.
        values = [value for value in values if value.shape != (0,)]

    # The parts may have different sizes along `dim`, so that axis is not united.
    others = [_without_ids(value, dim) for value in values]
    axes = elementwise(ids, replace_entry(shape, dim, -1), *others)
    # No ids are needed along `dim` if no part has channels there.
    if all(value.axes[dim] is None for value in values):
        return axes
    parts = [_ids_or_kept(ids, value, dim) for value in values]
    return replace_entry(axes, dim, np.concatenate(parts))


def _without_ids(value: Value, dim: int) -> Value:
    """Returns `value` with an axis `dim` of unknown size."""
    return Value(replace_entry(value.shape, dim, -1), replace_entry(value.axes, dim, None))


def _ids_or_kept(ids: ChannelIds, value: Value, dim: int) -> Ints:
    """Returns the ids of axis `dim`; if it has none, new ids that are kept."""
    axis = value.axes[dim]
    if axis is None:
        axis = ids.fresh(value.shape[dim])
        ids.keep(axis, "it is concatenated with channels")
    return axis


@rule("stack")
def stack(ids: ChannelIds, shape: Shape, values: Sequence[Value], dim: int = 0) -> Axes:
    """`stack`: the new axis has no ids; the tensors' ids along the other axes are united."""
    dim %= len(shape)
    axes = elementwise(ids, values[0].shape, *values)
    return (*axes[:dim], None, *axes[dim:])


@rule("pad", "constant_pad_nd")
def pad(ids: ChannelIds, shape: Shape, x: Value, widths: Sequence[int], *rest: Any) -> Axes:
    """Padding with zeros adds channels with new ids; the widths in the code are corrected.

    Example: a ResNet shortcut pads zeros up to the width of the next stage. The new channels are
    pruned with the channels of the block that they are added to.
    """
    # Other padding modes copy channels, and the copies would have to be pruned with the channels.
    adds_zeros = not rest or rest[0] in ("constant", 0, 0.0)
    axes: list[Axis] = []
    for i, axis in enumerate(x.axes):
        # torch lists the widths from the last axis to the first: before, after, before, after, ...
        k = 2 * (len(shape) - 1 - i)
        before, after = 0, 0
        if k < len(widths):
            before, after = widths[k], widths[k + 1]

        if axis is None or before == after == 0:
            axes.append(axis)
        elif before < 0 or after < 0 or not adds_zeros:
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
def permute(ids: ChannelIds, shape: Shape, x: Value, *dims: Any) -> Axes:
    """`permute`, `transpose` and others: axes are reordered together with their ids."""
    order = list(range(len(x.shape)))
    # `transpose` and `movedim` have two axes as arguments, `permute` a full order, `t` none.
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
def expand(ids: ChannelIds, shape: Shape, x: Value, sizes: Any = (), **options: Any) -> Axes:
    """`expand`: copies `x` along new axes and axes of size 1.

    These axes get new ids. `expand_as(other)` gives them the ids of the axes of `other`.
    """
    new_axes = len(shape) - len(x.shape)
    old_shape = (1,) * new_axes + x.shape
    axes = list(elementwise(ids, shape, x))

    if isinstance(sizes, Value):  # `expand_as` takes its sizes from another tensor
        for i, size in enumerate(shape):
            if old_shape[i] == size:
                ids.unite(axes[i], sizes.axes[i])
            else:
                axes[i] = sizes.axes[i]
        return tuple(axes)

    for i, size in enumerate(shape):
        # Only an axis of size 1 is copied. All copies are equal, so any of them may be pruned.
        if old_shape[i] == 1 < size:
            axes[i] = ids.fresh(size)
            if ids.call is None:
                ids.keep(axes[i], "its size is that of another tensor")
        if isinstance(sizes, list | tuple):
            ids.note_size(i, axes[i])
    return tuple(axes)


@rule("broadcast_tensors")
def broadcast(ids: ChannelIds, shape: Shape, values: Sequence[Value]) -> Axes:
    """`broadcast_tensors`: all tensors are broadcast to one shape, and aligned ids are united."""
    return elementwise(ids, shape, *values)


@rule("repeat")
def repeat(ids: ChannelIds, shape: Shape, x: Value, times: Sequence[int]) -> Axes:
    """`repeat` copies whole axes, [a, b] -> [a, b, a, b]; a channel is pruned with its copies."""
    old = (None,) * (len(shape) - len(x.shape)) + x.axes
    return tuple(tile(axis, n) for axis, n in zip(old, times, strict=True))


@rule("repeat_interleave.self_int")
def repeat_interleave(
    ids: ChannelIds, shape: Shape, x: Value, times: int, dim: int | None = None, **options: Any
) -> Axes:
    """`repeat_interleave` copies each channel in place, [a, b] -> [a, a, b, b].

    A channel is pruned with its copies.
    """
    if dim is None:
        ids.keep_all(x.axes, "repeat_interleave without dim flattens all axes into one")
        return (None,) * len(shape)
    dim %= len(x.shape)
    return replace_entry(x.axes, dim, repeat_each(x.axes[dim], times))


@rule("pixel_shuffle.default", "pixel_unshuffle.default")
def shuffle_pixels(ids: ChannelIds, shape: Shape, x: Value, factor: int) -> Axes:
    """`pixel_shuffle`: factor^2 channels become pixels of one channel, so they are united.

    `pixel_unshuffle` makes factor^2 channels of one; all of them get its id.
    """
    # Images may come without a batch axis, so axes are counted from the end.
    axis = x.axes[-3]
    block = factor * factor
    if axis is None:
        return x.axes
    if "unshuffle" in ids.operation:
        return (*x.axes[:-3], np.repeat(axis, block), None, None)
    ids.unite(axis, np.repeat(axis[::block], block))
    return (*x.axes[:-3], axis[::block], None, None)


@rule("channel_shuffle.default", "native_channel_shuffle.default")
def shuffle_channels(ids: ChannelIds, shape: Shape, x: Value, groups: int) -> Axes:
    """`channel_shuffle` interleaves the channels of groups.

    Every group must lose the channels at the same positions in it.
    """
    axis = x.axes[1]
    if axis is None:
        return x.axes
    by_group = axis.reshape(groups, -1)
    # torch shuffles only groups of equal size.
    ids.unite(axis, np.tile(by_group[0], groups))
    return (x.axes[0], by_group.T.reshape(-1), *x.axes[2:])


@rule(
    "zeros", "ones", "full", "empty.memory_format", "new_zeros", "new_ones", "new_full", "new_empty"
)
def create_correctable(ids: ChannelIds, shape: Shape, *args: Any, **options: Any) -> Axes:
    """`zeros(n, 16)`: its axes get ids, because the sizes in the code can be corrected."""
    axes: list[Axis] = []
    for i, size in enumerate(shape):
        # Without a recorded call there is no number to correct, so the size is fixed.
        axis: Axis = None
        if ids.call is not None and size > 1:
            axis = ids.fresh(size)
        ids.note_size(i, axis)
        axes.append(axis)
    return tuple(axes)


@rule("arange", "eye", "rand", "randn", "scalar_tensor", "linspace", "tril_indices")
def create_fixed(ids: ChannelIds, shape: Shape, *args: Any, **options: Any) -> Axes:
    """`arange(16)`, `randn(n, 16)` and others: their sizes are fixed, so no axis has ids."""
    return (None,) * len(shape)
