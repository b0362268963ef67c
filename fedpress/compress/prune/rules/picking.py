"""Operations that take or replace a part of an axis: slices, single places, places that indices name."""

from __future__ import annotations

from typing import Any

from fedpress.compress.prune.ids import Axis, Ids, Value
from fedpress.compress.prune.rules.table import Axes, Shape, elementwise, named, rule, tie

BY_NUMBER = "channels are taken by number"


@rule("slice.Tensor")
def take_slice(
    ids: Ids,
    shape: Shape,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Axes:
    """A run of channels: where it begins and ends is put right. Every n-th channel: n neighbours go together."""
    if shape == x.shape:
        return x.axes
    dim %= len(x.shape)
    at = ids.next_slice()
    axes, axis = list(x.axes), x.axes[dim]
    if axis is None:
        return (*x.axes,)
    first, last, _ = slice(start, end, step).indices(len(axis))
    axes[dim] = axis[first:last:step]
    if step == 1 and at is not None:
        ids.note_size(at, axis[:first] if start else None)
        ids.note_size(at + 1, axis[:last] if last < len(axis) else None)
    elif first < step and last == len(axis) and len(axis) % step == 0:
        for column in axis.reshape(-1, step).T[1:]:
            ids.unite(axis[::step], column)
    else:
        ids.keep(axis, "channels are sliced by number")
    return tuple(axes)


@rule("narrow.default")
def narrow(ids: Ids, shape: Shape, x: Value, dim: int, start: int, length: int) -> Axes:
    """A run of channels: where it begins and how long it is are put right."""
    dim %= len(x.shape)
    axis = x.axes[dim]
    if axis is None or shape == x.shape:
        return x.axes
    start %= len(axis)
    if ids.call is None:
        ids.keep(axis, "channels are sliced by number")
    ids.note_size(1, axis[:start])
    ids.note_size(2, axis[start : start + length])
    return (*x.axes[:dim], axis[start : start + length], *x.axes[dim + 1 :])


@rule("select.int", "unbind.int")
def select(ids: Ids, shape: Shape, x: Value, dim: int = 0, *rest: Any) -> Axes | list[Axes]:
    """Takes one index, or each by itself, and drops the axis, which must stay; the others pass."""
    dim %= len(x.shape)
    ids.keep(x.axes[dim], BY_NUMBER)
    axes = (*x.axes[:dim], *x.axes[dim + 1 :])
    return [axes] * x.shape[dim] if "unbind" in ids.operation else axes


@rule("gather", "take_along_dim")
def gather(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Looks places up along one axis, for each place of the others, which the two tensors share."""
    given = named(ids, [x, *args], options)
    dim = given["dim"]
    index: Value = given["index"] if "index" in given else given["indices"]
    if dim is None or not x.shape:
        for axis in x.axes:
            ids.keep(axis, BY_NUMBER)
        return ()
    axes: list[Axis] = []
    for d, (axis, other) in enumerate(zip(x.axes, index.axes, strict=True)):
        spread = "take_along_dim" in ids.operation and index.shape[d] == 1
        if d != dim % len(x.shape) and (spread or x.shape[d] == index.shape[d]):
            if not spread:
                tie(ids, axis, other)
            axes.append(axis)
            continue
        for each in (axis, other):
            ids.keep(each, BY_NUMBER)
        axes.append(None)
    return tuple(axes)


@rule("one_hot")
def one_hot(ids: Ids, shape: Shape, x: Value, *rest: Any) -> Axes:
    """Classes stand in a new last axis."""
    return x.axes


@rule("searchsorted.Tensor")
def searched(ids: Ids, shape: Shape, edges: Value, x: Value, *rest: Any, **options: Any) -> Axes:
    """Says between which edges each value lies; edges of its own are looked up along the last axis."""
    for axis in edges.axes:
        ids.keep(axis, BY_NUMBER)
    if len(edges.shape) > 1:
        for axis in x.axes:
            ids.keep(axis, BY_NUMBER)
        return (None,) * len(shape)
    return x.axes


@rule("index_select", "index.Tensor", "masked_select")
def pick(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Takes indices by number: along an axis with channels they must stay; other axes pass where one is looked up."""
    looked = args[0] if args and isinstance(args[0], list | tuple) else []
    where = [d for d, index in enumerate(looked) if isinstance(index, Value)]
    if "index_select" in ids.operation:
        where, rank = [args[0] % len(x.shape)], 1
    elif "index.Tensor" in ids.operation and len(where) == 1:
        rank = len(looked[where[0]].shape)
    else:
        where, rank = list(range(len(x.shape))), -1
    for d in where:
        ids.keep(x.axes[d], BY_NUMBER)
    if rank < 0 or len(shape) != len(x.shape) - 1 + rank:
        return (None,) * len(shape)
    return (*x.axes[: where[0]], *[None] * rank, *x.axes[where[0] + 1 :])


@rule("select_scatter", "slice_scatter")
def written_part(
    ids: Ids, shape: Shape, x: Value, source: Value, dim: int = 0, *rest: Any, **options: Any
) -> Axes:
    """Puts `source` in the place of one index, or of a run of them, along an axis that must stay."""
    dim %= len(shape)
    ids.keep(x.axes[dim], BY_NUMBER)
    left = Value((*shape[:dim], *shape[dim + 1 :]), (*x.axes[:dim], *x.axes[dim + 1 :]))
    if len(source.shape) == len(shape):
        ids.keep(source.axes[dim], BY_NUMBER)
        source = Value(
            (*source.shape[:dim], *source.shape[dim + 1 :]),
            (*source.axes[:dim], *source.axes[dim + 1 :]),
        )
    axes = elementwise(ids, left.shape, left, source)
    return (*axes[:dim], None, *axes[dim:])
