"""An exported file run here: does it say what the model says, how well, and how fast."""

from __future__ import annotations

from collections.abc import Callable
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
from fedpress.deploy.artifact import ROUNDING, TOLERANCE
from fedpress.deploy.examples import (
    Given,
    as_device,
    flatten,
    in_batches,
    main_output,
    random_rows,
    rows_of,
)
from fedpress.deploy.formats import of_file, open_file
from fedpress.deploy.session import Session
from fedpress.errors import ExportError
from fedpress.tasks import Task

BATCH_SIZE = 256


@dataclass(frozen=True)
class Parity:
    """How near the file is to the model.

    Attributes:
        max_abs_error: the largest difference of an output.
        same_argmax_share: the share of equal predictions, by the output `logits`, else the first.
        examples: how many were compared.
        relative_error: norm of the differences over that of the model's outputs.
        conditions: runtime, version, threads, options and processor.
    """

    max_abs_error: float
    same_argmax_share: float
    examples: int
    relative_error: float = 0.0
    conditions: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one example on one thread: median and the 10th and 90th percentile of `runs` runs.

    `conditions` are runtime, version, threads, options and processor.
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
    """Compares the outputs of `model` and of the file on standardised examples `x`, such as float32 [n, *input_shape].

    Examples on which the model itself gives no finite outputs are left out: there is nothing to compare.

    Args:
        model: the model, or the rounded graph that the file was made of (`Artifact.program`).
        path: the file.
        x: the examples.
        tolerance: how far an output may be off, times the largest value of this output if that is above 1;
            `Artifact.tolerance` is what suits a file.

    Raises:
        ExportError: if an output differs by more, if no example can be compared, or if the file cannot be run.
    """
    names, expected = _outputs(model, x)
    session, got = _file_outputs(path, x)
    theirs, ours = (", ".join(str(list(t.shape)) for t in side) for side in (got, expected))
    if theirs != ours:
        raise ExportError(
            f"the logits of {path} have shape {theirs} but the model's {ours}",
            place="path",
            cure="export the same model again",
        )
    count = rows_of(x)
    usable = _finite_rows(expected, count)
    if not bool(usable.any()):
        raise ExportError(
            f"the model gives finite logits on none of {count} examples",
            place="x",
            cure="train it again",
        )
    largest, error, norm = 0.0, 0.0, 0.0
    for name, wanted, given in zip(names, expected, got, strict=True):
        if wanted.dim() and len(wanted) == count:
            wanted, given = wanted[usable], given[usable]
        if not wanted.is_floating_point():
            _check_equal(path, name, wanted, given, tolerance)
            continue
        shown = name if len(names) > 1 else "logit"
        largest = max(largest, _largest_error(path, shown, wanted, given, tolerance))
        error += float((given.double() - wanted.double()).square().sum())
        norm += float(wanted.double().square().sum())
    main = main_output(names)
    same = 1.0
    if _decides(expected[main], count):
        same = agreement(expected[main][usable], got[main][usable])
    relative = (error / norm) ** 0.5 if norm else 0.0
    return Parity(largest, same, int(usable.sum()), relative, session.conditions())


def _finite_rows(outputs: list[Tensor], count: int) -> Tensor:
    """Returns for which of `count` examples all outputs are finite."""
    usable = torch.ones(count, dtype=torch.bool)
    for out in outputs:
        if out.dim() and len(out) == count:
            usable &= torch.isfinite(out).reshape(count, -1).all(1)
    return usable


def _check_equal(
    path: str | Path, name: str, wanted: Tensor, given: Tensor, tolerance: float
) -> None:
    """Refuses other whole numbers or truths: a wrong class is no nearer for being the next."""
    apart = float((wanted != given).double().mean())
    if apart > tolerance:
        raise ExportError(
            (
                f"the output '{name}' of {path} is another than that of the model in "
                f"{100 * apart:.0f}% of its values, allowed is {100 * tolerance:g}%"
            ),
            place="path",
            cure=_cure(tolerance),
        )


def _largest_error(
    path: str | Path, name: str, wanted: Tensor, given: Tensor, tolerance: float
) -> float:
    """Returns the largest difference, and refuses one that is too large."""
    error = (given.double() - wanted.double()).abs().nan_to_num(nan=torch.inf)
    largest, allowed = error.max().item(), tolerance * max(1.0, wanted.abs().max().item())
    if largest > allowed:
        what = "a logit" if name == "logit" else f"the output '{name}'"
        raise ExportError(
            f"{what} of {path} differs from the model by {largest:.2g}, allowed is {allowed:.2g}",
            place="path",
            cure=_cure(tolerance),
        )
    return float(largest)


def _cure(tolerance: float) -> str:
    return (
        "look for random or input-dependent parts in the model's forward, then export it again"
        if tolerance < ROUNDING
        else "look at the parts that left_float does not name, or export without int8"
    )


def _decides(out: Tensor, count: int) -> bool:
    """Whether an output has numbers for classes along dimension 1."""
    return out.dim() > 1 and len(out) == count


def agreement(a: Tensor, b: Tensor) -> float:
    """Returns the share of examples of which logits `a` and `b` [n, classes, ...] have their largest at one class.

    Numbers [n] name no class: they agree.
    """
    if a.dim() < 2:
        return 1.0
    return (a.argmax(1) == b.argmax(1)).float().mean().item()


def latency(
    path: str | Path, given: Given, *, seconds: float = 2.0, max_runs: int = 200
) -> Latency:
    """Times the file on one example on one thread, for about `seconds` and for 10 to `max_runs` runs.

    Args:
        path: the file.
        given: shape of one float32 example, which is random then, or a batch of inputs, whose first row is taken.
        seconds: about how long.
        max_runs: at most so many.

    Raises:
        ExportError: if the file cannot be run.
    """
    session = open_file(path, threads=1)
    args, named = array_call(random_rows(given, 1))
    x = session.in_order(args, named)
    for _ in range(3):  # the first runs allocate
        session.compute(x)
    times: list[float] = []
    while len(times) < 10 or (sum(times) < seconds and len(times) < max_runs):
        start = perf_counter()
        session.compute(x)
        times.append(perf_counter() - start)
    p10, median, p90 = (float(1000 * t) for t in np.percentile(times, [10, 50, 90]))
    return Latency(median, p10, p90, len(times), session.conditions())


def metrics(
    path: str | Path, arrays: Arrays, preprocess: Preprocess, task: Task
) -> dict[str, JsonValue]:
    """Returns what the file is worth on raw examples, by the keys of the task's metrics.

    Raises:
        ExportError: if there is no example, or if the file cannot be run.
    """
    if not len(arrays):
        raise ExportError(
            f"no example to measure {path} on", place="arrays", cure="give at least one"
        )
    return task.summary(task.metrics(answers(path, arrays.x, preprocess), arrays.y))


def answers(path: str | Path, x: Inputs, preprocess: Preprocess) -> Tensor:
    """Returns the file's main output [n, ...] for raw examples `x` [n, ...], run in batches of a size that it takes.

    Raises:
        ExportError: if the file cannot be run.
    """
    size, session = of_file(path).batch or BATCH_SIZE, open_file(path)
    found = []
    for part in x.split(size):
        args, named = array_call(preprocess(part))
        found.append(torch.from_numpy(np.array(session.main(*args, **named))))
    return torch.cat(found)


def file_logits(path: str | Path, x: Example) -> Tensor:
    """Runs examples through the file, in batches of the size that it takes; returns the output `logits`, or the first.

    Raises:
        ExportError: if the file cannot be run.
    """
    session, found = _file_outputs(path, x)
    return found[main_output(session.outputs)]


def logits(model: nn.Module | torch.export.ExportedProgram, x: Example) -> Tensor:
    """Runs examples through the model in evaluation mode, and puts its mode back; or through a graph.

    Of several outputs it returns `logits`, or the first.
    """
    names, found = _outputs(model, x)
    return found[main_output(names)]


def array_call(x: Example) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Returns a batch as arguments of a `Session`, by position and by name."""
    args, named = arguments(x)
    return [t.detach().cpu().numpy() for t in args], {
        name: t.detach().cpu().numpy() for name, t in named.items()
    }


def _file_outputs(path: str | Path, x: Example) -> tuple[Session, list[Tensor]]:
    session = open_file(path)

    def run(part: Example) -> list[Tensor]:
        args, named = array_call(part)
        return [torch.from_numpy(np.array(out)) for out in session.flat(*args, **named)]

    return session, in_batches(run, x, of_file(path).batch or BATCH_SIZE)


@torch.no_grad()
def _outputs(
    model: nn.Module | torch.export.ExportedProgram, x: Example
) -> tuple[list[str], list[Tensor]]:
    """Runs a model or graph on all rows: the names of its outputs, and the outputs."""
    if isinstance(model, torch.export.ExportedProgram):
        return _of(model.module(check_guards=False), as_device(x), torch.device("cpu"))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _of(model, x, device)
    finally:
        for module, training in modes:
            module.training = training


def _of(
    model: Callable[..., Any], x: Example, device: torch.device
) -> tuple[list[str], list[Tensor]]:
    names: list[str] = []

    def run(part: Example) -> list[Tensor]:
        args, named = arguments(with_tensors(part, [t.to(device) for t in tensors_of(part)]))
        _, found, names[:] = flatten(model(*args, **named))
        return [t.cpu() for t in found]

    return names, in_batches(run, x, BATCH_SIZE)
