"""An exported file run here: does it say what the model says, how well, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from fedpress.arrays import Preprocess
from fedpress.deploy.formats import Runner, of_file, open_file
from fedpress.errors import ExportError

TOLERANCE = 1e-4  # of the largest logit, or absolute where all logits are below 1: float32 sums in another order
ROUNDING = 0.05  # the same for integers: a value between two steps may fall to either side, and be carried on
BATCH_SIZE = 256


@dataclass(frozen=True)
class Parity:
    """How near the file is to the model: largest difference of a logit, share of equal predictions, how many."""

    max_abs_error: float
    same_argmax_share: float
    examples: int


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one example on one thread: median and the 10th and 90th percentile of `runs` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


def parity(
    model: nn.Module | torch.export.ExportedProgram, path: str | Path, x: Tensor, *, tolerance: float = TOLERANCE
) -> Parity:
    """Compares the logits of `model` and of the file on standardised float32 examples `x` [n, *input_shape].

    Examples on which the model itself gives no finite logits are left out: there is nothing to compare.

    Args:
        model: the model, or the rounded graph that the file was made of (`Artifact.program`).
        path: the file.
        x: the examples.
        tolerance: how far a logit may be off, times the largest logit if that is above 1; `ROUNDING` for integers.

    Raises:
        ExportError: if a logit differs by more, if no example can be compared, or if the file cannot be run.
    """
    expected = logits(model, x)
    got = file_logits(path, x)
    if got.shape != expected.shape:
        shapes = f"{list(got.shape)} but the model's {list(expected.shape)}"
        raise ExportError(f"export: the logits of {path} have shape {shapes}; export the same model again")
    usable = torch.isfinite(expected).flatten(1).all(1)
    expected, got = expected[usable], got[usable]
    if not len(expected):
        raise ExportError(f"export: the model gives finite logits on none of {len(x)} examples; train it again")
    error = (got - expected).abs().nan_to_num(nan=torch.inf).max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    if error > allowed:
        cure = (
            "look for random or input-dependent parts in the model's forward, then export it again"
            if tolerance < ROUNDING
            else "if this processor adds products of bytes in 16 bits (AVX2), export with weight_bits = 7"
        )
        raise ExportError(
            f"export: a logit of {path} differs from the model by {error:.2g}, allowed is {allowed:.2g}; {cure}"
        )
    return Parity(error, agreement(expected, got), len(expected))


def agreement(a: Tensor, b: Tensor) -> float:
    """Returns the share of examples of which logits `a` and `b` [n, classes, ...] have their largest at one class."""
    return (a.argmax(1) == b.argmax(1)).float().mean().item()


def latency(path: str | Path, input_shape: tuple[int, ...], *, seconds: float = 2.0, max_runs: int = 200) -> Latency:
    """Times the file on one random example on one thread, for about `seconds` and for 10 to `max_runs` runs.

    Raises:
        ExportError: if the file cannot be run.
    """
    run = open_file(path, threads=1)
    x = np.random.default_rng(0).standard_normal((1, *input_shape), np.float32)
    for _ in range(3):  # the first runs allocate
        run(x)
    times: list[float] = []
    while len(times) < 10 or (sum(times) < seconds and len(times) < max_runs):
        start = perf_counter()
        run(x)
        times.append(perf_counter() - start)
    p10, median, p90 = (float(1000 * t) for t in np.percentile(times, [10, 50, 90]))
    return Latency(median, p10, p90, len(times))


def accuracy(path: str | Path, x: Tensor, y: Tensor, preprocess: Preprocess) -> float:
    """Returns the share of raw examples `x` [n, ...] for which the file's largest logit is at the label `y` [n].

    Raises:
        ExportError: if there is no example, or if the file cannot be run.
    """
    if not len(y):
        raise ExportError(f"export: no example to measure the accuracy of {path} on; give at least one")
    size = of_file(path).batch or BATCH_SIZE
    run, right = open_file(path), 0
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        right += int((_run(run, preprocess(part)).argmax(1) == labels).sum())
    return right / len(y)


def file_logits(path: str | Path, x: Tensor) -> Tensor:
    """Runs float32 examples through the file, in batches of the size that it takes.

    Raises:
        ExportError: if the file cannot be run.
    """
    size = of_file(path).batch or BATCH_SIZE
    run = open_file(path)
    return torch.cat([_run(run, part) for part in x.split(size)])


def _run(run: Runner, x: Tensor) -> Tensor:
    return torch.from_numpy(np.array(run(x.cpu().numpy()), copy=True))


def logits(model: nn.Module | torch.export.ExportedProgram, x: Tensor) -> Tensor:
    """Runs float32 examples through the model in evaluation mode, and puts its mode back; or through a graph."""
    if isinstance(model, torch.export.ExportedProgram):
        return _batched(model.module(check_guards=False), x)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _batched(lambda part: model(part.to(device)).cpu(), x)
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _batched(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(BATCH_SIZE)])
