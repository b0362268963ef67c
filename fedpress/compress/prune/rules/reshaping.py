"""Reshapes: of an axis that becomes several, and of several that become one, one axis loses whole slices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, Ids, Ints, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule, tie


@rule(
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "flatten",
    "unflatten.int",
    "squeeze",
    "unsqueeze",
)
@rule("view_as", "reshape_as", "ravel")
def reshape(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Of an axis that is cut into several, and of several that become one, one loses whole slices."""
    axes: list[Axis] = []
    noted: list[
        tuple[Ints, bool] | None
    ] = []  # of each new axis: the ids of its length, and whether a multiple
    for old, new in _segments(x.shape, shape):
        if len(old) == len(new) == 1:
            axis = x.axes[old[0]]
            axes.append(axis)
            noted.append(None if axis is None else (axis, False))
            continue
        for pieces in _pieces(ids, [(x.shape[i], x.axes[i]) for i in old], [shape[i] for i in new]):
            axis, elements = _join(ids, pieces)
            axes.append(axis)
            known = axis is not None and elements is not None
            noted.append((elements, len(axis) != len(elements)) if known else None)  # type: ignore[arg-type]
    for like in (a for a in args if isinstance(a, Value)):  # `view_as`
        for axis, other in zip(axes, like.axes, strict=True):
            tie(ids, axis, other)
    if "squeeze" not in ids.operation:
        _note_sizes(ids, x, args, noted)
    return tuple(axes)


def _note_sizes(
    ids: Ids, x: Value, args: Sequence[Any], noted: Sequence[tuple[Ints, bool] | None]
) -> None:
    """Notes the numbers of the call: `unflatten` has its axis before them, and sizes from that axis on."""
    unflatten = "unflatten" in ids.operation
    first = args[0] % len(x.shape) if unflatten else 0
    sizes = next((list(a) for a in args if isinstance(a, list | tuple)), [])
    for j in range(len(sizes)):
        known = noted[first + j]
        if known is not None:
            axis, multiple = known
            ids.note_size(j + int(unflatten), axis, multiple=multiple)


@rule("view.dtype")
def reinterpret(ids: Ids, shape: Shape, x: Value, kind: Any) -> Axes:
    """The same bits as another type; of another width they are other numbers along the last axis."""
    if shape == x.shape:
        return x.axes
    ids.keep(x.axes[-1], "bits become other numbers")
    return x.axes[:-1]


@rule("view_as_real", "view_as_complex")
def pairs_of_numbers(ids: Ids, shape: Shape, x: Value) -> Axes:
    """The real and the imaginary part stand in a last axis, or become one number."""
    if len(shape) < len(x.shape):
        ids.keep(x.axes[-1], "real and imaginary parts")
    return x.axes[: len(shape)]


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


Piece = tuple[int, Axis]
"""A piece of an axis: its size and ids."""


def _pieces(ids: Ids, old: Sequence[Piece], new: Sequence[int]) -> list[list[Piece]]:
    """Cuts old axes into the pieces that new ones are made of; returns the pieces of each new axis.

    Axes [n, 4 * 8] that become [n * 4, 8] have the pieces n, 4 and 8.
    """
    ends = sorted({1, *np.cumprod([size for size, _ in old]).tolist(), *np.cumprod(new).tolist()})
    if any(b % a for a, b in pairwise(ends)):
        for _, axis in old:
            ids.keep(axis, "channels are cut across each other")
        return [[(size, None)] for size in new]
    pieces: dict[int, Piece] = {}  # where a piece ends -> the piece
    done = 1
    for size, axis in old:
        inside = [b // a for a, b in pairwise(e for e in ends if done <= e <= done * size)]
        if size == 1:
            ids.keep(axis, "its only channel")
        for n, part in zip(inside, _cut(ids, inside, axis), strict=True):
            done *= n
            pieces[done] = (n, part)
    result, done = [], 1
    for size in new:
        result.append([pieces[e] for e in ends if done < e <= done * size])
        done *= size
    return result


def _cut(ids: Ids, shape: Sequence[int], axis: Axis) -> list[Axis]:
    """Returns the ids of the pieces of an axis; a piece along which the ids are the same has none."""
    if axis is None or len(shape) < 2:
        return [axis] * len(shape)
    table = axis.reshape(shape)
    varies = [d for d in range(table.ndim) if not (table == table.take([0], axis=d)).all()]
    elements = table[tuple(slice(None) if d in varies else 0 for d in range(table.ndim))]
    if len(varies) == 1:
        return [elements if d in varies else None for d in range(table.ndim)]
    axes = {d: ids.fresh(shape[d]) for d in varies}
    ids.split_axis(elements, list(axes.values()))
    return [axes.get(d) for d in range(table.ndim)]


def _join(ids: Ids, parts: Sequence[Piece]) -> tuple[Axis, Ints | None]:
    """Returns the ids of an axis made of pieces, and those of one run through the pieces that have ids."""
    known = [axis for _, axis in parts if axis is not None]
    if not known:
        return None, None
    elements = known[0]
    if len(known) > 1:
        shape = tuple(len(axis) for axis in known)
        elements = ids.fresh(prod(shape)).reshape(shape)
        ids.split_axis(elements, known)
    wide = elements.reshape([1 if axis is None else n for n, axis in parts])
    return np.broadcast_to(wide, [n for n, _ in parts]).ravel(), elements.ravel()
