"""Which grid point a weight takes: scales of least error, and rounding that lets later weights mend earlier ones."""

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


def best_scale(weight: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns scales [out] or [out, groups]: of "int" the part of the span, of 80, with the least squared error.

    Those of "ternary" and "binary" are the best already (see `initial_scale`).
    """
    first = initial_scale(weight, quantization)
    if quantization.kind != "int":
        return first
    values = in_groups(weight.detach().float(), quantization.group)
    full = first.reshape(len(weight), -1, 1)
    best, least = full, torch.full_like(full, torch.inf)
    for share in torch.linspace(1, 0.2, 80).tolist():
        scale = full * share
        error = (fake_quantize(values, scale, quantization) - values).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return fill_zero_scales(best.reshape(first.shape))


def as_batch(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns the inputs `x` of `layer` with one leading axis of examples: rows [n, in] of a linear layer."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return x[None] if x.dim() == len(layer.kernel_size) + 1 else x


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns the inputs that each output value of `layer` sums over, [groups, outputs, in_channels * kernel].

    For a linear layer: the rows of `x`.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(layer, nn.modules.conv._ConvNd)
    dims = len(layer.kernel_size)
    around = layer._reversed_padding_repeated_twice
    x = F.pad(x, around, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    # [n, channels, *places, *kernel] -> [groups, n * places, channels per group * kernel]
    channels = x.shape[1]
    x = x.movedim(1, 1 + dims).reshape(
        -1, layer.groups, channels // layer.groups, *layer.kernel_size
    )
    return x.movedim(1, 0).reshape(
        layer.groups, -1, channels // layer.groups * layer.weight[0, 0].numel()
    )


def second_moment(layer: nn.Module, x: Tensor, *, most: int) -> tuple[Tensor, int]:
    """Returns the sum of x x^T over the patches of a batch, [groups, k, k] float32, and how many were summed.

    At most about `most` patches count, taken at equal distances.
    """
    rows = patches(layer, x.detach().float())
    rows = rows[:, :: max(1, rows.shape[1] // most)]
    return rows.mT @ rows, rows.shape[1]


@torch.no_grad()
def round_second_order_(layer: QuantLayer, moment: Tensor, *, damping: float = 0.01) -> None:
    """Moves the weights of `layer` onto its grid, each error made good by the weights that are not rounded yet.

    The error of the layer's outputs is quadratic in that of its weights, with the second moment of its inputs as the
    Hessian: GPTQ (Frantar et al. 2022, arXiv:2210.17323, section 3, algorithm 1), columns in the order of falling
    diagonal. Weights that are 0 stay 0 where the grid has a zero, as in SparseGPT. On a grid of two or three points
    the errors may grow instead: an output channel whose nearest points do less harm gets those.

    Args:
        layer: with scales or a codebook; changed in place.
        moment: the second moment of its inputs, [groups, k, k].
        damping: share of the mean diagonal that is added to it.
    """
    quantization = layer.weight_quantization()
    out = len(layer.weight)
    weight = layer.weight.detach().reshape(out, -1).float()
    pruned = weight == 0 if quantization.has_zero else torch.zeros_like(weight, dtype=torch.bool)
    shared = quantization.kind == "codebook"
    scale = layer.expanded_scale().detach()
    if not shared:
        scale = scale.expand_as(layer.weight).reshape(out, -1)
    chosen = layer.dequantize(layer.quantize()).reshape(out, -1)
    channels = out // len(moment)  # of each group
    for group, hessian in enumerate(moment):
        rows = slice(group * channels, (group + 1) * channels)
        tried = _gptq(
            weight[rows],
            scale if shared else scale[rows],
            pruned[rows],
            hessian.double(),
            quantization,
            damping,
        )
        harm_tried = _harm(tried - weight[rows], hessian)
        harm_nearest = _harm(chosen[rows] - weight[rows], hessian)
        chosen[rows] = torch.where(harm_tried <= harm_nearest, tried, chosen[rows])
    layer.weight.copy_(chosen.reshape(layer.weight.shape))


def _harm(error: Tensor, hessian: Tensor) -> Tensor:
    """The squared error [out, 1] of the outputs when the weights [out, k] are off by `error`."""
    return (error @ hessian * error).sum(1, keepdim=True)


def _gptq(
    weight: Tensor,
    scale: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    quantization: WeightQuantization,
    damping: float,
) -> Tensor:
    """Returns the grid points of `weight` [out, k]; `scale` holds its scales [out, k], or the codebook."""
    columns, shared = weight.shape[1], scale.dim() == 1
    diagonal = hessian.diagonal().clone()
    order = diagonal.argsort(descending=True, stable=True)
    # Without damping the matrix may not be invertible; a column that no example touches has no diagonal at all.
    hessian = hessian + torch.diag(damping * diagonal.mean() + (diagonal <= 0) * 1.0 + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w, pruned = weight[:, order].clone(), pruned[:, order]
    scale = scale if shared else scale[:, order]
    # Errors within a block are passed on at once, to later blocks in one product: the same sums, far faster.
    for start in range(0, columns, BLOCK):
        stop = min(columns, start + BLOCK)
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            now = w[:, j]
            point = fake_quantize(now, scale if shared else scale[:, j], quantization)
            point = point.masked_fill(pruned[:, j], 0.0)
            error = (now - point) / upper[j, j]
            w[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
            errors[:, j - start], w[:, j] = error, point
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w[:, order.argsort()]
