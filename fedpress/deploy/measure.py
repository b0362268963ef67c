"""Measures models and files side by side: latency, peak memory, and share of the possible speed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedpress.core.inputs import Example
from fedpress.deploy.artifact import Job
from fedpress.deploy.capture import capture, silence
from fedpress.deploy.examples import InputSpec
from fedpress.deploy.formats import FORMATS, export, file_bytes, format_of, open_file
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
    """Exports a model to each format in float32, and with `calibration` also in int8.

    Args:
        model: the model.
        job: settings of the export; its `batches` are ignored.
        folder: folder for the files.
        formats: keys of `FORMATS`; None: all formats whose packages are installed.
        calibration: batches of standardised examples, to measure value ranges for int8.

    Returns:
        Two dictionaries with names such as "onnx int8": the path of each file, and the reason for
        each file that could not be exported.

    Raises:
        ExportError: if a format in `formats` does not exist, its packages are missing, or the model
            cannot be exported to it in float.
    """
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    wanted = formats
    if wanted is None:
        wanted = [name for name, row in FORMATS.items() if row.missing() is None]
    # Float comes first: if a format cannot write even that, the user's request fails at once.
    kinds: dict[str, tuple[Example, ...]] = {"float32": ()}
    if calibration:
        kinds["int8"] = tuple(calibration)
    for name in wanted:
        for kind, batches in kinds.items():
            path = folder / f"{kind}{FORMATS[name].suffix}" if name in FORMATS else folder
            this_job = replace(job, batches=batches)
            try:
                files[f"{name} {kind}"] = export(model, path, name, this_job).path
            # If a format cannot hold the model, the other formats are still measured, unless the
            # user has asked for this format.
            except ExportError as error:
                if formats is not None and kind == "float32":
                    raise
                left_out[f"{name} {kind}"] = str(error)
    return files, left_out


@dataclass(frozen=True)
class Candidate:
    """A model or file to measure.

    Attributes:
        runnable: a model, or an exported file.
        macs: multiply-adds for one example.
        activations: number of values that all layers compute for one example.
        int8: whether the model or file computes on 8-bit integers.
        file_bytes: size of the saved file; None: size of the exported file, or of a model's
            parameters and buffers in memory.
    """

    runnable: Runnable
    macs: int
    activations: int
    int8: bool = False
    file_bytes: int | None = None


def measure(
    candidates: Mapping[str, Candidate],
    given: InputSpec,
    *,
    batches: Collection[int] = (1, 64),
    threads: Collection[int] = (1, 2),
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """Measures every candidate; returns a record for each, which is a dictionary of JSON values.

    The keys are "name", "runtime", "file_bytes", "peak_memory" (bytes, for one example), "macs",
    "machine" (its `Peak`), "conditions" (version, options and processor) and "timings" (a list of
    `Timing` as dictionaries, each with a `Roofline`). The peak memory of a model is None if the
    model cannot be captured, because the memory is measured in another process.

    Args:
        candidates: name -> model or file.
        given: shape of one float32 example, or a batch of inputs.
        batches: batch sizes.
        threads: numbers of threads.
        seconds: time for each candidate, batch size and number of threads.

    Raises:
        ExportError: if a candidate cannot be run.
    """
    machine = peak(seconds=min(0.5, seconds))
    runnables = {name: candidate.runnable for name, candidate in candidates.items()}
    times = time_in_turn(runnables, given, batches=batches, threads=threads, seconds=seconds)
    records = []
    for name, candidate in candidates.items():
        runnable = candidate.runnable
        # The weights that are read in each run, for the roofline; `file_bytes` may be of another
        # file.
        size = _stored_bytes(runnable)
        timings = []
        for timing in times[name]:
            near = roofline(
                timing,
                machine,
                macs=candidate.macs,
                weight_bytes=size,
                activations=candidate.activations,
                int8=candidate.int8,
            )
            timings.append({**asdict(timing), "roofline": asdict(near)})
        runtime = "torch" if isinstance(runnable, nn.Module) else format_of(runnable).runtime
        records.append(
            {
                "name": name,
                "runtime": runtime,
                "file_bytes": size if candidate.file_bytes is None else candidate.file_bytes,
                "peak_memory": _peak_memory(runnable, given),
                "macs": candidate.macs,
                "machine": asdict(machine),
                "conditions": _conditions(runnable),
                "timings": timings,
            }
        )
    return records


def _conditions(runnable: Runnable) -> dict[str, Any]:
    """Returns version, options and processor; each timing has its own number of threads."""
    if isinstance(runnable, nn.Module):
        found = conditions("torch", threads=0, options={})
    else:
        found = open_file(runnable, threads=1).conditions()
    del found["threads"]
    return found


def _peak_memory(runnable: Runnable, given: InputSpec) -> int | None:
    # Another process gets the model as a captured graph. A model that cannot be captured is not
    # measured.
    if isinstance(runnable, nn.Module):
        try:
            with silence():
                capture(runnable, given)
        except ExportError:
            return None
    return peak_memory(runnable, given)


def _stored_bytes(runnable: Runnable) -> int:
    if not isinstance(runnable, nn.Module):
        return file_bytes(runnable)
    # Parameters that two modules share are stored once.
    unique = {t.data_ptr(): t for t in runnable.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in unique.values())
