"""The train stage: fits the model to the public part; fine-tuning after a cut is this stage again."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any, Literal

from fedpress import training
from fedpress.folder import StageFolder
from fedpress.seeds import derive
from fedpress.state import Name, State, Tick
from fedpress.training import Fit, Step, TrainSettings


class TrainStage(TrainSettings):
    """`[[stage]] kind = "train"`: trains all weights on the public part, with a checkpoint after each epoch."""

    kind: Literal["train"]
    name: Name = "train"

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Says how much there is to do, without doing it.

        Raises:
            TrainingError: if the settings do not fit the data, for instance because the public part is empty.
        """
        data = state.data
        training.check(state.model, self, data.public, data.validation, data.preprocess)
        examples = len(data.public)
        return state, {
            "examples": examples,
            "epochs": self.epochs,
            "steps": self.epochs * max(1, examples // self.batch_size),
        }

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Trains; yields a tick for every step."""
        fit = Fit(state.model, self, seed=derive(state.seed, "stage", folder.index), sparse=state.spec.sparse)
        tensors, saved = folder.load_progress()
        note = ""
        if saved:
            fit.load_(tensors)
            note = f"epoch {fit.epoch}/{self.epochs}"
        start = time.perf_counter() - saved.get("seconds", 0.0)
        for event in fit.epochs(state.data.public, state.data.validation, state.data.preprocess):
            if isinstance(event, Step):
                at = event
                yield Tick(at.done, at.total, note)
                continue
            seconds = time.perf_counter() - start
            folder.record(
                epoch=event.epoch,
                epochs=event.epochs,
                loss=event.loss,
                accuracy=event.accuracy,
                image_size=event.image_size,
                seconds=round(seconds, 2),
            )
            folder.save_progress(fit.state(), {"seconds": seconds})
            note = f"epoch {event.epoch}/{event.epochs}, loss {event.loss:.3f}"
            if event.accuracy is not None:
                note += f", validation {event.accuracy:.2%}"
            yield Tick(at.done, at.total, note)
        return replace(state, model=fit.result_(), facts={"epochs": fit.epoch})
