"""The train and distill stages: they train the whole model on the public examples."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from fedpress.core.random import derive
from fedpress.errors import SettingError
from fedpress.stages.base import Stage
from fedpress.stages.epochs import total_steps
from fedpress.stages.public import check_public_training
from fedpress.stages.teaching import SAVED_MODELS, TEACHER_CURE, StageTraining, TeacherTrainSettings
from fedpress.workspace.drive import drive
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import Name, State, Tick


class TrainStage(TeacherTrainSettings, Stage):
    """`[[stage]] kind = "train"`: trains all weights on the public part.

    A checkpoint is saved after each epoch. With a `teacher` the model also learns from the outputs
    of the teacher. `kind = "distill"` is the same stage, but requires a teacher.
    """

    uses_data_standardization: ClassVar = True
    saved_models: ClassVar = SAVED_MODELS

    kind: Literal["train", "distill"]
    name: Name = "train"

    @model_validator(mode="after")
    def _has_its_teacher(self) -> TrainStage:
        # Only the kind decides: with `train` a missing teacher means ordinary training.
        if self.teacher is None and self.kind == "distill":
            raise SettingError(
                "distill needs a teacher",
                place="teacher",
                cure=TEACHER_CURE,
            )
        return self

    def setting_reading_labels(self) -> str:
        """Returns the kind of the stage: not one setting but training itself needs labels."""
        return self.kind

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Checks settings, data and teacher; returns `state` and the planned amount of work.

        The planned amount is a dictionary with the numbers of examples, epochs and steps.

        Raises:
            TrainingError: if the settings do not fit the data, for instance because the public part
                is empty, or the teacher does not fit the model.
            RecipeError: if the teacher does not exist.
        """
        data = state.data
        check_public_training(state, self)
        # The result is not used. The call raises an error if the teacher does not exist or not fit.
        self.objective(state, 0)
        examples = len(data.public)
        return state, {
            "examples": examples,
            "epochs": self.epochs,
            "steps": total_steps(self.epochs, self.batch_size, state),
        }

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Trains the model; yields a tick for every step, saves a checkpoint after every epoch."""
        # Each stage has its own seed, so that two train stages of one recipe draw other batches.
        seed = derive(state.seed, "stage", folder.index)
        distillation = self.objective(state, seed)
        work = StageTraining(state.model, self, state, seed=seed, distillation=distillation)
        yield from drive(work, folder)
        return replace(state, model=work.fit.result_(), facts={"epochs": work.fit.epoch})
