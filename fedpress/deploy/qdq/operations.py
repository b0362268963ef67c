"""Which operations an integer runtime has kernels for, and which only move values."""

import operator

import torch
from torch import Tensor, fx

aten = torch.ops.aten

CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
}
LINEAR = {aten.linear.default}
LAYERS = LINEAR | CONVOLUTIONS
"""Operations with a weight at argument 1, output channels first, and a bias at argument 2."""

TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
MATRIX = {aten.matmul.default, aten.bmm.default}
ELEMENTWISE = {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor}
MEANS = {
    *(aten.mean.dim, aten.avg_pool1d.default, aten.avg_pool2d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
}
CAT = {aten.cat.default}
SAME_GRID = {  # what comes out is among what goes in (or 0): both share one grid
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.adaptive_max_pool2d.default),
    *(aten.flatten.using_ints, aten.view.default, aten.reshape.default),
    *(aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.pixel_shuffle.default),
    *(aten.upsample_nearest2d.vec, aten.channel_shuffle.default, aten.dropout.default),
    *(aten.clone.default, aten.contiguous.default, aten.expand.default),
}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
CLIPS = {
    aten.relu.default,
    aten.relu_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.relu6.default,
}
"""Runtimes do these while they round, so nothing is rounded between them and the layer before."""


def passes_on(node: fx.Node) -> bool:
    """Whether what comes out of `node` are numbers that went in, moved or clipped."""
    return node.target in SAME_GRID | CLIPS | SPLITS or is_item(node)


def is_item(node: fx.Node) -> bool:
    """Whether `node` takes one of several results."""
    return node.op == "call_function" and node.target is operator.getitem


def is_float(node: fx.Node) -> bool:
    """Whether `node` gives one float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32
