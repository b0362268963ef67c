"""Runs an exported file on this machine: parity with the model, metrics, and latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import Example, Inputs, arguments, tensors_of, with_tensors
from fedpress.core.outputs import joined_outputs
from fedpress.deploy.artifact import ROUNDING, TOLERANCE
from fedpress.deploy.examples import (
    InputSpec,
    as_device,
    flatten,
    in_batches,
    main_output,
    random_rows,
    rows_of,
    unflatten,
)
from fedpress.deploy.formats import format_of, open_file
from fedpress.deploy.session import Session
from fedpress.errors import ExportError
from fedpress.tasks import Task

# Number of examples in one run; it bounds the memory for outputs and activations.
BATCH_SIZE = 256


@dataclass(frozen=True)
class Parity:
    """Differences between the outputs of a file and of the model.

    Attributes:
        max_abs_error: the largest absolute difference of a float output.
        same_argmax_share: share of examples with equal predictions. The prediction is the argmax of
            the output `logits`; if no output has this name, of the first output. If this output
            has no classes, the share is 1.
        examples: number of examples compared.
        relative_error: norm of the differences / norm of the model's outputs, over all float
            outputs.
        conditions: runtime, version, threads, options and processor.
    """

    max_abs_error: float
    same_argmax_share: float
    examples: int
    relative_error: float = 0.0
    conditions: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one example on one thread.

    Attributes:
        median_ms: median over the runs.
        p10_ms: 10th percentile over the runs.
        p90_ms: 90th percentile over the runs.
        runs: number of runs.
        conditions: runtime, version, threads, options and processor.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    conditions: dict[str, Any] = field(default_factory=dict)


def parity(
    model: nn.Module | torch.export.ExportedProgram,
    path: str | Path,
    x: Example,
    *,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compares the outputs of `model` and of the file on standardised examples.

    Examples for which the model's own outputs are not finite are left out.

    Args:
        model: the model, or the quantized graph that the file was made from (`Artifact.program`).
        path: the file.
        x: the examples, such as float32 [n, *input_shape].
        tolerance: allowed absolute error of an output. If the largest absolute value of the output
            is above 1, the allowed error is multiplied by it. In outputs of integers or booleans,
            this share of the values may differ. See `Artifact.tolerance`.

    Raises:
        ExportError: if an output has another shape or differs by more than allowed, if no example
            can be compared, or if the file cannot be run.
    """
    names, expected = _model_outputs(model, x)
    session, got = _file_outputs(path, x)
    file_shapes, model_shapes = _shapes(got), _shapes(expected)
    if file_shapes != model_shapes:
        raise ExportError(
            f"the logits of {path} have shape {file_shapes} but the model's {model_shapes}",
            place="path",
            cure="export the same model again",
        )
    count = rows_of(x)
    # A model may overflow on an example; then no file can reproduce its outputs.
    usable = _finite_rows(expected, count)
    if not bool(usable.any()):
        raise ExportError(
            f"the model gives finite logits on none of {count} examples",
            place="x",
            cure="train it again",
        )
    largest, error, norm = 0.0, 0.0, 0.0
    for name, wanted, found in zip(names, expected, got, strict=True):
        # An output such as a single number has no row for each example to select.
        if wanted.dim() and len(wanted) == count:
            wanted, found = wanted[usable], found[usable]
        if not wanted.is_floating_point():
            _check_equal(path, name, wanted, found, tolerance)
            continue
        shown = name if len(names) > 1 else "logit"
        largest = max(largest, _largest_error(path, shown, wanted, found, tolerance))
        # In double precision: float32 sums over many outputs would lose digits.
        error += float((found.double() - wanted.double()).square().sum())
        norm += float(wanted.double().square().sum())

    main = main_output(names)
    same = 1.0
    if _has_classes(expected[main], count):
        same = agreement(expected[main][usable], got[main][usable])
    relative = (error / norm) ** 0.5 if norm else 0.0
    return Parity(largest, same, int(usable.sum()), relative, session.conditions())


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)


def _finite_rows(outputs: list[Tensor], count: int) -> Tensor:
    """Returns a bool for each of `count` examples: whether all its outputs are finite."""
    usable = torch.ones(count, dtype=torch.bool)
    for out in outputs:
        if out.dim() and len(out) == count:
            usable &= torch.isfinite(out).reshape(count, -1).all(1)
    return usable


def _check_equal(
    path: str | Path, name: str, wanted: Tensor, found: Tensor, tolerance: float
) -> None:
    """Checks an output of integers or booleans: at most the share `tolerance` may differ.

    The size of a difference has no meaning for such values: if class 3 is right, class 4 is as
    wrong as class 9.

    Raises:
        ExportError: if more values differ.
    """
    different = float((wanted != found).double().mean())
    if different > tolerance:
        raise ExportError(
            (
                f"the output '{name}' of {path} differs from that of the model in "
                f"{100 * different:.0f}% of its values, allowed is {100 * tolerance:g}%"
            ),
            place="path",
            cure=_cure(tolerance),
        )


def _largest_error(
    path: str | Path, name: str, wanted: Tensor, found: Tensor, tolerance: float
) -> float:
    """Returns the largest absolute difference.

    Raises:
        ExportError: if it is more than `tolerance` allows.
    """
    # `NaN > allowed` is False, so NaN must be replaced by infinity to be noticed.
    error = (found.double() - wanted.double()).abs().nan_to_num(nan=torch.inf)
    largest = error.max().item()
    # Rounding errors are proportional to the size of the outputs.
    allowed = tolerance * max(1.0, wanted.abs().max().item())
    if largest > allowed:
        what = "a logit" if name == "logit" else f"the output '{name}'"
        raise ExportError(
            f"{what} of {path} differs from the model by {largest:.2g}, allowed is {allowed:.2g}",
            place="path",
            cure=_cure(tolerance),
        )
    return float(largest)


def _cure(tolerance: float) -> str:
    if tolerance < ROUNDING:
        return (
            "look for random or input-dependent parts in the model's forward, then export it again"
        )
    return "look at the parts that left_float does not name, or export without int8"


def _has_classes(out: Tensor, count: int) -> bool:
    """Whether an output has a row for each example and classes along dimension 1."""
    return out.dim() > 1 and len(out) == count


def agreement(a: Tensor, b: Tensor) -> float:
    """Returns the share of equal argmax classes in logits `a` and `b` [n, classes, ...].

    Outputs [n] have no classes: their agreement is 1.
    """
    if a.dim() < 2:
        return 1.0
    return (a.argmax(1) == b.argmax(1)).float().mean().item()


def latency(
    path: str | Path, given: InputSpec, *, seconds: float = 2.0, max_runs: int = 200
) -> Latency:
    """Times the file on one example and one thread.

    Args:
        path: the file.
        given: shape of one float32 example, which is drawn at random, or a batch of inputs, whose
            first row is used.
        seconds: approximate duration; at least 10 runs are made.
        max_runs: largest number of runs.

    Raises:
        ExportError: if the file cannot be run.
    """
    # One thread: results of machines with different numbers of cores stay comparable.
    session = open_file(path, threads=1)
    args, named = array_call(random_rows(given, 1))
    x = session.in_order(args, named)
    # The first runs allocate memory, and are slower.
    for _ in range(3):
        session.compute(x)
    times: list[float] = []
    # At least ten runs, or the percentiles would mean nothing.
    while len(times) < 10 or (sum(times) < seconds and len(times) < max_runs):
        start = perf_counter()
        session.compute(x)
        times.append(perf_counter() - start)
    # The median: single runs may be slow because another process runs.
    p10, median, p90 = (float(1000 * t) for t in np.percentile(times, [10, 50, 90]))
    return Latency(median, p10, p90, len(times), session.conditions())


def metrics(
    path: str | Path, arrays: Arrays, preprocess: Preprocess, task: Task
) -> dict[str, JsonValue]:
    """Returns the task's metrics of the file on raw examples, by name.

    Raises:
        ExportError: if there is no example, or if the file cannot be run.
    """
    if not len(arrays):
        raise ExportError(
            f"no example to measure {path} on", place="arrays", cure="give at least one"
        )
    outputs = main_outputs(path, arrays.x, preprocess)
    if task.several_outputs:
        outputs = structured_outputs(path, arrays.x, preprocess)
    return task.summary(task.metrics(outputs, arrays.y))


def main_outputs(path: str | Path, x: Inputs, preprocess: Preprocess) -> Tensor:
    """Returns the output `logits` of the file, or else the first output, for raw examples `x`.

    Raises:
        ExportError: if the file cannot be run.
    """
    session = open_file(path)
    found = []
    for part in _calls_of_rows(path, x, preprocess):
        # Copied, because a runtime may reuse the memory of its outputs in the next run.
        found.append(torch.from_numpy(np.array(session.main(*part[0], **part[1]))))
    return torch.cat(found)


def structured_outputs(path: str | Path, x: Inputs, preprocess: Preprocess) -> Any:
    """Returns all outputs of the file for raw examples `x`, as the model's forward returned them.

    Raises:
        ExportError: if the file cannot be run.
    """
    session = open_file(path)
    found = []
    for part in _calls_of_rows(path, x, preprocess):
        flat = [torch.from_numpy(np.array(out)) for out in session.flat(*part[0], **part[1])]
        found.append(unflatten(session.structure, flat))
    return joined_outputs(found)


def column_outputs(path: str | Path, columns: Mapping[str, np.ndarray], *, structured: bool) -> Any:
    """Returns the outputs of a file that prepares raw columns itself.

    Args:
        path: the file.
        columns: name of each column -> its cells [n, 1].
        structured: whether all outputs are returned, as the model's forward returned them; else the
            output `logits`, or the first one.

    Raises:
        ExportError: if the file cannot be run, or lacks one of the columns.
    """
    session = open_file(path)
    wanted = [each.name for each in session.inputs]
    rows = len(next(iter(columns.values())))
    found = []
    for start in range(0, rows, BATCH_SIZE):
        part = {name: columns[name][start : start + BATCH_SIZE] for name in wanted}
        if structured:
            flat = [torch.from_numpy(np.array(out)) for out in session.flat(**part)]
            found.append(unflatten(session.structure, flat))
        else:
            found.append(torch.from_numpy(np.array(session.main(**part))))
    return joined_outputs(found)


def _calls_of_rows(
    path: str | Path, x: Inputs, preprocess: Preprocess
) -> Iterator[tuple[list[np.ndarray], dict[str, np.ndarray]]]:
    """Yields the arguments of a session for batches of raw examples."""
    # The formats for phones take only batches of 1.
    for part in x.split(format_of(path).batch or BATCH_SIZE):
        yield array_call(preprocess(part))


def file_logits(path: str | Path, x: Example) -> Tensor:
    """Returns the output `logits` of the file, or else its first output, for standardised `x`.

    Raises:
        ExportError: if the file cannot be run.
    """
    session, found = _file_outputs(path, x)
    return found[main_output(session.outputs)]


def file_outputs(path: str | Path, x: Example) -> list[Tensor]:
    """Returns all outputs of the file, in its order, for standardised `x`.

    Raises:
        ExportError: if the file cannot be run.
    """
    return _file_outputs(path, x)[1]


def model_outputs(model: nn.Module | torch.export.ExportedProgram, x: Example) -> list[Tensor]:
    """Returns all outputs of a model or graph, in the order of its file, for standardised `x`."""
    return _model_outputs(model, x)[1]


def logits(model: nn.Module | torch.export.ExportedProgram, x: Example) -> Tensor:
    """Returns the output `logits` of a model or graph, or else its first output.

    The examples `x` are standardised.

    A model runs in evaluation mode; afterwards the modes of its modules are restored.
    """
    names, found = _model_outputs(model, x)
    return found[main_output(names)]


def array_call(x: Example) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Returns a batch as arguments of a `Session`, by position and by name."""
    args, named = arguments(x)
    by_position = [t.detach().cpu().numpy() for t in args]
    by_name = {name: t.detach().cpu().numpy() for name, t in named.items()}
    return by_position, by_name


def _file_outputs(path: str | Path, x: Example) -> tuple[Session, list[Tensor]]:
    session = open_file(path)

    def run(part: Example) -> list[Tensor]:
        args, named = array_call(part)
        return [torch.from_numpy(np.array(out)) for out in session.flat(*args, **named)]

    return session, in_batches(run, x, format_of(path).batch or BATCH_SIZE)


@torch.no_grad()
def _model_outputs(
    model: nn.Module | torch.export.ExportedProgram, x: Example
) -> tuple[list[str], list[Tensor]]:
    """Runs a model or graph on all rows; returns the names of its outputs, and the outputs."""
    if isinstance(model, torch.export.ExportedProgram):
        return _run_in_batches(model.module(check_guards=False), as_device(x), torch.device("cpu"))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # Modules may be in different modes, such as frozen batch norms, so each is restored by itself.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _run_in_batches(model, x, device)
    finally:
        for module, training in modes:
            module.training = training


def _run_in_batches(
    model: Callable[..., Any], x: Example, device: torch.device
) -> tuple[list[str], list[Tensor]]:
    names: list[str] = []

    def run(part: Example) -> list[Tensor]:
        moved = with_tensors(part, [t.to(device) for t in tensors_of(part)])
        args, named = arguments(moved)
        _, found, names[:] = flatten(model(*args, **named))
        return [t.cpu() for t in found]

    return names, in_batches(run, x, BATCH_SIZE)
