"""Pruning rules of writes by index: `x[:, index] = y`, `index_copy`, `scatter` and similar ones.

Channel j of `y` and channel index[j] of `x` are united (they are pruned together), and the indices
are renumbered after pruning. This needs indices that are the same for every input; otherwise the
channels are kept (they cannot be pruned). Each index of a channel axis has an id. A rule returns
the ids of the output's axes, which are those of `x`; its argument `shape` is the output's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedpress.compress.prune.ids import Axis, ChannelIds, Ints, Value
from fedpress.compress.prune.rules.table import (
    Axes,
    Shape,
    elementwise,
    replace_entry,
    rule,
    without_last_axes,
)

BY_NUMBER = "channels are written by index"
"""Reason why channels are kept: the indices cannot be renumbered after pruning."""


@rule("index_put", "index_put_")
def index_put(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    indices: Sequence[Value | None],
    source: Value,
    accumulate: bool = False,
) -> Axes:
    """`x[:, index] = source`: channel index[j] of `x` and channel j of `source` are united.

    On axes without an index, `x` and `source` are united. Indexed axes are kept if there are
    several indices, or if the index depends on the input or is not a vector.
    """
    # `x[:, index]` has the indices [None, index]: a missing index also counts as one axis.
    indexed: list[tuple[int, int, Value]] = []  # first axis, number of axes, index
    dim = 0
    for index in indices:
        width = 1
        if index is not None:
            # A boolean mask replaces as many axes as it has; a tensor of integers replaces one.
            if index.is_boolean:
                width = len(index.shape)
            indexed.append((dim, width, index))
        dim += width

    at, _, index = indexed[0]
    places = None
    if len(indexed) == 1 and len(index.shape) == 1:
        places = _constant_places(index)
    if places is None:
        part = _indexed_part(ids, x, indexed, source)
    else:
        part = _part_at_places(ids, 0, x, at, places)
    elementwise(ids, part.shape, part, source)
    return x.axes


def _indexed_part(
    ids: ChannelIds, x: Value, indexed: Sequence[tuple[int, int, Value]], source: Value
) -> Value:
    """Returns the part of `x` that is written to, if its indices cannot be renumbered.

    The indexed axes are kept. The part has the axes of the indices in their place, without ids.
    """
    taken, rank = _taken_axes(indexed)
    ids.keep_all([x.axes[d] for d in taken], BY_NUMBER)

    # As in numpy, the new axes come first if the indexed axes are not adjacent.
    is_adjacent = taken[-1] - taken[0] == len(taken) - 1
    first = taken[0] if is_adjacent else 0
    others = [d for d in range(len(x.shape)) if d not in taken]
    before = [d for d in others if d < first]
    after = others[len(before) :]

    # The new axes have the sizes of the source's axes, or 1 where the source is broadcast.
    end = len(source.shape) - len(after)
    new = []
    for d in range(end - rank, end):
        new.append(source.shape[d] if d >= 0 else 1)
    front, back = _axes_of(x, before), _axes_of(x, after)
    shape = (*front.shape, *new, *back.shape)
    return Value(shape, (*front.axes, *[None] * rank, *back.axes))


def _taken_axes(indexed: Sequence[tuple[int, int, Value]]) -> tuple[list[int], int]:
    """Returns the axes that are indexed, rising, and the number of axes that replace them."""
    taken: list[int] = []
    rank = 0
    for at, width, index in indexed:
        taken += range(at, at + width)
        # A mask selects a single list of places, however many axes it has.
        rank = max(rank, 1 if index.is_boolean else len(index.shape))
    return taken, rank


def _axes_of(x: Value, dims: Sequence[int]) -> Value:
    """Returns shape and ids of `x` for the axes `dims` only."""
    return Value(tuple(x.shape[d] for d in dims), tuple(x.axes[d] for d in dims))


@rule(
    "index_copy",
    "index_copy_",
    "index_add",
    "index_add_",
    "index_reduce",
    "index_reduce_",
    "index_fill",
    "index_fill_",
)
def index_copy(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    dim: int,
    index: Value,
    source: Any,
    *rest: Any,
    **options: Any,
) -> Axes:
    """`x.index_copy_(dim, index, source)` writes slice j of `source` to slice index[j] of `x`.

    These slices are united. If `index` depends on the input, axis `dim` of `x` is kept.
    """
    # torch accepts dim 0 for a 0-d tensor.
    dim %= max(len(x.shape), 1)
    places = _constant_places(index)
    written = source
    if not isinstance(source, Value):  # `index_fill` takes a number
        written = Value((), ())
    if places is None:
        ids.keep(x.axes[dim], BY_NUMBER)
        size = 1
        if written.shape:
            size = written.shape[dim]
        part = Value(replace_entry(x.shape, dim, size), replace_entry(x.axes, dim, None))
    else:
        part = _part_at_places(ids, 0, x, dim, places)
    elementwise(ids, part.shape, part, written)
    return x.axes


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def scatter(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    dim: int,
    index: Value,
    source: Any = None,
    *rest: Any,
    **options: Any,
) -> Axes:
    """`scatter(x, 1, index, source)` writes source[i, j] to x[i, index[i, j]].

    If all rows of `index` are equal, channel j of `source` and channel index[0, j] of `x` are
    united; otherwise `dim` is kept. Along the other axes all three tensors are united. If their
    sizes there differ, all axes are kept.
    """
    dim %= max(len(x.shape), 1)
    # ATen calls the source `src` in some overloads; in others it is a plain number.
    if not isinstance(source, Value):
        source = options.get("src")
    if not isinstance(source, Value) or not source.shape:
        source = None
    written = [index]
    if source is not None:
        written.append(source)

    if not all(_same_other_axes(x, part, dim) for part in written):
        # `index` is shorter than `x` on another axis, where only the first indices are written.
        for value in (x, *written):
            ids.keep_all(value.axes, BY_NUMBER)
        return x.axes

    places = _constant_places(index, dim)
    if places is not None and (source is None or source.shape[dim] == len(places)):
        part = _part_at_places(ids, dim, x, dim, places)
    else:
        for value in (x, *written):
            ids.keep(value.axes[dim], BY_NUMBER)
        part = Value(
            replace_entry(x.shape, dim, index.shape[dim]), replace_entry(x.axes, dim, None)
        )

    # Along `dim` the index gets the ids of the channels that it selects: entries of pruned channels
    # are dropped, the others renumbered.
    index = Value(index.shape, replace_entry(index.axes, dim, part.axes[dim]))
    elementwise(ids, part.shape, part, index, *written[1:])
    return x.axes


def _same_other_axes(x: Value, part: Value, dim: int) -> bool:
    """Returns whether `part` has the sizes of `x` on all axes but `dim`."""
    rank = len(x.shape)
    return replace_entry(part.shape[:rank], dim) == replace_entry(x.shape, dim)


@rule("masked_scatter", "masked_scatter_")
def masked_scatter(ids: ChannelIds, shape: Shape, x: Value, mask: Value, source: Value) -> Axes:
    """Writes the values of `source`, in order, to the places where `mask` is true.

    If the mask has size 1 along the last axis, it selects whole rows, so the last axis can lose
    channels. All other axes are kept: the place of a value depends on the number of true entries
    before it.
    """
    whole_rows = bool(mask.shape) and mask.shape[-1] == 1 and source.shape[-1:] == x.shape[-1:]
    for value in (x, mask, source):
        if whole_rows:
            value = without_last_axes(value, 1)
        ids.keep_all(value.axes, BY_NUMBER)
    if whole_rows:
        ids.unite(x.axes[-1], source.axes[-1])
    return x.axes


def _part_at_places(ids: ChannelIds, dim: int, x: Value, at: int, places: Ints) -> Value:
    """Returns the part of `x` at `places` of its axis `at`; records the indices for renumbering.

    Args:
        ids: the collector of united and kept ids.
        dim: the axis of the tensor of indices along which the indices differ.
        x: the tensor that is written to.
        at: the indexed axis of `x`.
        places: the indices on that axis; negative ones count from the end.
    """
    axis: Axis = x.axes[at]
    if axis is not None:
        places = np.where(places < 0, places + len(axis), places)
        ids.note_indices(dim, axis, places)
        axis = axis[places]
    return Value(replace_entry(x.shape, at, len(places)), replace_entry(x.axes, at, axis))


def _constant_places(index: Value, dim: int = 0) -> Ints | None:
    """Returns the indices along `dim`, if they are the same for every input.

    None if they depend on the input, or differ along the other dimensions of `index`.
    """
    # An index that depends on the input cannot be renumbered when the model is pruned.
    constant = index.constant
    if constant is None or not constant.dim() or not constant.numel():
        return None
    if constant.dtype == torch.bool and constant.dim() > 1:
        return None
    if constant.dtype == torch.bool:
        return np.asarray(constant.nonzero().flatten())
    lines = constant.movedim(dim, 0).reshape(constant.shape[dim], -1)
    if not bool((lines == lines[:, :1]).all()):
        return None
    return np.asarray(lines[:, 0], dtype=np.int64)
