"""Convolutions, linear layers and embeddings: they write one axis of their weight and sum over another."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, Ids, Value, sizes
from fedpress.compress.prune.rules.table import Axes, Shape, rule


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    ids: Ids,
    shape: Shape,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Axes:
    """Reads axis 1 of the weight, writes axis 0; depthwise ties both, groups lose the same place in every group."""
    at = _channel_axis(ids, x, weight)
    source, (out, read) = x.axes[at], weight.axes[:2]
    if groups == 1:
        ids.unite(read, source)
        ids.mark(read, "read")
    elif weight.shape[1] == 1:
        ids.keep(read, "depthwise kernel")
        ids.unite(out, None if source is None else np.repeat(source, weight.shape[0] // groups))
        _count_groups(ids, source, groups)
    else:
        _same_places(ids, source, groups, read)
        _same_places(ids, out, groups)
        ids.mark(read, "read")
    _multiply(ids, weight, shape[:at], shape[at + 1 :])
    return _written(ids, x, at, out, bias, shape)


@rule("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def transposed(
    ids: Ids,
    shape: Shape,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Axes:
    """Reads axis 0 of the weight, writes axis 1, of every group the same places."""
    at = _channel_axis(ids, x, weight)
    source, (read, write) = x.axes[at], weight.axes[:2]
    ids.unite(read, source)
    out = write
    if groups == weight.shape[0] > 1:  # depthwise
        ids.keep(write, "depthwise kernel")
        out = None if source is None else np.repeat(source, weight.shape[1])
        ids.mark(read, "write")
    elif groups > 1:
        _same_places(ids, source, groups)
        out = None if write is None else np.tile(write, groups)
    if out is write or groups < weight.shape[0]:
        ids.mark(read, "read")
        ids.mark(write, "write")
    _multiply(ids, weight, shape[:at], x.shape[at + 1 :])
    return _written(ids, x, at, out, bias, shape)


def _count_groups(ids: Ids, source: Axis, groups: int) -> None:
    """Says that the last number of the call is the number of groups; a layer of torch's keeps it right by itself."""
    numbers = [] if ids.call is None else ids.call.numbers
    if numbers and numbers[-1] == groups:
        ids.note_size(len(numbers) - 1, source)


def _channel_axis(ids: Ids, x: Value, weight: Value) -> int:
    """Returns where the channels of `x` are, with or without a batch axis; kernel and image keep their sizes."""
    at = len(x.shape) - len(weight.shape) + 1
    for axis in (*weight.axes[2:], *x.axes[at + 1 :]):
        ids.keep(axis, "kernel or image size")
    return at


def _same_places(ids: Ids, axis: Axis, groups: int, first: Axis = None) -> None:
    """Ties the same place of every group, because groups must stay equally large."""
    if axis is None:
        ids.keep(first, "it meets a size that cannot change")
        return
    parts = list(axis.reshape(groups, -1))
    for part in parts if first is not None else parts[1:]:
        ids.unite(parts[0] if first is None else first, part)


def _multiply(ids: Ids, weight: Value, batch: Shape, space: Shape) -> None:
    ids.multiply(
        prod((*batch, *space, *weight.shape[2:])), *sizes(weight.shape[:2], weight.axes[:2])
    )


def _written(ids: Ids, x: Value, at: int, out: Axis, bias: Value | None, shape: Shape) -> Axes:
    if out is not None:
        ids.mark(out, "write")
    if bias is not None:
        ids.unite(out, bias.axes[0])
    return (*x.axes[:at], out, *[None] * (len(shape) - at - 1))


@rule("convolution")
def general_convolution(
    ids: Ids,
    shape: Shape,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    turned: bool,
    output_padding: Any,
    groups: int,
) -> Axes:
    """The operation that all convolutions are made of."""
    if turned:
        return transposed(ids, shape, x, weight, bias, groups=groups)
    return convolution(ids, shape, x, weight, bias, groups=groups)


@rule("conv_tbc")
def time_first(ids: Ids, shape: Shape, x: Value, weight: Value, bias: Value, *rest: Any) -> Axes:
    """[time, n, in] with weights [kernel, in, out]."""
    for axis in (x.axes[0], weight.axes[0]):
        ids.keep(axis, "kernel or image size")
    read, out = weight.axes[1:]
    ids.unite(read, x.axes[2])
    ids.mark(read, "read")
    ids.mark(out, "write")
    ids.unite(out, bias.axes[0])
    ids.multiply(prod((*shape[:2], weight.shape[0])), *sizes(weight.shape[1:], weight.axes[1:]))
    return (None, x.axes[1], out)


@rule("linear.default")
def linear(ids: Ids, shape: Shape, x: Value, weight: Value, bias: Value | None = None) -> Axes:
    """Reads axis 1 of the weight over the last axis of `x`, writes axis 0, if there is one."""
    *first, read = weight.axes
    out = first[0] if first else None
    ids.unite(read, x.axes[-1])
    ids.mark(read, "read")
    ids.mark(out, "write")
    if bias is not None and bias.axes:
        ids.unite(out, bias.axes[0])
    ids.multiply(1, *sizes(x.shape[:-1], x.axes[:-1]), *sizes(weight.shape, weight.axes))
    return (*x.axes[:-1], *first)


@rule("embedding.default")
def embedding(
    ids: Ids, shape: Shape, weight: Value, indices: Value, *rest: Any, **options: Any
) -> Axes:
    """Writes axis 1 of the table; the words stay."""
    ids.keep(weight.axes[0], "rows are looked up by number")
    ids.mark(weight.axes[1], "write")
    return (*indices.axes, weight.axes[1])


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    ids: Ids,
    shape: Shape,
    weight: Value,
    indices: Value,
    offsets: Value | None = None,
    *rest: Any,
    **options: Any,
) -> list[Axes]:
    """Writes axis 1 of the table, summed or averaged over the words of a bag; the words stay.

    The other results say where the words came from; the last one only for the largest (mode 2), with that axis.
    """
    ids.keep(weight.axes[0], "rows are looked up by number")
    ids.mark(weight.axes[1], "write")
    return [(None, weight.axes[1]), (), (), ()]
