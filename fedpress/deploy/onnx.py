"""A model becomes one ONNX file, float or integer, that says how to feed it; and onnxruntime runs it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import BATCH, capture, require, silence
from fedpress.deploy.onnx_integers import make_integer_
from fedpress.deploy.qdq import quantized_program
from fedpress.errors import ExportError
from fedpress.quantized import quantized_layers

OPSET = 18  # what torch's exporter is written against; every runtime of the last years reads it
MAX_IR_VERSION = 13  # the newest file format that onnxruntime loads
INPUT, OUTPUT = "input", "logits"
WIDE = "wide_weights"  # in the metadata: weights of 8 bits, to be run with EXACT where products add up in 16 bits
EXACT = "session.x64quantprecision"  # onnxruntime's option; without AVX2, or with VNNI, it changes nothing


def export_onnx(model: nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` in evaluation mode as ONNX with a free batch size; the model itself is left as it was.

    The file takes standardised float32 examples [N, *input_shape]. A file that was there before is replaced only by a
    whole one. Weights of quantized layers are stored in as many bits as they have.

    Raises:
        ExportError: if the model cannot be captured or converted (naming the module or the operation), or if
            the file cannot be written.
    """
    onnx = require("onnx", "onnxscript")["onnx"]
    left, program = {}, None
    if job.batches or any(True for _ in quantized_layers(model)):
        rounded = quantized_program(
            model, job.input_shape, job.batches, observer=job.observer, weight_bits=job.weight_bits, float_output=True
        )
        left, program = rounded.left, rounded.program
    with silence():
        proto = _convert(program if program is not None else capture(model, job.input_shape))
    _tidy_(proto)
    words = job.words()
    if program is not None and make_integer_(proto):
        words[WIDE] = "true"
    onnx.helper.set_model_props(proto, words)
    data = proto.SerializeToString()
    path = Path(path)
    write(path, data)
    return Artifact(path, len(data), words, left, program)


def open_onnx(path: str | Path, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Loads the file into onnxruntime and returns a function from float32 examples [n, ...] to its first output.

    Args:
        path: the file.
        threads: how many it computes on; 0 lets onnxruntime choose.

    Raises:
        ExportError: if the file cannot be loaded; the function, if it cannot be run.
    """
    ort = require("onnxruntime")["onnxruntime"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors come back as exceptions, no need to print them too
    cpu = ["CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(str(path), options, providers=cpu)
        if session.get_modelmeta().custom_metadata_map.get(WIDE):
            options.add_session_config_entry(EXACT, "1")
            session = ort.InferenceSession(str(path), options, providers=cpu)
    except Exception as error:  # onnxruntime has a dozen exception types without a common base
        raise ExportError(f"export: onnxruntime cannot load {path}: {_first_line(error)}; export it again") from error
    name = session.get_inputs()[0].name

    def run(x: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = session.run(None, {name: x})[0]
        except Exception as error:
            said, wanted = _first_line(error), session.get_inputs()[0].shape
            raise ExportError(
                f"export: onnxruntime cannot run {path} on {list(x.shape)}: {said}; the file takes {wanted}"
            ) from error
        return found

    return run


def _convert(program: torch.export.ExportedProgram) -> Any:
    """Translates a captured graph to an ONNX model message."""
    try:
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
            custom_translation_table=_translations(),
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


def _translations() -> dict[Any, Any]:
    """Of the operations that torch's exporter translates wrongly or not at all."""
    if not hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
        return {}  # a float model
    require("onnxscript")
    from onnxscript import opset18, opset21
    from onnxscript.function_libs.torch_lib.ops.quantized_decomposed import quantized_decomposed_quantize_per_tensor

    def quantize(x: Any, scale: float, zero: int, low: int, high: int, dtype: int) -> Any:
        if high - low < 255:  # ONNX saturates at the ends of the type alone
            ends = (opset18.Constant(value_float=(end - zero) * scale) for end in (low, high))
            x = opset18.Clip(x, *ends)
        return quantized_decomposed_quantize_per_tensor(x, scale, zero, low, high, dtype)

    def groups(codes: Any, scales: Any, zeros: Any, low: int, high: int, dtype: int, group: int, to: int = 1) -> Any:
        return opset21.DequantizeLinear(codes, scales, axis=1, block_size=group)

    ops = torch.ops.quantized_decomposed
    return {
        ops.quantize_per_tensor.default: quantize,
        ops.dequantize_per_channel_group.default: groups,
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


def _whole_message(error: BaseException | None) -> str:
    """Joins the messages of an error and of all its causes."""
    parts = []
    while error:
        parts.append(str(error))
        error = error.__cause__
    return "\n".join(parts)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
