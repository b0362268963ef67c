"""Finds batch norms in a model, and whether they use the statistics of the batch."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm = _BatchNorm
"""torch's batch norms of any number of dimensions."""

ONE_VALUE = "more than 1 value per channel"
"""Part of torch's error for a batch norm in training mode that has a single value per channel."""


def has_batch_norm(model: nn.Module) -> bool:
    """Returns whether `model` has a batch norm with running statistics."""
    return any(norm.track_running_stats for norm in _batch_norms(model))


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def averages_batches(model: nn.Module) -> bool:
    """Returns whether a batch norm of `model` now uses the statistics of the batch."""
    # Without running statistics a norm averages in evaluation mode too.
    return any(norm.training or norm.running_mean is None for norm in _batch_norms(model))
