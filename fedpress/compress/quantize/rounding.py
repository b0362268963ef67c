"""Which grid point a weight takes: scales of least error, and rounding that lets later weights mend earlier ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.nn.quant_scheme import WeightGrid, first_scale, grouped, mended, rounded
from fedpress.nn.quantized import QuantLayer

BLOCK = 128


def best_scale(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Returns scales [out] or [out, groups]: of "int" the part of the span, of 80, with the least squared error.

    Those of "ternary" and "binary" are the best already (see `first_scale`).
    """
    first = first_scale(weight, grid)
    if grid.kind != "int":
        return first
    values = grouped(weight.detach().float(), grid.group)
    full = first.reshape(len(weight), -1, 1)
    best, least = full, torch.full_like(full, torch.inf)
    for share in torch.linspace(1, 0.2, 80).tolist():
        scale = full * share
        error = (rounded(values, scale, grid) - values).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return mended(best.reshape(first.shape))


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
    grid = layer._grid()
    out = len(layer.weight)
    weight = layer.weight.detach().reshape(out, -1).float()
    keep = weight == 0 if grid.has_zero else torch.zeros_like(weight, dtype=torch.bool)
    shared = grid.kind == "codebook"
    at = (
        layer._values().detach()
        if shared
        else layer._spread().detach().expand_as(layer.weight).reshape(out, -1)
    )
    chosen = layer.dequantize(layer.codes()).reshape(out, -1)
    each = out // len(moment)
    for g, hessian in enumerate(moment):
        rows = slice(g * each, (g + 1) * each)
        tried = _gptq(
            weight[rows], at if shared else at[rows], keep[rows], hessian.double(), grid, damping
        )
        harms = [
            (e @ hessian * e).sum(1, keepdim=True)
            for e in (tried - weight[rows], chosen[rows] - weight[rows])
        ]
        chosen[rows] = torch.where(harms[0] <= harms[1], tried, chosen[rows])
    layer.weight.copy_(chosen.reshape(layer.weight.shape))


def _gptq(
    weight: Tensor, at: Tensor, keep: Tensor, hessian: Tensor, grid: WeightGrid, damping: float
) -> Tensor:
    """Returns the grid points of `weight` [out, k]; `at` holds its scales [out, k], or the codebook."""
    k, shared = weight.shape[1], at.dim() == 1
    diagonal = hessian.diagonal().clone()
    hessian = hessian + torch.diag(damping * diagonal.mean() + (diagonal <= 0) * 1.0 + 1e-12)
    order = diagonal.argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w, keep = weight[:, order].clone(), keep[:, order]
    at = at if shared else at[:, order]
    for start in range(0, k, BLOCK):
        stop = min(k, start + BLOCK)
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            now = w[:, j]
            point = rounded(now, at if shared else at[:, j], grid)
            point = point.masked_fill(keep[:, j], 0.0)
            error = (now - point) / upper[j, j]
            w[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
            errors[:, j - start], w[:, j] = error, point
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w[:, order.argsort()]
