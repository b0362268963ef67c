"""Computes derivatives of losses with respect to weights; the model is not changed.

They are used for scores, which say how important a weight is and so whether it is pruned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def differentiable(
    model: nn.Module, weights: Sequence[Tensor], *, batch_statistics: bool = False
) -> Iterator[None]:
    """Prepares `model` for gradients with respect to `weights`, also if these are frozen.

    Within the block the model is in evaluation mode. Modes, buffers and `requires_grad` are
    restored afterwards.

    Args:
        model: the model whose losses are differentiated.
        weights: parameters of `model`.
        batch_statistics: whether normalisation layers use the statistics of each batch, as in
            training. Needed for freshly initialised networks, which have no running statistics yet.
    """
    modes = [(module, module.training) for module in model.modules()]
    required_grad = [weight.requires_grad for weight in weights]
    # Normalisation layers in training mode change their running statistics.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if batch_statistics else []

    try:
        model.eval()
        for module in model.modules():
            if batch_statistics and isinstance(module, nn.modules.batchnorm._NormBase):
                module.train()
        for weight in weights:
            # Frozen weights are scored too, because they can be pruned like trainable ones.
            weight.requires_grad_(True)
        # The fused attention kernels have no second derivative, which the score GraSP needs.
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for weight, was in zip(weights, required_grad, strict=True):
            weight.requires_grad_(was)
        for module, mode in modes:
            module.training = mode


def gradient(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns the gradient dL/dw for each of `weights`; zeros if the loss does not depend on w."""
    return list(torch.autograd.grad(loss, weights, materialize_grads=True))


def hessian_gradient(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns the Hessian-vector product H g for each of `weights`, g the gradient of `loss`.

    H g is half the gradient of |g|^2, so the Hessian itself is never formed.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_gradient((w**3).sum(), [w])  # g = 3 w^2, H = diag(6 w)
    [tensor([ 18., 144.])]
    """
    first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    # One factor is detached, so the gradient of `product` is that of |g|^2 / 2, which is H g.
    product = torch.stack([(g * g.detach()).sum() for g in first]).sum()
    if not product.requires_grad:  # a loss that is linear in the weights has no second derivative
        return [torch.zeros_like(w) for w in weights]
    return gradient(product, weights)


def mean_over_batches(batches: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Returns the mean over batches of each tensor; [] if there are no batches.

    `batches` has one list of tensors per batch.
    """
    total: list[Tensor] = []
    count = 0
    for values in batches:
        total = [t + v for t, v in zip(total, values, strict=True)] if count else list(values)
        count += 1
    return [t / count for t in total]
