"""Measures the latencies of several models and files; they run in turn, to be comparable."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np
import torch
from torch import nn

from fedpress.core.inputs import Example, arguments
from fedpress.core.threads import torch_threads
from fedpress.deploy.examples import InputSpec, random_rows
from fedpress.deploy.formats import format_of, open_file
from fedpress.deploy.runtime import array_call

Runnable = nn.Module | Path
"""A model, which runs in eager torch, or an exported file, which runs in its own runtime."""

Runner = Callable[[Example], object]
"""Runs a model or a file once on a batch."""


@dataclass(frozen=True)
class Timing:
    """Measured milliseconds for one batch.

    Attributes:
        batch: batch size.
        threads: number of threads.
        median_ms: median over the runs.
        p25_ms: lower quartile over the runs.
        p75_ms: upper quartile over the runs.
        best_ms: fastest run.
        cpu_ms: median processor time of the calling thread. It excludes the time that other
            processes took. With several threads it also excludes the work of the other threads.
        runs: number of runs.
    """

    batch: int
    threads: int
    median_ms: float
    p25_ms: float
    p75_ms: float
    best_ms: float
    cpu_ms: float
    runs: int


def time_in_turn(
    runnables: Mapping[str, Runnable],
    given: InputSpec,
    *,
    batches: Collection[int] = (1, 64),
    threads: Collection[int] = (1, 2),
    seconds: float = 1.0,
    min_runs: int = 5,
) -> dict[str, list[Timing]]:
    """Times every model and file at every batch size and number of threads.

    In each round, every model and file runs once. So other load on the machine slows all of them
    alike. Models are put into evaluation mode, and stay in it.

    Args:
        runnables: name -> model or file.
        given: shape of one float32 example, for random inputs; or a batch of inputs.
        batches: batch sizes; a file that takes only one batch size runs only with this size.
        threads: numbers of threads.
        seconds: time for all runs of one model at one batch size and number of threads, without
            warm-up.
        min_runs: least number of runs, even if they take more than `seconds`.

    Returns:
        Name -> one `Timing` for each number of threads and each batch size that it takes.

    Raises:
        ExportError: if a file cannot be run.
    """
    found: dict[str, list[Timing]] = {name: [] for name in runnables}
    for count in threads:
        # A session keeps the number of threads with which it was opened, so each file is opened
        # again for each number.
        with torch_threads(count):
            runners = {name: _runner(runnable, count) for name, runnable in runnables.items()}
            for size in batches:
                able = {n: run for n, run in runners.items() if _takes(runnables[n], size)}
                x = random_rows(given, size)
                # The time limit holds for all of them together, so that each gets `seconds`.
                times = _run_in_turn(able, x, seconds * len(able), min_runs)
                for name, seconds_of_runs in times.items():
                    found[name].append(_timing(size, count, seconds_of_runs))
    return found


def _run_in_turn(
    runners: Mapping[str, Runner], x: Example, seconds: float, min_runs: int
) -> dict[str, list[tuple[float, float]]]:
    """Runs all in turn; returns for each name the wall and processor seconds of each run.

    `seconds` is the time for all runs of all runners together.
    """
    # The first runs are not timed: they allocate memory, and are slower.
    for run in runners.values():
        for _ in range(2):
            run(x)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    start, done = perf_counter(), 0
    while runners and (done < min_runs or perf_counter() - start < seconds):
        for name, run in runners.items():
            wall, cpu = perf_counter(), thread_time()
            run(x)
            times[name].append((perf_counter() - wall, thread_time() - cpu))
        done += 1
    return times


def _timing(batch: int, threads: int, times: Sequence[tuple[float, float]]) -> Timing:
    wall, cpu = 1e3 * np.array(times).T
    p25, median, p75 = (float(t) for t in np.percentile(wall, [25, 50, 75]))
    return Timing(
        batch, threads, median, p25, p75, float(wall.min()), float(np.median(cpu)), len(times)
    )


def _takes(runnable: Runnable, size: int) -> bool:
    return isinstance(runnable, nn.Module) or format_of(runnable).batch in (None, size)


def _runner(runnable: Runnable, threads: int) -> Runner:
    if not isinstance(runnable, nn.Module):
        session = open_file(runnable, threads=threads)
        ready: dict[int, list[np.ndarray]] = {}

        def run_file(x: Example) -> object:
            # Tensors are converted once, in the warm-up: the conversion must not be timed.
            if id(x) not in ready:
                ready[id(x)] = session.in_order(*array_call(x))
            return session.compute(ready[id(x)])

        return run_file
    # A device runs the model in evaluation mode, without dropout and batch statistics.
    model = runnable.eval()

    @torch.inference_mode()
    def run(x: Example) -> object:
        args, named = arguments(x)
        return model(*args, **named)

    return run
