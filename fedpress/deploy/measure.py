"""What a model costs in each runtime here: milliseconds in turn, memory in a fresh process, nearness to the peak."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpress.deploy.artifact import Job
from fedpress.deploy.capture import capture, require, silence
from fedpress.deploy.examples import Example, Given, call_of, random_rows
from fedpress.deploy.formats import FORMATS, export, file_bytes, of_file, open_file
from fedpress.deploy.processor import conditions
from fedpress.deploy.runtime import array_call
from fedpress.errors import ExportError

Subject = nn.Module | Path
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


@dataclass(frozen=True)
class Peak:
    """What this machine reaches on one thread: float32 and 8-bit multiply-adds, and bytes copied, in 10^9 a second."""

    float_gmacs: float
    int8_gmacs: float
    gigabytes: float


@dataclass(frozen=True)
class Roofline:
    """How near one timing is to the peak, and what bounds it.

    `share` is the attained multiply-adds over those that the roof allows at this intensity (multiply-adds a byte):
    the peak of arithmetic or, below the ridge, the bandwidth times the intensity.
    """

    gmacs: float
    intensity: float
    bound: str
    share: float


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
    for name in (
        formats
        if formats is not None
        else [name for name, row in FORMATS.items() if row.missing() is None]
    ):
        for kind, batches in (("float32", ()), ("int8", tuple(calibration))):
            if kind == "int8" and not batches:
                continue
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


def time_in_turn(
    subjects: Mapping[str, Subject],
    given: Given,
    *,
    batches: Collection[int] = (1, 64),
    threads: Collection[int] = (1, 2),
    seconds: float = 1.0,
    min_runs: int = 5,
) -> dict[str, list[Timing]]:
    """Times every subject at every batch size and number of threads.

    All subjects are run one after the other, again and again, so that what else the machine does hits all alike.

    Args:
        subjects: name -> model or file.
        given: shape of one float32 example, which is random then, or a batch of inputs.
        batches: sizes; a file that takes one size alone is run at that.
        threads: how many threads.
        seconds: for all runs of one subject at one batch size and number of threads, warming up not counted.
        min_runs: at least so many, however long they take.

    Raises:
        ExportError: if a file cannot be run.
    """
    found: dict[str, list[Timing]] = {name: [] for name in subjects}
    for count in threads:
        with _torch_threads(count):
            runners = {name: _runner(subject, count) for name, subject in subjects.items()}
            for size in batches:
                here = {n: r for n, r in runners.items() if _takes(subjects[n], size)}
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


def _takes(subject: Subject, size: int) -> bool:
    return isinstance(subject, nn.Module) or of_file(subject).batch in (None, size)


def _runner(subject: Subject, threads: int) -> Runner:
    if not isinstance(subject, nn.Module):
        session = open_file(subject, threads=threads)
        ready: dict[int, list[np.ndarray]] = {}

        def run_file(x: Example) -> object:
            if id(x) not in ready:  # turning tensors into arrays is no part of what is timed
                ready[id(x)] = session.in_order(*array_call(x))
            return session.compute(ready[id(x)])

        return run_file
    model = subject.eval()

    @torch.inference_mode()
    def run(x: Example) -> object:
        args, named = call_of(x)
        return model(*args, **named)

    return run


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(subject: Subject, given: Given, *, batch: int = 1) -> int:
    """Returns the bytes by which a fresh process grows at most while it loads the subject and runs one batch.

    The runtime itself is loaded before: it counts for nothing. A model runs as its captured graph, in eager torch.

    Raises:
        ExportError: if it cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(subject, nn.Module):
            path = Path(folder) / "model.pt2"
            with silence():
                torch.export.save(capture(subject, given), path)
        else:
            path = Path(subject)
        x = random_rows(given, batch)
        args, named = array_call(x)
        held = Path(folder) / "x.npz"
        np.savez(held, *args, *named.values())
        # -P keeps the working folder out of the import path: a file onnxruntime.py there must not run.
        home, names = str(Path(__file__).parents[2]), json.dumps([*named] or None)
        words = [sys.executable, "-P", "-c", _PROBE, str(path), str(held), names, home]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1][:200]
        raise ExportError(
            f"measure: the memory of {path} cannot be measured: {said}; export it again"
        )
    return int(done.stdout.splitlines()[-1])


# Peaks of a process never fall, so what importing and a first small run need is raised out of the way first.
_PROBE = """
import json, resource, sys
import numpy as np
path, names = sys.argv[1], json.loads(sys.argv[3])
sys.path.append(sys.argv[4])  # where fedpress lies, if it is not installed
held = np.load(sys.argv[2])
x = [held[name] for name in held.files]
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
import torch
torch.set_num_threads(1)
from fedpress.deploy.formats import of_file, open_file
if path.endswith(".pt2"):
    torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))
else:
    for name in of_file(path).packages:
        __import__(name)
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak so far is forgotten
except OSError:
    pass
try:
    before = now()
except OSError:
    before = peak()
def high():
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        return peak()
if path.endswith(".pt2"):
    program = torch.export.load(path).module(check_guards=False)
    x = [torch.from_numpy(np.concatenate([part] * 2) if len(part) == 1 else part)[: len(part)] for part in x]
    with torch.inference_mode():
        program(**dict(zip(names, x))) if names else program(*x)
else:
    session = open_file(path, threads=1)
    session.flat(**dict(zip(names, x))) if names else session.flat(*x)
print(max(0, high() - before))
"""


def peak(*, seconds: float = 0.5, size: int = 512) -> Peak:
    """Measures what one thread of this machine reaches: matrix products of `size`, and copies of 64 MB.

    Processor time counts, and of several runs the quickest. The 8-bit product is onnxruntime's MatMulInteger, bytes
    times signed bytes.
    """
    with _torch_threads(1):
        a = torch.randn(size, size)
        out = torch.empty_like(a)
        float_time = _quickest(lambda: torch.mm(a, a, out=out), seconds)
    source = np.ones(8_000_000)
    target = np.empty_like(source)
    copy_time = _quickest(lambda: np.copyto(target, source), seconds)
    int8_time = _quickest(_int8_product(size), seconds)
    macs = size**3 / 1e9
    return Peak(macs / float_time, macs / int8_time, 2 * source.nbytes / 1e9 / copy_time)


def _quickest(run: Callable[[], Any], seconds: float) -> float:
    best, start = float("inf"), perf_counter()
    run()
    while perf_counter() - start < seconds or best == float("inf"):
        begin = thread_time()
        run()
        best = min(best, thread_time() - begin)
    return best


def _int8_product(size: int) -> Callable[[], Any]:
    found = require("onnx", "onnxruntime")
    helper, kinds, ort = found["onnx"].helper, found["onnx"].TensorProto, found["onnxruntime"]
    weight = np.ones((size, size), np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "peak",
        [helper.make_tensor_value_info("x", kinds.UINT8, [size, size])],
        [helper.make_tensor_value_info("y", kinds.INT32, [size, size])],
        [helper.make_tensor("w", kinds.INT8, weight.shape, weight.tobytes(), raw=True)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.ones((size, size), np.uint8)
    return lambda: session.run(None, {"x": x})


def roofline(
    timing: Timing, peak: Peak, *, macs: int, weight_bytes: int, activations: int, int8: bool
) -> Roofline:
    """Says how near `timing` is to the peak of its kind of arithmetic (Williams et al. 2009, section 3).

    The bytes are the least that must move: the weights once a batch, every activation written and read once.

    Args:
        timing: of the model.
        peak: of one thread; so many threads have so many times the arithmetic, and the same bandwidth.
        macs: multiply-adds of one example.
        weight_bytes: of all weights as they are stored.
        activations: numbers that the layers give for one example.
        int8: whether arithmetic and activations are of one byte.

    >>> one_ms = Timing(1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 9)
    >>> found = roofline(one_ms, Peak(40, 80, 10), macs=20_000_000, weight_bytes=80_000, activations=5_000, int8=False)
    >>> found.bound, found.gmacs, found.share
    ('arithmetic', 20.0, 0.5)
    """
    moved = weight_bytes + timing.batch * 2 * activations * (1 if int8 else 4)
    work = macs * timing.batch / 1e9
    alone = (
        timing.cpu_ms if timing.threads == 1 else timing.median_ms
    )  # what others took of the processor is not ours
    gmacs, intensity = work / (alone / 1e3), 1e9 * work / max(1, moved)
    arithmetic = (peak.int8_gmacs if int8 else peak.float_gmacs) * timing.threads
    memory = intensity * peak.gigabytes
    bound = "arithmetic" if arithmetic <= memory else "memory"
    return Roofline(gmacs, intensity, bound, gmacs / min(arithmetic, memory))


def measure(
    subjects: Mapping[str, Subject],
    given: Given,
    *,
    macs: Mapping[str, int],
    activations: Mapping[str, int],
    int8: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
    batches: Collection[int] = (1, 64),
    threads: Collection[int] = (1, 2),
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """Measures every subject: one record each, of plain JSON values.

    Keys: name, runtime, file_bytes (of a model its `sizes`, or parameters and buffers), peak_memory (batch 1; None of a
    model that cannot be captured to run in another process), macs, conditions (version, options and processor), and
    timings: a list of `Timing` with `Roofline` as dicts.

    Args:
        subjects: name -> model or file.
        given: shape of one float32 example, or a batch of inputs.
        macs: multiply-adds of one example of each subject.
        activations: numbers that its layers give for one example.
        int8: names of those that compute on bytes.
        sizes: bytes of the file that keeps a model, where they are not those of its numbers in memory.
        batches: see `time_in_turn`.
        threads: see `time_in_turn`.
        seconds: see `time_in_turn`.

    Raises:
        ExportError: if one cannot be run.
    """
    top = peak(seconds=min(0.5, seconds))
    times = time_in_turn(subjects, given, batches=batches, threads=threads, seconds=seconds)
    records = []
    for name, subject in subjects.items():
        size = _bytes(subject)
        kind: dict[str, Any] = {
            "macs": macs[name],
            "weight_bytes": size,
            "activations": activations[name],
            "int8": name in int8,
        }
        records.append(
            {
                "name": name,
                "runtime": "torch" if isinstance(subject, nn.Module) else of_file(subject).runtime,
                "file_bytes": (sizes or {}).get(name, size),
                "peak_memory": _memory(subject, given),
                "macs": macs[name],
                "machine": asdict(top),
                "conditions": _conditions(subject),
                "timings": [
                    asdict(t) | {"roofline": asdict(roofline(t, top, **kind))} for t in times[name]
                ],
            }
        )
    return records


def _conditions(subject: Subject) -> dict[str, Any]:
    """Version, options and processor; the number of threads stands beside each timing."""
    if isinstance(subject, nn.Module):
        found = conditions("torch", threads=0, options={})
    else:
        found = open_file(subject, threads=1).conditions()
    del found["threads"]
    return found


def _memory(subject: Subject, given: Given) -> int | None:
    if not isinstance(subject, nn.Module):
        return peak_memory(subject, given)
    try:
        with silence():
            capture(subject, given)
    except ExportError:
        return None
    return peak_memory(subject, given)


def _bytes(subject: Subject) -> int:
    if isinstance(subject, nn.Module):
        unique = {t.data_ptr(): t for t in subject.state_dict().values()}
        return sum(t.numel() * t.element_size() for t in unique.values())
    return file_bytes(subject)
