"""Operations that write to places of a tensor: a channel and its place are pruned together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedpress.compress.prune.ids import Axis, ChannelIds, Ints, Value
from fedpress.compress.prune.rules.table import Axes, Shape, elementwise, leading, replaced, rule

BY_NUMBER = "channels are written by number"


@rule("index_put", "index_put_")
def index_put(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    indices: Sequence[Value | None],
    source: Value,
    accumulate: bool = False,
) -> Axes:
    """`x[:, index] = source`: place index[j] of `x` and channel j of `source` are one channel.

    The indices are renumbered when channels are pruned. Axes that no index names are united. An
    axis whose indices depend on the input is kept.
    """
    # An index may be missing (`x[:, index]`), so its axis is counted along.
    indexed: list[tuple[int, int, Value]] = []  # first axis, number of axes, index
    dim = 0
    for index in indices:
        width = 1
        if index is not None:
            # A mask of bools takes as many axes as it has; a tensor of numbers takes one.
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
    """Returns the part of `x` that several indices, or indices unknown before the run, select.

    The axes of the indices have no ids. They stand where the first indexed axis was.
    """
    taken, rank = _taken_axes(indexed)
    ids.keep_all([x.axes[d] for d in taken], BY_NUMBER)

    # As in numpy, the new axes come first if other axes stand between the indexed ones.
    is_adjacent = taken[-1] - taken[0] == len(taken) - 1
    first = taken[0] if is_adjacent else 0
    others = [d for d in range(len(x.shape)) if d not in taken]
    before = [d for d in others if d < first]
    after = others[len(before) :]

    # The sizes of the new axes are those of `source`, or 1 where it is broadcast over them.
    end = len(source.shape) - len(after)
    new = [source.shape[d] if d >= 0 else 1 for d in range(end - rank, end)]
    front, back = _axes_of(x, before), _axes_of(x, after)
    shape = (*front.shape, *new, *back.shape)
    return Value(shape, (*front.axes, *[None] * rank, *back.axes))


def _taken_axes(indexed: Sequence[tuple[int, int, Value]]) -> tuple[list[int], int]:
    """Returns the axes that indices take, rising, and the number of axes that take their place."""
    taken: list[int] = []
    rank = 0
    for at, width, index in indexed:
        taken += range(at, at + width)
        # A mask selects a single list of places, however many axes it has.
        rank = max(rank, 1 if index.is_boolean else len(index.shape))
    return taken, rank


def _axes_of(x: Value, dims: Sequence[int]) -> Value:
    """Returns `x` as if it had only the axes `dims`."""
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
    """Slice j of `source` along `dim` goes to place index[j] of `x`: the two are one channel."""
    # A number without axes has a dimension 0 in torch.
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
        part = Value(replaced(x.shape, dim, size), replaced(x.axes, dim, None))
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
    """`source` at [i, j] goes to [i, index[i, j]] of `x`: one channel if all rows have one index.

    Otherwise `dim` is kept. Along the other axes `x`, index and `source` are united.
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
        # The index covers only the first places of another axis, so those are selected by number.
        for value in (x, *written):
            ids.keep_all(value.axes, BY_NUMBER)
        return x.axes

    places = _constant_places(index, dim)
    if places is not None and (source is None or source.shape[dim] == len(places)):
        part = _part_at_places(ids, dim, x, dim, places)
    else:
        for value in (x, *written):
            ids.keep(value.axes[dim], BY_NUMBER)
        part = Value(replaced(x.shape, dim, index.shape[dim]), replaced(x.axes, dim, None))

    # Along `dim` the index is renumbered, not pruned, so there it has the ids of what it selects.
    index = Value(index.shape, replaced(index.axes, dim, part.axes[dim]))
    elementwise(ids, part.shape, part, index, *written[1:])
    return x.axes


def _same_other_axes(x: Value, part: Value, dim: int) -> bool:
    """Returns whether `part` has the sizes of `x` on all axes but `dim`."""
    rank = len(x.shape)
    return replaced(part.shape[:rank], dim) == replaced(x.shape, dim)


@rule("masked_scatter", "masked_scatter_")
def masked_scatter(ids: ChannelIds, shape: Shape, x: Value, mask: Value, source: Value) -> Axes:
    """Writes the next values of `source` to the places where `mask` is true.

    A mask of size 1 along the last axis takes or leaves whole rows, so the last axis can lose
    channels. All other axes are kept: where a value goes depends on how many are true before it.
    """
    whole_rows = bool(mask.shape) and mask.shape[-1] == 1 and source.shape[-1:] == x.shape[-1:]
    for value in (x, mask, source):
        if whole_rows:
            value = leading(value, 1)
        ids.keep_all(value.axes, BY_NUMBER)
    if whole_rows:
        ids.unite(x.axes[-1], source.axes[-1])
    return x.axes


def _part_at_places(ids: ChannelIds, dim: int, x: Value, at: int, places: Ints) -> Value:
    """Returns the part of `x` at `places` of its axis `at`.

    The indices in the code, which name these places along their dimension `dim`, follow that axis.
    """
    axis: Axis = x.axes[at]
    if axis is not None:
        places = np.where(places < 0, places + len(axis), places)
        ids.note_indices(dim, axis, places)
        axis = axis[places]
    return Value(replaced(x.shape, at, len(places)), replaced(x.axes, at, axis))


def _constant_places(index: Value, dim: int = 0) -> Ints | None:
    """Returns the places that indices name along `dim`, if they are the same for every input.

    None if they depend on the input, or differ along the index's other dimensions.
    """
    # Only an index that is the same for every input can be renumbered once and for all.
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
