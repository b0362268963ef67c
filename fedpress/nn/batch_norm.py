"""Batch norms in a network: which there are, and which take their statistics from the batch."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm = _BatchNorm  # of any number of dimensions

ONE_VALUE = "more than 1 value per channel"
"""What torch says of a batch norm in training mode that has nothing to average."""


def has_batch_norm(model: nn.Module) -> bool:
    """Says whether `model` keeps statistics of batches."""
    return any(isinstance(m, BatchNorm) and m.track_running_stats for m in model.modules())


def averages_batches(model: nn.Module) -> bool:
    """Says whether a batch norm of `model` takes its statistics from the batch, now that it is in this mode."""
    norms = (m for m in model.modules() if isinstance(m, BatchNorm))
    return any(norm.training or norm.running_mean is None for norm in norms)
