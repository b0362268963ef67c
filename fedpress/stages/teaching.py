"""Training with or without a teacher, which several stages use, and the loading of the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from fedpress import storage
from fedpress.compress.distill import Distillation, DistillSettings
from fedpress.core.examples import Preprocess
from fedpress.core.inputs import shape_text
from fedpress.errors import (
    Argument,
    ModelError,
    RecipeError,
    SettingError,
    TrainingError,
)
from fedpress.models import ModelSpec, memory
from fedpress.nn.resize import copied
from fedpress.stages.epochs import epoch_milestone, train_epochs
from fedpress.training.device import autocast, place_
from fedpress.training.fit import Fit, Step
from fedpress.training.settings import TrainSettings
from fedpress.workspace.drive import Milestone, Snapshot
from fedpress.workspace.state import State, Tick

EXAMPLES = 64
TEACHERS_IN_RUN = ("dense", "before")
SAVED_MODELS = {"teacher": TEACHERS_IN_RUN}
"""`Stage.saved_models` of a stage with a teacher: its key `teacher` is the path of a saved model,
unless it is one of the words `TEACHERS_IN_RUN`."""


TEACHER_CURE = (
    "give the path of a saved model, such as ",
    Argument("teacher", "runs/dense"),
    ", or in a recipe that has cut the model before, 'dense'",
)
"""The cure if a teacher is missing. A command has no earlier stage, so 'dense' is for recipes."""


class TeacherTrainSettings(TrainSettings):
    """How to train on the public part, with or without a teacher."""

    teacher: str | None = Field(
        None,
        description="'dense' (the model before the first cut), 'before' (the model as it comes "
        "into "
        "this stage), or a saved model: its folder, a run, a packed file",
    )
    distill: DistillSettings = Field(
        DistillSettings(), description="what is learned from the teacher"
    )
    places: ClassVar[Mapping[str, str]] = {
        "features": "distill.features",
        "attention": "distill.attention",
    }

    @model_validator(mode="after")
    def _distill_needs_a_teacher(self) -> TeacherTrainSettings:
        if self.teacher is None and "distill" in self.model_fields_set:
            raise SettingError(
                "it needs a teacher",
                place="distill",
                cure=(*TEACHER_CURE, ", or leave distill out"),
            )
        return self

    def objective(
        self, state: State, seed: int, *, student: nn.Module | None = None
    ) -> Distillation | None:
        """Returns the loss with a teacher; None without one.

        Args:
            state: of the run.
            seed: of what the distillation draws, such as its projections.
            student: the model that learns; the state's if None. Give another if the teacher is the
                state's model ("before").

        Raises:
            RecipeError: if there is no such teacher.
            TrainingError: if it does not fit the student or the data.
        """
        # Without epochs nothing learns, so a teacher is not even loaded.
        if self.teacher is None or not self.epochs:
            return None
        data = state.data
        teacher = _teacher(self.teacher, state)
        student = place_(student if student is not None else state.model, state.device)
        # A few examples are run through both networks, for the shapes of their features.
        examples = data.preprocess(data.public.x[:EXAMPLES].to(state.device))
        context = partial(autocast, teacher, self.precision)
        task = data.task.smoothed(self.label_smoothing)
        return Distillation(
            teacher, student, self.distill, examples, task, context=context, seed=seed
        )


class StageTraining:
    """The training of a stage, as work that `drive` runs and resumes."""

    def __init__(
        self,
        model: nn.Module,
        settings: TeacherTrainSettings,
        state: State,
        *,
        seed: int,
        distillation: Distillation | None,
    ) -> None:
        self.model = model
        self.source = state
        self.distillation = distillation
        self.fit = Fit(
            model,
            settings,
            task=state.data.task,
            seed=seed,
            objective=distillation,
            helpers=distillation.projections if distillation else None,
            sparse=state.spec.sparse,
            device=state.device,
        )

    def events(self) -> Iterator[Tick | Milestone]:
        """Trains to the last epoch."""
        # The distillation reads the student's features by hooks, which must not stay on the model.
        watching = (
            self.distillation.recording_features(self.model) if self.distillation else nullcontext()
        )
        with watching:
            for event in train_epochs(self.fit, self.source):
                if isinstance(event, Step):
                    yield Tick(event.done, event.total)
                    continue
                score_text = ""
                if event.score is not None:
                    score_text = f", validation {self.source.data.task.formatted(event.score)}"
                yield epoch_milestone(event, more=score_text, image_size=event.image_size)

    def state(self) -> Snapshot:
        """Returns the training's state for a checkpoint."""
        return Snapshot(self.fit.state())

    def load_(self, saved: Snapshot) -> None:
        """Goes on from a checkpoint of the same model and settings."""
        self.fit.load_(dict(saved.tensors))


def saved_teacher(where: str) -> tuple[ModelSpec | None, nn.Module]:
    """Loads a teacher by its path, or takes the module that a Python call was given.

    Returns:
        Its spec (None for a module) and the teacher.

    Raises:
        ModelError: if it is not there, or its files are corrupt.
    """
    if where.startswith(memory.TEACHER):
        return None, memory.registered_copy(where.removeprefix(memory.TEACHER))
    try:
        return storage.load(Path(where))
    except ModelError as error:
        # The cure for the argument "model" also names models that cannot be a teacher.
        if error.place == "model":
            error.place = "teacher"
            error.cure = "give the folder of a model or of a run, or a packed file"
        raise


def _teacher(where: str, state: State) -> nn.Module:
    """Loads the teacher, with its own standardisation of the inputs.

    Args:
        where: the key `teacher`: "dense", "before" or a saved model.
        state: of the run.

    Raises:
        RecipeError: if it is not there.
        TrainingError: if it has other classes or inputs than the data.
        ModelError: if its files are corrupt.
    """
    if where == "before":
        spec = state.spec
        model = state.model
    elif where != "dense":
        found, model = saved_teacher(where)
        # A module from memory has no spec: it is taken to expect the same inputs.
        spec = found if found is not None else state.spec
    elif state.parent is not None:
        spec, model = state.parent()
    else:
        raise RecipeError(
            "got 'dense', but no stage before this one has made a trained model smaller",
            place="teacher",
            cure="put a stage that makes the model smaller before it, or give the teacher's folder",
        )
    names = state.data.class_names
    if spec.class_names and names and spec.class_names != tuple(names):
        different = sorted(set(spec.class_names) ^ set(names))[:3] or ["the order"]
        raise TrainingError(
            f"'{where}' knows other classes than the data ({', '.join(different)} differ)",
            place="teacher",
            cure="give a teacher of the same classes",
        )
    # Checked before the training: a teacher of other inputs would fail in its first step.
    if spec.input_shape != state.spec.input_shape:
        raise TrainingError(
            (
                f"'{where}' takes examples of shape {shape_text(spec.input_shape)}, the data's "
                f"have {shape_text(state.spec.input_shape)}"
            ),
            place="teacher",
            cure="give a teacher of the same inputs",
        )
    # A copy: the hook below must not stay on a model that goes on in the run.
    model = place_(copied(model), state.device)
    source_scale = state.data.preprocess
    target_scale = Preprocess(spec.mean, spec.std)
    if source_scale != target_scale:
        model.register_forward_pre_hook(
            lambda _, inputs: (restandardize(inputs[0], source_scale, target_scale), *inputs[1:])
        )
    return model


def restandardize(
    x: torch.Tensor, source_scale: Preprocess, target_scale: Preprocess
) -> torch.Tensor:
    """Converts inputs [n, C, ...] from one standardisation (`source_scale`) to another (`target_scale`)."""
    shape = (1, -1, *[1] * (x.dim() - 2))

    def numbers(values: tuple[float, ...], empty: float) -> torch.Tensor:
        return torch.tensor(values or (empty,), device=x.device).view(shape)

    raw = x * numbers(source_scale.std, 1.0) + numbers(source_scale.mean, 0.0)
    return (raw - numbers(target_scale.mean, 0.0)) / numbers(target_scale.std, 1.0)
