"""Re-estimates batch-norm statistics after pruning, which has changed the inputs of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, call
from fedpress.errors import DataError
from fedpress.nn.batch_norm import ONE_VALUE, BatchNorm


@torch.no_grad()
def restore_batch_norm_(model: nn.Module, batches: Iterable[Inputs]) -> int:
    """Re-estimates the running statistics of every batch norm as plain averages over `batches`.

    No weight changes. Dropout is off, and modes, momenta and counters are restored. Batch norms in
    evaluation mode (frozen ones) are re-estimated too.

    Args:
        model: any module; without batch norms nothing changes.
        batches: batches of inputs, each with at least two examples.

    Returns:
        The number of batches.

    Raises:
        DataError: if there are no batches, or a batch has a single value per channel, which has no
            variance. The model is then unchanged.
    """
    # The first batch is taken before the old statistics are cleared: without it nothing changes.
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError(
            "got no batches, and batch-norm statistics are averages over batches",
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
            # Other errors, for instance for inputs of a wrong shape, are passed on unchanged.
            if ONE_VALUE not in str(error):
                raise
            for norm in norms:
                norm.restore_()
            raise DataError(
                "batch-norm statistics cannot be taken from a batch of one example",
                place="batches",
                cure="give batches of two or more examples",
            ) from error
    return seen


class _Norm:
    """A batch norm during re-estimation, with the state that it had before."""

    def __init__(self, layer: BatchNorm) -> None:
        self.layer = layer
        self.momentum = layer.momentum
        self.before: dict[str, Tensor] = {}
        for name, value in layer._buffers.items():
            if value is not None:
                self.before[name] = value.clone()

    def begin_(self) -> None:
        """Clears the statistics; from now on they are plain averages over the batches."""
        self.layer.reset_running_stats()
        # Without a momentum torch takes the plain average of all batches, not a moving one.
        self.layer.momentum = None
        self.layer.training = True

    def end_(self) -> None:
        """Restores momentum and counter; for a norm that did not run, the old statistics too."""
        self.layer.momentum = self.momentum
        # Counts the batches since `begin_`, so it tells whether the norm ran.
        counter = self.layer.num_batches_tracked
        if counter is None:
            return
        # A norm whose branch did not run keeps what it had.
        if counter:
            counter.copy_(self.before["num_batches_tracked"])
        else:
            self.restore_()

    def restore_(self) -> None:
        """Restores the old statistics."""
        for name, value in self.before.items():
            getattr(self.layer, name).copy_(value)


@contextmanager
def _averaging(model: nn.Module) -> Iterator[list[_Norm]]:
    """Makes batch norms average their inputs within the block; the rest is in evaluation mode."""
    norms = []
    for module in model.modules():
        if isinstance(module, BatchNorm) and module.track_running_stats:
            norms.append(_Norm(module))
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
