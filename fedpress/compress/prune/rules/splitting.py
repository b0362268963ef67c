"""Pruning rules of `split`, `chunk` and similar operations.

`split([4, 12])`: each part is pruned independently. `split(4)` and `chunk(2)`: all parts have the
same size, so each must lose the channels at the same positions within the part. Each index of a
channel axis has an id. A rule unites the ids of channels that must be pruned together, keeps the
ids of channels that cannot be pruned, and returns the ids of each part's axes. Sizes in the user's
code, such as 4 and 12, are recorded, so that they can be corrected after pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fedpress.compress.prune.ids import Axis, ChannelIds, Value
from fedpress.compress.prune.rules.table import Axes, Shape, replace_entry, rule, slice_axis

UNEQUAL = "channels are cut into unequal parts"
"""Reason why an axis is kept: after pruning torch would choose other sizes of the parts."""
BY_NUMBER = "channels are split by number"
"""Reason why an axis is kept: the numbers that split it cannot be corrected after pruning."""


@rule("tensor_split.indices", "hsplit.array", "vsplit.array", "dsplit.array")
def split_at(
    ids: ChannelIds, shape: Shape, x: Value, ends: Sequence[int], dim: int = 0
) -> list[Axes]:
    """`tensor_split(x, [4, 12])`: parts are pruned independently; 4 and 12 are corrected."""
    dim = _split_dim(ids, x, dim)
    axis = x.axes[dim]
    size = x.shape[dim]
    places = []
    for end in ends:
        from_start = end if end >= 0 else max(0, end + size)
        places.append(min(size, from_start))

    # Numbers that fall, such as [12, 4], make an empty part. After pruning, no corrected numbers
    # keep this part empty for every choice of channels.
    if ids.call is None or places != sorted(places):
        ids.keep(axis, BY_NUMBER)
    for i, place in enumerate(places):
        if ends[i] < 0:
            # A corrected number is a length from the start, so a negative number is not corrected.
            ids.keep(axis, BY_NUMBER)
        else:
            ids.note_size(i, slice_axis(axis, None, place))
    return _parts_along(x, dim, [b - a for a, b in pairwise([0, *places, size])])


def _split_dim(ids: ChannelIds, x: Value, dim: int) -> int:
    """Returns the axis that the operation splits; it is fixed for `hsplit`, `vsplit`, `dsplit`."""
    name = ids.operation.split(".")[1]
    # `hsplit` splits axis 1, or the only axis of a vector.
    if name == "hsplit":
        return min(1, len(x.shape) - 1)
    return {"vsplit": 0, "dsplit": 2}.get(name, dim % len(x.shape))


@rule("tensor_split.sections", "hsplit.int", "vsplit.int", "dsplit.int")
def split_evenly(ids: ChannelIds, shape: Shape, x: Value, parts: int, dim: int = 0) -> list[Axes]:
    """`tensor_split(x, 3)`: equal parts lose the same positions.

    If the size is no multiple of 3, torch makes the first parts larger by one; then the axis is
    kept.
    """
    dim = _split_dim(ids, x, dim)
    size, longer = divmod(x.shape[dim], parts)
    _unite_parts(ids, x.axes[dim], size, longer)
    return _parts_along(x, dim, [size + 1] * longer + [size] * (parts - longer))


def _unite_parts(ids: ChannelIds, axis: Axis, size: int, rest: int) -> None:
    """Unites position i of all parts of `size`, for each i; keeps the axis if `rest` is not 0."""
    if axis is None:
        return
    if rest:
        # After pruning torch would choose other sizes, so channels would move between the parts.
        ids.keep(axis, UNEQUAL)
    else:
        ids.unite(axis, np.tile(axis[:size], len(axis) // size))


@rule("chunk.default", "glu.default")
def chunk(ids: ChannelIds, shape: Shape, x: Value, *args: int) -> Axes | list[Axes]:
    """`chunk(x, 2)` and `glu`: equal chunks lose the same positions; unequal chunks are kept.

    A gated linear unit multiplies one half by the sigmoid of the other: the halves are united, and
    the output has their ids.
    """
    is_glu = "glu" in ids.operation
    if is_glu:
        chunks = 2
        dim = args[0] if args else -1
    else:
        chunks = args[0]
        dim = args[1] if len(args) > 1 else 0
    dim %= len(x.shape)

    # torch rounds the size of a chunk up: 10 in 4 chunks is 3, 3, 3, 1.
    size = -(-x.shape[dim] // chunks)
    whole, rest = divmod(x.shape[dim], size)
    _unite_parts(ids, x.axes[dim], size, x.shape[dim] % chunks)
    sizes = [size] * whole
    if rest:
        sizes.append(rest)
    parts = _parts_along(x, dim, sizes)
    return parts[0] if is_glu else parts


@rule("split.Tensor", "split.sizes", "split_with_sizes")
def split(
    ids: ChannelIds, shape: Shape, x: Value, sizes: int | Sequence[int], dim: int = 0
) -> list[Axes]:
    """`split(x, [4, 12])`: each part is pruned independently.

    `split(x, 4)`: all parts lose the same positions. In both cases the sizes in the code are
    corrected.
    """
    dim %= len(x.shape)
    axis = x.axes[dim]
    if isinstance(sizes, int):
        whole, rest = divmod(x.shape[dim], sizes)
        _unite_parts(ids, axis, sizes, rest)
        # The size in the code is that of one part.
        ids.note_size(0, slice_axis(axis, None, sizes))
        part_sizes = [sizes] * whole
        if rest:
            part_sizes.append(rest)
        return _parts_along(x, dim, part_sizes)

    if ids.call is None:
        ids.keep(axis, BY_NUMBER)
    parts = _parts_along(x, dim, sizes)
    # Position i of the list of sizes is the length of part i.
    for i, part in enumerate(parts):
        ids.note_size(i, part[dim])
    return parts


def _parts_along(x: Value, dim: int, sizes: Sequence[int]) -> list[Axes]:
    """Returns the axes of each part of `x`, whose sizes along `dim` are given."""
    parts = []
    begin = 0
    for size in sizes:
        part = slice_axis(x.axes[dim], begin, begin + size)
        parts.append(replace_entry(x.axes, dim, part))
        begin += size
    return parts
