"""What a model costs in each runtime here: milliseconds in turn, memory in a fresh process, nearness to the peak."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedpress.core.inputs import Example
from fedpress.deploy.artifact import Job
from fedpress.deploy.capture import capture, silence
from fedpress.deploy.examples import Given
from fedpress.deploy.formats import FORMATS, export, file_bytes, of_file, open_file
from fedpress.deploy.memory import peak_memory
from fedpress.deploy.processor import conditions
from fedpress.deploy.roofline import peak, roofline
from fedpress.deploy.timing import Runnable, time_in_turn
from fedpress.errors import ExportError


def export_all(
    model: nn.Module,
    job: Job,
    folder: Path,
    *,
    formats: Collection[str] | None = None,
    calibration: Sequence[Example] = (),
) -> tuple[dict[str, Path], dict[str, str]]:
    """Exports a model to each format in float, and with `calibration` on integers too.

    Args:
        model: the model.
        job: how to export in float.
        folder: where the files go.
        formats: rows of `FORMATS`; None: all that are installed.
        calibration: standardised examples in batches, whose ranges the integers take.

    Returns:
        The files by "onnx float32", "onnx int8" and so on; and what a format cannot take -> why.

    Raises:
        ExportError: if a format that is asked for does not exist, its packages are missing, or it cannot take the
            model in float.
    """
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    wanted = formats
    if wanted is None:
        wanted = [name for name, row in FORMATS.items() if row.missing() is None]
    kinds: dict[str, tuple[Example, ...]] = {"float32": ()}
    if calibration:
        kinds["int8"] = tuple(calibration)
    for name in wanted:
        for kind, batches in kinds.items():
            path = folder / f"{kind}{FORMATS[name].suffix}" if name in FORMATS else folder
            try:
                files[f"{name} {kind}"] = export(
                    model, path, name, replace(job, batches=batches)
                ).path
            except ExportError as error:  # one file less is worth telling, not worth stopping
                if formats is not None and kind == "float32":
                    raise
                left_out[f"{name} {kind}"] = str(error)
    return files, left_out


@dataclass(frozen=True)
class Candidate:
    """What is measured.

    Attributes:
        runs: a model, or an exported file.
        macs: multiply-adds of one example.
        activations: numbers that its layers give for one example.
        int8: whether it computes on bytes.
        file_bytes: of the file that keeps it; None: of the exported file, or of a model's numbers in memory.
    """

    runs: Runnable
    macs: int
    activations: int
    int8: bool = False
    file_bytes: int | None = None


def measure(
    candidates: Mapping[str, Candidate],
    given: Given,
    *,
    batches: Collection[int] = (1, 64),
    threads: Collection[int] = (1, 2),
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """Measures every candidate: one record each, of plain JSON values.

    Keys: name, runtime, file_bytes, peak_memory (batch 1; None of a model that cannot be captured to run in another
    process), macs, machine (its `Peak`), conditions (version, options and processor), and timings: a list of `Timing`
    with `Roofline` as dicts.

    Args:
        candidates: name -> model or file.
        given: shape of one float32 example, or a batch of inputs.
        batches: see `time_in_turn`.
        threads: see `time_in_turn`.
        seconds: see `time_in_turn`.

    Raises:
        ExportError: if one cannot be run.
    """
    top = peak(seconds=min(0.5, seconds))
    runnables = {name: candidate.runs for name, candidate in candidates.items()}
    times = time_in_turn(runnables, given, batches=batches, threads=threads, seconds=seconds)
    records = []
    for name, candidate in candidates.items():
        runs = candidate.runs
        size = _bytes(runs)
        timings = []
        for timing in times[name]:
            near = roofline(
                timing,
                top,
                macs=candidate.macs,
                weight_bytes=size,
                activations=candidate.activations,
                int8=candidate.int8,
            )
            timings.append({**asdict(timing), "roofline": asdict(near)})
        records.append(
            {
                "name": name,
                "runtime": "torch" if isinstance(runs, nn.Module) else of_file(runs).runtime,
                "file_bytes": size if candidate.file_bytes is None else candidate.file_bytes,
                "peak_memory": _memory(runs, given),
                "macs": candidate.macs,
                "machine": asdict(top),
                "conditions": _conditions(runs),
                "timings": timings,
            }
        )
    return records


def _conditions(runs: Runnable) -> dict[str, Any]:
    """Version, options and processor; the number of threads stands beside each timing."""
    if isinstance(runs, nn.Module):
        found = conditions("torch", threads=0, options={})
    else:
        found = open_file(runs, threads=1).conditions()
    del found["threads"]
    return found


def _memory(runs: Runnable, given: Given) -> int | None:
    if not isinstance(runs, nn.Module):
        return peak_memory(runs, given)
    try:
        with silence():
            capture(runs, given)
    except ExportError:
        return None
    return peak_memory(runs, given)


def _bytes(runs: Runnable) -> int:
    if isinstance(runs, nn.Module):
        unique = {t.data_ptr(): t for t in runs.state_dict().values()}
        return sum(t.numel() * t.element_size() for t in unique.values())
    return file_bytes(runs)
