"""The sum of per-sample gradients, each clipped: the query of DP-SGD, whose L2 sensitivity is exactly the clip norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpress.errors import RecipeError
from fedpress.tree import trainable

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(outputs [n, ...], labels [n]) -> mean loss, a scalar; it is asked for one example at a time."""


@dataclass(frozen=True)
class RawStats:
    """What happened to the samples of one batch. NOT private: no noise was added, so it must not leave the client.

    Attributes:
        examples: size of the batch that was drawn.
        loss: mean loss over the batch, nan for an empty one.
        share_clipped: share of the samples whose gradient was longer than the clip norm.
        refused: samples with a NaN or infinite gradient; they contributed zero.
    """

    examples: int
    loss: float
    share_clipped: float
    refused: int


def clipped_gradient_sum(
    model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, *, clip_norm: float
) -> tuple[Tensor, RawStats]:
    """Returns the sum over samples of gradient * min(1, clip_norm / norm), and statistics that are not private.

    Abadi et al. 2016, Algorithm 1. Adding or removing one sample changes the sum by at most `clip_norm` in L2, also
    when that sample's gradient is NaN, infinite (it contributes zero) or overflows float32 when squared.

    Args:
        model: its trainable parameters, in the order of `tree.Layout`, give the d values.
        loss_fn: outputs and labels of one example [1, ...] to its loss.
        x: prepared inputs [n, ...]; n may be 0.
        y: labels [n].
        clip_norm: the L2 bound of one sample.

    Raises:
        RecipeError: if a module mixes the samples of a batch (batch normalisation in training mode).
    """
    check_separable(model)
    params = trainable(model)
    total = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    views = _views(total, params)
    losses, norms = [], []
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        norms.append(_add_clipped_(views, grads, clip_norm))
        losses.append(float(loss.detach()))
    return total, _stats(losses, norms, clip_norm)


def check_separable(model: nn.Module) -> None:
    """Raises RecipeError if a module of `model` would let one sample change the gradient of another."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.training or module.running_mean is None):
            raise RecipeError(
                f"model.{name}: batch normalisation in training mode mixes the samples of a batch, so no sample has a "
                "gradient of its own; use norm = 'frozen' or 'group'"
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats and module.training:
            raise RecipeError(f"model.{name}: running statistics keep private data without noise; use norm = 'group'")


def _views(total: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    parts = total.split([p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]


def _add_clipped_(views: list[Tensor], grads: tuple[Tensor | None, ...], clip_norm: float) -> float:
    """Adds one sample's clipped gradient to the sum and returns its norm before clipping."""
    used = [(v, g) for v, g in zip(views, grads, strict=True) if g is not None]
    if not used:
        return 0.0
    into, given = [v for v, _ in used], [g for _, g in used]
    norm = _norm(given)
    if math.isfinite(norm):
        torch._foreach_add_(into, given, alpha=min(1.0, clip_norm / max(norm, 1e-30)))
        return norm
    # Squares overflow float32 long before the values do; in float64 only true NaN and inf are left.
    wide = [g.double() for g in given]
    norm = _norm(wide)
    if math.isfinite(norm):
        torch._foreach_add_(into, [(g * (clip_norm / norm)).float() for g in wide])
    return norm


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(tensors)).double().norm())


def _stats(losses: list[float], norms: list[float], clip_norm: float) -> RawStats:
    n = len(norms)
    if n == 0:
        return RawStats(0, math.nan, 0.0, 0)
    refused = sum(not math.isfinite(norm) for norm in norms)
    return RawStats(n, sum(losses) / n, sum(norm > clip_norm for norm in norms) / n, refused)
