"""Pruning rules of pooling, interpolation, sampling and Fourier transforms.

Each index of a channel axis has an id. Channels pass through unchanged. Ids on the axes along
which an operation works (height, width, depth) are kept, that is, they cannot be pruned. Ids that
must be pruned together are united. A rule returns the ids of the output's axes; its argument
`shape` is the shape of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, ChannelIds, Value
from fedpress.compress.prune.rules.table import (
    Axes,
    Shape,
    arguments_by_name,
    elementwise,
    repeat_each,
    replace_entry,
    rule,
    values_among,
    without_last_axes,
)

SPACE = "kernel or image size"
"""Reason why ids on height and width are kept."""
MIXED = "values are mixed across channels"
"""Reason why the ids of transformed axes are kept."""


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
@rule("fractional_max_pool2d", "fractional_max_pool3d", "max_unpool2d", "max_unpool3d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
@rule("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d")
@rule("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa")
@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def pooling(ids: ChannelIds, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Pooling and interpolation: they work on the last 1, 2 or 3 axes of each channel."""
    # The number of these axes must be read from the name ("max_pool2d"): the batch axis is
    # optional, so the number of all axes does not determine it.
    space = next(n for n in (1, 2, 3) if f"{n}d" in ids.operation)
    aligned = [x]
    for value in values_among(args):
        if len(value.shape) == len(x.shape):  # the positions of maxima that unpooling takes
            aligned.append(value)
        else:  # the samples [n, channels, 2 or 3] of fractional pooling
            ids.keep(x.axes[-space - 1], "samples are drawn for each channel")

    # A network may pool over channels, if it moves them to the last axis.
    channel_parts = []
    for value in aligned:
        ids.keep_all(value.axes[-space:], "pooling runs over channels")
        channel_parts.append(without_last_axes(value, space))
    return elementwise(ids, x.shape[:-space], *channel_parts)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(
    ids: ChannelIds, shape: Shape, x: Value, grid: Value, *rest: Any, **options: Any
) -> Axes:
    """`grid_sample`: samples [n, channels, space] at the coordinates [n, new space, 2 or 3]."""
    ids.keep_all((*x.axes[2:], *grid.axes[1:]), "coordinates in space")
    image_batch = Value(x.shape[:1], x.axes[:1])
    grid_batch = Value(grid.shape[:1], grid.axes[:1])
    # Height and width of image and grid may differ, so only the batch axes are united.
    batch = elementwise(ids, shape[:1], image_batch, grid_batch)
    return (*batch, x.axes[1], *[None] * (len(shape) - 2))


@rule("affine_grid_generator")
def affine_grid(ids: ChannelIds, shape: Shape, theta: Value, *rest: Any, **options: Any) -> Axes:
    """`affine_grid`: coordinates [n, space, 2 or 3] from matrices [n, 2, 3] or [n, 3, 4]."""
    ids.keep_all(theta.axes[1:], "a matrix of coordinates")
    return (theta.axes[0], *[None] * (len(shape) - 1))


@rule("im2col")
def im2col(
    ids: ChannelIds, shape: Shape, x: Value, kernel: Sequence[int], *rest: Any, **options: Any
) -> Axes:
    """`im2col`: [n, channels, h, w] -> [n, channels * kernel, positions].

    A channel becomes a block of rows.
    """
    ids.keep_all(x.axes[-2:], SPACE)
    # Row c * kernel + k of the result is channel c at place k of the kernel.
    rows = repeat_each(x.axes[-3], prod(kernel))
    return (*x.axes[:-3], rows, None)


@rule("col2im")
def col2im(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    size: Sequence[int],
    kernel: Sequence[int],
    *rest: Any,
    **options: Any,
) -> Axes:
    """`col2im`: [n, channels * kernel, positions] -> [n, channels, h, w].

    A block of rows becomes a channel, so the ids of a block are united.
    """
    ids.keep(x.axes[-1], SPACE)
    rows = x.axes[-2]
    if rows is None:
        return (*x.axes[:-2], None, None, None)
    channels = rows[:: prod(kernel)]
    ids.unite(rows, np.repeat(channels, prod(kernel)))
    return (*x.axes[:-2], channels, None, None)


@rule("unfold")
def unfold(ids: ChannelIds, shape: Shape, x: Value, dim: int, size: int, step: int) -> Axes:
    """`x.unfold`: the windowed axis is kept; the new last axis (place in the window) has no ids."""
    # A 0-d tensor has one window.
    if not x.shape:
        return (None,)
    dim %= len(x.shape)
    ids.keep(x.axes[dim], "windows run over channels")
    return (*replace_entry(x.axes, dim, None), None)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(
    ids: ChannelIds, shape: Shape, x: Value, dims: Sequence[int], *rest: Any, **options: Any
) -> Axes:
    """Fourier transforms: the transformed axes are kept, because all their values are mixed."""
    axes: list[Axis] = list(x.axes)
    for dim in dims:
        ids.keep(axes[dim], MIXED)
        axes[dim] = None
    return tuple(axes)


@rule("stft", "istft")
def short_time_fourier(ids: ChannelIds, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """Short-time Fourier transform: [n, time] -> [n, frequencies, frames], or the inverse."""
    # The input of the inverse has two transformed axes: frequencies and frames.
    transformed = 1 if ids.operation.startswith("aten.stft") else 2
    ids.keep_all(x.axes[-transformed:], MIXED)
    for window in values_among((*rest, *options.values())):
        ids.keep_all(window.axes, MIXED)
    batch = x.axes[:-transformed]
    return (*batch, *[None] * (len(shape) - len(batch)))


@rule("diagonal", "linalg_diagonal")
def diagonal(ids: ChannelIds, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """`diagonal`: two axes, which are kept, become one last axis without ids."""
    given = arguments_by_name(ids, [x, *rest], options)
    # The diagonal has the entries [i, i], so both axes would have to lose the same indices.
    pair = {given["dim1"] % len(x.shape), given["dim2"] % len(x.shape)}
    others: list[Axis] = []
    for d, axis in enumerate(x.axes):
        if d in pair:
            ids.keep(axis, "a diagonal pairs channels by their index")
        else:
            others.append(axis)
    return (*others, None)
