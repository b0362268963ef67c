"""ExecuTorch: a model becomes a `.pte` file for phones and boards, its operations lowered to XNNPACK's kernels."""

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
from fedpress.deploy.capture import require, silence
from fedpress.deploy.device import (
    DeviceGraph,
    device_graph,
    hush,
    read_alone_,
    said,
    small_weights,
    unquantize_,
)
from fedpress.deploy.session import Port, Session
from fedpress.errors import ExportError

INSTALL = "'fedpress[executorch]'"
FLOAT_INSIDE = ("avg_pool2d", "bmm")  # XNNPACK takes them, but dequantizes what they read
WORDS = "fedpress"  # the method of the program that returns the file's words


def export_executorch(model: torch.nn.Module, path: str | Path, job: Job) -> Artifact:
    """Writes `model` in evaluation mode as an ExecuTorch program for batches of one; the model is left as it was.

    With batches in `job` convolutions, linear layers, sums, means and pools compute on 8-bit integers. XNNPACK has no
    convolution with 4-bit weights, so weights of fewer bits take 8; in float they take 32. What it does not take runs
    in ExecuTorch's portable kernels. All of this stands in `left`.

    Raises:
        ExportError: if the model cannot be captured or lowered, or if the file cannot be written.
    """
    with silence(), hush():
        require("executorch.exir", install=INSTALL)
    made = device_graph(model, job, "ExecuTorch")
    for groups in (True, False):
        for name, node in small_weights(made.graph, groups=groups):
            if groups or not made.integer:
                unquantize_(made.graph, node)
                made.left.setdefault(
                    name,
                    "XNNPACK has no kernel for its weights without 8-bit inputs; stored as float",
                )
    read_alone_(made.graph)
    words = job.words()
    data, outside = _lower(made, job, words)
    _try(data, job.one_shape("ExecuTorch"))
    path = Path(path)
    write(path, data)
    return Artifact(path, len(data), words, {**made.left, **outside}, made.rounded, made.rounds)


def _lower(made: DeviceGraph, job: Job, words: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    """Returns the file's bytes, and what XNNPACK left: module or operation -> reason."""
    outside: dict[str, str] = {}
    edge = _partitioned(made, job, words)
    # Codes outside of XNNPACK's parts have no kernel at all: such weights become float, and all is lowered anew.
    while stuck := _layers_left_on_codes(edge):
        for name, node in small_weights(made.graph):
            if name in stuck:
                unquantize_(made.graph, node)
                outside[name] = "XNNPACK does not take it on integers; computes in float"
        edge = _partitioned(made, job, words)
    for node in _operations_inside(edge) if made.integer else ():
        if any(f".{name}." in str(node.target) for name in FLOAT_INSIDE):
            why = "XNNPACK has no integer kernel of it; computes in float"
            outside.setdefault(_place(node), why)
    for node in _operations_outside(edge):
        outside.setdefault(_place(node), "not taken by XNNPACK; runs in a portable kernel")
    return _program_bytes(edge), outside


def _partitioned(made: DeviceGraph, job: Job, words: dict[str, str]) -> Any:
    """Returns ExecuTorch's form of the graph, in which XNNPACK has taken the parts that it can compute."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    program = made.program(job.one_shape("ExecuTorch"))
    try:
        with silence(), hush():
            return to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={WORDS: json.dumps(words)},
            )
    except Exception as error:  # passes and partitioners have no common base
        raise ExportError(
            f"ExecuTorch cannot lower the model: {said(error)}",
            place="model",
            cure="export it as onnx",
        ) from error


def _operations_outside(edge: Any) -> list[torch.fx.Node]:
    """Returns the operations that XNNPACK has not taken."""
    nodes = edge.exported_program().graph.nodes
    return [node for node in nodes if node.op == "call_function" and _computes(node)]


def _operations_inside(edge: Any) -> Iterator[torch.fx.Node]:
    """Yields the operations of the parts that XNNPACK has taken."""
    for _, part in edge.exported_program().graph_module.named_children():
        if hasattr(part, "original_module"):
            yield from part.original_module.graph.nodes


def _layers_left_on_codes(edge: Any) -> set[str]:
    """Returns the layers whose codes are read by an operation that XNNPACK has not taken."""
    buffers = edge.exported_program().graph_signature.inputs_to_buffers
    read = {a.name for node in _operations_outside(edge) for a in node.all_input_nodes}
    names = [str(buffers[name]) for name in read if name in buffers]
    return {name.rpartition(".")[0] for name in names if name.endswith("_codes")}


def _program_bytes(edge: Any) -> bytes:
    try:
        with silence(), hush():
            require("executorch.kernels.quantized", install=INSTALL)
            data: bytes = edge.to_executorch().buffer
    except Exception as error:
        raise ExportError(
            f"ExecuTorch cannot write the program: {said(error)}",
            place="model",
            cure="replace that operation, or export as onnx",
        ) from error
    return data


def _try(data: bytes, input_shape: tuple[int, ...]) -> None:
    """Runs the program once: a kernel that is missing or takes other tensors shows here alone.

    Raises:
        ExportError: naming the operation.
    """
    with silence(), hush() as printed:
        runtime = require("executorch.runtime", install=INSTALL)["executorch.runtime"]
        try:
            runtime.Runtime.get().load_program(data).load_method("forward").execute(
                [torch.zeros(1, *input_shape)]
            )
            return
        except RuntimeError as error:
            what = refused_kernel(printed()) or f"refused it: {said(error)}"
            raise ExportError(
                f"ExecuTorch has {what}",
                place="model",
                cure="replace it by operations of 1-d or 2-d images, or export as onnx",
            ) from error


def refused_kernel(printed: str) -> str | None:
    """Reads from what the runtime printed which operation it cannot run.

    >>> refused_kernel("[method.cpp:822] Missing operator: [23] aten::avg_pool2d_backward.grad_input")
    "no kernel that runs the operation 'aten::avg_pool2d_backward' of this model"
    """
    named = re.search(r"(?:in operator|Missing operator: \[\d+\]) ([\w:]+)", printed)
    return f"no kernel that runs the operation {named[1]!r} of this model" if named else None


def _computes(node: torch.fx.Node) -> bool:
    return node.target is not operator.getitem and "executorch_call_delegate" not in str(
        node.target
    )


def _place(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    module = next((str(name) for name, _ in reversed(list(stack.values())) if name), "")
    name = getattr(node.target, "_name", "") or str(node.target)
    return f"{module} ({name})" if module else name


def open_executorch(path: str | Path, threads: int = 0) -> Session:
    """Loads a program, which takes one float32 example [1, ...].

    Args:
        path: the file.
        threads: of XNNPACK's pool, which all programs of this process share; 0: one for each core.

    Raises:
        ExportError: if the file cannot be loaded; the session, if it cannot be run.
    """
    with silence(), hush():
        runtime = require("executorch.runtime", install=INSTALL)["executorch.runtime"]
        library = require("executorch.extension.pybindings.portable_lib", install=INSTALL)
    with hush():
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
                f"ExecuTorch cannot run {path}: {said(error)}",
                place="path",
                cure="export it again",
            ) from error

    compute.program = program  # type: ignore[attr-defined]  # the method reads the program's memory
    inputs = (Port("input", sizes, np.dtype(np.float32)),)
    return Session(str(path), "ExecuTorch", inputs, ("logits",), compute, threads=threads)


def load_method(runtime: Any, path: str | Path, method: str) -> tuple[Any, Any]:
    """Returns the program of a file and one of its methods.

    Raises:
        ExportError: if the file is damaged or needs a kernel that this runtime lacks.
    """
    try:
        with hush():
            program = runtime.Runtime.get().load_program(Path(path))  # every part of it is checked
            return program, program.load_method(method)
    except KeyError as error:
        raise ExportError(
            f"{path} has no method {error}", place="path", cure="export it again"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise ExportError(
            f"ExecuTorch cannot load {path}: {said(error)}", place="path", cure="export it again"
        ) from error


def words(path: str | Path) -> dict[str, str]:
    """Returns the words in the file.

    Raises:
        ExportError: if it cannot be loaded.
    """
    with silence(), hush():
        runtime = require("executorch.runtime", install=INSTALL)["executorch.runtime"]
    _program, method = load_method(runtime, path, WORDS)
    found: dict[str, str] = json.loads(method.execute([])[0])
    return found
