"""Pruning rules of indexing: `x[:, 2:8]`, `x[:, 3]`, `x[:, index]`, `gather` and similar ones.

Each index of a channel axis has an id. A rule unites the ids of channels that must be pruned
together, keeps the ids of channels that cannot be pruned, and returns the ids of the output's axes.
Its argument `shape` is the shape of the output. Numbers in the user's code, such as 2 and 8, are
recorded, so that they can be corrected after pruning.
"""

from __future__ import annotations

from typing import Any

from fedpress.compress.prune.ids import Axis, ChannelIds, Value
from fedpress.compress.prune.rules.table import (
    Axes,
    Shape,
    arguments_by_name,
    elementwise,
    replace_entry,
    rule,
)

BY_NUMBER = "channels are taken by index"
"""Reason why channels are kept: their indices are written in the code or come from the input."""


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
    """Slice `x[:, start:end:step]`.

    With step 1, `start` and `end` in the code are corrected after pruning. `x[:, ::2]` over the
    whole axis can be pruned too: channels 2i and 2i + 1 are united, so `::2` still takes the right
    channels. For all other slices the axis is kept, and also for step 1 if the slice was not
    recorded in the user's code.
    """
    if shape == x.shape:
        return x.axes
    dim %= len(x.shape)
    # `x[:4, 2:]` is captured as one operation per slice, in the order of the code.
    position = ids.next_slice_start()
    axis = x.axes[dim]
    if axis is None:
        return x.axes

    first, last, _ = slice(start, end, step).indices(len(axis))
    covers_axis = first < step and last == len(axis) and len(axis) % step == 0
    if step == 1 and position is not None:
        # `x[:, :n]` has no start to correct, and `x[:, n:]` no end.
        if start:
            ids.note_size(position, axis[:first])
        if last < len(axis):
            ids.note_size(position + 1, axis[:last])
    elif covers_axis:
        for column in axis.reshape(-1, step).T[1:]:
            ids.unite(axis[::step], column)
    else:
        ids.keep(axis, "channels are sliced by number")
    return replace_entry(x.axes, dim, axis[first:last:step])


@rule("narrow.default")
def narrow(ids: ChannelIds, shape: Shape, x: Value, dim: int, start: int, length: int) -> Axes:
    """`narrow(x, dim, start, length)`: `start` and `length` in the code are corrected."""
    dim %= len(x.shape)
    axis = x.axes[dim]
    # Nothing to correct: the axis has no channels, or all of it is taken.
    if axis is None or shape == x.shape:
        return x.axes
    start %= len(axis)
    if ids.call is None:
        ids.keep(axis, "channels are sliced by number")
    taken = axis[start : start + length]
    # Position 0 is the number `dim`, which does not change.
    ids.note_size(1, axis[:start])
    ids.note_size(2, taken)
    return replace_entry(x.axes, dim, taken)


@rule("select.int", "unbind.int")
def select(ids: ChannelIds, shape: Shape, x: Value, dim: int = 0, *rest: Any) -> Axes | list[Axes]:
    """`x[:, 3]` and `unbind`: the indexed axis is kept, and the results do not have it."""
    dim %= len(x.shape)
    ids.keep(x.axes[dim], BY_NUMBER)
    axes = replace_entry(x.axes, dim)
    if "unbind" in ids.operation:
        return [axes] * x.shape[dim]
    return axes


@rule("gather", "take_along_dim")
def gather(ids: ChannelIds, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """`gather(x, dim, index)`: axis `dim` is kept.

    The other axes of `x` and `index` are united where they have the same size.
    """
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
            # `dim` itself, or an axis on which `index` is shorter than `x`: only the first indices
            # of `x` are then read.
            ids.keep_all((axis, index_axis), BY_NUMBER)
            axes.append(None)
    return tuple(axes)


@rule("one_hot")
def one_hot(ids: ChannelIds, shape: Shape, x: Value, *rest: Any) -> Axes:
    """One-hot encoding: the new last axis has no ids."""
    return x.axes


@rule("searchsorted.Tensor")
def searchsorted(
    ids: ChannelIds, shape: Shape, edges: Value, x: Value, *rest: Any, **options: Any
) -> Axes:
    """`searchsorted(edges, x)` returns in which interval of `edges` each value of `x` lies.

    `edges` is a vector, or has a row for each row of `x`. The edges are kept.
    """
    # The result is an index into `edges`, so removing an edge would change it.
    ids.keep_all(edges.axes, BY_NUMBER)
    if len(edges.shape) > 1:
        ids.keep_all(x.axes, BY_NUMBER)
        return (None,) * len(shape)
    return x.axes


@rule("index_select", "index.Tensor", "masked_select")
def index(ids: ChannelIds, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """`x[:, index]`: indexed axes are kept.

    If only one axis is indexed, the axes of `index` replace it in the result, and all other axes
    pass on their ids. If several axes are indexed, and for `masked_select`, all axes are kept.
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
        # With several indices the order of the result's axes depends on which axes are indexed, so
        # all axes are kept.
        indexed = list(range(len(x.shape)))

    ids.keep_all([x.axes[d] for d in indexed], BY_NUMBER)
    # A boolean mask of several axes is a single index too, but replaces more than one axis.
    if index_rank is None or len(shape) != len(x.shape) - 1 + index_rank:
        return (None,) * len(shape)
    return replace_entry(x.axes, indexed[0], *[None] * index_rank)


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
    """`slice_scatter(x, source, dim, 2, 8)`: axis `dim` is kept, all other axes are united."""
    dim %= len(shape)
    ids.keep(x.axes[dim], BY_NUMBER)
    others = Value(replace_entry(shape, dim), replace_entry(x.axes, dim))
    # In `slice_scatter` the source has axis `dim` too; in `select_scatter` it does not.
    if len(source.shape) == len(shape):
        ids.keep(source.axes[dim], BY_NUMBER)
        source = Value(replace_entry(source.shape, dim), replace_entry(source.axes, dim))
    axes = elementwise(ids, others.shape, others, source)
    return (*axes[:dim], None, *axes[dim:])
