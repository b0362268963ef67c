"""Derivatives of losses by weights, without leaving a trace in the model: what the scores from data are made of."""

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
    """Lets gradients reach `weights`, also frozen ones, of `model` in evaluation mode; puts all back afterwards.

    Args:
        model: whose losses are differentiated.
        weights: by which.
        batch_statistics: whether norms use the statistics of each batch, as in training. A network at its
            initialisation has no others.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [weight.requires_grad for weight in weights]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if batch_statistics else []
    try:
        model.eval()
        for module in model.modules():
            if batch_statistics and isinstance(module, nn.modules.batchnorm._NormBase):
                module.train()
        for weight in weights:
            weight.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for weight, was in zip(weights, trained, strict=True):
            weight.requires_grad_(was)
        for module, mode in modes:
            module.training = mode


def gradient(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns dL/dw for each of `weights`; zeros where `loss` does not depend on it."""
    return list(torch.autograd.grad(loss, weights, materialize_grads=True))


def hessian_gradient(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns H g, half the gradient of |g|^2, for each of `weights`, with g and H those of `loss` by all of them.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_gradient((w**3).sum(), [w])  # g = 3 w^2, H = diag(6 w)
    [tensor([ 18., 144.])]
    """
    first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    flow = torch.stack([(g * g.detach()).sum() for g in first]).sum()
    if not flow.requires_grad:  # a loss that is linear in the weights bends nowhere
        return [torch.zeros_like(w) for w in weights]
    return gradient(flow, weights)


def mean(batches: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Returns the entrywise mean over `batches` of lists of tensors; an empty list for no batches."""
    total: list[Tensor] = []
    count = 0
    for values in batches:
        total = [t + v for t, v in zip(total, values, strict=True)] if count else list(values)
        count += 1
    return [t / count for t in total]
