"""Exports a model as an ONNX file, float or integer, and runs it in onnxruntime."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import BATCH, capture, require, silence
from fedpress.deploy.examples import (
    Structure,
    example_of,
    names_of,
    ordered,
)
from fedpress.deploy.onnx_integers import make_integer_
from fedpress.deploy.outputs import OUTPUTS, outputs_of
from fedpress.deploy.processor import options_for
from fedpress.deploy.qdq import IntegerFormat, quantized_program
from fedpress.deploy.raw_columns import RawColumns
from fedpress.deploy.session import FileInput, Session
from fedpress.errors import ExportError
from fedpress.nn.quantized import quantized_layers

# Version of the ONNX operations. Torch's exporter is written for this version, and runtimes of
# recent years read it.
OPSET = 18
# The newest version of the file format that onnxruntime loads.
MAX_IR_VERSION = 13
# Metadata key of files in which integer kernels read weights of more than 7 bits (see
# `deploy.processor`).
WIDE = "wide_weights"


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX message (`proto`) before it is written, and the attributes of its `Artifact`."""

    proto: Any
    metadata: dict[str, str]
    left_float: dict[str, str]
    program: torch.export.ExportedProgram | None
    rounds: bool


def export_onnx(model: nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` in evaluation mode as ONNX, for batches of any size.

    The inputs have the names of forward's arguments; a single tensor is called `input`. A single
    output is called `logits`; tensors in tuples and dictionaries have names such as `hidden_0`.
    Weights of quantized layers are stored in 2, 4 or 8 bits, the fewest that hold them.
    An older file at `path` is replaced only when the new one is complete. The model is not changed.

    Raises:
        ExportError: if the model cannot be captured or converted (naming the module or operation),
            or if the file cannot be written.
    """
    made = make_onnx(model, job)
    data = made.proto.SerializeToString()
    path = Path(path)
    write(path, data)
    return Artifact(path, len(data), made.metadata, made.left_float, made.program, made.rounds)


def make_onnx(model: nn.Module, job: Job, *, fewest_bits: int = 2) -> OnnxModel:
    """Converts `model` to an ONNX message (ONNX files are protobuf messages).

    Args:
        model: the model; it is not changed.
        job: the settings of the export.
        fewest_bits: the fewest bits of a stored integer weight, 2 or 4, that the runtime can read.

    Raises:
        ExportError: if the model cannot be captured or converted.
    """
    onnx = require("onnx", "onnxscript")["onnx"]
    left_float, program, rounds = {}, None, False
    if job.batches or any(True for _ in quantized_layers(model)):
        rounded = quantized_program(
            model,
            job.input_spec,
            job.batches,
            observer=job.observer,
            format=IntegerFormat(weight_bits=job.weight_bits, float_output=True),
        )
        left_float, program, rounds = rounded.left_float, rounded.program, rounded.rounds
    structure, outputs = outputs_of(model, job.input_spec)
    with silence():
        captured = program if program is not None else capture(model, job.input_spec)
        inputs = names_of(model, ordered(model, example_of(job.input_spec)))
        names = inputs if job.columns is None else job.columns.names
        proto = _convert(captured, inputs, _unique_names(names, outputs))
    _remove_traces_(proto)
    metadata = job.file_metadata()
    if structure != 0:
        metadata[OUTPUTS] = json.dumps(structure)
    if program is not None and make_integer_(proto, fewest_bits):
        metadata[WIDE] = "true"
    if job.columns is not None:
        job.columns.insert_(proto)
    # Last, because `_remove_traces_` deletes the metadata that the exporter has written.
    onnx.helper.set_model_props(proto, metadata)
    return OnnxModel(proto, metadata, left_float, program, rounds)


def open_onnx(path: str | Path, threads: int = 0) -> Session:
    """Loads the file into onnxruntime, with the options that this processor needs.

    Args:
        path: the file.
        threads: number of threads; 0: onnxruntime chooses.

    Raises:
        ExportError: if the file cannot be loaded. The session raises the same error if the file
            cannot be run.
    """
    ort = require("onnxruntime")["onnxruntime"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Operators run one after another: `threads` bounds the whole computation.
    options.inter_op_num_threads = 1
    # Errors come as exceptions; onnxruntime must not print them too.
    options.log_severity_level = 4
    cpu = ["CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(str(path), options, providers=cpu)
        metadata = session.get_modelmeta().custom_metadata_map
        # The needed options depend on metadata inside the file, so it may be loaded a second time.
        needed = options_for("onnxruntime", wide=WIDE in metadata)
        for name, value in needed.items():
            options.add_session_config_entry(name, value)
        if needed:
            session = ort.InferenceSession(str(path), options, providers=cpu)
    # onnxruntime has a dozen exception types without a common base.
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot load {path}: {_first_line(error)}",
            place="path",
            cure="export it again",
        ) from error
    inputs = tuple(FileInput(i.name, tuple(i.shape), _dtype(i.type)) for i in session.get_inputs())
    outputs = tuple(o.name for o in session.get_outputs())

    def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
        try:
            found: list[np.ndarray] = session.run(
                None, {i.name: x for i, x in zip(inputs, arrays, strict=True)}
            )
        except Exception as error:
            shapes = ", ".join(str(list(x.shape)) for x in arrays)
            wanted = ", ".join(str(i.shape) for i in session.get_inputs())
            raise ExportError(
                f"onnxruntime cannot run {path} on {shapes}: {_first_line(error)}",
                place="path",
                cure=f"the file takes {wanted}",
            ) from error
        return found

    structure: Structure = 0 if len(outputs) == 1 else list(range(len(outputs)))
    if OUTPUTS in metadata:
        structure = json.loads(metadata[OUTPUTS])
    columns = RawColumns.of_file(metadata, str(path))
    return Session(
        str(path), "onnxruntime", inputs, outputs, compute, structure, threads, needed, columns
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata in the file.

    Raises:
        ExportError: if the file cannot be loaded.
    """
    ort = require("onnxruntime")["onnxruntime"]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # The graph is not run, so it need not be optimised.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot load {path}: {_first_line(error)}",
            place="path",
            cure="export it again",
        ) from error
    return dict(session.get_modelmeta().custom_metadata_map)


def _dtype(type: str) -> np.dtype[Any]:
    """Returns the numpy dtype of `tensor(float)`, `tensor(int64)` and so on."""
    name = type.removeprefix("tensor(").removesuffix(")")
    of_numpy = {"float": "float32", "double": "float64", "string": "object"}
    return np.dtype(of_numpy.get(name, name))


def _unique_names(inputs: list[str], outputs: list[str]) -> list[str]:
    """Returns names for outputs that differ from each other and from the names of inputs.

    >>> _unique_names(["logits"], ["logits", "a_b", "a_b"])
    ['logits_1', 'a_b', 'a_b_1']
    """
    found: list[str] = []
    for name in outputs:
        number = 0
        unique = name
        while unique in inputs or unique in found:
            number += 1
            unique = f"{name}_{number}"
        found.append(unique)
    return found


def _convert(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> Any:
    """Translates a captured graph to an ONNX model message."""
    _copy_before_views_(program)
    try:
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
            custom_translation_table=_translations(),
        )
    except Exception as error:
        found = re.search(r"OpOverload\(op='([^']+)'", _whole_message(error))
        name = f"the operation {found[1]!r}" if found else "an operation of the model"
        cure = "write that part of the model with operations that ONNX has"
        raise ExportError(f"{name} has no ONNX counterpart", place="model", cure=cure) from error
    assert converted is not None, "only torchscript exports return nothing"
    if len(converted.model.graph.outputs) != len(outputs):
        raise ExportError(
            (
                f"the model returns {len(outputs)} tensors, but its graph "
                f"{len(converted.model.graph.outputs)}"
            ),
            place="model",
            cure="make its forward return only tensors, in tuples and dictionaries",
        )
    return converted.model_proto


def _copy_before_views_(program: torch.export.ExportedProgram) -> None:
    """Inserts a contiguous copy between a transpose or permute and the view that reads it.

    The fused kernel of attention returns values whose strides allow a view after a transpose. So
    the captured graph has such a view. torch's exporter replaces the kernel by single operations.
    Their results have other strides, and the exporter fails on the view. ONNX has no strides, so
    the copy does not appear in the file.
    """
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target not in (aten.view.default, aten.reshape.default):
            continue
        transposed = node.args[0]
        if transposed.target not in (aten.transpose.int, aten.permute.default):
            continue
        with program.graph.inserting_before(node):
            contiguous = program.graph.call_function(
                aten.clone.default, (transposed,), {"memory_format": torch.contiguous_format}
            )
        contiguous.meta = {**transposed.meta, "val": transposed.meta["val"].contiguous()}
        node.replace_input_with(transposed, contiguous)
    program.graph_module.recompile()


def _translations() -> dict[Any, Any]:
    """Returns translations of operations that torch's exporter translates wrongly or not at all."""
    # These operations are registered when a model is quantized; other graphs do not have them.
    if not hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
        return {}
    require("onnxscript")
    from onnxscript import opset18, opset21
    from onnxscript.function_libs.torch_lib.ops.quantized_decomposed import (
        quantized_decomposed_quantize_per_tensor,
    )

    def quantize(x: Any, scale: float, zero: int, low: int, high: int, dtype: int) -> Any:
        # ONNX saturates only at the limits of the dtype, so a smaller range needs a clip first.
        if high - low < 255:
            least = opset18.Constant(value_float=(low - zero) * scale)
            largest = opset18.Constant(value_float=(high - zero) * scale)
            x = opset18.Clip(x, least, largest)
        return quantized_decomposed_quantize_per_tensor(x, scale, zero, low, high, dtype)

    def dequantize_groups(
        codes: Any,
        scales: Any,
        zeros: Any,
        low: int,
        high: int,
        dtype: int,
        group: int,
        to: int = 1,
    ) -> Any:
        return opset21.DequantizeLinear(codes, scales, axis=1, block_size=group)

    ops = torch.ops.quantized_decomposed
    return {
        ops.quantize_per_tensor.default: quantize,
        ops.dequantize_per_channel_group.default: dequantize_groups,
    }


def _remove_traces_(proto: Any) -> None:
    """Removes the exporter's annotations: stack traces with source paths of the user's machine.

    Also names the batch dimension, and lowers the version of the file format if needed.
    """
    graph = proto.graph
    # The exporter gives the batch size a name such as s77.
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            # Sizes may be computed from the batch size, such as 4*s77.
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace(symbol, BATCH)

    annotated = [proto, graph, *graph.node, *graph.initializer, *proto.functions]
    for function in proto.functions:
        annotated.extend(function.node)
    for message in annotated:
        del message.metadata_props[:]
    proto.ir_version = min(proto.ir_version, MAX_IR_VERSION)


def _whole_message(error: BaseException | None) -> str:
    """Joins the messages of an error and of its causes; only the cause names the operation."""
    parts = []
    while error:
        parts.append(str(error))
        error = error.__cause__
    return "\n".join(parts)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
