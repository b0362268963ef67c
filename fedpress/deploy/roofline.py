"""How near a timing is to what this machine can do: its peaks of arithmetic and bandwidth, and the roofline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch

from fedpress.deploy.capture import require
from fedpress.deploy.timing import Timing, torch_threads


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


def peak(*, seconds: float = 0.5, size: int = 512) -> Peak:
    """Measures what one thread of this machine reaches: matrix products of `size`, and copies of 64 MB.

    Processor time counts, and of several runs the quickest. The 8-bit product is onnxruntime's MatMulInteger, bytes
    times signed bytes.
    """
    with torch_threads(1):
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
