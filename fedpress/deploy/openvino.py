"""Exports a model for OpenVINO (graph and weights, for Intel processors), and runs it here."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import BATCH, extra, require, silence
from fedpress.deploy.device import first_line
from fedpress.deploy.examples import Structure
from fedpress.deploy.onnx import WIDE, make_onnx
from fedpress.deploy.outputs import OUTPUTS
from fedpress.deploy.processor import options_for
from fedpress.deploy.session import FileInput, Session
from fedpress.errors import ExportError

# Arguments of `pip install` for the package.
INSTALL = extra("openvino")
# OpenVINO's reader of ONNX files does not know INT2.
FEWEST_BITS = 4
# What `left_float` says about weights of 8 bits.
OVERFLOW = (
    "overflow on x86 without VNNI, where they are computed in float; "
    "quantize to 7 bits (WeightQuantization(bits=7))"
)


def export_openvino(model: nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` as OpenVINO's graph `path` (.xml) and weights beside it (.bin).

    A device needs both files. They are converted from ONNX and take batches of any size.

    Float weights are quantized to 7 bits and not to 8. On x86 processors without VNNI, OpenVINO
    sums 8-bit products in 16 bits. With 8-bit weights this overflows silently: the accuracy of a
    pruned ResNet-18 fell from 93.1% to 86.7%. 8-bit weights are not faster than 7-bit weights. If
    the model already has weights of 8 bits, these are kept and listed in `left_float`. On
    processors where they would overflow, `open_openvino` computes with them in float.

    Raises:
        ExportError: if the model cannot be exported, or if a file cannot be written.
    """
    openvino = require("openvino", install=INSTALL)["openvino"]
    path = Path(path)
    made = make_onnx(model, replace(job, weight_bits=7), fewest_bits=FEWEST_BITS)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        graph = Path(folder) / "model.xml"
        weights = Path(folder) / "model.bin"
        source.write_bytes(made.proto.SerializeToString())
        try:
            with silence():
                found = openvino.Core().read_model(str(source))
                for name, value in made.metadata.items():
                    found.set_rt_info(value, ["fedpress", name])
                # By default OpenVINO stores float weights in fp16, which changes them.
                openvino.save_model(found, str(graph), compress_to_fp16=False)
        # OpenVINO raises RuntimeError and types of its own.
        except Exception as error:
            raise ExportError(
                f"OpenVINO cannot convert the model: {first_line(error)}",
                place="model",
                cure="export it as onnx",
            ) from error
        write(path.with_suffix(".bin"), weights.read_bytes())
        write(path, graph.read_bytes())
    # The weights are in the second file.
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    left_float = dict(made.left_float)
    if job.batches and WIDE in made.metadata:
        left_float["weights of 8 bits"] = OVERFLOW
    return Artifact(path, size, made.metadata, left_float, made.program, made.rounds)


def open_openvino(path: str | Path, threads: int = 0) -> Session:
    """Loads a graph (.xml or .onnx) into OpenVINO, with the options that this processor needs.

    Args:
        path: the graph file; the weights are in a file beside it.
        threads: number of threads; 0: OpenVINO chooses.

    Raises:
        ExportError: if the file cannot be loaded. The session raises the same error if the file
            cannot be run.
    """
    openvino = require("openvino", install=INSTALL)["openvino"]
    core = openvino.Core()
    try:
        model = core.read_model(str(path))
        needed = options_for("OpenVINO", wide=model.has_rt_info(["fedpress", WIDE]))
        structure: Structure = None
        if model.has_rt_info(["fedpress", OUTPUTS]):
            structure = json.loads(model.get_rt_info(["fedpress", OUTPUTS]).astype(str))
        inputs = tuple(_file_input(i) for i in model.inputs)
        outputs = tuple(o.get_any_name() for o in model.outputs)
    except Exception as error:
        raise ExportError(
            f"OpenVINO cannot load {path}: {first_line(error)}",
            place="path",
            cure="export it again",
        ) from error
    # A device answers one request at a time; OpenVINO's other hint is for many requests at once.
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", **needed}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
        shapes = tuple(x.shape for x in arrays)
        try:
            # A graph with fixed sizes is faster, so one is compiled for each batch size in use.
            if shapes not in compiled:
                fixed = model.clone()
                names = [i.name for i in inputs]
                fixed.reshape(dict(zip(names, map(list, shapes), strict=True)))
                program = core.compile_model(fixed, "CPU", options)
                compiled[shapes] = program.create_infer_request()
            found = compiled[shapes].infer([*arrays])
            return [found[at] for at in range(len(outputs))]
        except Exception as error:
            given = ", ".join(str(list(shape)) for shape in shapes)
            wanted = ", ".join(str(i.get_partial_shape()) for i in model.inputs)
            raise ExportError(
                f"OpenVINO cannot run {path} on {given}: {first_line(error)}",
                place="path",
                cure=f"the file takes {wanted}",
            ) from error

    if structure is None:
        structure = 0 if len(outputs) == 1 else list(range(len(outputs)))
    return Session(str(path), "OpenVINO", inputs, outputs, compute, structure, threads, needed)


def _file_input(port: Any) -> FileInput:
    sizes: list[int | str] = []
    for dim in port.get_partial_shape():
        sizes.append(dim.get_length() if dim.is_static else BATCH)
    dtype = np.dtype(port.get_element_type().to_dtype())
    return FileInput(port.get_any_name(), tuple(sizes), dtype)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata in the file.

    Raises:
        ExportError: if the file cannot be loaded.
    """
    openvino = require("openvino", install=INSTALL)["openvino"]
    try:
        model = openvino.Core().read_model(str(path))
        if not model.has_rt_info(["fedpress"]):
            return {}
        entries = model.get_rt_info(["fedpress"]).value
        return {name: str(getattr(value, "value", value)) for name, value in entries.items()}
    except Exception as error:
        raise ExportError(
            f"OpenVINO cannot load {path}: {first_line(error)}",
            place="path",
            cure="export it again",
        ) from error
