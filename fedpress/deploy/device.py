"""Captures a model for ExecuTorch and LiteRT: a graph for one example, float or int8."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_leaves, tree_structure

from fedpress.deploy.artifact import Job
from fedpress.deploy.capture import capture, silence
from fedpress.deploy.outputs import NamedOutputs
from fedpress.deploy.qdq import IntegerFormat, quantized_program
from fedpress.nn.quantized import quantized_layers

aten = torch.ops.aten


@dataclass
class DeviceGraph:
    """A captured graph that a runtime's exporter will lower into a file.

    Attributes:
        graph: the graph to lower; its weights may still be changed.
        left_float: module -> why it computes in float, or why its weights are stored in more bits
            than they need.
        rounded: the quantized program in torch, whose outputs the file must reproduce; None for a
            model without any quantization.
        integer: whether activations are quantized, with ranges from calibration batches.
        rounds: whether any activation is rounded. This can be so without calibration, if layers of
            the model have quantized inputs.
        outputs: names and structure of the model's outputs. The graph returns a tuple of them.
    """

    graph: fx.GraphModule
    left_float: dict[str, str] = field(default_factory=dict)
    rounded: torch.export.ExportedProgram | None = None
    integer: bool = False
    rounds: bool = False
    outputs: NamedOutputs = field(default_factory=NamedOutputs)

    def program(self, input_shape: tuple[int, ...]) -> torch.export.ExportedProgram:
        """Returns the graph for one example of `input_shape`."""
        with silence(), torch.no_grad():
            return torch.export.export(self.graph, (torch.zeros(1, *input_shape),), strict=False)


def device_graph(
    model: nn.Module, job: Job, format: str, *, four_bit_shift: int = 0
) -> DeviceGraph:
    """Captures `model`, quantized to int8 if `job` has calibration batches.

    Args:
        model: takes one float32 tensor.
        job: the settings of the export.
        format: name of the file format in errors.
        four_bit_shift: number of bits by which the runtime's kernels shift 4-bit weights (see
            `IntegerFormat`).

    Raises:
        ExportError: if the model cannot be captured, takes anything but one float32 tensor, or
            returns no tensor; or if a calibration batch does not fit or is not finite.
    """
    shape = job.one_shape(format)
    outputs = NamedOutputs.of_model(model, shape)
    if job.batches or any(True for _ in quantized_layers(model)):
        made = quantized_program(
            model,
            shape,
            job.batches,
            observer=job.observer,
            format=IntegerFormat(
                "int8", weight_bits=job.weight_bits, four_bit_shift=four_bit_shift
            ),
        )
        graph = made.program.module(check_guards=False)
        assert isinstance(graph, fx.GraphModule)
        found = DeviceGraph(
            graph, dict(made.left_float), made.program, bool(job.batches), made.rounds
        )
    else:
        with silence():
            plain = capture(model, shape).module(check_guards=False)
        assert isinstance(plain, fx.GraphModule)
        found = DeviceGraph(plain)
    found.outputs = outputs
    _return_tensors_alone_(found.graph)
    _keep_spatial_means_(found.graph)
    return found


def _return_tensors_alone_(graph: fx.GraphModule) -> None:
    """Makes the graph return its tensors in a tuple; a None is left out, which runtimes lack."""
    output = graph.graph.output_node()
    tensors = tuple(node for node in tree_leaves(output.args[0]) if isinstance(node, fx.Node))
    # One tensor is returned as it is.
    output.args = (tensors if len(tensors) > 1 else tensors[0],)
    codegen = graph.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        form = tree_structure(tuple(tensors) if len(tensors) > 1 else 0)
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=form)
    graph.recompile()


def _keep_spatial_means_(graph: fx.GraphModule) -> None:
    """Replaces `mean([2, 3])` by `mean([2, 3], keepdim=True)` and a view.

    With keepdim the runtimes can use a pooling kernel for the mean. In a quantized graph, the
    rounding after the old mean is repeated between the new mean and the view, so no value changes.
    """
    ops = torch.ops.quantized_decomposed
    for node in list(graph.graph.nodes):
        if not _is_spatial_mean(node):
            continue
        source = node.args[0]
        channels = source.meta["val"].shape[1]
        # If the old mean is rounded, the new mean is rounded in the same way, before the view.
        roundings = [u for u in node.users if u.target is ops.quantize_per_tensor.default]
        with graph.graph.inserting_before(node):
            kept = graph.graph.call_function(aten.mean.dim, (source, [-1, -2], True))
            if roundings:
                settings = roundings[0].args[1:]
                codes = graph.graph.call_function(
                    ops.quantize_per_tensor.default, (kept, *settings)
                )
                kept = graph.graph.call_function(
                    ops.dequantize_per_tensor.default, (codes, *settings)
                )
            flat = graph.graph.call_function(aten.view.default, (kept, [-1, channels]))
        node.replace_all_uses_with(flat)
        graph.graph.erase_node(node)
    graph.recompile()


def _is_spatial_mean(node: fx.Node) -> bool:
    """Whether `node` is the mean of images over height and width, without keepdim."""
    if node.target is not aten.mean.dim:
        return False
    arguments: list[Any] = list(node.args)
    source, dims, *keep = arguments
    value = source.meta.get("val")
    if value is None or value.dim() != 4:
        return False
    if any(keep) or node.kwargs:
        return False
    return {d % 4 for d in dims} == {2, 3}


def dequantize_for_each_reader_(graph: fx.GraphModule) -> None:
    """Copies a dequantization that several operations read, so that each reads its own.

    A partitioner (it selects the operations that a backend computes) can then accept one reader
    together with its dequantization, and refuse the others.
    """
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default:
            # The first reader keeps the original.
            for user in list(node.users)[1:]:
                with graph.graph.inserting_after(node):
                    user.replace_input_with(node, graph.graph.node_copy(node))
    graph.recompile()


def coded_weights(graph: fx.GraphModule, *, groups: bool = False) -> Iterator[tuple[str, fx.Node]]:
    """Yields the module's name and the dequantize operation of every weight stored as integers.

    Args:
        graph: the graph.
        groups: True yields only weights with several scales per output channel, False only
            weights with one scale per output channel.
    """
    ops = torch.ops.quantized_decomposed
    wanted = ops.dequantize_per_channel.default
    if groups:
        wanted = ops.dequantize_per_channel_group.default
    for node in list(graph.graph.nodes):
        if node.target is wanted:
            yield str(node.args[0].target).rpartition(".")[0], node


def make_float_(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replaces the dequantize operation `node` of a weight by the float weight itself."""
    arguments: list[Any] = list(node.args)
    for at, argument in enumerate(arguments):
        if isinstance(argument, fx.Node):
            arguments[at] = constant_of(graph, argument)
    target: Any = node.target
    # The weight is computed by the same operation as in the graph, so that no bit changes.
    with torch.no_grad():
        value: Tensor = target(*arguments)
    name = str(node.all_input_nodes[0].target).removesuffix("_codes") + "_float"
    owner, _, key = name.rpartition(".")
    graph.get_submodule(owner).register_buffer(key, value)
    with graph.graph.inserting_before(node):
        constant = graph.graph.get_attr(name)
    node.replace_all_uses_with(constant)
    graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def constant_of(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """Returns the parameter or buffer that the `get_attr` operation `node` reads."""
    owner, _, key = str(node.target).rpartition(".")
    found: Tensor = getattr(graph.get_submodule(owner), key)
    return found.detach()


@contextlib.contextmanager
def captured_output() -> Iterator[Callable[[], str]]:
    """Captures what runtimes print, also from C++; yields a function that returns the text so far.

    It returns at most the first MiB. C++ code writes directly to the file descriptors 1 and 2, so
    these are replaced by a temporary file, and restored at the end.
    """
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(tempfile.TemporaryFile())
        text = stack.enter_context(os.fdopen(os.dup(taken.fileno()), "w", buffering=1))
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            saved = os.dup(descriptor)
            # Callbacks run in reverse: the descriptor is restored before its copy is closed.
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, descriptor)
            os.dup2(taken.fileno(), descriptor)
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(text))
        # `pread` does not move the position at which the runtime writes.
        yield lambda: os.pread(taken.fileno(), 1 << 20, 0).decode(errors="replace")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that gives a reason; else the error's type."""
    for line in map(str.strip, str(error).splitlines()):
        # OpenVINO's messages begin with a line of its own source code.
        if line and not line.startswith("Exception from"):
            return line[:200].rstrip(".")
    return type(error).__name__
