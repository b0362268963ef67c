"""Operations that take a part of an axis: slices, single indices, and tensors of indices."""

from __future__ import annotations

from typing import Any

from fedpress.compress.prune.ids import Axis, ChannelIds, Value
from fedpress.compress.prune.rules.table import (
    Axes,
    Shape,
    arguments_by_name,
    elementwise,
    replaced,
    rule,
)

BY_NUMBER = "channels are taken by number"


@rule("slice.Tensor")
def take_slice(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Axes:
    """Takes every `step`-th channel between two places.

    With step 1 the two places in the code are corrected after pruning. `x[:, ::2]` over the whole
    axis is allowed too: two neighbours are then one channel, so that every second place stays
    right.
    """
    if shape == x.shape:
        return x.axes
    dim %= len(x.shape)
    # Each slice of an indexing is an operation of its own, in the order of the code.
    position = ids.next_slice_start()
    axis = x.axes[dim]
    if axis is None:
        return x.axes

    first, last, _ = slice(start, end, step).indices(len(axis))
    covers_axis = first < step and last == len(axis) and len(axis) % step == 0
    if step == 1 and position is not None:
        # `x[:, :n]` has no start that could be wrong, and `x[:, n:]` no end.
        if start:
            ids.note_size(position, axis[:first])
        if last < len(axis):
            ids.note_size(position + 1, axis[:last])
    elif covers_axis:
        for column in axis.reshape(-1, step).T[1:]:
            ids.unite(axis[::step], column)
    else:
        ids.keep(axis, "channels are sliced by number")
    return replaced(x.axes, dim, axis[first:last:step])


@rule("narrow.default")
def narrow(ids: ChannelIds, shape: Shape, x: Value, dim: int, start: int, length: int) -> Axes:
    """Takes `length` channels from `start` on; both numbers in the code are corrected."""
    dim %= len(x.shape)
    axis = x.axes[dim]
    # Nothing to correct: the axis has no channels, or all of it is taken.
    if axis is None or shape == x.shape:
        return x.axes
    start %= len(axis)
    if ids.call is None:
        ids.keep(axis, "channels are sliced by number")
    taken = axis[start : start + length]
    # Position 0 is the axis, which does not change.
    ids.note_size(1, axis[:start])
    ids.note_size(2, taken)
    return replaced(x.axes, dim, taken)


@rule("select.int", "unbind.int")
def select(ids: ChannelIds, shape: Shape, x: Value, dim: int = 0, *rest: Any) -> Axes | list[Axes]:
    """Takes one index of an axis, or each by itself: the axis is kept, and the result lacks it."""
    dim %= len(x.shape)
    ids.keep(x.axes[dim], BY_NUMBER)
    axes = replaced(x.axes, dim)
    if "unbind" in ids.operation:
        return [axes] * x.shape[dim]
    return axes


@rule("gather", "take_along_dim")
def gather(ids: ChannelIds, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Looks up places along one axis, for each place of the others; the two tensors share those."""
    given = arguments_by_name(ids, [x, *args], options)
    dim = given["dim"]
    index: Value = given["index"] if "index" in given else given["indices"]
    if dim is None or not x.shape:
        ids.keep_all(x.axes, BY_NUMBER)
        return ()

    dim %= len(x.shape)
    may_broadcast = "take_along_dim" in ids.operation  # `gather` never broadcasts its index
    axes: list[Axis] = []
    for d, (axis, index_axis) in enumerate(zip(x.axes, index.axes, strict=True)):
        is_broadcast = may_broadcast and index.shape[d] == 1
        if d != dim and is_broadcast:
            axes.append(axis)
        elif d != dim and x.shape[d] == index.shape[d]:
            ids.unite(axis, index_axis)
            axes.append(axis)
        else:
            # The looked-up axis, or one of which the index covers only the first places.
            ids.keep_all((axis, index_axis), BY_NUMBER)
            axes.append(None)
    return tuple(axes)


@rule("one_hot")
def one_hot(ids: ChannelIds, shape: Shape, x: Value, *rest: Any) -> Axes:
    """Classes stand in a new last axis without ids."""
    return x.axes


@rule("searchsorted.Tensor")
def searched(
    ids: ChannelIds, shape: Shape, edges: Value, x: Value, *rest: Any, **options: Any
) -> Axes:
    """Finds between which of the sorted `edges` each value lies.

    `edges` is one row, or has a row for each row of `x`.
    """
    # Without an edge the result, an index into the edges, would be another one.
    ids.keep_all(edges.axes, BY_NUMBER)
    if len(edges.shape) > 1:
        ids.keep_all(x.axes, BY_NUMBER)
        return (None,) * len(shape)
    return x.axes


@rule("index_select", "index.Tensor", "masked_select")
def index(ids: ChannelIds, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Takes the places that indices name: an axis that is indexed is kept.

    If one axis alone is indexed, the axes of the indices take its place and all other axes keep
    their ids.
    """
    indices = args[0] if args and isinstance(args[0], list | tuple) else []
    indexed = [d for d, index in enumerate(indices) if isinstance(index, Value)]
    index_rank = None
    if "index_select" in ids.operation:
        indexed = [args[0] % len(x.shape)]
        index_rank = 1
    elif "index.Tensor" in ids.operation and len(indexed) == 1:
        index_rank = len(indices[indexed[0]].shape)
    else:
        # Several indices select together, so it is not known where any other axis ends up.
        indexed = list(range(len(x.shape)))

    ids.keep_all([x.axes[d] for d in indexed], BY_NUMBER)
    # A mask of several axes is a single index too, but takes the place of more than one axis.
    if index_rank is None or len(shape) != len(x.shape) - 1 + index_rank:
        return (None,) * len(shape)
    return replaced(x.axes, indexed[0], *[None] * index_rank)


@rule("select_scatter", "slice_scatter")
def overwrite_part(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    source: Value,
    dim: int = 0,
    *rest: Any,
    **options: Any,
) -> Axes:
    """Writes `source` over one index, or a run of indices, of an axis, which is kept."""
    dim %= len(shape)
    ids.keep(x.axes[dim], BY_NUMBER)
    others = Value(replaced(shape, dim), replaced(x.axes, dim))
    # `slice_scatter` writes a run of indices, `select_scatter` a single one.
    if len(source.shape) == len(shape):  # a run of indices; a single one has no such axis
        ids.keep(source.axes[dim], BY_NUMBER)
        source = Value(replaced(source.shape, dim), replaced(source.axes, dim))
    axes = elementwise(ids, others.shape, others, source)
    return (*axes[:dim], None, *axes[dim:])
