"""A captured graph while it is quantized (`Rewrite`), and the descriptions of quantization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Activations = Literal["uint8", "int8"]
"""Integer type of quantized activations."""
aten = torch.ops.aten


@dataclass(frozen=True)
class IntegerFormat:
    """The integers that a runtime computes with.

    Attributes:
        activations: "uint8" (onnxruntime) or "int8" (XNNPACK, LiteRT). Both represent the same
            values; the zero points differ by 128.
        weight_bits: bits to which float weights are quantized. 7 where the processor sums 8-bit
            products in 16 bits (x86 without VNNI), which overflows with 8.
        float_output: whether the output of a linear layer or matrix product is float if no integer
            operation reads it.
        four_bit_shift: number of bits by which kernels shift 4-bit weights and the int32 bias to
            the left. So the bias may use this many bits fewer.
    """

    activations: Activations = "uint8"
    weight_bits: Literal[7, 8] = 8
    float_output: bool = False
    four_bit_shift: int = 0


@dataclass(frozen=True)
class QParams:
    """Quantization of one tensor: value = (code - zero_point) * scale, with codes in low..high."""

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, scale: float, zero_point: int, highest: int, activations: Activations) -> QParams:
        """Makes the parameters of uint8 codes 0..highest, shifted by -128 for int8 activations."""
        shift = 0 if activations == "uint8" else 128
        return cls(scale, zero_point - shift, -shift, highest - shift)


@dataclass
class LayerQuantization:
    """Quantization of a layer: integers and scales of its weight, and parameters of its input.

    Attributes:
        codes: int8 integers of the weight, in its shape; None if the weight is not quantized.
        scales: scales of the weight, one for each output channel or group.
        group: number of weights that share a scale; None: all weights of an output channel.
        axis: dimension of the codes to which the scales belong.
        inputs: quantization of the layer's input; None if the calibration decides it.
        reason: why the layer cannot compute on integers; empty if it can.
    """

    codes: Tensor | None = None
    scales: Tensor | None = None
    group: int | None = None
    axis: int = 0
    inputs: QParams | None = None
    reason: str = ""


@dataclass
class Rewrite:
    """A graph while it is quantized.

    Attributes:
        module: the captured module.
        layers: quantization of layers, by the name of the weight.
        format: the runtime's integers.
        integer: whether activations are quantized too, not only weights.
        left_float: module or operation that computes in float -> the reason.
    """

    module: fx.GraphModule
    layers: dict[str, LayerQuantization]
    format: IntegerFormat
    integer: bool
    left_float: dict[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    def tensor(self, node: fx.Node) -> Tensor:
        """Returns the parameter or buffer that the `get_attr` operation `node` reads."""
        owner, _, key = str(node.target).rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(owner), key)
        return found.detach()

    def set_(self, name: str, value: Tensor) -> None:
        """Replaces the parameter `name`."""
        owner, _, key = name.rpartition(".")
        setattr(self.module.get_submodule(owner), key, nn.Parameter(value, requires_grad=False))

    def add_(self, name: str, value: Tensor) -> str:
        """Adds a buffer to the captured module; returns its name."""
        owner, _, key = name.rpartition(".")
        self.module.get_submodule(owner).register_buffer(key, value)
        return name

    def round_(self, value: fx.Node, qparams: QParams) -> None:
        """Inserts a rounding (quantize and dequantize) of `value` before all its readers."""
        with self.graph.inserting_after(value):
            codes, rounded = self.quantize_dequantize(value, qparams)
        # All readers but the quantize operation itself.
        value.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not codes)

    def round_input_(self, node: fx.Node, value: fx.Node, qparams: QParams) -> None:
        """Inserts a rounding of `value` before its reader `node` only."""
        with self.graph.inserting_before(node):
            _, rounded = self.quantize_dequantize(value, qparams)
            node.replace_input_with(value, rounded)

    def quantize_dequantize(self, value: fx.Node, qparams: QParams) -> tuple[fx.Node, fx.Node]:
        """Inserts a quantize and a dequantize operation of `value`, and returns both."""
        ops = torch.ops.quantized_decomposed
        dtype = torch.uint8 if self.format.activations == "uint8" else torch.int8
        # The same settings for both operations, as exporters require.
        settings = (qparams.scale, qparams.zero_point, qparams.low, qparams.high, dtype)
        codes = self.graph.call_function(ops.quantize_per_tensor.default, (value, *settings))
        rounded = self.graph.create_node(
            "call_function", ops.dequantize_per_tensor.default, (codes, *settings)
        )
        codes.append(rounded)
        return codes, rounded

    def dequantize_weight(self, weight: fx.Node, layer: LayerQuantization) -> fx.Node:
        """Adds codes and scales as buffers, and inserts the operation that dequantizes them."""
        assert layer.codes is not None
        assert layer.scales is not None
        ops = torch.ops.quantized_decomposed
        graph = self.graph
        codes = layer.codes
        row = codes[0].numel()
        # The operation needs complete groups. The padding is removed after dequantization.
        if layer.group is not None:
            codes = F.pad(codes.reshape(len(codes), -1), (0, -row % layer.group))
        tensors = self._buffers_after(weight, codes, layer.scales)

        with graph.inserting_after(tensors[-1]):
            if layer.group is None:
                settings: tuple[Any, ...] = (layer.axis, -127, 127, torch.int8)
                return graph.call_function(
                    ops.dequantize_per_channel.default, (*tensors, *settings)
                )
            settings = (-127, 127, torch.int8, layer.group, torch.float32)
            made = graph.call_function(
                ops.dequantize_per_channel_group.default, (*tensors, *settings)
            )
        # The last group of each row was padded above.
        if row % layer.group:
            with graph.inserting_after(made):
                made = graph.call_function(aten.slice.Tensor, (made, 1, 0, row))
        with graph.inserting_after(made):
            return graph.call_function(aten.view.default, (made, list(layer.codes.shape)))

    def _buffers_after(
        self, weight: fx.Node, codes: Tensor, scales: Tensor
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Adds buffers of codes, scales and zero points; returns the operations that read them."""
        name = str(weight.target)
        # Weights are symmetric, so all zero points are 0, but the operations require them.
        zeros = torch.zeros(scales.shape, dtype=torch.int64)
        with self.graph.inserting_after(weight):
            code_node = self.graph.get_attr(self.add_(name + "_codes", codes.contiguous()))
        with self.graph.inserting_after(code_node):
            scale_node = self.graph.get_attr(self.add_(name + "_scales", scales.contiguous()))
        with self.graph.inserting_after(scale_node):
            zero_node = self.graph.get_attr(self.add_(name + "_zeros", zeros))
        return code_node, scale_node, zero_node

    def remove_unread_(self) -> None:
        """Removes tensors that nothing reads any more, such as float weights beside their codes."""
        # Operations without readers go first, because they still read tensors.
        self.graph.eliminate_dead_code()
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        names = [name for name, _ in self.module.named_parameters(remove_duplicate=False)]
        names += [name for name, _ in self.module.named_buffers(remove_duplicate=False)]
        for name in names:
            if name not in used:
                owner, _, key = name.rpartition(".")
                delattr(self.module.get_submodule(owner), key)
        self.module.recompile()


def argument(node: fx.Node, position: int) -> fx.Node:
    """Returns an argument of `node` that is an operation or tensor of the graph."""
    found = node.args[position]
    assert isinstance(found, fx.Node)
    return found


def before_rounding(node: fx.Node) -> fx.Node:
    """Returns the value that `node` rounds, or `node` itself if it does not round."""
    if node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default:
        codes = argument(node, 0)
        return argument(codes, 0)
    return node


def layer_of(tensor: str) -> str:
    """Returns the name of the layer of a parameter: "a.b" for "a.b.weight"."""
    return tensor.rpartition(".")[0]


def module_of(node: fx.Node) -> str:
    """Returns the name of the innermost module whose forward calls `node`; else the node's name."""
    stack = node.meta.get("nn_module_stack") or {}
    # The stack is ordered from the model, which has no name, to the innermost module.
    names = [str(name) for name, _ in stack.values() if name]
    return names[-1] if names else node.name
