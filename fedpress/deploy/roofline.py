"""Compares a timing with the limits of this machine: peak arithmetic and memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch

from fedpress.core.threads import torch_threads
from fedpress.deploy.capture import require
from fedpress.deploy.timing import Timing


@dataclass(frozen=True)
class Peak:
    """Measured peaks of one thread.

    Attributes:
        float_gmacs: 10^9 float32 multiply-adds per second.
        int8_gmacs: 10^9 int8 multiply-adds per second.
        gigabytes: 10^9 bytes per second that are read or written.
    """

    float_gmacs: float
    int8_gmacs: float
    gigabytes: float


@dataclass(frozen=True)
class Roofline:
    """A timing compared with the roofline, that is, with the largest speed that is possible.

    Attributes:
        gmacs: attained multiply-adds, in 10^9 per second.
        intensity: multiply-adds per byte that is moved.
        bound: what limits the speed at this intensity: "arithmetic" or "memory".
        share: attained multiply-adds / limit. The limit is the peak of arithmetic, or bandwidth
            times intensity if that is less.
    """

    gmacs: float
    intensity: float
    bound: str
    share: float


SHORTEST_SAMPLE = 0.001
"""Least processor time of one sample of `peak`, in seconds."""


def peak(*, seconds: float = 0.5, size: int = 512) -> Peak:
    """Measures the peaks of one thread on matrix products of `size` and copies of 64 MB.

    The result is the fastest of several runs, in processor time. The 8-bit product is
    onnxruntime's MatMulInteger of uint8 and int8.

    Args:
        seconds: duration of each of the three measurements.
        size: rows and columns of the matrices.
    """
    with torch_threads(1):
        a = torch.randn(size, size)
        out = torch.empty_like(a)
        float_time = _quickest(lambda: torch.mm(a, a, out=out), seconds)
    # 64 MB do not fit into the caches of usual processors, so the memory itself is measured.
    source = np.ones(8_000_000)
    target = np.empty_like(source)
    copy_time = _quickest(lambda: np.copyto(target, source), seconds)
    int8_time = _quickest(_int8_product(size), seconds)
    macs = size**3 / 1e9
    # A copy moves every byte twice: it is read and written.
    moved = 2 * source.nbytes / 1e9
    return Peak(macs / float_time, macs / int8_time, moved / copy_time)


def _quickest(run: Callable[[], Any], seconds: float) -> float:
    """Returns the least processor time of a run, in seconds; the first run does not count."""
    best = float("inf")
    runs = 1
    start = perf_counter()
    run()
    while perf_counter() - start < seconds or best == float("inf"):
        begin = thread_time()
        for _ in range(runs):
            run()
        spent = thread_time() - begin
        # The clock of a thread is coarse: a short product may seem to take no time. So the number
        # of runs in a sample is doubled until the sample is long enough.
        if spent < SHORTEST_SAMPLE:
            runs *= 2
        else:
            best = min(best, spent / runs)
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
    """Compares `timing` with the roofline (Williams et al. 2009, section 3).

    The bytes that are moved are a lower bound: for each batch, all weights are read once, and every
    activation is written once and read once.

    Args:
        timing: the timing of the model.
        peak: the peaks of one thread. `n` threads count as n times the arithmetic and the same
            bandwidth.
        macs: multiply-adds of one example.
        weight_bytes: size of all weights as they are stored.
        activations: number of values that the layers compute for one example.
        int8: whether arithmetic and activations are in 8 bits.

    >>> one_ms = Timing(1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 9)
    >>> found = roofline(
    ...     one_ms,
    ...     Peak(40, 80, 10),
    ...     macs=20_000_000,
    ...     weight_bytes=80_000,
    ...     activations=5_000,
    ...     int8=False,
    ... )
    >>> found.bound, found.gmacs, found.share
    ('arithmetic', 20.0, 0.5)
    """
    bytes_each = 1 if int8 else 4
    moved = weight_bytes + timing.batch * 2 * activations * bytes_each
    work = macs * timing.batch / 1e9
    # Processor time excludes other processes. But it is known only for the calling thread, so with
    # several threads the wall time is used.
    milliseconds = timing.cpu_ms if timing.threads == 1 else timing.median_ms
    gmacs = work / (milliseconds / 1e3)
    intensity = 1e9 * work / max(1, moved)
    arithmetic = (peak.int8_gmacs if int8 else peak.float_gmacs) * timing.threads
    memory = intensity * peak.gigabytes
    bound = "arithmetic" if arithmetic <= memory else "memory"
    return Roofline(gmacs, intensity, bound, gmacs / min(arithmetic, memory))
