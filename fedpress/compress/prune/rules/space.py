"""Operations along height, width and depth: each channel is worked on by itself, and space keeps its size."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, Ids, Value
from fedpress.compress.prune.rules.table import Axes, Shape, elementwise, named, rule


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
def pooling(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes:
    """Works on the axes whose size it changes, within each channel; places or samples go with their channels."""
    space = next(n for n in (1, 2, 3) if f"{n}d" in ids.operation)
    meeting = [x]
    for value in args:
        if isinstance(value, Value) and len(value.shape) == len(x.shape):  # where the maxima were
            meeting.append(value)
        elif isinstance(value, Value):  # random samples [n, channels, 2 or 3]
            ids.keep(x.axes[-space - 1], "samples are drawn for each channel")
    for value in meeting:
        for axis in value.axes[-space:]:
            ids.keep(axis, "pooling runs over channels")
    lead = elementwise(
        ids, x.shape[:-space], *(Value(v.shape[:-space], v.axes[:-space]) for v in meeting)
    )
    return lead


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(ids: Ids, shape: Shape, x: Value, grid: Value, *rest: Any, **options: Any) -> Axes:
    """Looks [n, channels, space] up at the places [n, new space, 2 or 3]."""
    for axis in (*x.axes[2:], *grid.axes[1:]):
        ids.keep(axis, "places in space")
    batch = elementwise(
        ids, shape[:1], Value(x.shape[:1], x.axes[:1]), Value(grid.shape[:1], grid.axes[:1])
    )
    return (*batch, x.axes[1], *[None] * (len(shape) - 2))


@rule("affine_grid_generator")
def affine_grid(ids: Ids, shape: Shape, theta: Value, *rest: Any, **options: Any) -> Axes:
    """Makes places [n, space, 2 or 3] from matrices [n, 2, 3] or [n, 3, 4]."""
    for axis in theta.axes[1:]:
        ids.keep(axis, "a matrix of coordinates")
    return (theta.axes[0], *[None] * (len(shape) - 1))


@rule("im2col")
def im2col(
    ids: Ids, shape: Shape, x: Value, kernel: Sequence[int], *rest: Any, **options: Any
) -> Axes:
    """[n, channels, h, w] -> [n, channels * kernel, places]: a channel is a whole block of rows."""
    for axis in x.axes[-2:]:
        ids.keep(axis, "kernel or image size")
    channels = x.axes[-3]
    block: Axis = None if channels is None else np.repeat(channels, prod(kernel))
    return (*x.axes[:-3], block, None)


@rule("col2im")
def col2im(
    ids: Ids,
    shape: Shape,
    x: Value,
    size: Sequence[int],
    kernel: Sequence[int],
    *rest: Any,
    **options: Any,
) -> Axes:
    """[n, channels * kernel, places] -> [n, channels, h, w]: the rows of a block go together."""
    ids.keep(x.axes[-1], "kernel or image size")
    rows = x.axes[-2]
    if rows is None:
        return (*x.axes[:-2], None, None, None)
    channels = rows[:: prod(kernel)]
    ids.unite(rows, np.repeat(channels, prod(kernel)))
    return (*x.axes[:-2], channels, None, None)


@rule("unfold")
def windows(ids: Ids, shape: Shape, x: Value, dim: int, size: int, step: int) -> Axes:
    """Windows along one axis, whose places stand in a new last axis."""
    if not x.shape:
        return (None,)
    dim %= len(x.shape)
    ids.keep(x.axes[dim], "windows run over channels")
    return (*x.axes[:dim], None, *x.axes[dim + 1 :], None)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(
    ids: Ids, shape: Shape, x: Value, dims: Sequence[int], *rest: Any, **options: Any
) -> Axes:
    """Frequencies along some axes take values from all over them; the other axes pass."""
    mixed = {d % len(x.shape) for d in dims}
    for d in mixed:
        ids.keep(x.axes[d], "values are mixed across channels")
    return tuple(None if d in mixed else axis for d, axis in enumerate(x.axes))


@rule("stft", "istft")
def short_fourier(ids: Ids, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """[n, time] <-> [n, frequencies, frames]."""
    ends = 1 if ids.operation.startswith("aten.stft") else 2
    for value in (x, *rest, *options.values()):
        for axis in value.axes[-ends if value is x else 0 :] if isinstance(value, Value) else ():
            ids.keep(axis, "values are mixed across channels")
    lead = x.axes[:-ends]
    return (*lead, *[None] * (len(shape) - len(lead)))


@rule("diagonal", "linalg_diagonal")
def diagonal(ids: Ids, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """Two axes become one, and both keep their sizes."""
    given = named(ids, [x, *rest], options)
    pair = {given["dim1"] % len(x.shape), given["dim2"] % len(x.shape)}
    for d in pair:
        ids.keep(x.axes[d], "channels are taken by number")
    return (*(axis for d, axis in enumerate(x.axes) if d not in pair), None)
