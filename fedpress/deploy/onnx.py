"""A model becomes one ONNX file, float or integer, that says how to feed it; and onnxruntime runs it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpress.core.inputs import arguments
from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import BATCH, capture, require, silence
from fedpress.deploy.examples import (
    Structure,
    as_device,
    example_of,
    flatten,
    names_of,
    ordered,
    take,
)
from fedpress.deploy.onnx_integers import make_integer_
from fedpress.deploy.processor import settings
from fedpress.deploy.qdq import IntegerFormat, quantized_program
from fedpress.deploy.session import Port, Session
from fedpress.errors import ExportError
from fedpress.nn.quantized import quantized_layers
from fedpress.nn.resize import copied

OPSET = 18  # what torch's exporter is written against; every runtime of the last years reads it
MAX_IR_VERSION = 13  # the newest file format that onnxruntime loads
WIDE = "wide_weights"  # in the metadata: integer kernels read weights of 8 bits (see `deploy.processor`)
OUTPUTS = "outputs"  # in the metadata: how several outputs stand together, as JSON


@dataclass(frozen=True)
class Made:
    """A model on its way into a file: the ONNX message and what is to be told of it."""

    proto: Any
    words: dict[str, str]
    left: dict[str, str]
    program: torch.export.ExportedProgram | None
    rounds: bool


def export_onnx(model: nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` in evaluation mode as ONNX with a free batch size; the model itself is left as it was.

    The file takes what forward takes, under the names of its arguments (one tensor alone is called `input`), and gives
    what forward gives: one tensor is called `logits`, those of tuples and dictionaries are called by their keys and
    places. A file that was there before is replaced only by a whole one. Weights of quantized layers are stored in as
    many bits as they have.

    Raises:
        ExportError: if the model cannot be captured or converted (naming the module or the operation), or if
            the file cannot be written.
    """
    made = make_onnx(model, job)
    data = made.proto.SerializeToString()
    path = Path(path)
    write(path, data)
    return Artifact(path, len(data), made.words, made.left, made.program, made.rounds)


def make_onnx(model: nn.Module, job: Job, *, fewest_bits: int = 2) -> Made:
    """Makes the ONNX message of `model`; codes take `fewest_bits` or more.

    Raises:
        ExportError: if the model cannot be captured or converted.
    """
    onnx = require("onnx", "onnxscript")["onnx"]
    left, program, rounds = {}, None, False
    if job.batches or any(True for _ in quantized_layers(model)):
        rounded = quantized_program(
            model,
            job.given,
            job.batches,
            observer=job.observer,
            format=IntegerFormat(weight_bits=job.weight_bits, float_output=True),
        )
        left, program, rounds = rounded.left, rounded.program, rounded.rounds
    structure, outputs = _outputs(model, job)
    with silence():
        captured = program if program is not None else capture(model, job.given)
        inputs = names_of(model, ordered(model, example_of(job.given)))
        proto = _convert(captured, inputs, _unlike(inputs, outputs))
    _tidy_(proto)
    words = job.words()
    if structure != 0:
        words[OUTPUTS] = json.dumps(structure)
    if program is not None and make_integer_(proto, fewest_bits):
        words[WIDE] = "true"
    onnx.helper.set_model_props(proto, words)
    return Made(proto, words, left, program, rounds)


def open_onnx(path: str | Path, threads: int = 0) -> Session:
    """Loads the file into onnxruntime, told what it needs on this processor.

    Args:
        path: the file.
        threads: how many it computes on; 0 lets onnxruntime choose.

    Raises:
        ExportError: if the file cannot be loaded; the session, if it cannot be run.
    """
    ort = require("onnxruntime")["onnxruntime"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors come back as exceptions, no need to print them too
    cpu = ["CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(str(path), options, providers=cpu)
        words = session.get_modelmeta().custom_metadata_map
        told = settings("onnxruntime", wide=WIDE in words)
        for name, value in told.items():
            options.add_session_config_entry(name, value)
        if told:
            session = ort.InferenceSession(str(path), options, providers=cpu)
    except Exception as error:  # onnxruntime has a dozen exception types without a common base
        raise ExportError(
            f"onnxruntime cannot load {path}: {_first_line(error)}",
            place="path",
            cure="export it again",
        ) from error
    inputs = tuple(Port(i.name, tuple(i.shape), _dtype(i.type)) for i in session.get_inputs())
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

    plain: Structure = 0 if len(outputs) == 1 else list(range(len(outputs)))
    structure = json.loads(words[OUTPUTS]) if OUTPUTS in words else plain
    return Session(str(path), "onnxruntime", inputs, outputs, compute, structure, threads, told)


def _dtype(type: str) -> np.dtype[Any]:
    """The numpy type of `tensor(float)`, `tensor(int64)` and the like."""
    name = type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


def _outputs(model: nn.Module, job: Job) -> tuple[Structure, list[str]]:
    """Runs the model once and says how its outputs stand together, and what they are called.

    A tensor that stands in several places is one output of the file for each.
    """
    runs = copied(model).to("cpu", torch.float32).eval()
    args, named = arguments(take(as_device(example_of(job.given)), 2))
    try:
        with torch.no_grad():
            found = runs(*args, **named)
    except Exception:  # the capture that comes says it better
        return 0, ["logits"]
    structure, _, names = flatten(found)
    if not names:
        raise ExportError(
            "the model returns no tensor",
            place="model",
            cure="make its forward return what a device should know",
        )
    return structure, names


def _unlike(inputs: list[str], outputs: list[str]) -> list[str]:
    """Returns names of outputs that nothing else in the file has.

    >>> _unlike(["logits"], ["logits", "a_b", "a_b"])
    ['logits_1', 'a_b', 'a_b_1']
    """
    found: list[str] = []
    for name in outputs:
        number, own = 0, name
        while own in inputs or own in found:
            number += 1
            own = f"{name}_{number}"
        found.append(own)
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
    assert converted is not None  # only torchscript exports return nothing
    if len(converted.model.graph.outputs) != len(outputs):
        raise ExportError(
            (
                f"the model returns {len(outputs)} tensors, but its graph "
                f"{len(converted.model.graph.outputs)}"
            ),
            place="model",
            cure="make its forward return tensors in tuples and dictionaries alone",
        )
    return converted.model_proto


def _copy_before_views_(program: torch.export.ExportedProgram) -> None:
    """Lets a view of turned values read a copy of them, which no file will hold.

    The capture writes `view` where the memory of attention's fused kernel allows it; torch's exporter takes attention
    apart, after which the memory lies otherwise, and stops there.
    """
    aten = torch.ops.aten
    for node in [
        n for n in program.graph.nodes if n.target in (aten.view.default, aten.reshape.default)
    ]:
        turned = node.args[0]
        if turned.target not in (aten.transpose.int, aten.permute.default):
            continue
        with program.graph.inserting_before(node):
            copied = program.graph.call_function(
                aten.clone.default, (turned,), {"memory_format": torch.contiguous_format}
            )
        copied.meta = {**turned.meta, "val": turned.meta["val"].contiguous()}
        node.replace_input_with(turned, copied)
    program.graph_module.recompile()


def _translations() -> dict[Any, Any]:
    """Of the operations that torch's exporter translates wrongly or not at all."""
    if not hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
        return {}  # a float model
    require("onnxscript")
    from onnxscript import opset18, opset21
    from onnxscript.function_libs.torch_lib.ops.quantized_decomposed import (
        quantized_decomposed_quantize_per_tensor,
    )

    def quantize(x: Any, scale: float, zero: int, low: int, high: int, dtype: int) -> Any:
        if high - low < 255:  # ONNX saturates at the ends of the type alone
            ends = (opset18.Constant(value_float=(end - zero) * scale) for end in (low, high))
            x = opset18.Clip(x, *ends)
        return quantized_decomposed_quantize_per_tensor(x, scale, zero, low, high, dtype)

    def groups(
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
