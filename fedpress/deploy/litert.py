"""LiteRT (TensorFlow Lite): a model becomes a `.tflite` file for phones, which runs on XNNPACK or an accelerator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import require, silence
from fedpress.deploy.device import (
    DeviceGraph,
    device_graph,
    held,
    hush,
    said,
    small_weights,
    unquantize_,
)
from fedpress.deploy.session import Port, Session
from fedpress.errors import ExportError

INSTALL = "'fedpress[litert]'"
RUNTIME = "ai_edge_litert.interpreter"
EIGHT_BITS, FOUR_BITS = 9, 17  # TensorType.INT8 and INT4 of the file format
FOUR_BIT_SHIFT = 4
"""XNNPACK's linear layers multiply int4 codes as int8 in the upper half of a byte, and the int32 bias by 16 with them.

A bias of more than 28 bits wraps around there without a word."""

FLOAT, QUANTIZE = 0, 114
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
"""What reads weights of four bits: operation (CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED, DEQUANTIZE) and argument."""


def export_litert(model: nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` in evaluation mode as LiteRT for batches of one; the model itself is left as it was.

    With batches in `job` everything computes on 8-bit integers and the file's input and output are int8 on a grid that
    stands in it (`open_litert` rounds). Weights whose codes fit into four bits are stored in four. In float, small
    weights stay codes too and become float when the file is loaded.

    Raises:
        ExportError: if the model cannot be captured or converted, or if the file cannot be written.
    """
    with silence(), hush():
        require("litert_torch", "ai_edge_litert", install=INSTALL)
    made = device_graph(model, job, "LiteRT", four_bit_shift=FOUR_BIT_SHIFT)
    for name, node in small_weights(made.graph, groups=True):
        unquantize_(made.graph, node)
        made.left[name] = "LiteRT has one scale per output channel; its weights are stored as float"
    for _, node in small_weights(made.graph):
        _round_here_(made.graph, node)
    words = job.words()
    data, floats = _small(_convert(made, job), words)
    for name in floats if made.integer else ():
        made.left.setdefault(name, "LiteRT computes it in float")
    path = Path(path)
    write(path, data)
    return Artifact(path, len(data), words, made.left, made.rounded, made.rounds)


def _round_here_(graph: fx.GraphModule, node: fx.Node) -> None:
    """Writes a weight as the converter wants it: a float constant and its rounding, which it does itself."""
    ops = torch.ops.quantized_decomposed
    given, scales, zeros, axis, _, _, kind = node.args
    assert isinstance(given, fx.Node)
    assert isinstance(scales, fx.Node)
    codes, scale = held(graph, given), held(graph, scales)
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
    """Returns the converter's file."""
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
    with silence(), hush() as printed:
        try:
            example = (torch.zeros(1, *job.one_shape("LiteRT")),)
            made_file = litert_torch.convert(
                graph, example, quant_config=static if made.integer else None
            )
            found: bytes = made_file.model_content()
            return found
        except Exception as error:  # passes, lowerings and MLIR have no common base
            reason = said(error) or said(ValueError(printed()))
            raise ExportError(
                f"LiteRT cannot convert the model: {reason}",
                place="model",
                cure="replace that operation, or export as onnx",
            ) from error


def _small(data: bytes, words: dict[str, str]) -> tuple[bytes, list[str]]:
    """Packs weights of four bits two to a byte, stores codes in place of roundings, and adds the file's words.

    Returns:
        The file, and the operations in it that compute on floats.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    file = schema.ModelT.InitFromPackedBuf(data, 0)
    for graph in file.subgraphs:
        _store_codes_(file, graph)
        for tensor in _weights(file, graph):
            codes = np.asarray(file.buffers[tensor.buffer].data, np.uint8).view(np.int8)
            if len(codes) and codes.min() >= -8 and codes.max() <= 7:
                pairs = (
                    np.append(codes, np.zeros(len(codes) % 2, np.int8))
                    .view(np.uint8)
                    .reshape(-1, 2)
                    & 15
                )
                file.buffers[tensor.buffer].data = pairs[:, 0] | (pairs[:, 1] << 4)
                tensor.type = FOUR_BITS
    for name, value in words.items():
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(value.encode(), np.uint8)
        entry.name, entry.buffer = name, len(file.buffers)
        file.buffers.append(buffer)
        file.metadata = [*(file.metadata or []), entry]
    builder = flatbuffers.Builder(len(data))
    builder.Finish(file.Pack(builder), b"TFL3")
    return bytes(builder.Output()), sorted(
        {name for graph in file.subgraphs for name in _floats(file, graph)}
    )


def _floats(file: Any, graph: Any) -> Iterator[str]:
    """Yields the names of operations that give floats, but for those that only move or convert them."""
    from ai_edge_litert import schema_py_generated as schema

    names = {
        value: name
        for name, value in vars(schema.BuiltinOperator).items()
        if isinstance(value, int)
    }
    for operator in graph.operators:
        name = names[_code(file, operator)]
        if name not in MOVES and any(graph.tensors[at].type == FLOAT for at in operator.outputs):
            yield name


def _code(file: Any, operator: Any) -> int:
    entry = file.operatorCodes[operator.opcodeIndex]
    return int(max(entry.builtinCode, entry.deprecatedBuiltinCode))


def _weights(file: Any, graph: Any) -> Iterator[Any]:
    """Yields the int8 weights that only `READERS` read, each once."""
    readers: dict[int, set[tuple[int, int]]] = {}
    for operator in graph.operators:
        for at, index in enumerate(operator.inputs):
            readers.setdefault(index, set()).add((_code(file, operator), at))
    shared = [tensor.buffer for tensor in graph.tensors]
    for index, uses in readers.items():
        tensor = graph.tensors[index]
        known = tensor.type == EIGHT_BITS and file.buffers[tensor.buffer].data is not None
        if uses <= READERS and known and shared.count(tensor.buffer) == 1:
            yield tensor


def _store_codes_(file: Any, graph: Any) -> None:
    """Does the roundings of constants now, so that the codes stand in the file and not the floats."""
    kept = []
    for operator in graph.operators:
        source, target = graph.tensors[operator.inputs[0]], graph.tensors[operator.outputs[0]]
        data = file.buffers[source.buffer].data
        if _code(file, operator) != QUANTIZE or data is None or not len(data):
            kept.append(operator)
            continue
        grid = target.quantization
        shape = [1] * len(target.shape)
        shape[grid.quantizedDimension] = -1
        values = np.asarray(data, np.uint8).view(np.float32).reshape(target.shape)
        codes = np.round(values / np.asarray(grid.scale, np.float32).reshape(shape)).astype(np.int8)
        file.buffers[source.buffer].data = codes.reshape(-1).view(np.uint8)
        target.buffer = source.buffer
        source.buffer = 0  # nobody reads it any more
    graph.operators = kept


def open_litert(path: str | Path, threads: int = 0) -> Session:
    """Loads the file, which takes one float32 example [1, ...] and gives floats, wherever it rounds inside.

    Args:
        path: the file.
        threads: how many it computes on; 0: one for each core.

    Raises:
        ExportError: if the file cannot be loaded; the session, if it cannot be run.
    """
    with silence(), hush():
        interpreter = require(RUNTIME, install=INSTALL)[RUNTIME].Interpreter
        try:
            file = interpreter(str(path), num_threads=threads or os.cpu_count() or 1)
            file.allocate_tensors()
            inside, outside = file.get_input_details()[0], file.get_output_details()[0]
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ) as error:  # damaged names and empty signatures too
            raise ExportError(
                f"LiteRT cannot load {path}: {said(error)}", place="path", cure="export it again"
            ) from error
    sizes = tuple(int(size) for size in inside["shape"])

    def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
        (x,) = arrays
        if inside["quantization"][0] and np.isnan(x).any():
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
            file.set_tensor(inside["index"], _onto_grid(x, inside))
            file.invoke()
            return [_off_grid(file.get_tensor(outside["index"]), outside)]
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"LiteRT cannot run {path}: {said(error)}", place="path", cure="export it again"
            ) from error

    inputs = (Port("input", sizes, np.dtype(np.float32)),)
    return Session(str(path), "LiteRT", inputs, ("logits",), compute, threads=threads)


def words(path: str | Path) -> dict[str, str]:
    """Returns the words in the file."""
    require("ai_edge_litert", install=INSTALL)
    from ai_edge_litert import schema_py_generated as schema

    file = schema.ModelT.InitFromPackedBuf(Path(path).read_bytes(), 0)
    found = {entry.name.decode(): file.buffers[entry.buffer].data for entry in file.metadata or []}
    return {name: bytes(bytearray(data)).decode(errors="replace") for name, data in found.items()}


def _onto_grid(x: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    scale, zero = details["quantization"]
    if not scale:
        return np.ascontiguousarray(x, np.float32)
    codes: np.ndarray = np.clip(np.round(x / np.float32(scale)) + zero, -128, 127)
    return codes.astype(np.int8)


def _off_grid(x: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    scale, zero = details["quantization"]
    return (x.astype(np.float32) - np.float32(zero)) * np.float32(scale) if scale else x
