"""Batch-norm statistics after removal: what a layer sees has changed, so its mean and variance are taken anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedpress.errors import DataError
from fedpress.nn.batch_norm import ONE_VALUE


@torch.no_grad()
def restore_batch_norm_(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Re-estimates the running statistics of every batch norm as plain averages over `batches` of inputs.

    Nothing else changes: dropout is off, modes, momenta and counters come back. Frozen batch norms are renewed too.

    Returns:
        The number of batches seen.

    Raises:
        DataError: if there are no batches, or one of a single example that leaves nothing to average; the model is
            then unchanged.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError(
            "batch-norm statistics cannot be restored from no batches; give at least one batch of inputs"
        )
    before = [{k: v.clone() for k, v in m._buffers.items() if v is not None} for m in layers]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in layers]
    seen = 0
    try:
        model.eval()
        for m in layers:
            m.reset_running_stats()
            m.momentum, m.training = None, True  # None: a cumulative average
        for batch in _chain(first, stream):
            model(batch)
            seen += 1
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        for m, old in zip(layers, before, strict=True):  # as if it had never begun
            for key, value in old.items():
                getattr(m, key).copy_(value)
        raise DataError(
            "batch-norm statistics cannot be taken from a batch of one example; give two or more public examples"
        ) from error
    finally:
        for m, momentum, old in zip(layers, momenta, before, strict=True):
            m.momentum = momentum
            if (
                m.num_batches_tracked is not None and not m.num_batches_tracked
            ):  # it never took a statistic
                for key, value in old.items():
                    getattr(m, key).copy_(value)
            elif m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(old["num_batches_tracked"])
        for module, mode in modes.items():
            module.training = mode
    return seen


def _chain(first: Tensor, rest: Iterable[Tensor]) -> Iterable[Tensor]:
    yield first
    yield from rest
