"""Trains a model with or without a teacher, for the stages train, distill and quantize."""

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
"""Number of examples that go through teacher and student once, to find the shapes of features."""
TEACHERS_IN_RUN = ("dense", "before")
"""Values of `teacher` that are not paths: the models from before pruning and before this stage."""
SAVED_MODELS = {"teacher": TEACHERS_IN_RUN}
"""`Stage.saved_models` of a stage with a teacher."""


TEACHER_CURE = (
    "give the path of a saved model, such as ",
    Argument("teacher", "runs/dense"),
    ", or 'dense' in a recipe with an earlier stage that prunes the model",
)
"""The cure if a teacher is missing. 'dense' needs an earlier stage, and a command has no such
stage."""


class TeacherTrainSettings(TrainSettings):
    """How to train on the public part, with or without a teacher."""

    teacher: str | None = Field(
        None,
        description="'dense' (the model before pruning), 'before' (the model before this stage), "
        "or a saved model: its folder, a run, a packed file",
    )
    distill: DistillSettings = Field(
        DistillSettings(), description="which outputs and features of the teacher are learned"
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
        """Returns the distillation loss; None without a teacher.

        Args:
            state: the state of the run.
            seed: seed of random parts of the loss, such as projections of features.
            student: the model that is trained; if None, the model of `state`. With the teacher
                "before", which is the model of `state`, the student must be another model.

        Raises:
            RecipeError: if there is no such teacher.
            TrainingError: if the teacher does not fit the student or the data.
        """
        # Without epochs nothing is trained, so the teacher is not needed.
        if self.teacher is None or not self.epochs:
            return None
        data = state.data
        teacher = _teacher(self.teacher, state)
        student = place_(student if student is not None else state.model, state.device)
        # A few examples go through both networks, which gives the shapes of their features.
        examples = data.preprocess(data.public.x[:EXAMPLES].to(state.device))
        context = partial(autocast, teacher, self.precision)
        task = data.task.smoothed(self.label_smoothing)
        return Distillation(
            teacher, student, self.distill, examples, task, context=context, seed=seed
        )


class StageTraining:
    """The training of a stage.

    `fedpress.workspace.drive` runs it, and resumes it from checkpoints.
    """

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
        """Trains to the last epoch; yields a tick for each step and a milestone for each epoch."""
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
        """Continues from a checkpoint of the same model and settings."""
        self.fit.load_(dict(saved.tensors))


def saved_teacher(where: str) -> tuple[ModelSpec | None, nn.Module]:
    """Loads a teacher from its path, or returns a copy of the module passed to a Python call.

    Returns:
        The teacher's spec (None for a module), and the teacher.

    Raises:
        ModelError: if the teacher does not exist, or its files are corrupt.
    """
    if where.startswith(memory.TEACHER):
        return None, memory.registered_copy(where.removeprefix(memory.TEACHER))
    try:
        return storage.load(Path(where))
    except ModelError as error:
        # The original cure is for the key `model`, which accepts more kinds of models than
        # `teacher` does.
        if error.place == "model":
            error.place = "teacher"
            error.cure = "give the folder of a model or of a run, or a packed file"
        raise


def _teacher(where: str, state: State) -> nn.Module:
    """Returns the teacher as a module that takes inputs in the student's standardisation.

    The teacher may have been trained with another mean and std. Then a hook converts its inputs.

    Args:
        where: the value of `teacher`: "dense", "before" or the path of a saved model.
        state: the state of the run.

    Raises:
        RecipeError: if there is no such teacher.
        TrainingError: if classes or inputs of the teacher differ from the data.
        ModelError: if the teacher does not exist, or its files are corrupt.
    """
    if where == "before":
        spec = state.spec
        model = state.model
    elif where != "dense":
        found, model = saved_teacher(where)
        # A module from memory has no spec, so it is assumed to expect the same inputs.
        spec = found if found is not None else state.spec
    elif state.parent is not None:
        spec, model = state.parent()
    else:
        raise RecipeError(
            "got 'dense', but no stage before this one prunes a trained model",
            place="teacher",
            cure="put a prune stage before it, or give the teacher's folder",
        )
    names = state.data.class_names
    if spec.class_names and names and spec.class_names != tuple(names):
        different = sorted(set(spec.class_names) ^ set(names))[:3] or ["the order"]
        raise TrainingError(
            f"'{where}' has other classes than the data ({', '.join(different)} differ)",
            place="teacher",
            cure="give a teacher of the same classes",
        )
    # Checked before the training: a teacher of other inputs would fail in its first step.
    if spec.input_shape != state.spec.input_shape:
        raise TrainingError(
            (
                f"'{where}' takes examples of shape {shape_text(spec.input_shape)}, but the data "
                f"have shape {shape_text(state.spec.input_shape)}"
            ),
            place="teacher",
            cure="give a teacher of the same inputs",
        )
    # A copy, because the hook below must not stay on a model that later stages use.
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
    """Converts standardised inputs [n, C, ...] from one mean and std to another mean and std.

    >>> x = torch.tensor([[1.0]])
    >>> restandardize(x, Preprocess((2.0,), (3.0,)), Preprocess((1.0,), (2.0,)))  # of the raw 5.0
    tensor([[2.]])
    """
    shape = (1, -1, *[1] * (x.dim() - 2))

    def numbers(values: tuple[float, ...], empty: float) -> torch.Tensor:
        return torch.tensor(values or (empty,), device=x.device).view(shape)

    # An empty `std` or `mean` means inputs without standardisation: std 1, mean 0.
    raw = x * numbers(source_scale.std, 1.0) + numbers(source_scale.mean, 0.0)
    return (raw - numbers(target_scale.mean, 0.0)) / numbers(target_scale.std, 1.0)
