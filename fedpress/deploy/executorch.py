"""Exports a model as an ExecuTorch file `.pte`, lowered to XNNPACK's kernels, and runs it."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpress.deploy.artifact import Artifact, Job, write
from fedpress.deploy.capture import extra, require, silence
from fedpress.deploy.device import (
    DeviceGraph,
    captured_output,
    coded_weights,
    dequantize_for_each_reader_,
    device_graph,
    first_line,
    make_float_,
)
from fedpress.deploy.outputs import NamedOutputs
from fedpress.deploy.session import FileInput, Session
from fedpress.errors import ExportError

# Arguments of `pip install` for the package.
INSTALL = extra("executorch")
# Operations that XNNPACK accepts, but computes in float after dequantizing their inputs.
FLOAT_INSIDE = ("avg_pool2d", "bmm")
# The method of the program that returns the file's metadata, as JSON.
METADATA = "fedpress"


def export_executorch(model: torch.nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` in evaluation mode as an ExecuTorch program for batches of one.

    XNNPACK is a library of fast kernels for the processors of phones. With calibration batches in
    `job`, convolutions, linear layers, sums, means and max pools compute on 8-bit integers. XNNPACK
    has no convolution with 4-bit weights, so weights of fewer than 8 bits are stored in 8 bits.
    Weights with several scales per output channel are stored as float32; without calibration, all
    quantized weights are. Operations that XNNPACK does not support run in ExecuTorch's portable
    kernels. `left_float` of the result names every module or operation that does not compute on
    8-bit integers although the model asks for them, and those in portable kernels, with the reason.
    The model is not changed.

    Raises:
        ExportError: if the model cannot be captured or lowered, or if the file cannot be written.
    """
    with silence(), captured_output():
        require("executorch.exir", install=INSTALL)
    made = device_graph(model, job, "ExecuTorch")
    to_float = [*coded_weights(made.graph, groups=True)]
    if not made.integer:
        to_float += coded_weights(made.graph)
    for name, node in to_float:
        make_float_(made.graph, node)
        made.left_float.setdefault(
            name, "XNNPACK has no kernel for its weights without 8-bit inputs; stored as float"
        )
    dequantize_for_each_reader_(made.graph)
    metadata = job.file_metadata() | made.outputs.metadata()
    data, outside = _lower(made, job, metadata)
    _run_once(data, job.one_shape("ExecuTorch"))
    path = Path(path)
    write(path, data)
    return Artifact(
        path, len(data), metadata, {**made.left_float, **outside}, made.rounded, made.rounds
    )


def _lower(made: DeviceGraph, job: Job, metadata: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    """Lowers the graph to a file.

    Returns:
        The bytes of the file; and for each module that XNNPACK does not compute on integers, the
        reason.
    """
    outside: dict[str, str] = {}
    edge = _partitioned(made, job, metadata)
    # Outside of XNNPACK's partitions no kernel reads integer weights. Such weights are made float,
    # and the graph is lowered again. That may move further layers out of the partitions, so this
    # is repeated until no integer weights are left outside.
    while stuck := _layers_left_on_codes(edge):
        for name, node in coded_weights(made.graph):
            if name in stuck:
                make_float_(made.graph, node)
                outside[name] = "XNNPACK does not take it with integer weights; computes in float"
        edge = _partitioned(made, job, metadata)
    if made.integer:
        for node in _operations_inside(edge):
            if any(f".{name}." in str(node.target) for name in FLOAT_INSIDE):
                why = "XNNPACK has no integer kernel of it; computes in float"
                outside.setdefault(_place(node), why)
    for node in _operations_outside(edge):
        outside.setdefault(_place(node), "not taken by XNNPACK; runs in a portable kernel")
    return _program_bytes(edge), outside


def _partitioned(made: DeviceGraph, job: Job, metadata: dict[str, str]) -> Any:
    """Lowers the graph; a partitioner assigns the parts that XNNPACK can compute to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    program = made.program(job.one_shape("ExecuTorch"))
    try:
        with silence(), captured_output():
            return to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={METADATA: json.dumps(metadata)},
            )
    # Passes and partitioners raise errors of many types without a common base class.
    except Exception as error:
        raise ExportError(
            f"ExecuTorch cannot lower the model: {first_line(error)}",
            place="model",
            cure="export it as onnx",
        ) from error


def _operations_outside(edge: Any) -> list[torch.fx.Node]:
    """Returns the operations that XNNPACK does not compute."""
    nodes = edge.exported_program().graph.nodes
    return [node for node in nodes if node.op == "call_function" and _computes(node)]


def _operations_inside(edge: Any) -> Iterator[torch.fx.Node]:
    """Yields the operations that XNNPACK computes."""
    for _, part in edge.exported_program().graph_module.named_children():
        if hasattr(part, "original_module"):
            yield from part.original_module.graph.nodes


def _layers_left_on_codes(edge: Any) -> set[str]:
    """Returns the layers whose integer weights are read by an operation outside of XNNPACK."""
    buffers = edge.exported_program().graph_signature.inputs_to_buffers
    layers: set[str] = set()
    for node in _operations_outside(edge):
        for argument in node.all_input_nodes:
            buffer = str(buffers.get(argument.name, ""))
            if buffer.endswith("_codes"):
                layers.add(buffer.rpartition(".")[0])
    return layers


def _program_bytes(edge: Any) -> bytes:
    try:
        with silence(), captured_output():
            # Importing it registers the quantized kernels with the runtime.
            require("executorch.kernels.quantized", install=INSTALL)
            data: bytes = edge.to_executorch().buffer
    except Exception as error:
        raise ExportError(
            f"ExecuTorch cannot write the program: {first_line(error)}",
            place="model",
            cure="replace that operation, or export as onnx",
        ) from error
    return data


def _run_once(data: bytes, input_shape: tuple[int, ...]) -> None:
    """Runs the program once on zeros, to find missing kernels and kernels that refuse a tensor.

    Raises:
        ExportError: if the program cannot run; the error names the operation.
    """
    with silence(), captured_output() as printed:
        runtime = require("executorch.runtime", install=INSTALL)["executorch.runtime"]
        try:
            method = runtime.Runtime.get().load_program(data).load_method("forward")
            # Zeros suffice: whether a kernel exists depends on shapes and dtypes, not on values.
            method.execute([torch.zeros(1, *input_shape)])
            return
        except RuntimeError as error:
            what = refused_kernel(printed()) or f"refused it: {first_line(error)}"
            raise ExportError(
                f"ExecuTorch has {what}",
                place="model",
                cure="replace it by an operation on sequences [1, C, L] or images [1, C, H, W], "
                "or export as onnx",
            ) from error


def refused_kernel(printed: str) -> str | None:
    """Returns a description of the operation that the runtime cannot run; None if no name is found.

    The runtime's exceptions contain only an error code. The name of the operation is taken
    from `printed`, the text that the runtime has printed.

    >>> refused_kernel("[method.cpp:822] Missing operator: [23] aten::avg_pool2d_backward.out")
    "no kernel that runs the operation 'aten::avg_pool2d_backward' of this model"
    """
    named = re.search(r"(?:in operator|Missing operator: \[\d+\]) ([\w:]+)", printed)
    return f"no kernel that runs the operation {named[1]!r} of this model" if named else None


def _computes(node: torch.fx.Node) -> bool:
    if node.target is operator.getitem:
        return False
    return "executorch_call_delegate" not in str(node.target)


def _place(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    # The stack is ordered from the model, which has no name, to the innermost module.
    names = [str(name) for name, _ in stack.values() if name]
    module = names[-1] if names else ""
    name = getattr(node.target, "_name", "") or str(node.target)
    return f"{module} ({name})" if module else name


def open_executorch(path: str | Path, threads: int = 0) -> Session:
    """Loads a program, which takes one float32 example [1, ...].

    Args:
        path: the file.
        threads: size of XNNPACK's thread pool, which all programs of this process share; 0: one for
            each logical processor.

    Raises:
        ExportError: if the file cannot be loaded. The session raises the same error if the file
            cannot be run.
    """
    with silence(), captured_output():
        runtime = require("executorch.runtime", install=INSTALL)["executorch.runtime"]
        library = require("executorch.extension.pybindings.portable_lib", install=INSTALL)
    with captured_output():
        library["executorch.extension.pybindings.portable_lib"]._unsafe_reset_threadpool(
            threads or os.cpu_count() or 1
        )
    program, method = load_method(runtime, path, "forward")
    if method.metadata.num_inputs() != 1:
        raise ExportError(
            (f"{path} takes {method.metadata.num_inputs()} tensors, as a program that trains does"),
            place="path",
            cure="open it with deploy.DeviceModel",
        )
    sizes = tuple(method.metadata.input_tensor_meta(0).sizes())

    def compute(arrays: list[np.ndarray]) -> list[np.ndarray]:
        (x,) = arrays
        # The runtime's own error has only a code.
        if x.shape != sizes:
            raise ExportError(
                f"{path} takes float32 {list(sizes)}, got {list(x.shape)}",
                place="x",
                cure="give it one example",
            )
        try:
            return [out.numpy() for out in method.execute([torch.from_numpy(x)])]
        except RuntimeError as error:
            raise ExportError(
                f"ExecuTorch cannot run {path}: {first_line(error)}",
                place="path",
                cure="export it again",
            ) from error

    # The method reads the program's memory, so the function keeps a reference to the program.
    compute.program = program  # type: ignore[attr-defined]
    inputs = (FileInput("input", sizes, np.dtype(np.float32)),)
    metadata = {}
    if METADATA in program.method_names:
        metadata = json.loads(program.load_method(METADATA).execute([])[0])
    outputs = NamedOutputs.of_file(metadata, method.metadata.num_outputs())
    return Session(
        str(path),
        "ExecuTorch",
        inputs,
        outputs.names,
        compute,
        outputs.structure,
        threads,
    )


def load_method(runtime: Any, path: str | Path, method: str) -> tuple[Any, Any]:
    """Returns the program of a file and one of its methods.

    Args:
        runtime: the Python module `executorch.runtime`.
        path: the file.
        method: name of the method.

    Raises:
        ExportError: if the file is damaged, has no such method, or needs a kernel that this runtime
            lacks.
    """
    try:
        with captured_output():
            # The runtime verifies the complete file here. A damaged file could crash it later.
            program = runtime.Runtime.get().load_program(Path(path))
            return program, program.load_method(method)
    except KeyError as error:
        raise ExportError(
            f"{path} has no method {error}", place="path", cure="export it again"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise ExportError(
            f"ExecuTorch cannot load {path}: {first_line(error)}",
            place="path",
            cure="export it again",
        ) from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata in the file.

    Raises:
        ExportError: if the file cannot be loaded.
    """
    with silence(), captured_output():
        runtime = require("executorch.runtime", install=INSTALL)["executorch.runtime"]
    _program, method = load_method(runtime, path, METADATA)
    found: dict[str, str] = json.loads(method.execute([])[0])
    return found
