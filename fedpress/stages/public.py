"""Draws public examples, from which stages compute scores, batch-norm statistics and ranges.

Private examples are not used for this: everything computed from private examples costs privacy.
"""

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
    """Checks that the model can be trained on the public examples with these settings."""
    data = state.data
    check_training(state.model, settings, data.public, data.validation, data.preprocess, data.task)


def draw_calibration(state: State, n: int, seed: int) -> Arrays:
    """Draws up to `n` different public examples at random.

    Raises:
        DataError: if there are no public examples, if `n` is 0, or if there are several classes and
            all drawn examples have the same label.
    """
    public = state.data.public
    if not len(public):
        raise DataError(
            "it needs public examples, but the public part of the data is empty",
            place="calibration",
            cure=("give public examples by ", Argument("data.public_share", 0.1)),
        )
    if n < 1:
        raise DataError(
            f"got {n}, but it needs public examples",
            place="calibration",
            cure=("give ", Argument("calibration", 256)),
        )
    drawn = public.take(public_stream(seed, "calibration").permutation(len(public))[:n])
    # Scores computed from one class would prune channels that the other classes need.
    if state.data.labelled and state.data.num_classes > 1 and len(drawn.y.unique()) == 1:
        name = state.data.class_names[int(drawn.y[0])]
        raise DataError(
            (
                f"all {len(drawn)} drawn public examples have the class '{name}', expected at "
                f"least 2 of {state.data.num_classes} classes"
            ),
            place="calibration",
            cure=f"raise calibration (now {n}), or give public data of more classes",
        )
    return drawn


def restore_norms_(model: nn.Module, state: State, public: Arrays | None, *, batch: int) -> int:
    """Recomputes the statistics of the model's batch norms.

    Args:
        model: changed in place.
        state: gives the standardisation of inputs.
        public: examples from which the statistics are computed; if None or empty, nothing changes.
        batch: batch size.

    Returns:
        The number of examples used; 0 without batch norms or examples.
    """
    if public is None or not len(public) or not has_batch_norm(model):
        return 0
    at = next(chain(model.parameters(), model.buffers())).device
    # A generator, so that one batch at a time is in memory.
    inputs = (state.data.preprocess(x.to(at)) for x, _ in public.batches(batch))
    restore_batch_norm_(model, inputs)
    return len(public)
