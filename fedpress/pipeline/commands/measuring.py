"""Models side by side: what each costs in torch and in every runtime that it can be exported to."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress import deploy, storage
from fedpress.compress import cost
from fedpress.core import consent
from fedpress.core.examples import Preprocess
from fedpress.core.random import generator
from fedpress.deploy import FORMATS, Job
from fedpress.deploy.examples import Example, Given, example_of, is_shape, take, tensors_of
from fedpress.errors import ExportError, ModelError
from fedpress.models import ModelSpec, memory
from fedpress.models.weights import load_weights_
from fedpress.nn.resize import copied
from fedpress.pipeline.commands.several import Shapes, one_shape, several_shapes
from fedpress.pipeline.commands.subject import Subject, holding, outputs_of
from fedpress.pipeline.commands.wording import naming_arguments


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
    """Measures every model in torch and, exported, in the runtime of each format; exported files in their own.

    Args:
        models: folders of models or runs, packed files, `module:function`, exported files, or modules in memory; one
            or several.
        formats: rows of `fedpress.deploy.FORMATS` to export each model to; None: all that are installed, and one that
            cannot take a model is left out.
        int8: export each also on integers, with ranges of random inputs: such files show size and time, not accuracy.
        batches: batch sizes.
        threads: numbers of threads.
        seconds: for each model, runtime, batch size and number of threads.
        input_shape: of one example, for functions and modules; a list of shapes for modules of several inputs.
        checkpoint: a state dict for a function.
        allow_code: names `module:function` that the files of models may have called; see `fedpress.storage.load`.

    Returns:
        `records`, one for each pair of model and runtime, as `fedpress.deploy.measure` says, "parameters" besides; and
        `left_out`: what could not be exported -> why.

    Raises:
        ExportError: if a format is unknown, its packages are missing, or a model cannot be exported or run.
        ModelError: if there is no model, one does not take inputs of its shape, or they take different ones.
    """
    if not isinstance(models, list | tuple | None):
        models = [models]  # type: ignore[list-item]
    for one in models or ():
        if not isinstance(one, str | Path | nn.Module):
            raise ModelError(
                f"model: got {type(one).__name__}, expected a torch.nn.Module, a path or module:function"
            )
    if checkpoint is not None and any(isinstance(one, nn.Module) for one in models or ()):
        raise ModelError(
            "checkpoint=: a module has weights of its own; load them into it, and leave it out"
        )
    several = several_shapes(input_shape)
    shape_given = one_shape(input_shape) if several is None else None
    if not models:
        raise ModelError(
            "measure: no model was given; give folders, packed or exported files, or module:function"
        )
    if not seconds > 0 or not batches or not threads or min(*batches, *threads) < 1:
        raise ExportError("measure: seconds, batches and threads must be above 0")
    if wrong := [name for name in formats or () if name not in FORMATS]:
        raise ExportError(f"measure: {deploy.unknown_format(wrong[0])}")
    left_out: dict[str, str] = {}
    subjects: dict[str, nn.Module | Path] = {}
    counts: dict[str, tuple[int | None, int, int]] = {}
    takes: dict[str, Given] = {}
    sizes: dict[str, int] = {}
    with ExitStack() as stack:
        stack.enter_context(naming_arguments())
        stack.enter_context(consent.allowing(allow_code))
        stack.enter_context(
            torch.random.fork_rng(devices=[])
        )  # the caller's random numbers stay theirs
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, given in enumerate(models):
            title = type(given).__name__ if isinstance(given, nn.Module) else str(given)
            name = title if title not in subjects else f"{title} ({number + 1})"
            if (
                not isinstance(given, nn.Module)
                and Path(given).suffix in {row.suffix for row in FORMATS.values()}
                and Path(given).is_file()
            ):
                near = _model_beside(Path(given))
                takes[name] = _several_inputs(several) or _given(
                    near[0] if near else None, name, shape_given
                )
                subjects[name], counts[name] = (
                    Path(given),
                    _counts(near[1], takes[name]) if near else (None, 0, 0),
                )
                continue
            made = memory.spec_of(given) if isinstance(given, nn.Module) else None
            if isinstance(given, nn.Module) and made is not None:
                spec, model = made, copied(given)
            elif isinstance(given, nn.Module):
                table = stack.enter_context(holding(given))
                spec = ModelSpec(
                    **table, input_shape=several[0] if several else _known(name, shape_given)
                )
                spec, model = spec.take_in()
            elif several:
                raise ModelError(
                    "input_shape=: several inputs are for modules in memory; build the model and give that"
                )
            else:
                spec, model = _load(given, shape_given, checkpoint)
            model.eval()
            if (
                several is None
                and not spec.class_names
                and outputs_of(model, spec.input_shape).tokens
            ):
                spec = spec.model_copy(update={"input_dtype": "int64"})
            takes[name] = _several_inputs(several) or _given(spec, name, None)
            subjects[name], counts[name] = model, _counts(model, takes[name])
            packed = None if isinstance(given, nn.Module) else Path(given)
            if packed is not None and packed.is_file():
                sizes[name] = packed.stat().st_size
            else:
                sizes[name] = storage.file_bytes(spec, model)
            place = folder / str(number)
            place.mkdir()
            what, about = takes[name], Preprocess(spec.mean, spec.std)
            job = (
                Job(what, about)
                if is_shape(what)
                else Job(preprocess=about, example=example_of(what))
            )
            noise = [_noise(what)] if int8 else []
            files, left = deploy.export_all(model, job, place, formats=formats, calibration=noise)
            left_out |= {f"{name} as {label}": why for label, why in left.items()}
            for label, path in files.items():
                other = f"{name} as {label}"
                subjects[other], counts[other], takes[other] = path, counts[name], takes[name]
        told = {name: _told(what) for name, what in takes.items()}
        if len(set(told.values())) > 1:
            (a, first), (b, second) = next(
                (p, q) for p in told.items() for q in told.items() if p[1] != q[1]
            )
            raise ModelError(
                f"measure: '{a}' takes {first} and '{b}' takes {second}; measure them apart"
            )
        records = deploy.measure(
            subjects,
            next(iter(takes.values())),
            macs={name: macs for name, (_, macs, _) in counts.items()},
            activations={name: numbers for name, (_, _, numbers) in counts.items()},
            int8={
                name
                for name, subject in subjects.items()
                if isinstance(subject, Path) and _on_integers(subject)
            },
            sizes=sizes,
            batches=batches,
            threads=threads,
            seconds=seconds,
        )
    lines = [record | {"parameters": counts[record["name"]][0]} for record in records]
    return {"records": lines, "left_out": left_out}


def _load(
    given: str | Path, shape: tuple[int, ...] | None, weights: Path | None
) -> tuple[ModelSpec, nn.Module]:
    subject = Subject.find(given, weights=weights)
    if subject.spec is not None:
        return storage.load(Path(given))
    spec = ModelSpec(
        architecture=subject.model["architecture"], input_shape=_known(str(given), shape)
    )
    spec, model = spec.take_in()
    if weights is not None:
        load_weights_(model, weights)
    return spec, model


def _known(name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if shape is None:
        raise ModelError(
            f"input_shape=: the shape of an example of '{name}' is not known; give it, such as input_shape=(3, 32, 32)"
        )
    return shape


def _several_inputs(shapes: Shapes | None) -> Example | None:
    """Returns a batch of noise for a module of several inputs; None for one input."""
    chance = generator(0, "measure")
    return tuple(torch.randn(32, *shape, generator=chance) for shape in shapes) if shapes else None


def _given(spec: ModelSpec | None, name: str, shape: tuple[int, ...] | None) -> Given:
    """Returns what a model takes: the shape of one example, or token ids."""
    if spec is None:
        return _known(name, shape)
    return spec.example(2) if spec.input_dtype == "int64" else shape or spec.input_shape


def _noise(given: Given) -> Example:
    if is_shape(given):
        return torch.randn(32, *given, generator=generator(0, "measure"))
    return example_of(given)


def _told(given: Given) -> str:
    if is_shape(given):
        return str(list(given))
    parts = [given] if isinstance(given, Tensor) else list(example_of(given))
    return " and ".join(
        f"{list(part.shape[1:])}{' token ids' if part.dtype == torch.int64 else ''}"
        for part in parts
    )


def _model_beside(file: Path) -> tuple[ModelSpec, nn.Module] | None:
    """Returns the model of the run in whose artifacts/ an exported file lies."""
    run = file.resolve().parent.parent
    return (
        storage.load(run)
        if file.resolve().parent.name == "artifacts" and (run / "stages").is_dir()
        else None
    )


def _on_integers(file: Path) -> bool:
    return b"QuantizeLinear" in file.read_bytes().replace(b"DequantizeLinear", b"")


def _counts(model: nn.Module, given: Given) -> tuple[int, int, int]:
    """Returns parameters, multiply-adds of one example, and the numbers that its layers give."""
    example = tuple(tensors_of(take(example_of(given), 1)))
    try:
        return cost.parameters(model), cost.macs(model, example), cost.activations(model, example)
    except Exception as error:  # whatever somebody's own network raises
        raise ModelError(
            f"input_shape=: {type(model).__name__} does not take inputs of {_told(given)} ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); give the shape of one example, or a list of shapes"
        ) from error
