"""Rounds weights to a grid: finds scales of least squared error, and rounds by GPTQ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.nn.quant_scheme import (
    WeightQuantization,
    fake_quantize,
    fill_zero_scales,
    in_groups,
    initial_scale,
)
from fedpress.nn.quantized import QuantLayer

BLOCK = 128
"""Number of columns that GPTQ rounds before it updates all later columns, as in the paper."""
SCALES = 80
"""Number of scales tried for each row (or group), from the full range down to a fifth of it."""


def best_scale(weight: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns the scales [out] or [out, groups] with the least squared error of rounding.

    For the kind "int", 80 scales are tried, from the full range down to a fifth of it: a smaller
    scale clips a few large weights but rounds all others more precisely. For "ternary" and "binary"
    `initial_scale` is optimal already.

    Args:
        weight: [out, ...].
        quantization: how the weight is quantized.
    """
    first = initial_scale(weight, quantization)
    if quantization.kind != "int":
        return first
    values = in_groups(weight.detach().float(), quantization.group)
    full = first.reshape(len(weight), -1, 1)
    best = full
    least = torch.full_like(full, torch.inf)
    for share in torch.linspace(1, 0.2, SCALES).tolist():
        scale = full * share
        error = (fake_quantize(values, scale, quantization) - values).square().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    # A row of zeros has the scale 0, by which nothing can be divided.
    return fill_zero_scales(best.reshape(first.shape))


def as_batch(layer: nn.Module, x: Tensor) -> Tensor:
    """Reshapes inputs of `layer` to a single axis of examples in front.

    The result is [n, in] for a linear layer, and [n, channels, ...] for a convolution.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return x[None] if x.dim() == len(layer.kernel_size) + 1 else x


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns the input values that each output is computed from (im2col).

    The result is [groups, n * positions, in / groups * kernel]; for a linear layer [1, n, in].

    Args:
        layer: a linear layer or a convolution.
        x: inputs with an axis of examples in front (see `as_batch`).
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(layer, nn.modules.conv._ConvNd)
    dims = len(layer.kernel_size)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    settings = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(settings, start=2):
        reach = (kernel - 1) * dilation + 1
        x = x.unfold(axis, reach, stride)[..., ::dilation]

    # [n, channels, *positions, *kernel] -> [n * positions, groups, channels of a group, *kernel]
    per_group = x.shape[1] // layer.groups
    x = x.movedim(1, 1 + dims).reshape(-1, layer.groups, per_group, *layer.kernel_size)
    kernel_size = layer.weight[0, 0].numel()
    return x.movedim(1, 0).reshape(layer.groups, -1, per_group * kernel_size)


def second_moment(layer: nn.Module, x: Tensor, *, most: int) -> tuple[Tensor, int]:
    """Returns the sum of x x^T over the patches of a batch, and how many patches were summed.

    Args:
        layer: a linear layer or a convolution.
        x: inputs with an axis of examples in front.
        most: how many patches to use at least, at equal distances, if the batch has so many; fewer
            than twice as many are used.

    Returns:
        The sum, [groups, k, k] float32, and the number of patches.
    """
    rows = patches(layer, x.detach().float())
    # Every n-th patch, so that all parts of the images and all examples occur.
    rows = rows[:, :: max(1, rows.shape[1] // most)]
    return rows.mT @ rows, rows.shape[1]


@torch.no_grad()
def round_second_order_(layer: QuantLayer, moment: Tensor, *, damping: float = 0.01) -> None:
    """Rounds the weights of `layer` by GPTQ: the remaining weights compensate each rounding error.

    GPTQ (Frantar et al. 2022, arXiv:2210.17323, section 3, algorithm 1) minimises the squared error
    of the layer's outputs. This is a quadratic form of the weights' errors; its Hessian is the
    second moment of the inputs. Columns are rounded in the order of the Hessian's diagonal, the
    largest first. Weights that are 0 stay 0 if the grid has a zero, as in SparseGPT. With two or
    three grid points GPTQ may be worse than rounding to nearest, so each output channel gets the
    better of the two.

    Args:
        layer: a quantized layer whose scales or codebook are set; its weights are changed.
        moment: second moment of the layer's inputs, [groups, k, k] (see `second_moment`).
        damping: number that is added to the Hessian's diagonal, as a share of the diagonal's mean.
    """
    quantization = layer.weight_quantization()
    out = len(layer.weight)
    weight = layer.weight.detach().reshape(out, -1).float()
    pruned = weight == 0 if quantization.has_zero else torch.zeros_like(weight, dtype=torch.bool)
    has_codebook = quantization.kind == "codebook"
    scale = layer.expanded_scale().detach()
    if not has_codebook:
        scale = scale.expand_as(layer.weight).reshape(out, -1)
    rounded = layer.dequantize(layer.quantize()).reshape(out, -1)

    channels = out // len(moment)  # of each group
    for group, hessian in enumerate(moment):
        rows = slice(group * channels, (group + 1) * channels)
        own_scale = scale if has_codebook else scale[rows]
        compensated = _gptq(
            weight[rows], own_scale, pruned[rows], hessian.double(), quantization, damping
        )
        error = _output_error(compensated - weight[rows], hessian)
        error_of_nearest = _output_error(rounded[rows] - weight[rows], hessian)
        rounded[rows] = torch.where(error <= error_of_nearest, compensated, rounded[rows])
    layer.weight.copy_(rounded.reshape(layer.weight.shape))


def _output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Returns the squared error [out, 1] of the outputs for an `error` [out, k] of the weights."""
    return (error @ hessian * error).sum(1, keepdim=True)


def _gptq(
    weight: Tensor,
    scale: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    quantization: WeightQuantization,
    damping: float,
) -> Tensor:
    """Returns the grid points of a weight by algorithm 1 of GPTQ.

    Args:
        weight: [out, k].
        scale: [out, k], or the codebook [values].
        pruned: [out, k], the weights that must stay 0.
        hessian: [k, k] float64.
        quantization: the grid.
        damping: number that is added to the Hessian's diagonal, as a share of the diagonal's mean.
    """
    columns = weight.shape[1]
    has_codebook = scale.dim() == 1
    diagonal = hessian.diagonal().clone()
    # Important inputs first: their weights are rounded while many others can still compensate.
    order = diagonal.argsort(descending=True, stable=True)
    # Without damping the matrix may be singular, for instance if an input is 0 in all examples.
    hessian = hessian + torch.diag(damping * diagonal.mean() + (diagonal <= 0) * 1.0 + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w = weight[:, order].clone()
    pruned = pruned[:, order]
    if not has_codebook:
        scale = scale[:, order]

    # Within a block each error changes the next columns at once; all errors of the block change the
    # later blocks in one matrix product. The sums are the same, but this is much faster.
    for start in range(0, columns, BLOCK):
        stop = min(columns, start + BLOCK)
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            exact = w[:, j]
            point = fake_quantize(exact, scale if has_codebook else scale[:, j], quantization)
            point = point.masked_fill(pruned[:, j], 0.0)
            error = (exact - point) / upper[j, j]
            w[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
            errors[:, j - start] = error
            w[:, j] = point
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w[:, order.argsort()]
