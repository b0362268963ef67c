"""Operations that write to places of a tensor, which indices name: what is written and where it stands go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedpress.compress.prune.ids import Axis, Ids, Ints, Value
from fedpress.compress.prune.rules.table import Axes, Shape, elementwise, rule

BY_NUMBER = "channels are written by number"


@rule("index_put", "index_put_")
def index_put(
    ids: Ids,
    shape: Shape,
    x: Value,
    indices: Sequence[Value | None],
    source: Value,
    accumulate: bool = False,
) -> Axes:
    """`x[:, index] = source`: place index[j] of `x` and channel j of `source` are one, and the indices follow.

    Axes that no index names pass. Indices that are not the same for every input keep the axes that they name whole.
    """
    named: list[tuple[int, int, Value]] = []  # first axis, number of axes, index
    dim = 0
    for index in indices:
        width = len(index.shape) if index is not None and index.boolean else 1
        if index is not None:
            named.append((dim, width, index))
        dim += width
    places = None
    if len(named) == 1 and len(named[0][2].shape) == 1:
        places = _line(named[0][2])
    part = (
        _looked_up(ids, x, named, source)
        if places is None
        else _placed(ids, 0, x, named[0][0], places)
    )
    elementwise(ids, part.shape, part, source)
    return x.axes


def _looked_up(ids: Ids, x: Value, named: Sequence[tuple[int, int, Value]], source: Value) -> Value:
    """Returns what several indices, or unknown ones, take of `x`: their own axes come where the first of them is."""
    taken = {at + d for at, width, _ in named for d in range(width)}
    for d in taken:
        ids.keep(x.axes[d], BY_NUMBER)
    rank = max(1 if index.boolean else len(index.shape) for _, _, index in named)
    # torch puts the new axes first where others stand between those that are looked up.
    together = taken == set(range(min(taken), max(taken) + 1))
    first = min(taken) if together else 0
    before = [d for d in range(len(x.shape)) if d not in taken and d < first]
    after = [d for d in range(len(x.shape)) if d not in taken and d >= first]
    end = len(source.shape) - len(after)
    new = [source.shape[d] if d >= 0 else 1 for d in range(end - rank, end)]
    return Value(
        (*(x.shape[d] for d in before), *new, *(x.shape[d] for d in after)),
        (*(x.axes[d] for d in before), *[None] * rank, *(x.axes[d] for d in after)),
    )


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
    ids: Ids, shape: Shape, x: Value, dim: int, index: Value, source: Any, *rest: Any, **how: Any
) -> Axes:
    """Slice j of `source` along `dim` goes to place index[j] of `x`: they are one, and the indices follow."""
    dim %= max(len(x.shape), 1)
    places = _line(index)
    written = source if isinstance(source, Value) else Value((), ())
    if places is None:
        ids.keep(x.axes[dim], BY_NUMBER)
        size = written.shape[dim] if written.shape else 1
        part = Value(_with(x.shape, dim, size), _with(x.axes, dim, None))
    else:
        part = _placed(ids, 0, x, dim, places)
    elementwise(ids, part.shape, part, written)
    return x.axes


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def scatter(
    ids: Ids,
    shape: Shape,
    x: Value,
    dim: int,
    index: Value,
    source: Any = None,
    *rest: Any,
    **how: Any,
) -> Axes:
    """`source` at [i, j] goes to [i, index[i, j]]: the two are one channel where the index is the same for every i.

    Else `dim` stays whole. Along the other axes `x`, index and `source` go together.
    """
    dim %= max(len(x.shape), 1)
    source = next((v for v in (source, how.get("src")) if isinstance(v, Value) and v.shape), None)
    parts = [index] if source is None else [index, source]
    if any(part.shape[d] != x.shape[d] for part in parts for d in range(len(x.shape)) if d != dim):
        for value in (x, *parts):  # a part of the other axes, by number
            for axis in value.axes:
                ids.keep(axis, BY_NUMBER)
        return x.axes
    places = _line(index, dim)
    if places is not None and (source is None or source.shape[dim] == len(places)):
        part = _placed(ids, dim, x, dim, places)
    else:
        for value in (x, *parts):
            ids.keep(value.axes[dim], BY_NUMBER)
        part = Value(_with(x.shape, dim, index.shape[dim]), _with(x.axes, dim, None))
    plain = Value(
        index.shape, _with(index.axes, dim, part.axes[dim])
    )  # its own places are exchanged, not cut
    elementwise(ids, part.shape, part, plain, *([] if source is None else [source]))
    return x.axes


@rule("masked_scatter", "masked_scatter_")
def masked_scatter(ids: Ids, shape: Shape, x: Value, mask: Value, source: Value) -> Axes:
    """A mask without extent along the last axis takes or leaves whole rows of `source`, however wide they are."""
    rows = bool(mask.shape) and mask.shape[-1] == 1 and source.shape[-1:] == x.shape[-1:]
    for value in (x, mask, source):
        for axis in value.axes[:-1] if rows else value.axes:
            ids.keep(axis, BY_NUMBER)
    if rows and (x.axes[-1] is not None or source.axes[-1] is not None):
        ids.unite(x.axes[-1], source.axes[-1])
    return x.axes


def _placed(ids: Ids, dim: int, x: Value, at: int, places: Ints) -> Value:
    """Returns the part of `x` at `places` of its axis `at`; the indices, along their `dim`, follow that axis."""
    axis: Axis = x.axes[at]
    if axis is not None:
        places = np.where(places < 0, places + len(axis), places)
        ids.note_indices(dim, axis, places)
        axis = axis[places]
    return Value(_with(x.shape, at, len(places)), _with(x.axes, at, axis))


def _line(index: Value, dim: int = 0) -> Ints | None:
    """Returns the places that indices name along `dim`; None if they depend on the input, or differ across it."""
    known = index.known
    if known is None or not known.dim() or not known.numel():
        return None
    if known.dtype == torch.bool:
        return np.asarray(known.nonzero().flatten()) if known.dim() == 1 else None
    lines = known.movedim(dim, 0).reshape(known.shape[dim], -1)
    return np.asarray(lines[:, 0], dtype=np.int64) if bool((lines == lines[:, :1]).all()) else None


def _with(values: Sequence[Any], at: int, new: Any) -> tuple[Any, ...]:
    return (*values[:at], new, *values[at + 1 :])
