"""Public examples for scores, statistics and ranges: those of private ones would have to be charged to the ledger."""

from __future__ import annotations

from itertools import chain

from torch import nn

from fedpress.compress import restore_batch_norm_
from fedpress.core.examples import Arrays
from fedpress.core.random_source import public_stream
from fedpress.errors import Argument, DataError
from fedpress.nn.batch_norm import has_batch_norm
from fedpress.training.checks import check_training
from fedpress.training.settings import TrainSettings
from fedpress.workspace.state import State


def check_public_training(state: State, settings: TrainSettings) -> None:
    """Finds what would stop a training of the state's model on the public part; see `check_training`."""
    data = state.data
    check_training(state.model, settings, data.public, data.validation, data.preprocess, data.task)


def draw_calibration(state: State, n: int, seed: int) -> Arrays:
    """Draws up to `n` public examples without repetition, in an order that `seed` decides.

    Raises:
        DataError: if there are none, or they all have one label though the data has more.
            (`FederatedData` itself refuses values that are NaN or infinite.)
    """
    public = state.data.public
    if not len(public):
        raise DataError(
            "it needs public examples, but the public part of the data is empty",
            place="calibration",
            cure=("give public examples by ", Argument("data.public_share", 0.1)),
        )
    drawn = public.take(public_stream(seed, "calibration").permutation(len(public))[:n])
    if state.data.labelled and state.data.num_classes > 1 and len(drawn.y.unique()) == 1:
        name = state.data.class_names[int(drawn.y[0])]
        raise DataError(
            (
                f"all {len(drawn)} public examples are of the one class '{name}', expected at "
                f"least 2 of {state.data.num_classes}"
            ),
            place="calibration",
            cure=f"raise calibration (now {n}), or give public data of more classes",
        )
    return drawn


def restore_norms_(model: nn.Module, state: State, public: Arrays | None, *, batch: int) -> int:
    """Takes the statistics of the batch norms of `model` anew, from `public` examples in batches of `batch`.

    Returns:
        From how many examples; 0 where there is no batch norm, or no example.
    """
    if public is None or not len(public) or not has_batch_norm(model):
        return 0
    at = next(chain(model.parameters(), model.buffers())).device
    inputs = (state.data.preprocess(x.to(at)) for x, _ in public.batches(batch))
    restore_batch_norm_(model, inputs)
    return len(public)
