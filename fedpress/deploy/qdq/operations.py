"""Sets of torch operations by how they are quantized: layers, products, moves, clips and so on."""

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

# Layers too, but no runtime has an integer kernel for them.
TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
# Products of two activations, as in attention.
MATRIX_PRODUCTS = {aten.matmul.default, aten.bmm.default}
# Operations on two tensors; integer kernels exist for them.
ELEMENTWISE = {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor}
MEANS = {
    *(aten.mean.dim, aten.avg_pool1d.default, aten.avg_pool2d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
}
CONCATENATIONS = {aten.cat.default}
# Operations that only move or select values (or add 0), so input and result share a scale and zero
# point.
SAME_GRID = {
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
"""Operations that clip. A kernel clips while it rounds: only the clipped value is rounded."""


def only_moves_values(node: fx.Node) -> bool:
    """Returns whether `node` only moves or clips its inputs."""
    return node.target in SAME_GRID | CLIPS | SPLITS or takes_one_result(node)


def takes_one_result(node: fx.Node) -> bool:
    """Returns whether `node` selects one of several results of an operation."""
    return node.op == "call_function" and node.target is operator.getitem


def is_float(node: fx.Node) -> bool:
    """Returns whether the result of `node` is one float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32
