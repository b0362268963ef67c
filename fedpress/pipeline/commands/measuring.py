"""Compares size and speed of models, in torch and in the runtimes they can be exported to."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress import deploy, storage
from fedpress.compress import cost
from fedpress.core import consent
from fedpress.core.examples import Preprocess
from fedpress.core.inputs import Example
from fedpress.core.random_source import public_stream
from fedpress.deploy import FORMATS, Candidate, Job
from fedpress.deploy.examples import InputSpec, example_of, is_shape, take_rows
from fedpress.errors import Argument, ExportError, ModelError, renaming
from fedpress.models import ModelSpec, memory
from fedpress.nn.resize import copied
from fedpress.pipeline.commands.several import Shapes, known_shape, one_shape, several_shapes
from fedpress.pipeline.commands.subject import ChosenModel, holding, outputs_of, shape_cure


def measure(
    models: Sequence[str | Path | nn.Module] | str | Path | nn.Module,
    *,
    formats: Sequence[str] | None = None,
    int8: bool = True,
    batches: Sequence[int] = (1, 64),
    threads: Sequence[int] = (1, 2),
    seconds: float = 1.0,
    input_shape: Sequence[Any] | None = None,
    checkpoint: Path | None = None,
    allow_code: Collection[str] | str = (),
) -> dict[str, Any]:
    """Measures each model in torch, and each file exported from it in the runtime of its format.

    Example: the file in the format "onnx" runs in ONNX Runtime.

    Args:
        models: one model or several: folders of models or runs, packed files (as `fedpress.save`
            writes them), exported files, `module:function`, or modules in memory.
        formats: formats to export each model to, names of `fedpress.deploy.FORMATS`, such as
            "onnx". None: all installed formats, except those that cannot export the model.
        int8: whether to also export each model with 8-bit integers. The ranges of activations in
            these files come from random inputs. So their size and latency are real, but their
            outputs are not.
        batches: batch sizes.
        threads: numbers of threads.
        seconds: time limit for each combination of model or file, batch size and number of threads.
        input_shape: shape of one example, for functions and modules; a list of shapes for modules
            of several inputs.
        checkpoint: file with a state dict for the model that `module:function` builds.
        allow_code: names `module:function` that may be called to build models.

    Returns:
        A dictionary. "records": for each model and each exported file the record of
        `fedpress.deploy.measure`, with one more key, "parameters". "left_out": name of an export
        that failed -> reason.

    Raises:
        ExportError: if a format is unknown, its packages are missing, or a model cannot be exported
            or run.
        ModelError: if there is no model, a model fails on inputs of its shape, or the models take
            different inputs.

    >>> import torch, fedpress
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> found = fedpress.measure(net, input_shape=(4,), formats=["onnx"], int8=False, seconds=0.01)
    >>> [record["runtime"] for record in found["records"]]
    ['torch', 'onnxruntime']
    """
    inputs = Inputs.of(input_shape)
    chosen = _chosen(models, checkpoint)
    _check_numbers(seconds, batches, threads)
    # Before any model is opened, since that may take long.
    if wrong := [name for name in formats or () if name not in FORMATS]:
        with renaming({"format": "formats"}):
            raise deploy.unknown_format(wrong[0])
    with ExitStack() as stack:
        stack.enter_context(consent.allowing(allow_code))
        # Measuring draws random inputs. The state of the caller's generator must not change.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = Entries(inputs, checkpoint, stack)
        for number, given in enumerate(chosen):
            found.add_(number, given, folder, formats=formats, int8=int8)
        entries = found.entries
        records = deploy.measure(
            {name: entry.candidate() for name, entry in entries.items()},
            _same_inputs(entries),
            batches=batches,
            threads=threads,
            seconds=seconds,
        )
    lines = [record | {"parameters": entries[record["name"]].parameters} for record in records]
    return {"records": lines, "left_out": found.left_out}


@dataclass(frozen=True)
class Inputs:
    """The input shapes that the user has given.

    Attributes:
        several: shapes of all inputs, for a module with several inputs; else None.
        shape: shape of one example, for a model with one input; None if not given.
    """

    several: Shapes | None
    shape: tuple[int, ...] | None

    @classmethod
    def of(cls, input_shape: Sequence[Any] | None) -> Inputs:
        """Checks the argument `input_shape=` and converts it.

        Raises:
            ModelError: if `input_shape` is not a shape or a list of shapes.
        """
        several = several_shapes(input_shape)
        return cls(several, one_shape(input_shape) if several is None else None)

    def example(self) -> Example | None:
        """Returns a batch of random inputs for a module with several inputs, else None."""
        if self.several is None:
            return None
        chance = public_stream(0, "measure")
        return tuple(chance.normal(32, *shape, dtype=torch.float32) for shape in self.several)


@dataclass(frozen=True)
class Entry:
    """A model or an exported file that is to be measured.

    Attributes:
        chosen_model: the model, or the path of an exported file.
        takes: what the model takes: the shape of one example, or a batch of inputs.
        parameters: number of parameters; None for an exported file without a known model.
        macs: multiply-adds of one example; 0 if unknown.
        activations: number of values that all layers output for one example; 0 if unknown.
        file_bytes: size of the model's file; None: the size of the file `chosen_model`.
    """

    chosen_model: nn.Module | Path
    takes: InputSpec
    parameters: int | None = None
    macs: int = 0
    activations: int = 0
    file_bytes: int | None = None

    @property
    def on_integers(self) -> bool:
        """Whether this is an exported ONNX file that computes on integers."""
        if not isinstance(self.chosen_model, Path):
            return False
        # A file in which only the weights are rounded has DequantizeLinear but no QuantizeLinear;
        # it computes on floats.
        return b"QuantizeLinear" in self.chosen_model.read_bytes().replace(b"DequantizeLinear", b"")

    def candidate(self) -> Candidate:
        """Converts the entry to the argument type of `deploy.measure`."""
        return Candidate(
            self.chosen_model, self.macs, self.activations, self.on_integers, self.file_bytes
        )


def _check_numbers(seconds: float, batches: Sequence[int], threads: Sequence[int]) -> None:
    if not seconds > 0:
        raise ExportError(
            f"got {seconds}, expected a number above 0",
            place="seconds",
            cure=("give for instance ", Argument("seconds", 1.0)),
        )
    for name, numbers in (("batches", batches), ("threads", threads)):
        if not numbers or min(numbers) < 1:
            raise ExportError(
                f"got {list(numbers)}, expected whole numbers above 0",
                place=name,
                cure=("give for instance ", Argument(name, (1, 2))),
            )


def _chosen(models: Any, checkpoint: Path | None) -> Sequence[str | Path | nn.Module]:
    """Returns the models that were given, as a list."""
    found = models if isinstance(models, list | tuple | None) else [models]
    for one in found or ():
        if not isinstance(one, str | Path | nn.Module):
            raise ModelError(
                (
                    f"got {type(one).__name__}, expected a torch.nn.Module, a path or "
                    "module:function"
                ),
                place="models",
            )
    # A state dict can only be loaded into a model that is built here.
    if checkpoint is not None and any(isinstance(one, nn.Module) for one in found or ()):
        raise ModelError(
            "a module has weights of its own",
            place="checkpoint",
            cure="load them into it, and leave it out",
        )
    if not found:
        raise ModelError(
            "no model was given",
            place="models",
            cure="give folders, packed or exported files, or module:function",
        )
    return found


def _is_exported(path: Path) -> bool:
    return path.suffix in {row.suffix for row in FORMATS.values()} and path.is_file()


def _entry_of_file(file: Path, name: str, inputs: Inputs) -> Entry:
    """Makes the entry of an exported file.

    If the file is in the folder `artifacts` of a run, its counts are those of the run's model.
    """
    near = _model_beside(file)
    takes = inputs.example() or _given(near[0] if near else None, name, inputs.shape)
    return Entry(file, takes, *_counts(near[1], takes)) if near else Entry(file, takes)


def _entry_of_model(
    spec: ModelSpec, model: nn.Module, name: str, inputs: Inputs, path: Path | None
) -> Entry:
    """Makes the entry of a model. If `path` is a packed file, the entry has the file's size."""
    takes = inputs.example() or _given(spec, name, None)
    size = path.stat().st_size if path and path.is_file() else storage.file_bytes(spec, model)
    return Entry(model, takes, *_counts(model, takes), file_bytes=size)


class Entries:
    """Collects what is to be measured: the given models, and the files exported from them.

    Attributes:
        inputs: the input shapes that the user has given.
        checkpoint: file with a state dict; None if not given.
        entries: name -> entry; a model "net" gives "net", "net as onnx" and so on.
        left_out: name of an export that failed -> reason.
    """

    def __init__(self, inputs: Inputs, checkpoint: Path | None, stack: ExitStack) -> None:
        self.inputs, self.checkpoint = inputs, checkpoint
        self.stack = stack  # modules stay registered until this stack is closed
        self.entries: dict[str, Entry] = {}
        self.left_out: dict[str, str] = {}

    def add_(
        self,
        number: int,
        given: str | Path | nn.Module,
        folder: Path,
        *,
        formats: Sequence[str] | None,
        int8: bool,
    ) -> None:
        """Adds the model or file at position `number`; a model is also exported into `folder`."""
        title = type(given).__name__ if isinstance(given, nn.Module) else str(given)
        # Two modules may have the same class, and the names are the keys of the result.
        name = title if title not in self.entries else f"{title} ({number + 1})"
        if not isinstance(given, nn.Module) and _is_exported(Path(given)):
            self.entries[name] = _entry_of_file(Path(given), name, self.inputs)
            return
        spec, model = self._opened(given, name)
        packed = None if isinstance(given, nn.Module) else Path(given)
        entry = _entry_of_model(spec, model, name, self.inputs, packed)
        self.entries[name] = entry

        # Two models may have the same name, so each gets a folder of its own.
        place = folder / str(number)
        place.mkdir()
        # Of these files only size and latency are shown, so ranges that come from noise are enough.
        noise = [_noise(entry.takes)] if int8 else []
        job = _job(spec, entry.takes)
        files, left = deploy.export_all(model, job, place, formats=formats, calibration=noise)
        self.left_out |= {f"{name} as {label}": why for label, why in left.items()}
        for label, path in files.items():
            self.entries[f"{name} as {label}"] = replace(entry, chosen_model=path, file_bytes=None)

    def _opened(self, given: str | Path | nn.Module, name: str) -> tuple[ModelSpec, nn.Module]:
        """Returns the model in evaluation mode, with its spec."""
        several = self.inputs.several
        if isinstance(given, nn.Module):
            made = memory.spec_of(given)
            if made is not None:
                # A module that fedpress made has its spec. The copy can be exported without
                # changing the module.
                spec, model = made, copied(given)
            else:
                table = self.stack.enter_context(holding(given))
                shape = several[0] if several else known_shape(name, self.inputs.shape)
                spec, model = ModelSpec(**table, input_shape=shape).build_for_user()
        elif several:
            raise ModelError(
                "a list of input shapes works only with a torch.nn.Module",
                place="input_shape",
                cure="build the model and give the module",
            )
        else:
            chosen_model = ChosenModel.find(given, weights=self.checkpoint)
            spec, model = chosen_model.opened(self.inputs.shape)
        model.eval()
        # The spec of a saved classifier has the right dtype of inputs; else a trial run tells.
        unknown = several is None and not spec.class_names
        one = spec.input_shape
        if unknown and not isinstance(one, dict) and outputs_of(model, one).tokens:
            spec = spec.model_copy(update={"input_dtype": "int64"})
        return spec, model


def _job(spec: ModelSpec, takes: InputSpec) -> Job:
    about = Preprocess(spec.mean, spec.std)
    if is_shape(takes):
        return Job(takes, about)
    return Job(preprocess=about, example=example_of(takes))


def _same_inputs(entries: Mapping[str, Entry]) -> InputSpec:
    """Returns the inputs that all `entries` take.

    Latencies are only comparable for equal inputs.

    Raises:
        ModelError: if two entries take different inputs.
    """
    (first, one), *others = entries.items()
    for name, other in others:
        if _told(other.takes) != _told(one.takes):
            raise ModelError(
                f"'{first}' takes {_told(one.takes)} and '{name}' takes {_told(other.takes)}",
                place="models",
                cure="measure each in a call of its own",
            )
    return one.takes


def _given(spec: ModelSpec | None, name: str, shape: tuple[int, ...] | None) -> InputSpec:
    """Returns what `deploy.measure` needs to make inputs of a model.

    For a model with one float input this is the shape of one example. For token ids or named inputs
    it is a batch of two examples, since random floats would not do.
    """
    if spec is None:
        return known_shape(name, shape)
    if isinstance(spec.input_shape, dict) or spec.input_dtype != "float32":
        return spec.example(2)
    return shape or spec.input_shape


def _noise(given: InputSpec) -> Example:
    if is_shape(given):
        return public_stream(0, "measure").normal(32, *given, dtype=torch.float32)
    return example_of(given)


def _told(given: InputSpec) -> str:
    if is_shape(given):
        return str(list(given))
    parts = [given] if isinstance(given, Tensor) else list(example_of(given))
    return " and ".join(
        f"{list(part.shape[1:])}{' token ids' if part.dtype == torch.int64 else ''}"
        for part in parts
    )


def _model_beside(file: Path) -> tuple[ModelSpec, nn.Module] | None:
    """Returns the model of the run if `file` is in the run's folder `artifacts`, else None."""
    folder = file.resolve().parent
    run = folder.parent
    if folder.name == "artifacts" and (run / "stages").is_dir():
        return storage.load(run)
    return None


def _counts(model: nn.Module, given: InputSpec) -> tuple[int, int, int]:
    """Counts the parameters, and for one example the multiply-adds and the outputs of layers."""
    example = take_rows(example_of(given), 1)
    try:
        return cost.parameters(model), cost.macs(model, example), cost.activations(model, example)
    except Exception as error:  # a user's network may raise anything
        raise ModelError(
            (
                f"{type(model).__name__} does not take inputs of {_told(given)} "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            ),
            place="input_shape",
            cure=shape_cure(model, given) if is_shape(given) else "give the shape of each input",
        ) from error
