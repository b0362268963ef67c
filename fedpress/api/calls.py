"""Runs one stage on one model: what `prune`, `quantize`, `federate` and so on have in common."""

from __future__ import annotations

import shlex
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedpress import storage, tasks
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
from fedpress.pipeline.environment import note_environment
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.recipe import Override
from fedpress.pipeline.start import device_of
from fedpress.stages.table import commands, row_of
from fedpress.tasks import Task
from fedpress.tasks.weights import ClassWeights
from fedpress.workspace.folder import RunFolder

Model = str | Path | nn.Module | Result
Mean = Sequence[float] | Literal["none", "data"] | None


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
    allow_code: Collection[str] | str = (),
    progress: bool | None = None,
    **settings: Any,
) -> Result:
    """Runs one stage on one model.

    Args:
        kind: of the stage.
        model: the folder of a model or of a run, a packed file, `module:function`, the `Result` of
            another call, or a module, which is not changed.
        data: a source such as "cifar10"; or what is in memory: a tensor of inputs [n, ...] to
            calibrate on, a pair (inputs, labels [n]), a torch Dataset or DataLoader of one or the
            other, or a `FederatedData`. By default the data of the run that left the model. Data in
            memory are taken as inputs of the network (images of bytes as values from 0 to 1),
            except by a saved model, which standardises them as it was trained.
        path: where the source finds its files.
        checkpoint: a state dict for `module:function`.
        input_shape: of one example, for a module or function without data. Of several inputs a list
            of shapes: then a module in memory is cut, rounded or exported without data, and the
            result stays in memory.
        mean: of each channel, as a model that was trained elsewhere wants its inputs standardised
            (images as values from 0 to 1); "none": as they are; "data": by the public part of the
            source.
        std: of each channel.
        out: the run folder to write; without one the result lives in memory alone.
        device: where to train and measure: "auto", "cpu", "cuda", "cuda:1" or "mps"; None is
            "auto".
        class_weights: how much each class counts in the loss: a list, or "balanced" by the public
            part of the data; None: all alike. On the command line and in a recipe
            `data.class_weights`.
        allow_code: names `module:function` that the files of `model`, of its run or of a teacher
            may have called; a `model` that is given as `module:function` is allowed by that.
        progress: whether to show bars; None: in a notebook, and where the error stream is a
            terminal.
        settings: the keys of the stage; a `teacher` may be a module, too.

    Returns:
        The result. Without `out` it holds what export and pack wrote as `files`, by name.

    Raises:
        FedpressError: if something does not fit, saying what; before any work where it can be
            known.
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
    with call_scope(allow_code) as stack:
        opened, bound, loaded = bind(kind, model, arguments, settings, stack, out=out)
        if bound.note is not None:
            warnings.warn(str(bound.note), stacklevel=3)
        # Everything that can stop the work is found before a folder is written.
        bound.check(loaded)
        opened = _checked(kind, opened, loaded, out)
        place = out if out is not None else stack.enter_context(tempfile.TemporaryDirectory())
        result = _executed(bound, loaded, Path(place), str(model)[:200], progress)
        # Of a module that nothing builds again, a spec would name this process only.
        unknown = opened.module is not None and (out is None or opened.named is None)
        result = replace(result, spec=None if unknown else result.spec)
        if out is not None:
            return result
        return replace(result, folder=None, artifact=None, files=_files(result))


@dataclass(frozen=True)
class DataArguments:
    """The arguments of a call about its data and device; see `call`.

    Attributes:
        data: a source, or data in memory; None: those of the run that left the model, else none.
        path: of the source.
        checkpoint: a state dict for a function that builds the model.
        input_shape: of one example.
        mean: how the model wants its inputs.
        std: likewise.
        device: to compute on.
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
    """Yields a stack for what a call holds until it ends; restores torch's random state then."""
    with ExitStack() as stack:
        stack.enter_context(consent.allowing(allow_code))
        # Stages seed torch's global generator: the caller's next draws must not depend on that.
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
    """Finds the model, puts the recipe of one stage together, and loads the data.

    Raises:
        FedpressError: if something does not fit.
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
    """Returns the model that a call works on, and how it wants its inputs standardised.

    Args:
        model: as `call` takes it. A result that was written to a folder stands for that folder; one
            in memory for its module, whose inputs are standardised as those that it was made with.
        mean: as the user gives it; that goes first.
        std: likewise.

    Raises:
        ModelError: if it is nothing that a call takes.
    """
    if isinstance(model, Result):
        # A folder also knows the data of its run, so it is worth more than the module.
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
    """Returns the settings as keys of the stage; `stack` holds a teacher that is a module."""
    # TOML holds no module. The recipe names it by a number that is valid while the call lasts.
    if isinstance(teacher := settings.get("teacher"), nn.Module):
        name = stack.enter_context(memory.holding(teacher))
        settings = {**settings, "teacher": memory.TEACHER + name}
    return [Override.of(key, value) for key, value in settings.items()]


def _executed(
    bound: OneStage, data: FederatedData, place: Path, model: str, progress: bool | None
) -> Result:
    """Does the work in a new run folder at `place`."""
    folder = RunFolder.create(place, bound.text, settings_of(bound.recipe))
    with folder.locked():
        words = [f"fedpress.{bound.kind}", model]
        note_environment(folder, shlex.join(words), device=device_of(bound.recipe))
        show(bound.execute(folder, data), progress)
        return Result.read(folder, bound.kind)


@dataclass(frozen=True)
class CallModel:
    """The model of a call.

    Attributes:
        chosen_model: where it comes from, as a recipe says it.
        module: itself, if it was given as a module.
        named: how such a module can be built anew; None if that is not known, or it is none.
    """

    chosen_model: ChosenModel
    module: nn.Module | None = None
    named: memory.Named | None = None


def _find_model(
    kind: str,
    model: nn.Module | str | Path,
    checkpoint: str | Path | None,
    out: object,
    stack: ExitStack,
) -> CallModel:
    """Finds the model; `stack` holds a module while the call lasts."""
    if not isinstance(model, nn.Module):
        weights = Path(checkpoint) if checkpoint is not None else None
        return CallModel(ChosenModel.find(model, weights=weights))
    if checkpoint is not None:
        raise ModelError(
            "this module has weights of its own",
            place="checkpoint",
            cure="load them into it, and leave it out",
        )
    named = memory.find_name(model)
    _refuse_what_cannot_be_saved(kind, model, named, out)
    chosen_model = ChosenModel(stack.enter_context(holding(model, named)), module=model)
    if named is not None and ":" in named.architecture:
        # Its class is here already: nothing new is called.
        stack.enter_context(consent.allowing(named.architecture))
    return CallModel(chosen_model, model, named)


def _checked(kind: str, opened: CallModel, data: FederatedData, out: object) -> CallModel:
    """Looks whether a module that is built anew computes the same; if not, it has no name.

    Raises:
        ModelError: if it must be built anew for what the call leaves.
    """
    if opened.module is None or opened.named is None:
        return opened
    arrays = data.public if len(data.public) else next(iter(data.clients.values()))
    name = opened.chosen_model.model["arguments"]["name"]
    if memory.check_name(opened.module, name, data.preprocess(arrays.x[:2])):
        return opened
    _refuse_what_cannot_be_saved(kind, opened.module, None, out)
    return replace(opened, named=None)


def _files(result: Result) -> dict[str, bytes]:
    """Returns what export and pack wrote, by name."""
    if result.artifact is None:
        return {}
    return {file.name: file.read_bytes() for file in sorted(result.artifact.parent.iterdir())}


def _of_several(
    kind: str, model: nn.Module, shapes: several.Shapes, settings: dict[str, Any]
) -> Result:
    """Runs a stage on a model of several inputs; see `fedpress.pipeline.commands.several`."""
    if commands()[kind].load().reports_artifact:
        if odd := sorted(settings.keys() - {"format"}):
            raise ModelError(
                f"{kind} of a model of several inputs takes format alone",
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
    """Makes a data set of what is in memory.

    Raises:
        DataError: if it is nothing that `call` takes.
    """
    found = _as_federated(data, chosen_model, given, keys)
    weights = next((key.value for key in keys if key.key == "data.class_weights"), None)
    if weights is None:
        return found
    return replace(found, task=found.task.weighted(weights, found.public.y))


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
    task = None
    if chosen_model.spec is not None and chosen_model.spec.task:
        task = tasks.of_model(chosen_model.spec.task, chosen_model.spec.class_names)
    model = chosen_model.module if chosen_model.module is not None else chosen_model.fresh(keys)
    preprocess = given.preprocess() if given is not None and given.mean is not None else own
    if isinstance(data, Clients):
        if chosen_model.spec is not None:
            model, task = _saved_with_task(chosen_model, chosen_model.spec)
        found = data.federated(preprocess, model, task)
    else:
        found = given_data.in_memory(
            data,
            preprocess,
            class_names=chosen_model.spec.class_names if chosen_model.spec is not None else (),
            model=model,
            task=task,
        )
    if given is not None and given.mean is None:  # mean="data"
        return replace(found, preprocess=Preprocess.fit(found.public.x))
    return found


def _saved_with_task(chosen_model: ChosenModel, spec: ModelSpec) -> tuple[nn.Module, Task | None]:
    """Returns a saved model and what it was trained for, so that labels need not show it."""
    model = storage.load(Path(chosen_model.model["checkpoint"]))[1]
    if not spec.task and not spec.class_names:
        return model, None
    return model, tasks.of_model(spec.task, spec.class_names)


def _refuse_what_cannot_be_saved(
    kind: str, model: nn.Module, named: memory.Named | None, out: object
) -> None:
    """Refuses, before any work, to write a module that could not be loaded again.

    Raises:
        ModelError: if that is so.
    """
    row = row_of(kind).load()
    if named is not None or (out is None and not row.needs_buildable_spec):
        return
    what = "the file" if row.needs_buildable_spec else "the folder"
    error = ModelError(
        f"{what} could not be opened again, since nothing is known that builds this "
        f"{type(model).__name__}: it is not made of torch.nn layers in sequences alone, and its "
        "class does not build it from arguments that it keeps",
        place=kind if row.needs_buildable_spec else "out",
        cure=(
            "give ",
            Argument("model", "package.module:function"),
            ", a function that returns it, and ",
            Argument("checkpoint", "weights.pt"),
            " with its state_dict()",
        ),
    )
    if not row.needs_buildable_spec:
        error.add_cure(", or leave ", Argument("out"), " away and keep the result in memory")
    if row.reports_artifact:  # the file of the device is what counts here
        warnings.warn(str(error), stacklevel=4)
        return
    raise error
