"""Batch-norm statistics after removal: what a layer sees has changed, so its mean and variance are taken anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from fedpress.core.inputs import Inputs, call
from fedpress.errors import DataError
from fedpress.nn.batch_norm import ONE_VALUE, BatchNorm


@torch.no_grad()
def restore_batch_norm_(model: nn.Module, batches: Iterable[Inputs]) -> int:
    """Re-estimates the running statistics of every batch norm as plain averages over `batches` of inputs.

    Nothing else changes: dropout is off, modes, momenta and counters come back. Frozen batch norms are renewed too.

    Returns:
        The number of batches seen.

    Raises:
        DataError: if there are no batches, or one of a single example that leaves nothing to average; the model is
            then unchanged.
    """
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError(
            "batch-norm statistics cannot be restored from no batches",
            place="batches",
            cure="give at least one batch of inputs",
        )
    seen = 0
    with _averaging(model) as norms:
        try:
            for batch in chain((first,), stream):
                call(model, batch)
                seen += 1
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            for norm in norms:  # as if it had never begun
                norm.put_back_()
            raise DataError(
                "batch-norm statistics cannot be taken from a batch of one example",
                place="batches",
                cure="give two or more public examples",
            ) from error
    return seen


class _Norm:
    """A batch norm that takes its statistics anew, and what it was before."""

    def __init__(self, layer: BatchNorm) -> None:
        self.layer, self.momentum = layer, layer.momentum
        buffers = layer._buffers.items()
        self.before = {name: value.clone() for name, value in buffers if value is not None}

    def begin_(self) -> None:
        """Forgets the statistics; from now on they are plain averages over the batches."""
        self.layer.reset_running_stats()
        self.layer.momentum = None  # a cumulative average
        self.layer.training = True

    def end_(self) -> None:
        """Gives momentum and counter back, and all that it was to a norm that never took a statistic."""
        self.layer.momentum = self.momentum
        counter = self.layer.num_batches_tracked
        if counter is None:
            return
        if counter:
            counter.copy_(self.before["num_batches_tracked"])
        else:
            self.put_back_()

    def put_back_(self) -> None:
        """Gives the old statistics back."""
        for name, value in self.before.items():
            getattr(self.layer, name).copy_(value)


@contextmanager
def _averaging(model: nn.Module) -> Iterator[list[_Norm]]:
    """Lets every batch norm of `model` average while the block lasts, and the rest of it be in evaluation mode."""
    kept = (m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats)
    norms = [_Norm(layer) for layer in kept]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for norm in norms:
            norm.begin_()
        yield norms
    finally:
        for norm in norms:
            norm.end_()
        for module, mode in modes.items():
            module.training = mode
