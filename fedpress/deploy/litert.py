"""Exports a model as a LiteRT (TensorFlow Lite) file `.tflite`, and runs it on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import extra, require, silence
from fedpress.deploy.device import (
    DeviceGraph,
    captured_output,
    coded_weights,
    constant_of,
    device_graph,
    first_line,
    make_float_,
)
from fedpress.deploy.outputs import NamedOutputs
from fedpress.deploy.session import FileInput, Session
from fedpress.errors import ExportError

# Arguments of `pip install` for the packages.
INSTALL = extra("litert", "constraints-litert.txt")
# Python module that runs files.
RUNTIME = "ai_edge_litert.interpreter"
# Codes of the file format: TensorType.INT8, INT4 and FLOAT32, BuiltinOperator.QUANTIZE.
EIGHT_BITS, FOUR_BITS = 9, 17
FLOAT, QUANTIZE = 0, 114

FOUR_BIT_SHIFT = 4
"""Bits by which XNNPACK's linear layers shift int4 weights and the int32 bias to the left.

These layers keep an int4 weight in the upper half of a byte and multiply it as int8. So all sums
are 16 times as large, and a bias of more than 28 bits overflows silently.
"""

# Operations that move or convert values, and do no arithmetic.
MOVES = {
    "DEQUANTIZE",
    "RESHAPE",
    "TRANSPOSE",
    "SLICE",
    "BROADCAST_TO",
    "CONCATENATION",
    "PAD",
    "GATHER_ND",
    "SELECT",
}
READERS = {(3, 1), (4, 1), (9, 1), (6, 0)}
"""Kernels that read 4-bit weights: code of the operation, and index of its argument for weights.

The operations are CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED and DEQUANTIZE.
"""


def export_litert(model: nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` in evaluation mode as a LiteRT file for batches of one.

    With calibration batches in `job` the file computes on 8-bit integers. Its input and output are
    then int8 too, with scale and zero point in the file (`open_litert` converts from and to
    floats). Weights that fit into 4 bits are stored in 4 bits. Without batches the file computes in
    float. Weights of quantized layers are then stored as integers, and become float when the file
    is loaded. The model is not changed.

    Raises:
        ExportError: if the model cannot be captured or converted, or if the file cannot be written.
    """
    with silence(), captured_output():
        require("litert_torch", "ai_edge_litert", install=INSTALL)
    made = device_graph(model, job, "LiteRT", four_bit_shift=FOUR_BIT_SHIFT)
    for name, node in coded_weights(made.graph, groups=True):
        make_float_(made.graph, node)
        made.left_float[name] = (
            "its weights have several scales per output channel, LiteRT has one; stored as float"
        )
    for _, node in coded_weights(made.graph):
        _quantize_from_float_(made.graph, node)
    metadata = job.file_metadata() | made.outputs.metadata()
    data, float_operations = _compressed(_convert(made, job), metadata)
    if made.integer:
        for name in float_operations:
            made.left_float.setdefault(name, "LiteRT computes it in float")
    path = Path(path)
    write(path, data)
    return Artifact(path, len(data), metadata, made.left_float, made.rounded, made.rounds)


def _quantize_from_float_(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replaces the codes of a weight by a float constant that is quantized in the graph.

    The converter recognises quantized weights only in this form. It computes the same codes from
    the float constant.
    """
    ops = torch.ops.quantized_decomposed
    given, scales, zeros, axis, _, _, kind = node.args
    assert isinstance(given, fx.Node)
    assert isinstance(scales, fx.Node)
    codes, scale = constant_of(graph, given), constant_of(graph, scales)
    owner, _, key = str(given.target).rpartition(".")
    module = graph.get_submodule(owner)
    delattr(module, key)
    module.register_buffer(key, codes * scale.view(-1, *[1] * (codes.dim() - 1)))
    how = (scales, zeros, axis, -128, 127, kind)
    with graph.graph.inserting_before(node):
        rounded = graph.graph.call_function(ops.quantize_per_channel.default, (given, *how))
    node.args = (rounded, *how)
    graph.recompile()


def _convert(made: DeviceGraph, job: Job) -> bytes:
    """Returns the bytes of the file as litert_torch converts it."""
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import (
        PT2EQuantizer,
        get_symmetric_quantization_config,
    )
    from litert_torch.quantize.quant_config import QuantConfig

    static = QuantConfig(
        pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config())
    )
    graph = made.program(job.one_shape("LiteRT")).module(check_guards=False)
    with silence(), captured_output() as printed:
        try:
            example = (torch.zeros(1, *job.one_shape("LiteRT")),)
            made_file = litert_torch.convert(
                graph, example, quant_config=static if made.integer else None
            )
            found: bytes = made_file.model_content()
            return found
        # The errors of passes, lowerings and MLIR have no common base.
        except Exception as error:
            reason = first_line(error) or first_line(ValueError(printed()))
            raise ExportError(
                f"LiteRT cannot convert the model: {reason}",
                place="model",
                cure="replace that operation, or export as onnx",
            ) from error


def _compressed(data: bytes, metadata: dict[str, str]) -> tuple[bytes, list[str]]:
    """Stores constants as integers, packs 4-bit weights two to a byte, and adds the metadata.

    Returns:
        The file, and the names of operations in it that compute on floats.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    file = schema.ModelT.InitFromPackedBuf(data, 0)
    for graph in file.subgraphs:
        _store_codes_(file, graph)
        for tensor in _packable_weights(file, graph):
            codes = np.asarray(file.buffers[tensor.buffer].data, np.uint8).view(np.int8)
            # All codes must fit into 4 bits; other weights stay in 8 bits.
            if len(codes) and codes.min() >= -8 and codes.max() <= 7:
                file.buffers[tensor.buffer].data = _two_to_a_byte(codes)
                tensor.type = FOUR_BITS
    for name, value in metadata.items():
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(value.encode(), np.uint8)
        entry.name, entry.buffer = name, len(file.buffers)
        file.buffers.append(buffer)
        file.metadata = [*(file.metadata or []), entry]
    builder = flatbuffers.Builder(len(data))
    # TFL3 identifies the file format.
    builder.Finish(file.Pack(builder), b"TFL3")
    float_operations: set[str] = set()
    for graph in file.subgraphs:
        float_operations.update(_float_operations(file, graph))
    return bytes(builder.Output()), sorted(float_operations)


def _two_to_a_byte(codes: np.ndarray) -> np.ndarray:
    """Packs int8 numbers in -8..7 two to a byte, the first in the lower half; pads with 0."""
    even = np.append(codes, np.zeros(len(codes) % 2, np.int8))
    pairs = even.view(np.uint8).reshape(-1, 2) & 15
    packed: np.ndarray = pairs[:, 0] | (pairs[:, 1] << 4)
    return packed


def _float_operations(file: Any, graph: Any) -> Iterator[str]:
    """Yields the names of operations that compute floats; moves and conversions do not count."""
    from ai_edge_litert import schema_py_generated as schema

    names: dict[int, str] = {}
    for name, value in vars(schema.BuiltinOperator).items():
        if isinstance(value, int):
            names[value] = name
    for operator in graph.operators:
        name = names[_operation_code(file, operator)]
        outputs = [graph.tensors[at] for at in operator.outputs]
        if name not in MOVES and any(tensor.type == FLOAT for tensor in outputs):
            yield name


def _operation_code(file: Any, operator: Any) -> int:
    # A code up to 127 may be in the old field only. The schema says to use the larger field.
    entry = file.operatorCodes[operator.opcodeIndex]
    return int(max(entry.builtinCode, entry.deprecatedBuiltinCode))


def _packable_weights(file: Any, graph: Any) -> Iterator[Any]:
    """Yields each int8 weight that is read only by kernels that can also read 4-bit weights."""
    readers: dict[int, set[tuple[int, int]]] = {}
    for operator in graph.operators:
        for at, index in enumerate(operator.inputs):
            readers.setdefault(index, set()).add((_operation_code(file, operator), at))
    buffers = [tensor.buffer for tensor in graph.tensors]
    for index, uses in readers.items():
        tensor = graph.tensors[index]
        constant = tensor.type == EIGHT_BITS and file.buffers[tensor.buffer].data is not None
        # A buffer that two tensors share cannot be packed for one of them alone.
        shared = buffers.count(tensor.buffer) > 1
        if uses <= READERS and constant and not shared:
            yield tensor


def _store_codes_(file: Any, graph: Any) -> None:
    """Stores the 8-bit codes of float constants that the graph quantizes, not the constants."""
    kept = []
    for operator in graph.operators:
        source = graph.tensors[operator.inputs[0]]
        target = graph.tensors[operator.outputs[0]]
        data = file.buffers[source.buffer].data
        if _operation_code(file, operator) != QUANTIZE or data is None or not len(data):
            kept.append(operator)
            continue
        parameters = target.quantization
        shape = [1] * len(target.shape)
        shape[parameters.quantizedDimension] = -1
        scales = np.asarray(parameters.scale, np.float32).reshape(shape)
        values = np.asarray(data, np.uint8).view(np.float32).reshape(target.shape)
        codes = np.round(values / scales).astype(np.int8)
        file.buffers[source.buffer].data = codes.reshape(-1).view(np.uint8)
        target.buffer = source.buffer
        # Nothing reads the float tensor any more. Buffer 0 is empty in every file.
        source.buffer = 0
    graph.operators = kept


def open_litert(path: str | Path, threads: int = 0) -> Session:
    """Loads the file. The session takes one float32 example [1, ...] and returns float32.

    A file that computes on integers has int8 inputs and outputs; the session converts.

    Args:
        path: the file.
        threads: number of threads; 0: one for each logical processor.

    Raises:
        ExportError: if the file cannot be loaded. The session raises the same error if the file
            cannot be run.
    """
    with silence(), captured_output():
        interpreter = require(RUNTIME, install=INSTALL)[RUNTIME].Interpreter
        try:
            file = interpreter(str(path), num_threads=threads or os.cpu_count() or 1)
            file.allocate_tensors()
            takes = file.get_input_details()[0]
            gives = file.get_output_details()
        # A damaged file may also raise ValueError; one without inputs raises IndexError.
        except (RuntimeError, ValueError, IndexError) as error:
            raise ExportError(
                f"LiteRT cannot load {path}: {first_line(error)}",
                place="path",
                cure="export it again",
            ) from error
    sizes = tuple(int(size) for size in takes["shape"])

    def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
        (x,) = arrays
        # Quantizing would turn NaN into some integer, and the output would look valid.
        if takes["quantization"][0] and np.isnan(x).any():
            raise ExportError(
                f"{path} computes on integers, which have no NaN",
                place="x",
                cure="leave that example out",
            )
        if x.shape != sizes:
            raise ExportError(
                f"{path} takes float32 {list(sizes)}, got {list(x.shape)}",
                place="x",
                cure="give it one example",
            )
        try:
            file.set_tensor(takes["index"], _quantized(x, takes))
            file.invoke()
            return [_dequantized(file.get_tensor(each["index"]), each) for each in gives]
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"LiteRT cannot run {path}: {first_line(error)}",
                place="path",
                cure="export it again",
            ) from error

    inputs = (FileInput("input", sizes, np.dtype(np.float32)),)
    outputs = NamedOutputs.of_file(read_metadata(path), len(gives))
    return Session(str(path), "LiteRT", inputs, outputs.names, compute, outputs.structure, threads)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata in the file."""
    require("ai_edge_litert", install=INSTALL)
    from ai_edge_litert import schema_py_generated as schema

    file = schema.ModelT.InitFromPackedBuf(Path(path).read_bytes(), 0)
    found: dict[str, str] = {}
    for entry in file.metadata or []:
        data = file.buffers[entry.buffer].data
        found[entry.name.decode()] = bytes(bytearray(data)).decode(errors="replace")
    return found


def _quantized(x: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Returns `x` as the int8 input of the file; as float32 if the file takes floats (scale 0)."""
    scale, zero_point = details["quantization"]
    if not scale:
        return np.ascontiguousarray(x, np.float32)
    codes: np.ndarray = np.clip(np.round(x / np.float32(scale)) + zero_point, -128, 127)
    return codes.astype(np.int8)


def _dequantized(x: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Returns an output of the file as float32; the reverse of `_quantized`."""
    scale, zero_point = details["quantization"]
    if not scale:
        return x
    return (x.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
