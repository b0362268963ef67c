"""What the runtimes of phones share: a graph for one example, rounded to int8, in the form that they fuse."""

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

from fedpress.deploy.artifact import Job
from fedpress.deploy.capture import capture, silence
from fedpress.deploy.qdq import IntegerFormat, quantized_program
from fedpress.errors import ExportError
from fedpress.nn.quantized import quantized_layers

aten = torch.ops.aten


@dataclass
class DeviceGraph:
    """A graph on its way into a file.

    Attributes:
        graph: what is lowered; its weights may still be changed.
        left: module -> why it computes in float, or why its weights take more room than their bits.
        rounded: the program in torch that says what comes out; None for a model without any rounding.
        integer: whether activations are rounded too.
        rounds: whether some are, if only the inputs of layers that the quantize stage has put on grids.
    """

    graph: fx.GraphModule
    left: dict[str, str] = field(default_factory=dict)
    rounded: torch.export.ExportedProgram | None = None
    integer: bool = False
    rounds: bool = False

    def program(self, input_shape: tuple[int, ...]) -> torch.export.ExportedProgram:
        """Returns the graph for one example of `input_shape`."""
        with silence(), torch.no_grad():
            return torch.export.export(self.graph, (torch.zeros(1, *input_shape),), strict=False)


def device_graph(
    model: nn.Module, job: Job, format: str, *, four_bit_shift: int = 0
) -> DeviceGraph:
    """Captures `model`, rounded to int8 if `job` has batches to take ranges from.

    Args:
        model: takes one float32 tensor.
        job: what is asked.
        format: what the file is called in errors.
        four_bit_shift: of its kernels (see `IntegerFormat`).

    Raises:
        ExportError: if the model cannot be captured, or a calibration batch does not fit or is not finite.
    """
    shape = job.one_shape(format)
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
        found = DeviceGraph(graph, dict(made.left), made.program, bool(job.batches), made.rounds)
    else:
        with silence():
            plain = capture(model, shape).module(check_guards=False)
        assert isinstance(plain, fx.GraphModule)
        found = DeviceGraph(plain)
    outputs = next(len(n.all_input_nodes) for n in found.graph.graph.nodes if n.op == "output")
    if outputs != 1:
        raise ExportError(
            f"the model returns {outputs} tensors",
            place="model",
            cure="its forward must return the logits alone",
        )
    _keep_spatial_means_(found.graph)
    return found


def _keep_spatial_means_(graph: fx.GraphModule) -> None:
    """Writes a mean over height and width as runtimes know it: with the two dimensions kept, then dropped.

    On integers both steps are rounded to the same grid, which changes no value.
    """
    ops = torch.ops.quantized_decomposed
    for node in [n for n in graph.graph.nodes if n.target is aten.mean.dim]:
        source, dims, *keep = node.args
        value = source.meta.get("val")
        if (
            value is None
            or value.dim() != 4
            or any(keep)
            or node.kwargs
            or {d % 4 for d in dims} != {2, 3}
        ):
            continue
        with graph.graph.inserting_before(node):
            kept = graph.graph.call_function(aten.mean.dim, (source, [-1, -2], True))
            for rounding in [u for u in node.users if u.target is ops.quantize_per_tensor.default][
                :1
            ]:
                codes = graph.graph.call_function(
                    ops.quantize_per_tensor.default, (kept, *rounding.args[1:])
                )
                kept = graph.graph.call_function(
                    ops.dequantize_per_tensor.default, (codes, *rounding.args[1:])
                )
            flat = graph.graph.call_function(aten.view.default, (kept, [-1, value.shape[1]]))
        node.replace_all_uses_with(flat)
        graph.graph.erase_node(node)
    graph.recompile()


def read_alone_(graph: fx.GraphModule) -> None:
    """Gives every reader of a rounded value a dequantization of its own, so that any of them can be taken out."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default:
            for user in list(node.users)[1:]:
                with graph.graph.inserting_after(node):
                    user.replace_input_with(node, graph.graph.node_copy(node))
    graph.recompile()


def small_weights(graph: fx.GraphModule, *, groups: bool = False) -> Iterator[tuple[str, fx.Node]]:
    """Yields module name and operation of every weight that is codes times scales; `groups`: several per channel."""
    ops = torch.ops.quantized_decomposed
    wanted = (
        ops.dequantize_per_channel_group.default if groups else ops.dequantize_per_channel.default
    )
    for node in list(graph.graph.nodes):
        if node.target is wanted:
            yield str(node.args[0].target).rpartition(".")[0], node


def unquantize_(graph: fx.GraphModule, node: fx.Node) -> None:
    """Puts the float weight in the place of the operation `node` on codes and scales."""
    arguments = [held(graph, a) if isinstance(a, fx.Node) else a for a in node.args]
    target: Any = node.target
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


def held(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """Returns the tensor that the constant `node` of `graph` stands for."""
    owner, _, key = str(node.target).rpartition(".")
    found: Tensor = getattr(graph.get_submodule(owner), key)
    return found.detach()


@contextlib.contextmanager
def hush() -> Iterator[Callable[[], str]]:
    """Takes what runtimes print, also from C++, off the terminal, and gives a function that returns it."""
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(tempfile.TemporaryFile())
        text = stack.enter_context(os.fdopen(os.dup(taken.fileno()), "w", buffering=1))
        for at, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            kept = os.dup(at)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, at)
            os.dup2(taken.fileno(), at)
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(text))
        yield lambda: os.pread(taken.fileno(), 1 << 20, 0).decode(errors="replace")


def said(error: BaseException) -> str:
    """Returns the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [
        line for line in lines if not line.startswith("Exception from")
    ]  # a place in OpenVINO's sources
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
