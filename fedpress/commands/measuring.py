"""Models side by side: what each costs in torch and in every runtime that it can be exported to."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpress import consent, deploy, storage
from fedpress.arrays import Preprocess
from fedpress.commands.subject import Subject, holding
from fedpress.commands.wording import naming_arguments
from fedpress.compress import cost
from fedpress.deploy import FORMATS, Job
from fedpress.errors import ExportError, ModelError
from fedpress.models import ModelSpec
from fedpress.models.weights import load_weights_
from fedpress.seeds import generator


def measure(
    models: Sequence[str | Path | nn.Module] | str | Path | nn.Module,
    *,
    formats: Sequence[str] | None = None,
    int8: bool = True,
    batches: Sequence[int] = (1, 64),
    threads: Sequence[int] = (1, 2),
    seconds: float = 1.0,
    input_shape: tuple[int, ...] | None = None,
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
        input_shape: of one example, for functions.
        checkpoint: a state dict for a function.
        allow_code: names `module:function` that the files of models may have called; see `fedpress.storage.load`.

    Returns:
        `records`, one for each pair of model and runtime, as `fedpress.deploy.measure` says, "parameters" besides; and
        `left_out`: what could not be exported -> why.

    Raises:
        ExportError: if a format is unknown, its packages are missing, or a model cannot be exported or run.
        ModelError: if there is no model, or models take inputs of different shapes.
    """
    if isinstance(models, str | Path | nn.Module):
        models = [models]
    if not models:
        raise ModelError("measure: no model was given; give folders, packed or exported files, or module:function")
    if not seconds > 0 or not batches or not threads or min(*batches, *threads) < 1:
        raise ExportError("measure: seconds, batches and threads must be above 0")
    if wrong := [name for name in formats or () if name not in FORMATS]:
        raise ExportError(f"measure: {deploy.unknown_format(wrong[0])}")
    left_out: dict[str, str] = {}
    subjects: dict[str, nn.Module | Path] = {}
    counts: dict[str, tuple[int | None, int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    with ExitStack() as stack:
        stack.enter_context(naming_arguments())
        stack.enter_context(consent.allowing(allow_code))
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
                shape = input_shape or (near[0].input_shape if near else None)
                subjects[name], counts[name] = Path(given), _counts(near[1], shape) if near and shape else (None, 0, 0)
                shapes[name] = _known(name, shape)
                continue
            if isinstance(given, nn.Module):
                table = stack.enter_context(holding(given))
                spec = ModelSpec(**table, input_shape=_known(name, input_shape))
                spec, model = spec.take_in()
            else:
                spec, model = _load(given, input_shape, checkpoint)
            model.eval()
            subjects[name], counts[name] = model, _counts(model, spec.input_shape)
            packed = None if isinstance(given, nn.Module) else Path(given)
            if packed is not None and packed.is_file():
                sizes[name] = packed.stat().st_size
            else:
                sizes[name] = storage.file_bytes(spec, model)
            shapes[name] = spec.input_shape
            place = folder / str(number)
            place.mkdir()
            job = Job(spec.input_shape, Preprocess(spec.mean, spec.std))
            noise = [torch.randn(32, *spec.input_shape, generator=generator(0, "measure"))] if int8 else []
            files, left = deploy.export_all(model, job, place, formats=formats, calibration=noise)
            left_out |= {f"{name} as {label}": why for label, why in left.items()}
            for label, path in files.items():
                other = f"{name} as {label}"
                subjects[other], counts[other], shapes[other] = path, counts[name], spec.input_shape
        if len(set(shapes.values())) > 1:
            (a, first), (b, second) = next((p, q) for p in shapes.items() for q in shapes.items() if p[1] != q[1])
            raise ModelError(f"measure: '{a}' takes {list(first)} and '{b}' takes {list(second)}; measure them apart")
        records = deploy.measure(
            subjects,
            next(iter(shapes.values())),
            macs={name: macs for name, (_, macs, _) in counts.items()},
            activations={name: numbers for name, (_, _, numbers) in counts.items()},
            int8={name for name, subject in subjects.items() if isinstance(subject, Path) and _on_integers(subject)},
            sizes=sizes,
            batches=batches,
            threads=threads,
            seconds=seconds,
        )
    told = [record | {"parameters": counts[record["name"]][0]} for record in records]
    return {"records": told, "left_out": left_out}


def _load(given: str | Path, shape: tuple[int, ...] | None, weights: Path | None) -> tuple[ModelSpec, nn.Module]:
    subject = Subject.find(given, weights=weights)
    if subject.spec is not None:
        return storage.load(Path(given))
    spec = ModelSpec(architecture=subject.model["architecture"], input_shape=_known(str(given), shape))
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


def _model_beside(file: Path) -> tuple[ModelSpec, nn.Module] | None:
    """Returns the model of the run in whose artifacts/ an exported file lies."""
    run = file.resolve().parent.parent
    return storage.load(run) if file.resolve().parent.name == "artifacts" and (run / "stages").is_dir() else None


def _on_integers(file: Path) -> bool:
    return b"QuantizeLinear" in file.read_bytes().replace(b"DequantizeLinear", b"")


def _counts(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns parameters, multiply-adds of one example, and the numbers that its layers give."""
    example = torch.zeros(1, *shape)
    return cost.parameters(model), cost.macs(model, example), cost.activations(model, example)
