"""OpenVINO: the ONNX file becomes OpenVINO's own two files, for Intel processors of computers and gateways."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import BATCH, require, silence
from fedpress.deploy.device import said
from fedpress.deploy.examples import Structure
from fedpress.deploy.onnx import OUTPUTS, WIDE, make_onnx
from fedpress.deploy.processor import settings
from fedpress.deploy.session import Port, Session
from fedpress.errors import ExportError

INSTALL = "'fedpress[openvino]'"
FEWEST_BITS = 4  # its reader of ONNX files does not know INT2
OVERFLOW = (
    "overflow on x86 without VNNI, where they are computed in float; "
    "quantize to 7 bits (WeightQuantization(bits=7))"
)


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
    made = make_onnx(model, replace(job, weight_bits=7), fewest_bits=FEWEST_BITS)
    with tempfile.TemporaryDirectory() as folder:
        source, graph, weights = (
            Path(folder) / f"model.{suffix}" for suffix in ("onnx", "xml", "bin")
        )
        source.write_bytes(made.proto.SerializeToString())
        try:
            with silence():
                found = openvino.Core().read_model(str(source))
                for name, value in made.words.items():
                    found.set_rt_info(value, ["fedpress", name])
                openvino.save_model(found, str(graph), compress_to_fp16=False)
        except Exception as error:  # OpenVINO raises RuntimeError and its own
            raise ExportError(
                f"OpenVINO cannot convert the model: {said(error)}",
                place="model",
                cure="export it as onnx",
            ) from error
        write(path.with_suffix(".bin"), weights.read_bytes())
        write(path, graph.read_bytes())
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    wide = {"weights of 8 bits": OVERFLOW} if job.batches and WIDE in made.words else {}
    return Artifact(path, size, made.words, made.left | wide, made.program, made.rounds)


def open_openvino(path: str | Path, threads: int = 0) -> Session:
    """Loads a graph (.xml or .onnx) into OpenVINO, told what it needs on this processor.

    Args:
        path: the file; the weights lie beside it.
        threads: how many it computes on; 0 lets OpenVINO choose.

    Raises:
        ExportError: if the file cannot be loaded; the session, if it cannot be run.
    """
    openvino = require("openvino", install=INSTALL)["openvino"]
    core = openvino.Core()
    try:
        model = core.read_model(str(path))
        told = settings("OpenVINO", wide=model.has_rt_info(["fedpress", WIDE]))
        structure: Structure = None
        if model.has_rt_info(["fedpress", OUTPUTS]):
            structure = json.loads(model.get_rt_info(["fedpress", OUTPUTS]).astype(str))
        inputs = tuple(_port(i) for i in model.inputs)
        outputs = tuple(o.get_any_name() for o in model.outputs)
    except Exception as error:
        raise ExportError(
            f"OpenVINO cannot load {path}: {said(error)}", place="path", cure="export it again"
        ) from error
    how: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", **told}
    if threads:
        how["INFERENCE_NUM_THREADS"] = threads
    compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
        shapes = tuple(x.shape for x in arrays)
        try:
            if shapes not in compiled:  # a graph of fixed sizes is the faster one
                fixed = model.clone()
                fixed.reshape(
                    {i.name: list(shape) for i, shape in zip(inputs, shapes, strict=True)}
                )
                compiled[shapes] = core.compile_model(fixed, "CPU", how).create_infer_request()
            found = compiled[shapes].infer([*arrays])
            return [found[at] for at in range(len(outputs))]
        except Exception as error:
            given = ", ".join(str(list(shape)) for shape in shapes)
            wanted = ", ".join(str(i.get_partial_shape()) for i in model.inputs)
            raise ExportError(
                f"OpenVINO cannot run {path} on {given}: {said(error)}",
                place="path",
                cure=f"the file takes {wanted}",
            ) from error

    if structure is None:
        structure = 0 if len(outputs) == 1 else list(range(len(outputs)))
    return Session(str(path), "OpenVINO", inputs, outputs, compute, structure, threads, told)


def _port(given: Any) -> Port:
    shape = tuple(d.get_length() if d.is_static else BATCH for d in given.get_partial_shape())
    return Port(given.get_any_name(), shape, np.dtype(given.get_element_type().to_dtype()))
