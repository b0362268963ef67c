"""Milliseconds of models and files, run in turn so that what else the machine does hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np
import torch
from torch import nn

from fedpress.core.inputs import Example, arguments
from fedpress.deploy.examples import Given, random_rows
from fedpress.deploy.formats import of_file, open_file
from fedpress.deploy.runtime import array_call

Runnable = nn.Module | Path
"""A model, which runs in eager torch, or an exported file, which runs in its own runtime."""

Runner = Callable[[Example], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one batch: median, quartiles and least of `runs` runs.

    `cpu_ms` is the median processor time of the calling thread: with one thread, what no other process took part in.
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
    given: Given,
    *,
    batches: Collection[int] = (1, 64),
    threads: Collection[int] = (1, 2),
    seconds: float = 1.0,
    min_runs: int = 5,
) -> dict[str, list[Timing]]:
    """Times every subject at every batch size and number of threads.

    All are run one after the other, again and again, so that what else the machine does hits all alike.

    Args:
        runnables: name -> model or file.
        given: shape of one float32 example, which is random then, or a batch of inputs.
        batches: sizes; a file that takes one size alone is run at that.
        threads: how many threads.
        seconds: for all runs of one of them at one batch size and number of threads, warming up not counted.
        min_runs: at least so many, however long they take.

    Raises:
        ExportError: if a file cannot be run.
    """
    found: dict[str, list[Timing]] = {name: [] for name in runnables}
    for count in threads:
        with torch_threads(count):
            runners = {name: _runner(runnable, count) for name, runnable in runnables.items()}
            for size in batches:
                here = {n: r for n, r in runners.items() if _takes(runnables[n], size)}
                x = random_rows(given, size)
                for name, times in _rounds(here, x, seconds * len(here), min_runs).items():
                    found[name].append(_timing(size, count, times))
    return found


def _rounds(
    runners: Mapping[str, Runner], x: Example, seconds: float, min_runs: int
) -> dict[str, list[tuple[float, float]]]:
    """Runs all in turn and returns wall and processor seconds of each run."""
    for run in runners.values():
        for _ in range(2):  # the first runs allocate
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
    return isinstance(runnable, nn.Module) or of_file(runnable).batch in (None, size)


def _runner(runnable: Runnable, threads: int) -> Runner:
    if not isinstance(runnable, nn.Module):
        session = open_file(runnable, threads=threads)
        ready: dict[int, list[np.ndarray]] = {}

        def run_file(x: Example) -> object:
            if id(x) not in ready:  # turning tensors into arrays is no part of what is timed
                ready[id(x)] = session.in_order(*array_call(x))
            return session.compute(ready[id(x)])

        return run_file
    model = runnable.eval()

    @torch.inference_mode()
    def run(x: Example) -> object:
        args, named = arguments(x)
        return model(*args, **named)

    return run


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets torch compute on so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
