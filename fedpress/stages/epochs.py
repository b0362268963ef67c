"""Epochs of a training stage: each becomes a milestone with a record, a note and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import JsonValue

from fedpress.tasks.base import json_number
from fedpress.training.fit import EpochRecord, Fit, Step
from fedpress.workspace.drive import Milestone
from fedpress.workspace.state import State


def train_epochs(fit: Fit, state: State) -> Iterator[Step | EpochRecord]:
    """Trains on the public part of the state's data, from where `fit` stands."""
    data = state.data
    return fit.epochs(data.public, data.validation, data.preprocess)


def total_steps(epochs: int, batch_size: int, state: State) -> int:
    """Returns the number of steps of a whole training on the public part."""
    return epochs * max(1, len(state.data.public) // batch_size)


def epoch_milestone(
    epoch: EpochRecord, *, more: str = "", before: str = "", **facts: JsonValue
) -> Milestone:
    """Returns the milestone after `epoch`.

    Args:
        epoch: number, loss and validation of the epoch.
        more: end of the note.
        before: beginning of the note.
        **facts: further entries of the record.
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
