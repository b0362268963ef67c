"""Operations that cut an axis into parts. Sizes that the code says are noted, so that they can be corrected."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fedpress.compress.prune.ids import Ids, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule


@rule("tensor_split.indices", "hsplit.array", "vsplit.array", "dsplit.array")
def split_at(ids: Ids, shape: Shape, x: Value, ends: Sequence[int], dim: int = 0) -> list[Axes]:
    """Parts that end at given places: each loses what it likes. The places are put right."""
    dim = _split_axis(ids, x, dim)
    axis, size = x.axes[dim], x.shape[dim]
    places = [min(size, end if end >= 0 else max(0, end + size)) for end in ends]
    if ids.call is None or places != sorted(places):
        ids.keep(axis, "channels are split by number")
    for i, place in enumerate(places):
        ids.note_size(i, None if axis is None or ends[i] < 0 else axis[:place])
        if ends[i] < 0:
            ids.keep(axis, "channels are split by number")
    return _parts_along(x, dim, [b - a for a, b in pairwise([0, *places, size])])


def _split_axis(ids: Ids, x: Value, dim: int) -> int:
    """Returns along which axis the present kind of splitting works."""
    name = ids.operation.split(".")[1]
    if name == "hsplit":
        return min(1, len(x.shape) - 1)
    return {"vsplit": 0, "dsplit": 2}.get(name, dim % len(x.shape))


@rule("tensor_split.sections", "hsplit.int", "vsplit.int", "dsplit.int")
def split_evenly(ids: Ids, shape: Shape, x: Value, parts: int, dim: int = 0) -> list[Axes]:
    """Equal parts lose the same places; of unequal ones the first are larger by one, and they stay whole."""
    dim = _split_axis(ids, x, dim)
    axis, (size, more) = x.axes[dim], divmod(x.shape[dim], parts)
    if axis is not None and more:
        ids.keep(axis, "channels are cut into unequal parts")
    elif axis is not None:
        ids.unite(axis, np.tile(axis[:size], parts))
    return _parts_along(x, dim, [size + 1] * more + [size] * (parts - more))


@rule("chunk.default", "glu.default")
def chunk(ids: Ids, shape: Shape, x: Value, *args: int) -> Axes | list[Axes]:
    """Equal parts stay equal when the same place goes in every part; unequal ones stay whole."""
    glu = "glu" in ids.operation
    chunks, dim = (
        (2, args[0] if args else -1) if glu else (args[0], args[1] if len(args) > 1 else 0)
    )
    dim %= len(x.shape)
    axis, size = x.axes[dim], -(-x.shape[dim] // chunks)
    if axis is not None and x.shape[dim] % chunks:
        ids.keep(axis, "channels are cut into unequal parts")
    elif axis is not None:
        ids.unite(axis, np.tile(axis[:size], chunks))
    parts = _parts_along(
        x,
        dim,
        [size] * (x.shape[dim] // size) + ([x.shape[dim] % size] if x.shape[dim] % size else []),
    )
    return parts[0] if glu else parts


@rule("split.Tensor", "split.sizes", "split_with_sizes")
def split(ids: Ids, shape: Shape, x: Value, sizes: int | Sequence[int], dim: int = 0) -> list[Axes]:
    """Parts of a list of sizes lose what they like; of one size, the same places. The sizes are put right."""
    dim %= len(x.shape)
    axis = x.axes[dim]
    if isinstance(sizes, int):
        whole, rest = divmod(x.shape[dim], sizes)
        if axis is not None and rest:
            ids.keep(axis, "channels are cut into unequal parts")
        elif axis is not None and whole > 1:
            ids.unite(axis, np.tile(axis[:sizes], whole))
        ids.note_size(0, None if axis is None else axis[:sizes])
        return _parts_along(x, dim, [sizes] * whole + ([rest] if rest else []))
    if ids.call is None:
        ids.keep(axis, "channels are split by number")
    parts = _parts_along(x, dim, sizes)
    for i, part in enumerate(parts):
        ids.note_size(i, part[dim])
    return parts


def _parts_along(x: Value, dim: int, sizes: Sequence[int]) -> list[Axes]:
    axis, ends = x.axes[dim], np.cumsum(sizes)
    parts = [
        None if axis is None else axis[end - size : end]
        for size, end in zip(sizes, ends, strict=True)
    ]
    return [(*x.axes[:dim], part, *x.axes[dim + 1 :]) for part in parts]
