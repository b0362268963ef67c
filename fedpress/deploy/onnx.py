"""A model becomes one ONNX file that says how to feed it, or an error that says which module is in the way."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fedpress
from fedpress.arrays import Preprocess
from fedpress.deploy.capture import BATCH, capture, require, silence
from fedpress.errors import ExportError

OPSET = 18  # what torch's exporter is written against; every runtime of the last years reads it
MAX_IR_VERSION = 13  # the newest file format that onnxruntime loads
INPUT, OUTPUT = "input", "logits"


@dataclass(frozen=True)
class Artifact:
    """One exported file: where it is, its size in bytes, the ONNX opset it needs, and the metadata inside it."""

    path: Path
    file_bytes: int
    opset: int
    metadata: dict[str, str]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: tuple[int, ...],
    preprocess: Preprocess,
    metadata: Mapping[str, str],
) -> Artifact:
    """Writes `model` in evaluation mode as ONNX with a free batch size; the model itself is left as it was.

    The file takes standardised float32 examples [N, *input_shape], so `preprocess` is not part of the graph;
    its numbers are written into the file's metadata beside `metadata` (for instance class names), so that
    whoever holds the file knows how to feed it. A file that was there before is replaced only by a whole one.

    Args:
        model: maps float32 [N, *input_shape] to one tensor [N, classes]; on any device.
        path: the file to write; missing folders are made.
        input_shape: shape of one example, such as (3, 32, 32).
        preprocess: what the training applied to raw examples.
        metadata: further words for the file; they may not replace the words that are written here.

    Raises:
        ExportError: if the model cannot be captured or converted (naming the module or the operation), or if
            the file cannot be written.
    """
    onnx = require("onnx", "onnxscript")["onnx"]
    with silence():
        proto = _convert(capture(model, input_shape))
    described = {**metadata, **_how_to_feed(input_shape, preprocess)}
    _tidy_(proto)
    onnx.helper.set_model_props(proto, described)
    data = proto.SerializeToString()
    path = Path(path)
    _write(path, data)
    return Artifact(path, len(data), OPSET, described)


def _convert(program: torch.export.ExportedProgram) -> Any:
    """Translates a captured graph to an ONNX model message."""
    try:
        converted = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    except Exception as error:
        found = re.search(r"OpOverload\(op='([^']+)'", _whole_message(error))
        name = f"the operation {found[1]!r}" if found else "an operation of the model"
        cure = "write that part of the model with operations that ONNX has"
        raise ExportError(f"export: {name} has no ONNX counterpart; {cure}") from error
    assert converted is not None  # only torchscript exports return nothing
    outputs = len(converted.model.graph.outputs)
    if outputs != 1:
        raise ExportError(f"export: the model returns {outputs} tensors; its forward must return the logits alone")
    return converted.model_proto


def _how_to_feed(input_shape: tuple[int, ...], preprocess: Preprocess) -> dict[str, str]:
    """Says in the file's own words what a device must do with a raw example."""
    how = "float32 [N, *input_shape]: bytes / 255 (floats as they are), then (x - mean) / std per channel if given"
    return {
        "fedpress_version": fedpress.__version__,
        "input": how,
        "input_shape": json.dumps(list(input_shape)),
        "mean": json.dumps(list(preprocess.mean)),
        "std": json.dumps(list(preprocess.std)),
    }


def _tidy_(proto: Any) -> None:
    """Drops the exporter's traces (they hold source paths of this machine) and names the batch dimension."""
    graph = proto.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # sizes computed from the batch size, such as 4*s77, are named alike
                dim.dim_param = dim.dim_param.replace(symbol, BATCH)
    for thing in (graph, *graph.node, *graph.initializer, *proto.functions):
        del thing.metadata_props[:]
    for node in (n for function in proto.functions for n in function.node):
        del node.metadata_props[:]
    del proto.metadata_props[:]
    proto.ir_version = min(proto.ir_version, MAX_IR_VERSION)


def _write(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, then renames, so that no half file is ever seen."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part:
            Path(part).unlink(missing_ok=True)
        reason = error.strerror or error
        raise ExportError(
            f"export: cannot write {len(data)} bytes to {path}: {reason}; free space or choose another --out"
        ) from error


def _whole_message(error: BaseException | None) -> str:
    """Joins the messages of an error and of all its causes."""
    parts = []
    while error:
        parts.append(str(error))
        error = error.__cause__
    return "\n".join(parts)
