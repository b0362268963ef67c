"""The sum of per-sample gradients, each clipped: the query of DP-SGD, whose L2 sensitivity is the clip norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.errors import RecipeError, did_you_mean
from fedpress.layers import copied
from fedpress.privacy import ghost
from fedpress.privacy.persample import LossFn, Measured, add_loop_, add_vmap_
from fedpress.tree import trainable

Method = Literal["ghost", "vmap", "loop"]

METHODS: dict[str, Callable[[list[Tensor], nn.Module, LossFn, Tensor, Tensor, float], Measured]] = {
    "ghost": ghost.add_ghost_,
    "vmap": add_vmap_,
    "loop": add_loop_,
}


@dataclass(frozen=True)
class RawStats:
    """What happened to the samples of one batch. NOT private: no noise was added, so it must not leave the client.

    Attributes:
        examples: size of the batch that was drawn.
        loss: mean loss over the samples with a finite one; nan if there are none.
        share_clipped: share of the samples whose gradient was longer than the clip norm.
        refused: samples with a NaN or infinite gradient; they contributed zero.
    """

    examples: int
    loss: float
    share_clipped: float
    refused: int


def clipped_gradient_sum(
    model: nn.Module,
    loss_fn: LossFn,
    x: Tensor,
    y: Tensor,
    *,
    clip_norm: float,
    method: Method = "loop",
    chunk: int = 128,
) -> tuple[Tensor, RawStats]:
    """Returns the sum over samples of gradient * min(1, clip_norm / norm), and statistics that are not private.

    Abadi et al. 2016, Algorithm 1. Adding or removing one sample changes the sum by at most `clip_norm` in L2, also
    when that sample's gradient is NaN or infinite (it contributes zero) or overflows float32 when squared. For
    "ghost" and "vmap" this holds up to the rounding of kernels whose order of summation depends on the batch.

    Args:
        model: its trainable parameters, in the order of `tree.Layout`, give the d values.
        loss_fn: outputs and labels of one example [1, ...] to its loss.
        x: prepared inputs [n, ...]; n may be 0.
        y: labels [n].
        clip_norm: the L2 bound of one sample.
        method: row of `METHODS`; see `choose_method`.
        chunk: samples that are in memory together.

    Raises:
        RecipeError: if a module mixes the samples of a batch (batch normalisation in training mode), or for an
            unknown method; or if a forward pass changed a buffer, which would keep private data without noise.
    """
    check_separable(model)
    buffers = [(name, b, b._version) for name, b in model.named_buffers()]
    if method not in METHODS:
        raise RecipeError(f"method: got {method!r}, expected one of {list(METHODS)}{did_you_mean(method, [*METHODS])}")
    params = trainable(model)
    total = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    views = [part.view(p.shape) for part, p in zip(total.split([p.numel() for p in params]), params, strict=True)]
    measured: Measured = []
    for start in range(0, len(x), chunk):
        at = slice(start, start + chunk)
        measured += METHODS[method](views, model, loss_fn, x[at], y[at], clip_norm)
    _check_unchanged(model, buffers)
    return total, _stats(measured, clip_norm)


def choose_method(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor) -> Method:
    """Returns the fastest method that agrees with the plain loop on a copy of `model` and two random inputs.

    `x` [n, ...] prepared and `y` [n] only give shapes and types: no private value is read. A network whose samples
    mix fails the comparison for every batched method, so it falls to the loop, where they cannot.
    """
    twin = copied(model)  # in the modes of the real one: a network may mix samples only while it trains
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # its draws would differ between the methods
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainable(twin):  # away from zeros: a zero layer would hide that a gradient is wrong
            p.add_(0.05 * torch.randn(p.shape, generator=noise).to(p))
    inputs = torch.randn((2, *x.shape[1:]), generator=noise).to(x)
    labels = torch.zeros((2, *y.shape[1:]), dtype=y.dtype, device=y.device)
    candidates: list[Method] = ["ghost"] if ghost.supports(model) else []
    small = sum(p.numel() for p in trainable(model)) < 1_000_000 and not _convolves(model)
    candidates += ["vmap"] if small or x.device.type != "cpu" else []
    if not candidates:
        return "loop"
    expected, _ = clipped_gradient_sum(twin, loss_fn, inputs, labels, clip_norm=1.0)
    for method in candidates:
        try:
            got, _ = clipped_gradient_sum(twin, loss_fn, inputs, labels, clip_norm=1.0, method=method)
        except (NotImplementedError, RuntimeError):  # torch.func or the rules do not know this network
            continue
        if float((got - expected).norm()) <= 1e-3 * float(expected.norm()):
            return method
    return "loop"


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


def _check_unchanged(model: nn.Module, before: list[tuple[str, Tensor, int]]) -> None:
    now = dict(model.named_buffers())
    for name, buffer, version in before:
        if now.get(name) is not buffer or buffer._version != version:
            raise RecipeError(
                f"model.{name}: this buffer changed during a private step, so it keeps private data without noise; "
                "use a layer without running statistics"
            )


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())


def _stats(measured: Measured, clip_norm: float) -> RawStats:
    losses = [loss for loss, _ in measured if math.isfinite(loss)]
    clipped = sum(norm > clip_norm for _, norm in measured)
    refused = sum(not math.isfinite(norm) for _, norm in measured)
    n = len(measured)
    return RawStats(n, sum(losses) / len(losses) if losses else math.nan, clipped / max(n, 1), refused)
