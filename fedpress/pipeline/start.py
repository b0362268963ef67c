"""Loads the data of a recipe, and builds the state before its first stage: model, data, device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress import data as data_sets
from fedpress import storage, tasks
from fedpress.compress import cost
from fedpress.core import consent
from fedpress.core.inputs import Inputs, Shape, call, dtype_of, shape_of, shape_text
from fedpress.core.log import logger
from fedpress.core.random import derive
from fedpress.data import statistics
from fedpress.data.column_facts import Rows
from fedpress.data.examples import Progress
from fedpress.errors import Argument, FedpressError, ModelError, RecipeError, Words
from fedpress.models import ModelSpec, memory
from fedpress.models.weights import load_weights_
from fedpress.nn.expected_input import input_cure
from fedpress.nn.resize import copied
from fedpress.pipeline.arguments import KEYS
from fedpress.pipeline.places import errors_of_data, errors_of_device, errors_of_model
from fedpress.pipeline.recipe import ModelSettings, Recipe
from fedpress.pipeline.sizes import completed_arguments
from fedpress.training import device
from fedpress.workspace.state import Loader, State

log = logger(__name__)

NO_DATA = "no data"
"""Name of the data set that is used if a command gets no data: one random example."""


def load_data(
    recipe: Recipe, *, progress: Progress | None = None, describe: Rows = "public"
) -> data_sets.FederatedData:
    """Loads the recipe's data set and divides it among clients.

    If the source is a `module:function`, or the task a `module:Class`, this code is called: the
    user allows this by naming it in the recipe. From then on, it may also be called if a saved run
    names it (see `fedpress.core.consent`).

    Args:
        recipe: the recipe.
        progress: called during downloads and decoding.
        describe: the rows by which the columns of a table are described; "all" means only the
            public ones if a stage has differential privacy.

    Raises:
        TrainingError: if this machine lacks the recipe's device.
        DataError: if the data cannot be read or do not fit the settings.
    """
    # A missing device must fail before a long download.
    at = device_of(recipe)
    log.info("device %s (%s in the recipe)", at, recipe.device)
    # The user named this code in the recipe, which is consent to call it.
    task = tasks.kind_of(recipe.data.task) if recipe.data.task is not None else ""
    for name in (recipe.data.source, task):
        if consent.NAME.fullmatch(name):
            consent.allow(name)
    log.info("data come from %s", recipe.data.source)
    with errors_of_data():
        rows: Rows = "public" if recipe.private else describe
        seed = derive(recipe.seed, "data")
        return data_sets.load(recipe.data, seed, progress=progress, describe=rows)


def device_of(recipe: Recipe) -> torch.device:
    """Returns the device of the recipe.

    Raises:
        TrainingError: if this machine does not have this device.
    """
    with errors_of_device():
        return device.find(recipe.device)


def saved_model(path: Path) -> tuple[ModelSpec, nn.Module]:
    """Loads a saved model from the path that the recipe gives as `model.checkpoint`.

    Raises:
        ModelError: if the model cannot be loaded. The error names keys of the recipe, such as
            `recipe.data.source`, and not arguments of Python functions, such as `data`.
    """
    try:
        return storage.load(path)
    except ModelError as error:
        if error.place == "model":
            error.place = "recipe.model.checkpoint"
        error.change_arguments(lambda one: replace(one, name=KEYS.get(one.name, one.name)))
        raise


def first_state(recipe: Recipe, data: data_sets.FederatedData) -> State:
    """Returns the state before the first stage: the model, the data, the seed and the device.

    The model has new weights, weights from a state dict, or the weights of a checkpoint.

    Raises:
        RecipeError: if the model does not take the examples of the data, or its number of outputs
            does not fit the classes of the data.
        ModelError: if the checkpoint cannot be loaded.
        TrainingError: if this machine lacks the recipe's device.
    """
    at = device_of(recipe)
    waiting, data = data, _with_inputs(recipe, data)
    # A data set may have an empty public part or test set, so take the first part with examples.
    examples = next(a for a in (data.public, data.test, *data.clients.values()) if len(a))
    about: dict[str, Any] = {
        "input_shape": shape_of(examples.x),
        "mean": data.preprocess.mean,
        "std": data.preprocess.std,
        **({"class_names": data.class_names, "task": data.task.to_json()} if data.labelled else {}),
        "input_dtype": dtype_of(examples.x),
    }
    # torch.nn draws new weights from the global generator. Its seed is drawn from the random stream
    # "weights", which nothing else uses, so that other random numbers of the run do not depend on
    # the weights.
    torch.manual_seed(derive(recipe.seed, "weights"))
    if recipe.model.checkpoint is not None:
        spec, model = saved_model(recipe.model.checkpoint)
        # The new data may have another mean or other class names than the data of the checkpoint.
        spec = spec.model_copy(update={**about, "preparation": _preparation(data, spec)})
    else:
        about["preparation"] = _preparation(data, None)
        settings = _with_sizes(recipe.model, about["input_shape"], data)
        _check_mlp(settings, about["input_shape"], data)
        with errors_of_model():
            spec, model = _built(settings, about)
    try:
        with torch.inference_mode():
            # Two rows: some networks cannot take a batch of one.
            given = data.preprocess(examples.x[:2])
            logits = call(model.eval(), given)
    # A user's network may raise anything.
    except Exception as error:
        raise _not_taken(recipe, spec, model, given, data, error) from error
    if data.labelled:
        _check_outputs(recipe, spec, logits, examples.y[:2], data)
    # If the user gave a module, that module is the dense reference, even if an earlier call pruned
    # it.
    start = copied(model) if recipe.model.architecture == memory.IN_MEMORY else None
    dense = cost.parameters(start if start is not None else spec.build_dense())
    # The stage that makes the statistics needs the data without them.
    if waiting.awaits_statistics and recipe.stage[0].gives_statistics:
        data = waiting
    return State(spec, model.train(), data, recipe.seed, dense, device=at, given=start)


def _with_inputs(recipe: Recipe, data: data_sets.FederatedData) -> data_sets.FederatedData:
    """Returns the data with the inputs that the model gets, if a query has still to complete them.

    A checkpoint has the statistics of its training. Without one, the inputs have only the right
    shape until the first stage has run.

    Raises:
        RecipeError: if the checkpoint was trained on other columns.
    """
    if not data.awaits_statistics or data.preparation is None:
        return data
    first = recipe.stage[0]
    if first.gives_statistics:
        return statistics.settled(data, first.prepared_shape(data.preparation))
    assert recipe.model.checkpoint is not None, "checked by Recipe"
    return completed(data, saved_model(recipe.model.checkpoint)[0])


def completed(data: data_sets.FederatedData, spec: ModelSpec) -> data_sets.FederatedData:
    """Returns the data with the statistics of a model, if a private query had to make them.

    Raises:
        RecipeError: if the model has none, or was trained on other columns.
    """
    if not data.awaits_statistics or data.preparation is None:
        return data
    names = [column.name for column in data.preparation.columns]
    about = None
    if spec.preparation:
        about = data_sets.Preparation.from_json(spec.preparation)
    if about is None or [column.name for column in about.columns] != names:
        raise RecipeError(
            "the model has no private statistics of these columns, and these data need them",
            place="recipe.data.statistics",
            cure="give a model that a run with these data has saved",
        )
    return statistics.settled(data, about)


def _preparation(
    data: data_sets.FederatedData, checkpoint: ModelSpec | None
) -> dict[str, JsonValue]:
    """Returns how raw data become examples, as JSON; {} if the data do not say it.

    Args:
        data: the data set. Its standardisation and its task are those of the model.
        checkpoint: spec of a saved model. Its columns are kept if the data are prepared examples
            of the same shape, such as tensors in memory.
    """
    about = data.preparation
    if about is None and checkpoint is not None and checkpoint.preparation:
        kept = data_sets.Preparation.from_json(checkpoint.preparation)
        if data.example_shape == kept.shape:
            about = kept
    if about is None:
        return {}
    task = data.task.to_json() if data.labelled else about.task
    names = data.task.names if data.labelled else about.class_names
    return about.with_standardisation(data.preprocess, tuple(map(str, names)), task).to_json()


def _with_sizes(
    settings: ModelSettings, shape: Shape, data: data_sets.FederatedData
) -> ModelSettings:
    """Returns the table `[model]` with the sizes of a built-in network that it leaves out."""
    assert settings.architecture is not None
    arguments = completed_arguments(settings.architecture, settings.arguments, shape, data)
    return settings.model_copy(update={"arguments": arguments})


def _check_mlp(settings: ModelSettings, shape: Shape, data: data_sets.FederatedData) -> None:
    """Checks `in_features` of the built-in `mlp`.

    For any other architecture, it is not known which argument sets the input size. Such a model is
    only run on an example.

    Raises:
        RecipeError: if an example has another number of values; the cure names the right arguments.
    """
    if settings.architecture != "mlp" or isinstance(shape, dict):
        return
    wanted = prod(shape)
    given = settings.arguments.get("in_features")
    if given == wanted:
        return
    cure: list[str | Argument] = [
        "set ",
        Argument("recipe.model.arguments.in_features", wanted),
    ]
    if data.labelled:
        outputs = Argument("recipe.model.arguments.num_classes", data.task.outputs)
        cure += [" and ", outputs]
    raise RecipeError(
        f"got {given} inputs, but an example of the data has {wanted} (shape {shape_text(shape)})",
        place="recipe.model.arguments.in_features",
        cure=cure,
    )


def _not_taken(
    recipe: Recipe,
    spec: ModelSpec,
    model: nn.Module,
    given: Inputs,
    data: data_sets.FederatedData,
    error: Exception,
) -> RecipeError:
    """Returns the error for a network that fails on the examples `given`."""
    # Errors call a module in memory by its class: the user has never seen the name `IN_MEMORY`.
    in_memory = recipe.model.architecture == memory.IN_MEMORY
    name = type(model).__name__ if in_memory else spec.architecture
    # torch's errors have many lines. The first one says which shapes differ.
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    cure: Words
    if isinstance(error, FedpressError) and error.cure:
        # A more precise error, for example about wrong names of inputs. Its cure is better.
        reason = error.problem
        cure = error.cure
    elif recipe.model.takes_arguments and isinstance(error, IndexError) and _is_language(data):
        # The usual reason: its embedding has fewer rows than the vocabulary has tokens.
        tokens = data.task.outputs
        argument = Argument("recipe.model.arguments.num_classes", tokens)
        cure = (f"give it an embedding of {tokens:,} tokens, for instance with ", argument)
    elif recipe.model.takes_arguments:
        cure = (
            "change ",
            Argument("recipe.model.arguments"),
            " so that the model takes this shape",
        )
    else:
        cure = input_cure(model, given, "give examples in the shape that the model takes")
    shape = shape_text(spec.input_shape)
    return RecipeError(
        f"'{name}' does not take examples of shape {shape} ({reason})",
        place="recipe.model",
        cure=cure,
    )


def _is_language(data: data_sets.FederatedData) -> bool:
    return data.labelled and data.task.kind == "language"


def _built(settings: ModelSettings, about: dict[str, Any]) -> tuple[ModelSpec, nn.Module]:
    """Builds an architecture with new weights, or loads its weights from a state dict.

    Args:
        settings: the table `[model]` of the recipe.
        about: further fields of the `ModelSpec`: input shape, mean, std, class names and task.
    """
    assert settings.architecture is not None
    spec = ModelSpec(architecture=settings.architecture, arguments=settings.arguments, **about)
    spec, model = spec.build_for_user()
    if settings.weights is not None:
        masked = load_weights_(model, settings.weights)
        # Layers whose state dict has a pruning mask: their zeros must stay 0 in later stages.
        spec = spec.model_copy(update={"sparse": tuple(dict.fromkeys((*spec.sparse, *masked)))})
    return spec, model


def _check_outputs(
    recipe: Recipe, spec: ModelSpec, found: object, targets: Tensor, data: data_sets.FederatedData
) -> None:
    """Refuses a model whose outputs do not fit the task.

    Args:
        recipe: the recipe.
        spec: the model's spec.
        found: the model's outputs for two examples.
        targets: the labels of these examples.
        data: the data set, which knows the task.

    Raises:
        RecipeError: if the outputs do not fit.
    """
    try:
        data.task.check(found, targets)
    except ModelError as error:
        number = data.task.outputs
        sentence = f"make it return {number} numbers"
        cure: Words = sentence
        if recipe.model.takes_arguments:
            argument = Argument("recipe.model.arguments.num_classes", number)
            cure = (sentence, ", for instance with ", argument)
        # Outputs with another number of dimensions, such as a segmentation map, belong to another
        # task. Another number of classes would not help.
        dims = targets.dim() + 1 if data.task.targets == "classes" else 2
        if not isinstance(found, Tensor) or found.dim() != dims:
            cure = (
                "it can still be pruned, quantized and exported: give no data, or inputs without "
                "labels"
            )
        in_memory = recipe.model.architecture == memory.IN_MEMORY
        name = "the module" if in_memory else f"'{spec.architecture}'"
        raise RecipeError(f"{name} {error.problem}", place="recipe.model", cure=cure) from error


def with_parent(state: State, before: State, load: Loader | None) -> State:
    """Returns the state after a stage; sets an unset `parent` if this stage changed the spec.

    So the parent is the trained model before the first stage that changed its spec, for example
    before the first pruning. A later stage with `teacher = "dense"` distils from the parent.

    Args:
        state: the state after a stage.
        before: the state before this stage.
        load: loads the model before the stage; None if this model is untrained, and then `parent`
            stays unset.
    """
    if (
        state.parent is None
        and load is not None
        and state.spec.model_dump() != before.spec.model_dump()
    ):
        return replace(state, parent=load)
    return state


def parent_of(recipe: Recipe, data: data_sets.FederatedData) -> Loader | None:
    """Returns a function that loads the model before the first stage; None if it is untrained."""
    if recipe.model.checkpoint is not None:
        return partial(saved_model, recipe.model.checkpoint)
    # An untrained model is a useless teacher.
    return partial(_started, recipe, data) if recipe.model.trained else None


def spec_and_model(state: State) -> tuple[ModelSpec, nn.Module]:
    """Returns the spec and the model of `state`, the same pair that a `Loader` returns."""
    return state.spec, state.model


def _started(recipe: Recipe, data: data_sets.FederatedData) -> tuple[ModelSpec, nn.Module]:
    return spec_and_model(first_state(recipe, data))
