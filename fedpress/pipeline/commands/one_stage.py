"""Builds and runs the recipe of a command such as `fedpress prune`: one stage on one model."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpress import storage, tasks
from fedpress.core.examples import Preprocess
from fedpress.data import FederatedData
from fedpress.data.examples import Progress
from fedpress.errors import Argument, DataError, FedpressError, RecipeError
from fedpress.models import ModelSpec
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.arguments import errors_of_command
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.commands.chosen_data import ChosenData
from fedpress.pipeline.commands.subject import NO_SOURCE, ChosenModel
from fedpress.pipeline.measure import measure
from fedpress.pipeline.recipe import Override, Recipe
from fedpress.pipeline.start import completed, first_state, load_data
from fedpress.stages.table import row_of
from fedpress.workspace.atomic import write_json_with_checksum
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import Event, StageFinished, StageStarted, Tick

TOP = ("data", "model", "seed", "device")
"""Tables and keys of a recipe that a command accepts in addition to the keys of its stage."""


@dataclass(frozen=True)
class OneStage:
    """A recipe of one stage on one model, which a command such as `fedpress prune` runs.

    Attributes:
        kind: kind of the stage, such as "prune"; also the name of the command.
        text: the recipe as TOML.
        recipe: the checked settings of the recipe.
        spec: spec of a saved model; None for a function or a module.
        note: warning that the mean and std of the inputs may be wrong; None: no warning.
    """

    kind: str
    text: str
    recipe: Recipe
    spec: ModelSpec | None = None
    note: FedpressError | None = None

    @classmethod
    def bind(
        cls,
        kind: str,
        chosen_model: ChosenModel,
        keys: Sequence[Override] = (),
        examples: ChosenData | None = None,
    ) -> OneStage:
        """Builds and checks the recipe.

        Args:
            kind: kind of the stage.
            chosen_model: the model.
            keys: keys of the stage, such as `keep_params=0.5`, or of the recipe, such as `seed=1`
                and `data.validation=500`.
            examples: the data that the user has given; None: the data of the run that wrote the
                model, if there is one.

        Raises:
            RecipeError: if a key is unknown, a value is wrong, or a command such as prune gets none
                of the keys that say how much to keep. The error names the key as in `keys`.
            ModelError: if the model cannot be built, or its input shape is not known.
        """
        examples = examples or ChosenData()
        row = row_of(kind).load()
        given = {key.key for key in keys}
        seed, data = examples.table(chosen_model, keys, needs_clients=row.needs_clients)
        stage: dict[str, Any] = {"kind": kind}
        if examples.is_empty(chosen_model):
            stage |= {
                key: value for key, value in row.defaults_without_data.items() if key not in given
            }
        tables = recipes.plain(
            {
                "name": kind,
                "seed": seed,
                "data": data,
                "model": chosen_model.model,
                "stage": [stage],
            }
        )
        with errors_of_command(kind, all_public=data["source"] == NO_SOURCE):
            # `keep_params=0.5` is applied to the table of the stage, not as `stage.0.keep_params`
            # to the recipe. So errors name the key as the user wrote it.
            whole = recipes.completed(tables, [key for key in keys if _of_recipe(key)])
            own = [key for key in keys if not _of_recipe(key)]
            whole["stage"] = [recipes.overridden(whole["stage"][0], own)]
            recipe = recipes.checked(whole)
        if row.requires_one_of and not given & set(row.requires_one_of):
            wanted = ", ".join(row.requires_one_of)
            raise RecipeError(
                "the amount to keep is not given",
                place=kind,
                cure=(f"give one of {wanted}, such as ", Argument(row.requires_one_of[0], 0.5)),
            )
        note = None if row.uses_data_standardization else examples.question(chosen_model, keys)
        return cls(kind, recipes.write(whole), recipe, chosen_model.spec, note)

    @staticmethod
    def lies_in(kind: str, folder: Path) -> bool:
        """Whether `folder` is the run folder of the command `kind`, such as "prune"."""
        try:
            stages = tomllib.loads((folder / "recipe.toml").read_text("utf-8")).get("stage", [])
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            return False
        # `fedpress run` with a recipe of one such stage writes no `before.json`.
        return (folder / "before.json").exists() and [stage.get("kind") for stage in stages] == [
            kind
        ]

    @classmethod
    def of_folder(cls, folder: Path, keys: Sequence[Override] = ()) -> OneStage:
        """Reads the recipe of a command from its run folder, to resume the run.

        Args:
            folder: the run folder.
            keys: keys that may change when a run is resumed, such as `device=cpu`.
        """
        text = (folder / "recipe.toml").read_text("utf-8")
        recipe = recipes.load(text, keys)
        saved = recipe.model.checkpoint
        return cls(
            recipe.stage[0].kind,
            text,
            recipe,
            storage.load(saved)[0] if saved is not None else None,
        )

    def load_data(self, progress: Progress | None = None) -> FederatedData:
        """Loads the data, and checks that they have the same classes or targets as the model.

        Raises:
            DataError: if the classes or targets differ, or the data cannot be read.
        """
        spec = self.spec
        with self._naming():
            data = load_data(self.recipe, progress=progress)
        if spec is None:
            return data
        data = completed(data, spec)
        if self.recipe.data.source == NO_SOURCE:
            names = spec.class_names or data.class_names
            task = tasks.of_model(spec.task, names)
            return replace(
                data, preprocess=Preprocess(spec.mean, spec.std), class_names=names, task=task
            )
        # Another order of the classes would give wrong labels without any error.
        if spec.class_names and spec.class_names != data.class_names:
            odd = sorted(set(spec.class_names) ^ set(data.class_names))[:3]
            what = f"{', '.join(odd)} differ" if odd else "their order differs"
            raise DataError(
                f"the data '{data.name}' has other classes than the model ({what})",
                place=self.kind,
                cure="give the data that the model was trained for",
            )
        if spec.task:  # the saved task says what the model's outputs mean
            task = tasks.of_model(spec.task, spec.class_names)
            if task.names != data.task.names:
                raise DataError(
                    (
                        f"the data '{data.name}' has targets {', '.join(data.task.names)}, but the "
                        f"model predicts {', '.join(task.names)}"
                    ),
                    place=self.kind,
                    cure="give the data that the model was trained for",
                )
            # Class weights come from the data: they depend on how frequent each class is.
            if data.task.class_weights:
                task = task.weighted(data.task.class_weights, data.public.y)
            return replace(data, task=task)
        return data

    def check(self, data: FederatedData) -> None:
        """Checks the stage on the data without running it.

        Raises:
            DataError: if the stage needs labels, and there are none.
            FedpressError: the first error that would stop the run.
        """
        if (
            len(data.public)
            and not data.labelled
            and (why := self.recipe.stage[0].setting_reading_labels())
        ):
            always = why == self.kind
            who, otherwise = (
                (why, "") if always else (f"{self.kind} with {why}", ", or leave that out")
            )
            raise DataError(
                # Labels that fit no task, such as a one-hot matrix, count as no labels.
                f"{who} learns from labels, but these inputs have no labels that fit a task",
                place="data",
                cure=(
                    "give ",
                    Argument("data", "(INPUTS, LABELS)"),
                    ", where LABELS are whole numbers [n], or for a regression floats in the shape "
                    "of the outputs",
                    otherwise,
                ),
            )
        with self._naming():
            check_recipe(self.recipe, data, sizes=False)

    def execute(self, folder: RunFolder, data: FederatedData) -> Iterator[Event]:
        """Measures the model, then runs the stage.

        The measurement before the stage goes into the file `before.json`.

        Yields:
            The events of both steps.
        """
        with self._naming():
            path = folder.path / "before.json"
            # A resumed run has measured the model already.
            if not path.exists():
                yield StageStarted(0, "model", "before")
                yield Tick(0, 1, "measuring the model as it is")
                before = {
                    "kind": "model",
                    "name": "before",
                    **measure(first_state(self.recipe, data)),
                }
                checkpoint = self.recipe.model.checkpoint
                # A packed file has its own size; `measure` would count its weights as float32.
                if checkpoint is not None and Path(checkpoint).is_file():
                    before["file_bytes"] = Path(checkpoint).stat().st_size
                write_json_with_checksum(path, before, folder.path)
                yield StageFinished(0, before)
            yield from runs.execute(self.recipe, folder, data)

    def _naming(self) -> AbstractContextManager[None]:
        return errors_of_command(self.kind, all_public=self.recipe.data.source == NO_SOURCE)


def _of_recipe(key: Override) -> bool:
    """Whether a key, such as `data.path`, belongs to the recipe and not to the stage."""
    return key.key.split(".")[0] in TOP
