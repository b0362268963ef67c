"""Opens whatever can predict: a module, a saved model, a run, or an exported file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpress import deploy, tasks
from fedpress.core import consent
from fedpress.core.examples import Preprocess
from fedpress.core.inputs import Inputs, inputs_text
from fedpress.core.outputs import as_float32, is_plain, joined_outputs
from fedpress.data import Preparation
from fedpress.data.raw_inputs import RawInputs
from fedpress.errors import ModelError, first_line
from fedpress.models import ModelSpec, memory
from fedpress.nn.expected_input import input_cure
from fedpress.pipeline.commands.chosen_data import Standardization
from fedpress.pipeline.commands.given import as_taken
from fedpress.pipeline.commands.subject import ChosenModel
from fedpress.tasks import Task
from fedpress.training import evaluate as evaluation
from fedpress.workspace.stage_folder import OLD_PREPARATION, PREPARATION

# Examples in one forward pass: large enough for speed, small enough for the memory.
BATCH = 500
Outputs = tuple[Tensor, tuple[int, ...] | None]
"""Outputs for all examples, and the shape of one output; None if the latter is not known."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """A model that is ready to predict.

    Attributes:
        compute: maps examples and their standardisation to outputs.
        preprocess: standardisation of prepared examples.
        given: whether the user has given this standardisation.
        task: the task that the model was trained for; None if it is not known.
        preparation: how raw data become inputs; None if the model does not say it.
        of_columns: maps raw columns of a table to outputs, for a file that prepares them itself.
    """

    compute: Callable[[Inputs, Preprocess], Outputs]
    preprocess: Preprocess
    given: bool
    task: Task | None
    preparation: Preparation | None
    of_columns: Callable[[Mapping[str, np.ndarray]], Outputs] | None = None

    def outputs_of_raw(self, raw: RawInputs) -> Outputs:
        """Runs the model on examples that were made of raw data.

        Raises:
            FedpressError: if the model does not take them.
        """
        if self.of_columns is not None and raw.columns is not None:
            return self.of_columns(raw.columns())
        return self.outputs(raw.x, raw=True)

    def outputs(self, x: Inputs, *, raw: bool) -> Outputs:
        """Runs the model.

        Args:
            x: the examples.
            raw: whether they come from raw rows. These are standardised as in the training, even
                for a module, which takes other examples as they are.

        Raises:
            FedpressError: if the model does not take the examples.
        """
        preprocess = self.preprocess
        if raw and self.preparation is not None and not self.given:
            preprocess = Preprocess(self.preparation.mean, self.preparation.std)
        return self.compute(x, preprocess)


def predictor_of(
    model: nn.Module | str | Path, checkpoint: str | Path | None, given: Standardization | None
) -> Predictor:
    """Opens a model.

    Args:
        model: a module, the path of a saved model, run or exported file, or `module:function`.
        checkpoint: file with a state dict for the model that `module:function` builds.
        given: the standardisation that the user asks for; None: that of the training.

    Raises:
        FedpressError: if the model cannot be opened.
    """
    # `given.mean` is None for mean="data", which asks for the mean of the training data. `predict`
    # gets no training data, so mean="data" is ignored here.
    own = given.preprocess() if given is not None and given.mean is not None else None
    if isinstance(model, nn.Module):
        return _of_module(model, memory.spec_of(model), own or Preprocess(), own is not None)
    path = Path(model)
    suffixes = [row.suffix for row in deploy.FORMATS.values()]
    if path.is_file() and path.suffix in suffixes:
        return _of_file(path, own)
    weights = Path(checkpoint) if checkpoint is not None else None
    chosen_model = ChosenModel.find(model, weights=weights)
    if chosen_model.spec is None:
        # Any shape will do: it matters only if the model is saved, and here it is not.
        _, network = chosen_model.opened((1,))
        return _of_module(network, None, own or Preprocess(), own is not None)
    spec, network = chosen_model.opened()
    preprocess = own or Preprocess(spec.mean, spec.std)
    found = _of_module(network, spec, preprocess, own is not None)
    if found.preparation is not None or chosen_model.run is None:
        return found
    # Models of fedpress 0.2.0 and older have the preparation in the run folder only.
    beside = _beside(chosen_model.run / "artifacts", path.parent)
    return Predictor(found.compute, preprocess, found.given, found.task, beside)


def _of_module(
    network: nn.Module, spec: ModelSpec | None, preprocess: Preprocess, given: bool
) -> Predictor:
    task = None
    if spec is not None:
        # The task of a model that this process has loaded or trained was allowed then.
        with consent.allowing([spec.own_task] if spec.own_task else []):
            task = _task_of(spec.task, spec.class_names)

    def compute(x: Inputs, standard: Preprocess) -> Outputs:
        rows, shape = as_taken(x, network, standard)
        outputs: list[Tensor] = []
        with evaluation.evaluating(network), torch.inference_mode():
            for part in rows.split(BATCH):
                outputs.append(_outputs(network, standard(part), task))
        return joined_outputs(outputs), shape

    about = None
    if spec is not None and spec.preparation:
        about = Preparation.from_json(spec.preparation)
    return Predictor(compute, preprocess, given, task, about)


def _of_file(path: Path, own: Preprocess | None) -> Predictor:
    """Opens an exported file, such as `model.onnx`; its metadata say how to feed it."""
    metadata = deploy.file_metadata(path)
    try:
        mean, std = (tuple(json.loads(metadata.get(key, "[]"))) for key in ("mean", "std"))
        names = tuple(map(str, json.loads(metadata.get("class_names", "[]"))))
        told: Mapping[str, Any] = json.loads(metadata.get("task", "{}"))
        preprocess = own or Preprocess(mean, std)
        task = _task_of(dict(told), names)
        about = _beside(path.parent)
        if "preparation" in metadata:
            about = Preparation.from_json(json.loads(metadata["preparation"]))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"its metadata are corrupt ({error})", place=f"'{path}'", cure="export it again"
        ) from error

    def compute(x: Inputs, standard: Preprocess) -> Outputs:
        if task is not None and task.several_outputs:
            return deploy.structured_outputs(path, x, standard), None
        found = deploy.file_logits(path, standard(x)).float()
        return found, tuple(found.shape[1:])

    def of_columns(columns: Mapping[str, np.ndarray]) -> Outputs:
        several = task is not None and task.several_outputs
        outputs = deploy.column_outputs(path, columns, structured=several)
        return outputs, None if several else tuple(outputs.shape[1:])

    if deploy.INSIDE not in metadata:
        return Predictor(compute, preprocess, own is not None, task, about)
    if own is not None:
        raise ModelError(
            "the file standardises its inputs itself",
            place="mean",
            cure="leave mean and std out, or export it again with another one",
        )
    return Predictor(compute, preprocess, False, task, about, of_columns)


def _beside(*folders: Path) -> Preparation | None:
    """Returns the preparation that lies in one of the folders; None if there is none."""
    for folder in folders:
        for name in (PREPARATION, OLD_PREPARATION):
            if (folder / name).is_file():
                return Preparation.read(folder / name)
    return None


def _task_of(told: Mapping[str, Any], class_names: tuple[str, ...]) -> Task | None:
    """Returns the task that a model was trained for; None if the model does not name a task."""
    if not class_names and not told:
        return None
    return tasks.of_model(dict(told), class_names)


def _outputs(network: nn.Module, x: Inputs, task: Task | None) -> Tensor:
    """Runs the network on one batch.

    Raises:
        ModelError: if the network fails on the batch, or does not return one tensor although the
            task does not take several.
    """
    try:
        found = evaluation.outputs(network, x)
    except Exception as error:  # a user's network may raise anything
        raise ModelError(
            f"it does not take examples of {inputs_text(x)} ({type(error).__name__}: "
            f"{first_line(error)})",
            place="inputs",
            cure=input_cure(
                network,
                x,
                "give examples like those of the training; the first dimension counts them",
            ),
        ) from error
    several = task is not None and task.several_outputs
    if not (is_plain(found) if several else isinstance(found, Tensor)):
        raise ModelError(
            f"it returns {type(found).__name__}, expected one tensor",
            place="model",
            cure="wrap it in a module that returns only the tensor of outputs, or give its own task "
            "several_outputs = True (docs/tasks.md)",
        )
    return as_float32(found)
