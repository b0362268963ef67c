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
        """Returns the kind of the stage, because training always reads labels."""
        return self.kind

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Checks settings, data and teacher; returns the number of examples and steps.

        Raises:
            TrainingError: if the settings do not fit the data, for instance because the public part
                is empty, or the teacher does not fit the model.
            RecipeError: if the teacher does not exist.
        """
        data = state.data
        check_public_training(state, self)
        # Only for its errors: the teacher is loaded and run on a few examples.
        self.objective(state, 0)
        examples = len(data.public)
        return state, {
            "examples": examples,
            "epochs": self.epochs,
            "steps": total_steps(self.epochs, self.batch_size, state),
        }

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Trains the model; yields a tick for every step, saves a checkpoint after every epoch."""
        # A seed of its own: two train stages of one recipe must not draw the same batches.
        seed = derive(state.seed, "stage", folder.index)
        distillation = self.objective(state, seed)
        work = StageTraining(state.model, self, state, seed=seed, distillation=distillation)
        yield from drive(work, folder)
        return replace(state, model=work.fit.result_(), facts={"epochs": work.fit.epoch})
