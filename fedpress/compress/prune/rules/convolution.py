"""Pruning rules of convolutions, linear layers and embeddings.

Their weights have input channels (role "read") and output channels (role "write"). Each index of a
channel axis has an id. A rule unites the ids of channels that must be pruned together, keeps the
ids of channels that cannot be pruned, and returns the ids of the output's axes. Its argument
`shape` is the shape of the output.
"""

from __future__ import annotations

from math import prod
from typing import Any

from fedpress.compress.prune.ids import Axis, ChannelIds, Value, ids_or_sizes
from fedpress.compress.prune.rules.table import Axes, Shape, repeat_each, rule, tile


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Axes:
    """Convolution with weight [out, in / groups, kernel].

    In a plain convolution, input and output channels are pruned independently. In a depthwise
    convolution, an input channel is pruned together with its output channels. In a grouped
    convolution, every group loses the channels at the same positions within the group.
    """
    channel_dim = _channel_axis(ids, x, weight)
    source = x.axes[channel_dim]
    out, read = weight.axes[:2]
    if groups == 1:
        ids.unite(read, source)
        ids.mark_role(read, "read")
    # With one input channel per group an output channel depends on that channel only.
    elif weight.shape[1] == 1:
        ids.keep(read, "depthwise kernel")
        ids.unite(out, repeat_each(source, weight.shape[0] // groups))
        _note_groups(ids, source, groups)
    else:
        # All groups share axis 1 of the weight, so their inputs are pruned at the same positions.
        # torch needs groups of equal size, so outputs are pruned at the same positions as well.
        _unite_groups(ids, source, groups, read)
        _unite_groups(ids, out, groups)
        ids.mark_role(read, "read")

    _count_multiply_adds(ids, weight, shape[:channel_dim], shape[channel_dim + 1 :])
    return _output(ids, x, channel_dim, out, bias, shape)


@rule("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def transposed_convolution(
    ids: ChannelIds,
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
    """Transposed convolution with weight [in, out / groups, kernel].

    All groups share axis 1 of the weight, so every group loses the output channels at the same
    positions within the group.
    """
    channel_dim = _channel_axis(ids, x, weight)
    source = x.axes[channel_dim]
    read, write = weight.axes[:2]
    ids.unite(read, source)
    out = write
    # Depthwise: each input channel has its own kernels, and is pruned with its output channels.
    if groups == weight.shape[0] > 1:
        ids.keep(write, "depthwise kernel")
        out = repeat_each(source, weight.shape[1])
        ids.mark_role(read, "write")
    else:
        if groups > 1:
            _unite_groups(ids, source, groups)
            out = tile(write, groups)
        ids.mark_role(read, "read")
        ids.mark_role(write, "write")

    # Multiply-adds are counted per input pixel; a plain convolution has them per output pixel.
    _count_multiply_adds(ids, weight, shape[:channel_dim], x.shape[channel_dim + 1 :])
    return _output(ids, x, channel_dim, out, bias, shape)


def _note_groups(ids: ChannelIds, source: Axis, groups: int) -> None:
    """Records that the last number of the call is `groups`, so that pruning can change it.

    This is for calls of `F.conv2d` in a user's code. A torch layer has the number as an attribute,
    which pruning updates.
    """
    numbers = [] if ids.call is None else ids.call.numbers
    # `groups` is the last argument of a convolution; any other last number is left alone.
    if numbers and numbers[-1] == groups:
        ids.note_size(len(numbers) - 1, source)


def _channel_axis(ids: ChannelIds, x: Value, weight: Value) -> int:
    """Returns the channel axis of `x` (1, or 0 without a batch); keeps kernel and image sizes."""
    # A weight has as many axes as a batch [n, channels, h, w], one more than a single image.
    channel_dim = len(x.shape) - len(weight.shape) + 1
    ids.keep_all((*weight.axes[2:], *x.axes[channel_dim + 1 :]), "kernel or image size")
    return channel_dim


def _unite_groups(ids: ChannelIds, axis: Axis, groups: int, first: Axis = None) -> None:
    """Unites position i of all groups, for each i, because torch needs groups of equal size.

    Args:
        ids: the collector of united and kept ids.
        axis: ids of the channels, [groups * size].
        groups: number of groups.
        first: ids of an axis [size] that all groups share, such as that of a weight; None if there
            is no such axis.
    """
    if axis is None:
        ids.keep(first, "it is combined with an axis of fixed size")
        return
    parts = list(axis.reshape(groups, -1))
    if first is None:
        first = parts.pop(0)
    for part in parts:
        ids.unite(first, part)


def _count_multiply_adds(ids: ChannelIds, weight: Value, batch: Shape, space: Shape) -> None:
    # Every position costs one product per entry of the weight, whatever the number of groups.
    kernel = weight.shape[2:]
    channels = ids_or_sizes(weight.shape[:2], weight.axes[:2])
    ids.count_multiply_adds(prod((*batch, *space, *kernel)), *channels)


def _output(
    ids: ChannelIds, x: Value, channel_dim: int, out: Axis, bias: Value | None, shape: Shape
) -> Axes:
    """Marks the output channels, unites the bias with them, and returns the axes of the output."""
    ids.mark_role(out, "write")
    if bias is not None:
        ids.unite(out, bias.axes[0])
    # Height and width of the output have no ids: the kernel mixes the positions of the input.
    return (*x.axes[:channel_dim], out, *[None] * (len(shape) - channel_dim - 1))


@rule("convolution")
def general_convolution(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    is_transposed: bool,
    output_padding: Any,
    groups: int,
) -> Axes:
    """The operation `aten::convolution`, into which ATen decomposes all convolutions."""
    # Stride, padding and dilation do not matter for channels.
    if is_transposed:
        return transposed_convolution(ids, shape, x, weight, bias, groups=groups)
    return convolution(ids, shape, x, weight, bias, groups=groups)


@rule("conv_tbc")
def time_first_convolution(
    ids: ChannelIds, shape: Shape, x: Value, weight: Value, bias: Value, *rest: Any
) -> Axes:
    """`conv_tbc`: convolves [time, n, in] with weight [kernel, in, out]."""
    ids.keep_all((x.axes[0], weight.axes[0]), "kernel or image size")
    read, out = weight.axes[1:]
    ids.unite(read, x.axes[2])
    ids.mark_role(read, "read")
    ids.mark_role(out, "write")
    ids.unite(out, bias.axes[0])
    channels = ids_or_sizes(weight.shape[1:], weight.axes[1:])
    ids.count_multiply_adds(prod((*shape[:2], weight.shape[0])), *channels)
    return (None, x.axes[1], out)


@rule("linear.default")
def linear(
    ids: ChannelIds, shape: Shape, x: Value, weight: Value, bias: Value | None = None
) -> Axes:
    """Linear layer with weight [out, in], or [in] (a single output without an axis)."""
    *first, read = weight.axes
    ids.unite(read, x.axes[-1])
    ids.mark_role(read, "read")
    for out in first:
        ids.mark_role(out, "write")
        if bias is not None:
            ids.unite(out, bias.axes[0])
    rows = ids_or_sizes(x.shape[:-1], x.axes[:-1])
    ids.count_multiply_adds(1, *rows, *ids_or_sizes(weight.shape, weight.axes))
    return (*x.axes[:-1], *first)


@rule("embedding.default")
def embedding(
    ids: ChannelIds, shape: Shape, weight: Value, indices: Value, *rest: Any, **options: Any
) -> Axes:
    """Embedding table [words, width]: channels of the width can be pruned, the words are kept."""
    # The input holds row numbers. If a row were removed, these numbers would mean other words.
    ids.keep(weight.axes[0], "rows are looked up by index")
    ids.mark_role(weight.axes[1], "write")
    return (*indices.axes, weight.axes[1])


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    ids: ChannelIds,
    shape: Shape,
    weight: Value,
    indices: Value,
    offsets: Value | None = None,
    *rest: Any,
    **options: Any,
) -> list[Axes]:
    """Sum or mean of rows of a table [words, width] for each bag of words; the words are kept.

    torch returns three more tensors (offsets and sizes of the bags), which have no channels.
    """
    ids.keep(weight.axes[0], "rows are looked up by index")
    ids.mark_role(weight.axes[1], "write")
    return [(None, weight.axes[1]), (), (), ()]
