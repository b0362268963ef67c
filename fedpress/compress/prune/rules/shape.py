"""Operations that move, cut and join axes. Sizes that the code says are noted, so that they can be put right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, Ids, Ints, Value
from fedpress.compress.prune.rules.table import Axes, Shape, elementwise, named, rule


@rule("cat")
def concatenate(ids: Ids, shape: Shape, values: Sequence[Value], dim: int = 0) -> Axes:
    """Ids stand one after the other along `dim` and are tied along the other axes."""
    dim %= len(shape)
    values = [
        v for v in values if v.shape != (0,) or len(shape) == 1
    ]  # the empty beginning of a list: torch skips it
    axes = list(
        elementwise(
            ids, tuple(-1 if i == dim else n for i, n in enumerate(shape)), *_hide_axis(values, dim)
        )
    )
    parts = [v.axes[dim] for v in values]
    if any(part is not None for part in parts):
        axes[dim] = np.concatenate([_ids_or_new(ids, v, dim) for v in values])
    return tuple(axes)


@rule("stack")
def stack(ids: Ids, shape: Shape, values: Sequence[Value], dim: int = 0) -> Axes:
    """A new axis that never changes; the others are tied."""
    dim %= len(shape)
    axes = list(elementwise(ids, values[0].shape, *values))
    return (*axes[:dim], None, *axes[dim:])


@rule("pad", "constant_pad_nd")
def pad(ids: Ids, shape: Shape, x: Value, widths: Sequence[int], *rest: Any) -> Axes:
    """Added channels have ids of their own and can go with what they meet; the numbers are put right."""
    axes: list[Axis] = []
    for i, axis in enumerate(x.axes):
        k = 2 * (len(shape) - 1 - i)
        before, after = (widths[k], widths[k + 1]) if k < len(widths) else (0, 0)
        if axis is None or before == after == 0:
            axes.append(axis)
        elif before < 0 or after < 0 or (rest and rest[0] not in ("constant", 0, 0.0)):
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
    ids.keep(x.axes[dim], "channels are taken by number")
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
            ids.keep(axis, "channels are taken by number")
        return ()
    axes: list[Axis] = []
    for d, (axis, other) in enumerate(zip(x.axes, index.axes, strict=True)):
        spread = "take_along_dim" in ids.operation and index.shape[d] == 1
        if d != dim % len(x.shape) and (spread or x.shape[d] == index.shape[d]):
            if not spread:
                _tie(ids, axis, other)
            axes.append(axis)
            continue
        for each in (axis, other):
            ids.keep(each, "channels are taken by number")
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
        ids.keep(axis, "channels are taken by number")
    if len(edges.shape) > 1:
        for axis in x.axes:
            ids.keep(axis, "channels are taken by number")
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
        ids.keep(x.axes[d], "channels are taken by number")
    if rank < 0 or len(shape) != len(x.shape) - 1 + rank:
        return (None,) * len(shape)
    return (*x.axes[: where[0]], *[None] * rank, *x.axes[where[0] + 1 :])


@rule("select_scatter", "slice_scatter")
def written_part(
    ids: Ids, shape: Shape, x: Value, source: Value, dim: int = 0, *rest: Any, **options: Any
) -> Axes:
    """Puts `source` in the place of one index, or of a run of them, along an axis that must stay."""
    dim %= len(shape)
    ids.keep(x.axes[dim], "channels are taken by number")
    left = Value((*shape[:dim], *shape[dim + 1 :]), (*x.axes[:dim], *x.axes[dim + 1 :]))
    if len(source.shape) == len(shape):
        ids.keep(source.axes[dim], "channels are taken by number")
        source = Value(
            (*source.shape[:dim], *source.shape[dim + 1 :]),
            (*source.axes[:dim], *source.axes[dim + 1 :]),
        )
    axes = elementwise(ids, left.shape, left, source)
    return (*axes[:dim], None, *axes[dim:])


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
    return _split(x, dim, [b - a for a, b in pairwise([0, *places, size])])


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
    return _split(x, dim, [size + 1] * more + [size] * (parts - more))


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
    parts = _split(
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
        return _split(x, dim, [sizes] * whole + ([rest] if rest else []))
    if ids.call is None:
        ids.keep(axis, "channels are split by number")
    parts = _split(x, dim, sizes)
    for i, part in enumerate(parts):
        ids.note_size(i, part[dim])
    return parts


@rule("permute", "transpose.int", "t", "numpy_T", "mT", "movedim.int", "swapaxes", "adjoint")
def permute(ids: Ids, shape: Shape, x: Value, *dims: Any) -> Axes:
    """Axes change places and take their ids along."""
    order = list(range(len(x.shape)))
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
def expand(ids: Ids, shape: Shape, x: Value, sizes: Any = (), **options: Any) -> Axes:
    """Copies along new axes and axes of size 1, which may become fewer copies."""
    new = len(shape) - len(x.shape)
    old = (1,) * new + x.shape
    like = sizes if isinstance(sizes, Value) else None  # `expand_as`
    axes: list[Axis] = list(elementwise(ids, shape, x))
    for i, size in enumerate(shape):
        if like is not None and old[i] == size:
            _tie(ids, axes[i], like.axes[i])
        elif like is not None:
            axes[i] = like.axes[i]
        elif old[i] == 1 < size:
            axes[i] = ids.fresh(size)
            if ids.call is None:
                ids.keep(axes[i], "its size is that of another tensor")
        if isinstance(sizes, list | tuple):
            ids.note_size(i, axes[i])
    return tuple(axes)


@rule("broadcast_tensors")
def broadcast(ids: Ids, shape: Shape, values: Sequence[Value]) -> Axes:
    """All get one shape."""
    return elementwise(ids, shape, *values)


def _tie(ids: Ids, a: Axis, b: Axis) -> None:
    """Says that two axes are one; two that never change need no word."""
    if a is not None or b is not None:
        ids.unite(a, b)


@rule("repeat")
def repeat(ids: Ids, shape: Shape, x: Value, times: Sequence[int]) -> Axes:
    """Copies stand one after the other; a channel goes with its copies."""
    new = len(shape) - len(x.shape)
    old = (None,) * new + x.axes
    return tuple(
        None if axis is None else np.tile(axis, n) for axis, n in zip(old, times, strict=True)
    )


@rule("repeat_interleave.self_int")
def interleave(
    ids: Ids, shape: Shape, x: Value, times: int, dim: int | None = None, **options: Any
) -> Axes:
    """Copies stand beside each other; a channel goes with its copies."""
    if dim is None:
        for axis in x.axes:
            ids.keep(axis, "channels are taken by number")
        return (None,) * len(shape)
    dim %= len(x.shape)
    axis = x.axes[dim]
    return (*x.axes[:dim], None if axis is None else np.repeat(axis, times), *x.axes[dim + 1 :])


@rule("pixel_shuffle.default", "pixel_unshuffle.default")
def shuffle_pixels(ids: Ids, shape: Shape, x: Value, factor: int) -> Axes:
    """The channels that become pixels of one channel go together, and the other way round."""
    axis, block = x.axes[-3], factor * factor
    if axis is None:
        return x.axes
    if "unshuffle" in ids.operation:
        return (*x.axes[:-3], np.repeat(axis, block), None, None)
    ids.unite(axis, np.repeat(axis[::block], block))
    return (*x.axes[:-3], axis[::block], None, None)


@rule("channel_shuffle.default", "native_channel_shuffle.default")
def shuffle_channels(ids: Ids, shape: Shape, x: Value, groups: int) -> Axes:
    """Every group loses the same places."""
    axis = x.axes[1]
    if axis is None:
        return x.axes
    table = axis.reshape(groups, -1)
    ids.unite(axis, np.tile(table[0], groups))
    return (x.axes[0], table.T.reshape(-1), *x.axes[2:])


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
    sized: list[tuple[Ints, bool] | None] = []
    for old, new in _segments(x.shape, shape):
        if len(old) == len(new) == 1:
            axes.append(x.axes[old[0]])
            sized.append(None if (axis := x.axes[old[0]]) is None else (axis, False))
            continue
        atoms = _atoms(ids, [(x.shape[i], x.axes[i]) for i in old], [shape[i] for i in new])
        for parts in atoms:
            axis, elements = _join(ids, parts)
            axes.append(axis)
            sized.append(
                None if axis is None or elements is None else (elements, len(axis) != len(elements))
            )
    for like in (a for a in args if isinstance(a, Value)):  # `view_as`
        for axis, other in zip(axes, like.axes, strict=True):
            _tie(ids, axis, other)
    sizes = next((list(a) for a in args if isinstance(a, list | tuple)), [])
    first = args[0] % len(x.shape) if "unflatten" in ids.operation else 0
    for j in range(len(sizes) if "squeeze" not in ids.operation else 0):
        if (known := sized[first + j]) is not None:
            ids.note_size(
                j + (1 if "unflatten" in ids.operation else 0), known[0], multiple=known[1]
            )
    return tuple(axes)


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


@rule(
    "zeros", "ones", "full", "empty.memory_format", "new_zeros", "new_ones", "new_full", "new_empty"
)
def uniform(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Makes a tensor whose sizes the code says; they are put right."""
    axes: list[Axis] = [
        ids.fresh(size) if ids.call is not None and size > 1 else None for size in shape
    ]
    for i, axis in enumerate(axes):
        ids.note_size(i, axis)
    return tuple(axes)


@rule("arange", "eye", "rand", "randn", "scalar_tensor", "linspace", "tril_indices")
def constant(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Makes a tensor whose sizes must stay."""
    return (None,) * len(shape)


def _ids_or_new(ids: Ids, value: Value, dim: int) -> Ints:
    """Returns the ids of an axis, new frozen ones where it never changes."""
    axis = value.axes[dim]
    if axis is None:
        axis = ids.fresh(value.shape[dim])
        ids.keep(axis, "it stands beside channels")
    return axis


def _hide_axis(values: Sequence[Value], dim: int) -> list[Value]:
    """Hides axis `dim`, so that the other axes can be tied like those of a sum."""

    def hide(v: Value) -> Value:
        shape = tuple(-1 if i == dim else n for i, n in enumerate(v.shape))
        return Value(shape, tuple(None if i == dim else a for i, a in enumerate(v.axes)))

    return [hide(v) for v in values if len(v.shape) > 1 or v.shape[0]]


def _split(x: Value, dim: int, sizes: Sequence[int]) -> list[Axes]:
    axis, ends = x.axes[dim], np.cumsum(sizes)
    parts = [
        None if axis is None else axis[end - size : end]
        for size, end in zip(sizes, ends, strict=True)
    ]
    return [(*x.axes[:dim], part, *x.axes[dim + 1 :]) for part in parts]


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


Atom = tuple[int, Axis]
"""A piece of an axis: its size and ids."""


def _atoms(ids: Ids, old: Sequence[Atom], new: Sequence[int]) -> list[list[Atom]]:
    """Cuts old axes into the pieces that new ones are made of; returns the pieces of each new axis.

    Axes [n, 4 * 8] that become [n * 4, 8] have the pieces n, 4 and 8.
    """
    ends = sorted({1, *np.cumprod([size for size, _ in old]).tolist(), *np.cumprod(new).tolist()})
    if any(b % a for a, b in pairwise(ends)):
        for _, axis in old:
            ids.keep(axis, "channels are cut across each other")
        return [[(size, None)] for size in new]
    pieces: dict[int, Atom] = {}  # where a piece ends -> the piece
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


def _join(ids: Ids, parts: Sequence[Atom]) -> tuple[Axis, Ints | None]:
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
