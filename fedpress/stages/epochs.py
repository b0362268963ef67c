"""The epochs of a stage that trains: how many steps they have, and what is recorded after each."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import JsonValue

from fedpress.tasks.base import json_number
from fedpress.training.fit import EpochRecord, Fit, Step
from fedpress.workspace.drive import Milestone
from fedpress.workspace.state import State


def train_epochs(fit: Fit, state: State) -> Iterator[Step | EpochRecord]:
    """Trains on the public examples, from the present epoch of `fit` to the last epoch.

    Yields:
        A `Step` after each optimizer step, and an `EpochRecord` after each epoch.
    """
    data = state.data
    return fit.epochs(data.public, data.validation, data.preprocess)


def total_steps(epochs: int, batch_size: int, state: State) -> int:
    """Returns the number of optimizer steps of a training on the public examples."""
    # An epoch drops the last, incomplete batch, but has at least one batch.
    return epochs * max(1, len(state.data.public) // batch_size)


def epoch_milestone(
    epoch: EpochRecord, *, more: str = "", before: str = "", **facts: JsonValue
) -> Milestone:
    """Returns the milestone after an epoch: a point at which a record and a checkpoint are saved.

    Its note for the progress bar is, for example, "epoch 3/10, loss 0.412".

    Args:
        epoch: number, loss and validation score of the epoch.
        more: text to append to the note.
        before: text to put before the note.
        **facts: further entries of the record, such as the size of images.
    """
    record = {
        "epoch": epoch.epoch,
        "epochs": epoch.epochs,
        "loss": epoch.loss,
        # `json_number` turns NaN into None, since JSON has no NaN.
        epoch.metric: None if epoch.score is None else json_number(epoch.score),
        **facts,
    }
    note = f"{before}epoch {epoch.epoch}/{epoch.epochs}, loss {epoch.loss:.3f}{more}"
    return Milestone(record, note, timed=True)
