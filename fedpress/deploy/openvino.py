"""OpenVINO: the ONNX file becomes OpenVINO's own two files, for Intel processors of computers and gateways."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import require, silence
from fedpress.deploy.device import said
from fedpress.deploy.onnx import WIDE, export_onnx
from fedpress.errors import ExportError

INSTALL = "'fedpress[openvino]'"
OVERFLOW = "overflow on x86 without VNNI, where they are computed in float; quantize to 7 bits (WeightGrid(bits=7))"


def export_openvino(model: nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` as OpenVINO's graph `path` (.xml) and the weights beside it (.bin), both of which a device needs.

    They are made of the ONNX file and say the same; batches of any size can be run. Weights that are rounded here get
    7 bits: OpenVINO adds products of bytes in 16 bits on x86 processors without VNNI, which overflows silently with 8
    (the pruned ResNet-18 fell from 93.1% to 86.7%), and it is no quicker with 8. Weights that came with 8 bits keep
    them; that they need care stands in `left`, and `open_openvino` computes with them in float where they overflow.

    Raises:
        ExportError: if the model cannot be exported, or if a file cannot be written.
    """
    openvino = require("openvino", install=INSTALL)["openvino"]
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        made = export_onnx(model, Path(folder) / "model.onnx", replace(job, weight_bits=7))
        graph, weights = Path(folder) / "model.xml", Path(folder) / "model.bin"
        try:
            with silence():
                found = openvino.Core().read_model(str(made.path))
                for name, value in made.metadata.items():
                    found.set_rt_info(value, ["fedpress", name])
                openvino.save_model(found, str(graph), compress_to_fp16=False)
        except Exception as error:  # OpenVINO raises RuntimeError and its own
            raise ExportError(f"export: OpenVINO cannot convert the model: {said(error)}; export it as onnx") from error
        write(path.with_suffix(".bin"), weights.read_bytes())
        write(path, graph.read_bytes())
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    wide = {"weights of 8 bits": OVERFLOW} if job.batches and WIDE in made.metadata else {}
    return Artifact(path, size, made.metadata, made.left | wide, made.program)


def open_openvino(path: str | Path, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Loads a graph (.xml or .onnx) and returns a function from float32 examples [n, ...] to its first output.

    Args:
        path: the file; the weights lie beside it.
        threads: how many it computes on; 0 lets OpenVINO choose.

    Raises:
        ExportError: if the file cannot be loaded; the function, if it cannot be run.
    """
    openvino = require("openvino", install=INSTALL)["openvino"]
    core = openvino.Core()
    how: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        how["INFERENCE_NUM_THREADS"] = threads
    try:
        model = core.read_model(str(path))
        wanted = model.inputs[0].get_partial_shape()
        if model.has_rt_info(["fedpress", WIDE]) and _adds_in_16_bits():
            how["LP_TRANSFORMS_MODE"] = "NO"  # integers become floats again: exact, and slower
    except Exception as error:
        raise ExportError(f"export: OpenVINO cannot load {path}: {said(error)}; export it again") from error
    compiled: dict[tuple[int, ...], Any] = {}

    def run(x: np.ndarray) -> np.ndarray:
        try:
            if x.shape not in compiled:  # a graph of fixed sizes is the faster one
                fixed = model.clone()
                fixed.reshape(list(x.shape))
                compiled[x.shape] = core.compile_model(fixed, "CPU", how).create_infer_request()
            found: np.ndarray = compiled[x.shape].infer([np.ascontiguousarray(x, np.float32)])[0]
        except Exception as error:
            raise ExportError(
                f"export: OpenVINO cannot run {path} on {list(x.shape)}: {said(error)}; the file takes {wanted}"
            ) from error
        return found

    return run


def _adds_in_16_bits() -> bool:
    """Whether this processor multiplies bytes by instructions whose sums overflow."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_vnni_supported()
