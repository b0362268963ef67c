"""Pruning rules of `view`, `reshape`, `flatten` and similar operations.

If one axis is split into several, or several are joined, only one of the several can be pruned.
Example: [n, 32] viewed as [n, 4, 8] can lose heads (4 channels of eight ids each), or the same
positions in all heads (8 channels of four ids each). Each index of a channel axis has an id. A
rule unites ids that must be pruned together, keeps ids that cannot be pruned, and returns the ids
of the output's axes. Its argument `shape` is the shape of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, ChannelIds, Ints, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule, values_among

Length = tuple[Ints, bool]
"""Two facts about the length of an axis: the ids that determine it, and whether it is a multiple.

The length is the number of these ids, or, if the bool is True, a multiple of that number.
"""


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
def reshape(ids: ChannelIds, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Reshape: the ids of old axes are split or joined into the ids of new axes.

    Consecutive old axes are matched with consecutive new axes of the same product of sizes. In
    [n, 32, 7, 7] -> [n, 4, 8, 49] axis 1 is matched with axes 1 and 2, and axes 2 and 3 are matched
    with axis 3.
    """
    axes: list[Axis] = []
    lengths: list[Length | None] = []  # of each new axis
    for old, new in _segments(x.shape, shape):
        # An unchanged axis passes on its ids, but its size may be a number in the code.
        if len(old) == len(new) == 1:
            axis = x.axes[old[0]]
            axes.append(axis)
            lengths.append(None if axis is None else (axis, False))
            continue
        old_axes = [(x.shape[i], x.axes[i]) for i in old]
        new_sizes = [shape[i] for i in new]
        for pieces in _pieces(ids, old_axes, new_sizes):
            axis, length = _join(ids, pieces)
            axes.append(axis)
            lengths.append(length)

    # `view_as(other)`: the sizes are those of `other`, so it must lose the same channels.
    for like in values_among(args):
        for axis, other in zip(axes, like.axes, strict=True):
            ids.unite(axis, other)
    # `squeeze` has no sizes among its arguments, only axes.
    if "squeeze" not in ids.operation:
        _note_sizes(ids, x, args, lengths)
    return tuple(axes)


def _note_sizes(
    ids: ChannelIds, x: Value, args: Sequence[Any], lengths: Sequence[Length | None]
) -> None:
    """Records which sizes in the call are lengths of channel axes.

    Positions count the numbers of the call. In `view(n, 4, 8)` the sizes of all axes begin at
    position 0. In `unflatten(1, (4, 8))` position 0 is the axis, and the sizes of the new axes
    begin at position 1.
    """
    unflatten = "unflatten" in ids.operation
    first_axis = first_position = 0
    if unflatten:
        first_axis = args[0] % len(x.shape)
        first_position = 1
    sizes: Sequence[Any] = ()
    for argument in args:
        if isinstance(argument, list | tuple):
            sizes = argument
            break
    for i, length in enumerate(lengths[first_axis : first_axis + len(sizes)]):
        if length is not None:
            axis, is_multiple = length
            ids.note_size(first_position + i, axis, multiple=is_multiple)


@rule("view.dtype")
def reinterpret(ids: ChannelIds, shape: Shape, x: Value, dtype: Any) -> Axes:
    """`x.view(dtype)` reads the same bits as values of another type.

    If one value of the new type has more or fewer bits, the size of the last axis changes, and the
    axis is kept.
    """
    if shape == x.shape:
        return x.axes
    ids.keep(x.axes[-1], "bits are read as other numbers")
    return x.axes[:-1]


@rule("view_as_real", "view_as_complex")
def real_and_complex(ids: ChannelIds, shape: Shape, x: Value) -> Axes:
    """Real and imaginary parts become a last axis of size 2, or the reverse."""
    if len(shape) < len(x.shape):
        ids.keep(x.axes[-1], "real and imaginary parts")
    return x.axes[: len(shape)]


def _segments(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Pairs consecutive old axes with consecutive new axes of the same product of sizes.

    >>> _segments((2, 8, 4, 4), (2, 2, 4, 16))
    [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    pairs = []
    i = j = 0
    while i < len(old) or j < len(new):
        old_run = [i] if i < len(old) else []
        new_run = [j] if j < len(new) else []
        i += len(old_run)
        j += len(new_run)

        # The side with the smaller product takes its next axis, until both products are equal.
        while True:
            old_size = prod(old[k] for k in old_run)
            new_size = prod(new[k] for k in new_run)
            if old_size == new_size:
                break
            if old_size < new_size:
                old_run.append(i)
                i += 1
            else:
                new_run.append(j)
                j += 1
        pairs.append((old_run, new_run))
    return pairs


Piece = tuple[int, Axis]
"""A factor of an axis: its size and its ids."""


def _pieces(ids: ChannelIds, old: Sequence[Piece], new: Sequence[int]) -> list[list[Piece]]:
    """Returns the factors of each new axis, which are the common factors of old and new axes.

    Example: axes [n, 32] that become [n * 4, 8] have the common factors n, 4 and 8. The new axes
    have the factors (n, 4) and (8).

    Args:
        ids: the collector of united and kept ids.
        old: size and ids of each old axis.
        new: sizes of the new axes, with the same product.
    """
    # The boundaries of both shapes as products from the left: [12, 5] has 12 and 60.
    old_ends = np.cumprod([size for size, _ in old]).tolist()
    new_ends = np.cumprod(new).tolist()
    ends = sorted({1, *old_ends, *new_ends})
    if any(b % a for a, b in pairwise(ends)):
        # For example [6, 4] -> [4, 6]: neither of the boundaries 4 and 6 divides the other.
        ids.keep_all([axis for _, axis in old], "a reshape mixes parts of several axes")
        return [[(size, None)] for size in new]

    piece_ending_at: dict[int, Piece] = {}
    begin = 1
    for size, axis in old:
        factors = _factors(ends, begin, size)
        # A pruned axis of one channel would be empty.
        if size == 1:
            ids.keep(axis, "its only channel")
        for factor, part in zip(factors, _split(ids, factors, axis), strict=True):
            begin *= factor
            piece_ending_at[begin] = (factor, part)

    result = []
    begin = 1
    for size in new:
        pieces = []
        for factor in _factors(ends, begin, size):
            begin *= factor
            pieces.append(piece_ending_at[begin])
        result.append(pieces)
    return result


def _factors(ends: Sequence[int], begin: int, size: int) -> list[int]:
    """Returns the factors into which the boundaries divide an axis.

    Args:
        ends: all boundaries, as products of sizes from the left.
        begin: product of the sizes to the left of the axis.
        size: size of the axis.
    """
    inside = []
    for end in ends:
        if begin <= end <= begin * size:
            inside.append(end)
    return [b // a for a, b in pairwise(inside)]


def _split(ids: ChannelIds, shape: Sequence[int], axis: Axis) -> list[Axis]:
    """Returns the ids of each factor of an axis; None for a factor along which ids are repeated."""
    if axis is None or len(shape) < 2:
        return [axis] * len(shape)
    table = axis.reshape(shape)
    # After `repeat` or `flatten` of pixels an axis may have each id several times; the factor along
    # which they repeat needs no ids of its own.
    varying = []
    repeated = []
    for d in range(table.ndim):
        first_slice = table.take([0], axis=d)
        if (table == first_slice).all():
            repeated.append(d)
        else:
            varying.append(d)
    elements = table
    for d in reversed(repeated):
        elements = np.asarray(elements.take(0, axis=d))

    axes: list[Axis] = [None] * table.ndim
    if len(varying) == 1:
        axes[varying[0]] = elements
        return axes
    new = [ids.fresh(shape[d]) for d in varying]
    for d, own in zip(varying, new, strict=True):
        axes[d] = own
    # Which factor can be pruned is decided when all operations are known (`resolve_splits`).
    ids.split_axis(elements, new)
    return axes


def _join(ids: ChannelIds, parts: Sequence[Piece]) -> tuple[Axis, Length | None]:
    """Joins factors into one axis; returns its ids and how its length depends on them."""
    with_ids = [axis for _, axis in parts if axis is not None]
    if not with_ids:
        return None, None
    elements = with_ids[0]
    # With several factors the joined axis has a new id for each combination.
    if len(with_ids) > 1:
        shape = tuple(len(axis) for axis in with_ids)
        elements = ids.fresh(prod(shape)).reshape(shape)
        ids.split_axis(elements, with_ids)

    # Factors without ids (pixels, say) repeat the ids of the others.
    sizes = []
    sizes_with_ids = []
    for size, axis in parts:
        sizes.append(size)
        sizes_with_ids.append(1 if axis is None else size)
    joined = np.broadcast_to(elements.reshape(sizes_with_ids), sizes).ravel()
    return joined, (elements.ravel(), len(joined) != elements.size)
