"""Runs one stage on one model: the common part of `prune`, `quantize`, `federate` and so on.

A stage is one step of work, such as pruning. `call` writes a recipe (the settings of a run) that
has only this stage, runs it in a run folder, and reads the result from the files in the folder.
"""

from __future__ import annotations

import shlex
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedpress import storage, tasks
from fedpress.api.modules import building_spec, not_buildable
from fedpress.api.progress import show
from fedpress.api.result import Result
from fedpress.core import consent
from fedpress.core.examples import Preprocess
from fedpress.data import FederatedData
from fedpress.errors import Argument, ModelError
from fedpress.models import ModelSpec, memory
from fedpress.pipeline.commands import given as given_data
from fedpress.pipeline.commands import several
from fedpress.pipeline.commands.chosen_data import ChosenData, Standardization
from fedpress.pipeline.commands.clients import Clients
from fedpress.pipeline.commands.one_stage import OneStage
from fedpress.pipeline.commands.subject import ChosenModel, holding
from fedpress.pipeline.environment import write_environment
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.recipe import Override
from fedpress.pipeline.start import device_of
from fedpress.stages.table import commands, row_of
from fedpress.tasks import Task
from fedpress.tasks.weights import ClassWeights
from fedpress.workspace.folder import RunFolder

Model = str | Path | nn.Module | Result
"""The model of a call; for what each type means, see the argument `model` of `call`."""
Mean = Sequence[float] | Literal["none", "data"] | None
"""How inputs are standardised; for what each value means, see the argument `mean` of `call`."""


def call(
    kind: str,
    model: Model,
    *,
    data: Any = None,
    path: str | Path | None = None,
    checkpoint: str | Path | None = None,
    input_shape: Sequence[Any] | None = None,
    mean: Mean = None,
    std: Sequence[float] | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    class_weights: ClassWeights | None = None,
    task: str | Mapping[str, Any] | None = None,
    allow_code: Collection[str] | str = (),
    progress: bool | None = None,
    **settings: Any,
) -> Result:
    """Runs one stage on one model.

    Args:
        kind: kind of stage, such as "prune".
        model: a `torch.nn.Module` (it is not changed), the `Result` of another call, the folder of
            a model or of a run, a packed file (`.safetensors`), or the name of a function that
            builds the model, as `package.module:function`.
        data: name of a source of data, such as "cifar10"; or data in memory: inputs [n, ...] to
            calibrate on, a pair (inputs, labels [n]), a torch Dataset or DataLoader of inputs or
            pairs, or a `FederatedData`. None: the data of the run that wrote the model. A module
            gets data in memory unchanged, except that uint8 images are scaled to 0..1. For a saved
            model, data in memory are standardised as in its training.
        path: file or folder of the source, if the source reads files.
        checkpoint: file with a state dict for the model that `module:function` builds.
        input_shape: shape of one example, such as (3, 32, 32). A module or function without data
            needs it. A list of shapes means several inputs. Then the model must be a module, which
            can be pruned, quantized or exported without data; the result stays in memory.
        mean: mean of each channel, for a model that was trained by another program (images are
            scaled to 0..1 first). "none": no standardisation. "data": mean and std of the public
            examples, which belong to no client.
        std: standard deviation of each channel.
        out: run folder to write; None: the result stays in memory.
        device: device to train and measure on: "cpu", "cuda", "cuda:1", "mps" or "auto" (a CUDA GPU
            if there is one, else the CPU); None is "auto".
        class_weights: weight of each class in the loss, as a list; "balanced": weights from the
            number of public examples of each class; None: equal weights. In a recipe and on the
            command line this is the key `data.class_weights`.
        task: what is learned from pairs or a source: a name such as "forecast", a table such as
            `{"kind": "binary", "threshold": 0.3}`, or your own class as `module:Class`. None: the
            task of a saved model, else it is found from targets and model. In a recipe and on the
            command line this is the key `data.task`.
        allow_code: functions that may be called to build a model, as `module:function`: the given
            model, the model of the run that wrote it, or a teacher. A `model` given as
            `module:function` need not be listed.
        progress: whether to show progress bars; None: in a notebook or terminal only.
        settings: keys of the stage, such as `keep_params=0.5`. `teacher` may also be a module.

    Returns:
        The result. If `out` is None, `files` has the bytes of the files that export or pack made.

    Raises:
        FedpressError: if arguments do not fit together. Nearly all checks come before training.
    """
    model, mean, std = model_of(model, mean, std)
    if (shapes := several.several_shapes(input_shape)) is not None:
        several.check(kind, model, data, out)
        return _of_several(kind, model, shapes, settings)  # type: ignore[arg-type]
    arguments = DataArguments(
        data, path, checkpoint, several.one_shape(input_shape), mean, std, device
    )
    if class_weights is not None:
        settings["data.class_weights"] = class_weights
    if task is not None:
        settings["data.task"] = task
    with call_scope(allow_code) as stack:
        opened, bound, loaded = bind(kind, model, arguments, settings, stack, out=out)
        if bound.note is not None:
            warnings.warn(str(bound.note), stacklevel=3)
        # Everything that can stop the work is found before a folder is written.
        bound.check(loaded)
        opened = _checked(kind, opened, loaded, out)
        # Stages always work in a run folder. Without `out`, it is deleted when the call ends.
        place = out if out is not None else stack.enter_context(tempfile.TemporaryDirectory())
        result = _executed(bound, loaded, Path(place), str(model)[:200], progress)
        # A spec is of no use if only this process can build the module.
        if result.spec is not None and result.spec.architecture == memory.IN_MEMORY:
            result = replace(result, spec=None)
        if out is not None:
            return result
        return replace(result, folder=None, artifact=None, files=_files(result))


@dataclass(frozen=True)
class DataArguments:
    """The arguments of `call` about data and device.

    Attributes:
        data: name of a source, or data in memory; None: the data of the run that wrote the model,
            if a run wrote it.
        path: file or folder of the source.
        checkpoint: file with a state dict for a function that builds the model.
        input_shape: shape of one example.
        mean: mean of each input channel, "none" or "data".
        std: standard deviation of each input channel.
        device: device to train and measure on.
    """

    data: Any = None
    path: str | Path | None = None
    checkpoint: str | Path | None = None
    input_shape: tuple[int, ...] | None = None
    mean: Mean = None
    std: Sequence[float] | None = None
    device: str | torch.device | None = None


@contextmanager
def call_scope(allow_code: Collection[str] | str) -> Iterator[ExitStack]:
    """Yields a stack for context managers that must end with the call.

    At the end, the functions in `allow_code` are no longer allowed, and torch's random state is as
    before the call.
    """
    with ExitStack() as stack:
        stack.enter_context(consent.allowing(allow_code))
        # Stages seed torch's global generator. The caller's random numbers must not depend on it.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield stack


def bind(
    kind: str,
    model: nn.Module | str | Path,
    arguments: DataArguments,
    settings: dict[str, Any],
    stack: ExitStack,
    *,
    out: str | Path | None = None,
) -> tuple[CallModel, OneStage, FederatedData]:
    """Finds the model, makes a recipe of one stage, and loads the data.

    Args:
        kind: kind of stage.
        model: the model as `model_of` returns it.
        arguments: data and device.
        settings: keys of the stage.
        stack: keeps modules registered until the call ends.
        out: run folder to write; None: the result stays in memory.

    Returns:
        The model, the recipe, and the data set.

    Raises:
        FedpressError: if model, data and settings do not fit together.
    """
    given = Standardization.of(arguments.mean, arguments.std)
    opened = _find_model(kind, model, arguments.checkpoint, out, stack)
    keys = _keys(settings, stack)
    if arguments.device is not None:
        keys.append(Override.of("device", str(arguments.device)))
    source = arguments.data if isinstance(arguments.data, str) else None
    data_set = None
    if arguments.data is not None and source is None:
        data_set = _data_set(arguments.data, opened.chosen_model, given, keys)
    path = Path(arguments.path) if arguments.path is not None else None
    examples = ChosenData(source, path, arguments.input_shape, data_set, given)
    bound = OneStage.bind(kind, opened.chosen_model, keys, examples)
    return opened, bound, data_set if data_set is not None else bound.load_data()


def model_of(
    model: Model, mean: Mean = None, std: Sequence[float] | None = None
) -> tuple[nn.Module | str | Path, Mean, Sequence[float] | None]:
    """Returns the model that a call works on, with the mean and std of its inputs.

    Args:
        model: the argument `model` of `call`. For a `Result` with a folder, the folder is returned.
            For a `Result` in memory, its module is returned, with the mean and std of the result.
        mean: the user's `mean=`; it takes precedence over the mean of the result.
        std: the user's `std=`.

    Raises:
        ModelError: if `model` has another type.
    """
    if isinstance(model, Result):
        # The folder is better than the module: it also names the data of the run.
        if model.folder is not None:
            return model.folder, mean, std
        if mean is None and model.mean:
            return model.model, model.mean, model.std
        return model.model, mean, std
    if not isinstance(model, nn.Module | str | Path):
        raise ModelError(
            f"got {type(model).__name__}, expected a torch.nn.Module, a Result, a path or "
            "module:function",
            place="model",
        )
    return model, mean, std


def _keys(settings: dict[str, Any], stack: ExitStack) -> list[Override]:
    """Returns the settings as overrides of the recipe; registers a teacher module in `stack`."""
    # TOML cannot contain a module. The recipe has a number instead, valid during this call.
    if isinstance(teacher := settings.get("teacher"), nn.Module):
        name = stack.enter_context(memory.registered(teacher))
        settings = {**settings, "teacher": memory.TEACHER + name}
    return [Override.of(key, value) for key, value in settings.items()]


def _executed(
    bound: OneStage, data: FederatedData, place: Path, model: str, progress: bool | None
) -> Result:
    """Runs the stage in a new run folder at `place`."""
    folder = RunFolder.create(place, bound.text, settings_of(bound.recipe))
    with folder.locked():
        # `environment.json` gets the words of the call, as if the call had been a command. They
        # say how this folder was made.
        words = [f"fedpress.{bound.kind}", model]
        write_environment(folder, shlex.join(words), device=device_of(bound.recipe))
        show(bound.execute(folder, data), progress)
        return Result.read(folder, bound.kind)


@dataclass(frozen=True)
class CallModel:
    """The model of a call.

    Attributes:
        chosen_model: the model as keys of the table `[model]` in a recipe.
        module: the user's module; None if the user gave a path or a function.
        named: class or function, and its arguments, that build the module again; None if they are
            not known, if a spec builds the module instead, or if the user gave no module.
    """

    chosen_model: ChosenModel
    module: nn.Module | None = None
    named: memory.Buildable | None = None


def _find_model(
    kind: str,
    model: nn.Module | str | Path,
    checkpoint: str | Path | None,
    out: object,
    stack: ExitStack,
) -> CallModel:
    """Finds the model for a recipe with one stage.

    TOML cannot contain a module. The recipe names it by a number, valid until `stack` is closed.
    """
    if not isinstance(model, nn.Module):
        weights = Path(checkpoint) if checkpoint is not None else None
        return CallModel(ChosenModel.find(model, weights=weights))
    if checkpoint is not None:
        raise ModelError(
            "this module has weights of its own",
            place="checkpoint",
            cure="load them into it, and leave it out",
        )
    spec = memory.spec_that_builds(model)
    named = memory.find_buildable(model)
    if named is not None and not (spec is not None and spec.sparse):
        # The constructor is enough to build the module. Only a sparse module needs its spec, which
        # says which zeros must stay.
        spec = None
    if spec is not None:
        named = None
    if named is None and building_spec(model) is None:
        _refuse_what_cannot_be_saved(kind, model, out)
    chosen_model = ChosenModel(stack.enter_context(holding(model, named, spec)), module=model)
    for known in (named, spec):
        if known is not None and ":" in known.architecture:
            # The user's own program has imported this class or function, so it may be called
            # without being in `allow_code`.
            stack.enter_context(consent.allowing(known.architecture))
    # The same holds for the task of a model that this process has loaded or trained.
    about = memory.spec_of(model)
    if about is not None and (kind := about.own_task):
        stack.enter_context(consent.allowing(kind))
    return CallModel(chosen_model, model, named)


def _checked(kind: str, opened: CallModel, data: FederatedData, out: object) -> CallModel:
    """Builds the user's module again and compares outputs; if they differ, sets `named` to None.

    Raises:
        ModelError: if the call must write a model that can be built again, and outputs differ.
    """
    if opened.module is None or opened.named is None:
        return opened
    # Outputs are compared on real examples, because token ids, for instance, must be below the size
    # of the vocabulary.
    arrays = data.public if len(data.public) else next(iter(data.clients.values()))
    name = opened.chosen_model.model["arguments"]["name"]
    if memory.check_buildable(opened.module, name, data.preprocess(arrays.x[:2])):
        return opened
    _refuse_what_cannot_be_saved(kind, opened.module, out)
    return replace(opened, named=None)


def _files(result: Result) -> dict[str, bytes]:
    """Returns the files that export or pack wrote: name -> bytes."""
    if result.artifact is None:
        return {}
    # All files of the folder, because some formats need more than one (OpenVINO: .xml and .bin).
    return {file.name: file.read_bytes() for file in sorted(result.artifact.parent.iterdir())}


def _of_several(
    kind: str, model: nn.Module, shapes: several.Shapes, settings: dict[str, Any]
) -> Result:
    """Runs a stage on a model of several inputs.

    The stage sees a wrapper with one input: for each example a row that contains all inputs, each
    flattened, one after another. See `fedpress.pipeline.commands.several`.
    """
    # An exported file must have the separate inputs, so export does not use the wrapper.
    if commands()[kind].load().reports_artifact:
        if odd := sorted(settings.keys() - {"format"}):
            raise ModelError(
                f"{kind} of a model of several inputs takes only the setting format",
                place=odd[0],
                cure="leave it out",
            )
        files, facts = several.export(model, shapes, **settings)
        return Result(None, model, {}, facts, None, None, files)
    joined = several.Joined(model, shapes)
    result = call(kind, joined, input_shape=(sum(prod(shape) for shape in shapes),), **settings)
    assert isinstance(result.model, several.Joined)
    return replace(result, model=result.model.model)


def _data_set(
    data: Any,
    chosen_model: ChosenModel,
    given: Standardization | None,
    keys: Sequence[Override],
) -> FederatedData:
    """Makes a federated data set from data in memory, with the user's class weights.

    Raises:
        DataError: if `data` has a type that `call` does not take.
    """
    found = _as_federated(data, chosen_model, given, keys)
    # A source applies `data.class_weights` when it loads the data. Data in memory have no source,
    # so the key is applied here.
    weights = _value_of("data.class_weights", keys)
    if weights is None:
        return found
    return replace(found, task=found.task.weighted(weights, found.public.y))


def _value_of(name: str, keys: Sequence[Override]) -> Any:
    """Returns the value that the user gives to a key of the recipe; None if there is none."""
    return next((key.value for key in keys if key.key == name), None)


def _as_federated(
    data: Any,
    chosen_model: ChosenModel,
    given: Standardization | None,
    keys: Sequence[Override],
) -> FederatedData:
    if isinstance(data, FederatedData):
        return (
            data
            if given is None or given.mean is None
            else replace(data, preprocess=given.preprocess())
        )
    own = (
        Preprocess(chosen_model.spec.mean, chosen_model.spec.std)
        if chosen_model.spec is not None
        else Preprocess()
    )
    task = _task_of_model(chosen_model)
    model = chosen_model.module if chosen_model.module is not None else chosen_model.fresh(keys)
    preprocess = given.preprocess() if given is not None and given.mean is not None else own
    if isinstance(data, Clients):
        # The task is found from the model's outputs, since the clients' labels are private.
        if chosen_model.spec is not None:
            model, task = _saved_with_task(chosen_model, chosen_model.spec)
        elif data.task is not None:
            task = None  # the user's task replaces that of a module
        found = data.federated(preprocess, model, task)
    else:
        found = given_data.in_memory(
            data,
            preprocess,
            class_names=chosen_model.spec.class_names if chosen_model.spec is not None else (),
            model=model,
            task=task,
            named=_value_of("data.task", keys),
        )
    if given is not None and given.mean is None:  # mean="data"
        return replace(found, preprocess=Preprocess.fit(found.public.x))
    return found


def _task_of_model(chosen_model: ChosenModel) -> Task | None:
    """Returns the task of a saved model, or of a module that an earlier call has trained.

    The module's outputs are in the units of its task: those of a forecast are standardised, for
    instance. None: the model has none, or a classification, which labels and outputs tell too.
    """
    spec = chosen_model.spec
    if spec is None and chosen_model.module is not None:
        spec = memory.spec_of(chosen_model.module)
    if spec is None or not spec.task:
        return None
    return tasks.of_model(spec.task, spec.class_names)


def _saved_with_task(chosen_model: ChosenModel, spec: ModelSpec) -> tuple[nn.Module, Task | None]:
    """Returns a saved model and its saved task; the task is None if the file has none."""
    model = storage.load(Path(chosen_model.model["checkpoint"]))[1]
    if not spec.task and not spec.class_names:
        return model, None
    return model, tasks.of_model(spec.task, spec.class_names)


def _refuse_what_cannot_be_saved(kind: str, model: nn.Module, out: object) -> None:
    """Refuses to write a module that could not be loaded again. Called before any work is done.

    Raises:
        ModelError: if the call would write a folder or file from which the module must be built
            again. For an export there is only a warning.
    """
    row = row_of(kind).load()
    if out is None and not row.needs_buildable_spec:
        return
    if row.needs_buildable_spec:
        error = not_buildable(model, place=kind, what="the file")
    else:
        error = not_buildable(model, place="out", what="the folder")
        error.add_cure(", or leave out ", Argument("out"), " and keep the result in memory")
    # For an export a warning is enough: the exported file runs without the Python class.
    if row.reports_artifact:
        warnings.warn(str(error), stacklevel=4)
        return
    raise error
