"""Tells whether a model has batch norms, and whether any of them uses batch statistics."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm = _BatchNorm
"""Base class of torch's batch norms of one to three dimensions."""

ONE_VALUE = "more than 1 value per channel"
"""Part of torch's error message if a batch norm in training mode gets one value per channel."""


def has_batch_norm(model: nn.Module) -> bool:
    """Returns whether `model` has a batch norm with running statistics."""
    return any(norm.track_running_stats for norm in _batch_norms(model))


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    norms = []
    for module in model.modules():
        if isinstance(module, BatchNorm):
            norms.append(module)
    return norms


def uses_batch_statistics(model: nn.Module) -> bool:
    """Returns whether any batch norm of `model` uses batch statistics in its current mode."""
    # Without running statistics a norm uses batch statistics in evaluation mode too.
    return any(norm.training or norm.running_mean is None for norm in _batch_norms(model))
