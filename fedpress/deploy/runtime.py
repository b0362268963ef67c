"""The exported file run by onnxruntime: does it say what the model says, how well, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpress.arrays import Preprocess
from fedpress.deploy.capture import require
from fedpress.errors import ExportError

TOLERANCE = 1e-4  # of the largest logit, or absolute where all logits are below 1: float32 sums in another order
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


def parity(model: nn.Module, path: str | Path, x: Tensor) -> Parity:
    """Compares the logits of `model` and of the file on standardised float32 examples `x` [n, *input_shape].

    Examples on which the model itself gives no finite logits are left out: there is nothing to compare.

    Raises:
        ExportError: if a logit differs by more than `TOLERANCE` (times the largest logit, if that is above 1),
            if no example can be compared, or if the file cannot be run.
    """
    expected = _torch_logits(model, x)
    got = _logits(_session(path), x, path)
    if got.shape != expected.shape:
        shapes = f"{list(got.shape)} but the model's {list(expected.shape)}"
        raise ExportError(f"export: the logits of {path} have shape {shapes}; export the same model again")
    usable = torch.isfinite(expected).flatten(1).all(1)
    expected, got = expected[usable], got[usable]
    if not len(expected):
        raise ExportError(f"export: the model gives finite logits on none of {len(x)} examples; train it again")
    error = (got - expected).abs().nan_to_num(nan=torch.inf).max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    if error > allowed:
        raise ExportError(
            f"export: a logit of {path} differs from the model by {error:.2g}, allowed is {allowed:.2g}; "
            "look for random or input-dependent parts in the model's forward, then export it again"
        )
    same = (got.argmax(1) == expected.argmax(1)).float().mean().item()
    return Parity(error, same, len(expected))


def latency(path: str | Path, input_shape: tuple[int, ...], *, seconds: float = 2.0, max_runs: int = 200) -> Latency:
    """Times the file on one random example on one thread, for about `seconds` and for 10 to `max_runs` runs.

    Raises:
        ExportError: if the file cannot be run.
    """
    session = _session(path, threads=1)
    feed = {session.get_inputs()[0].name: np.random.default_rng(0).standard_normal((1, *input_shape), np.float32)}
    for _ in range(3):  # the first runs allocate
        _run(session, feed, path)
    times: list[float] = []
    while len(times) < 10 or (sum(times) < seconds and len(times) < max_runs):
        start = perf_counter()
        session.run(None, feed)
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
    session = _session(path)
    right = 0
    for part, labels in zip(x.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True):
        right += int((_logits(session, preprocess(part), path).argmax(1) == labels).sum())
    return right / len(y)


def _session(path: str | Path, *, threads: int = 0) -> Any:
    """Opens the file; `threads` = 0 lets onnxruntime choose."""
    ort = require("onnxruntime")["onnxruntime"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors come back as exceptions, no need to print them too
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen exception types without a common base
        raise ExportError(f"export: onnxruntime cannot load {path}: {_first_line(error)}; export it again") from error


def _run(session: Any, feed: dict[str, np.ndarray], path: str | Path) -> np.ndarray:
    """Runs one batch and returns the first output."""
    try:
        return session.run(None, feed)[0]
    except Exception as error:
        wanted = session.get_inputs()[0].shape
        shapes = " ".join(str(list(value.shape)) for value in feed.values())
        raise ExportError(
            f"export: onnxruntime cannot run {path} on {shapes}: {_first_line(error)}; the file takes {wanted}"
        ) from error


def _logits(session: Any, x: Tensor, path: str | Path) -> Tensor:
    """Runs float32 examples through the file in batches."""
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(_run(session, {name: p.cpu().numpy()}, path)) for p in x.split(BATCH_SIZE)])


def _torch_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Runs float32 examples through the model in evaluation mode, and puts its mode back."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part.to(device)).cpu() for part in x.split(BATCH_SIZE)])
    finally:
        for module, training in modes:
            module.training = training


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
