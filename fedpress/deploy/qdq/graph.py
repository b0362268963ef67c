"""A captured graph while it is rewritten: its tensors, and the operations that quantize and dequantize."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Activations = Literal["uint8", "int8"]
aten = torch.ops.aten


@dataclass(frozen=True)
class IntegerFormat:
    """What the integers of a runtime are like.

    Attributes:
        activations: "uint8" (onnxruntime) or "int8" (XNNPACK, LiteRT); the values are the same.
        weight_bits: 7 where the processor adds products of bytes in 16 bits (AVX2 without VNNI), which may overflow.
        float_output: whether the output of a linear layer or matrix product stays unrounded where no integer
            operation reads it.
        four_bit_shift: by how many bits kernels shift codes of four bits up, and the int32 bias with them.
    """

    activations: Activations = "uint8"
    weight_bits: Literal[7, 8] = 8
    float_output: bool = False
    four_bit_shift: int = 0


@dataclass(frozen=True)
class QParams:
    """Quantization parameters of one tensor: values (code - zero_point) * scale with codes in low..high."""

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, scale: float, zero_point: int, highest: int, activations: Activations) -> QParams:
        """Moves codes 0..highest to -128..highest-128 where a runtime wants int8: the values stay the same."""
        shift = 0 if activations == "uint8" else 128
        return cls(scale, zero_point - shift, -shift, highest - shift)


@dataclass
class LayerQuantization:
    """What a layer brings along: whole numbers and scales of its weight, and how its input is quantized.

    Attributes:
        codes: of the weight; None where it has none.
        scales: of the weight.
        group: how many codes share a scale; None: an output channel.
        axis: of the codes, along which scales go.
        inputs: of its input; None where that is not fixed.
        reason: why it does not compute on integers, if it cannot.
    """

    codes: Tensor | None = None
    scales: Tensor | None = None
    group: int | None = None
    axis: int = 0
    inputs: QParams | None = None
    reason: str = ""


@dataclass
class Rewrite:
    """A graph while it is rewritten.

    Attributes:
        module: of the graph.
        layers: by the name of the weight.
        format: of the runtime's integers.
        integer: whether values are rounded too, and not weights alone.
        left: what computes in float -> the reason.
    """

    module: fx.GraphModule
    layers: dict[str, LayerQuantization]
    format: IntegerFormat
    integer: bool
    left: dict[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    def tensor(self, node: fx.Node) -> Tensor:
        """Returns the parameter or buffer that `node` gets."""
        owner, _, key = str(node.target).rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(owner), key)
        return found.detach()

    def set_(self, name: str, value: Tensor) -> None:
        """Gives a parameter another value."""
        owner, _, key = name.rpartition(".")
        setattr(self.module.get_submodule(owner), key, nn.Parameter(value, requires_grad=False))

    def add_(self, name: str, value: Tensor) -> str:
        """Adds a buffer; returns its name."""
        owner, _, key = name.rpartition(".")
        self.module.get_submodule(owner).register_buffer(key, value)
        return name

    def round_(self, value: fx.Node, qparams: QParams) -> None:
        """Lets everybody read `value` rounded."""
        with self.graph.inserting_after(value):
            rounded, back = self.quantize_dequantize(value, qparams)
        value.replace_all_uses_with(back, delete_user_cb=lambda user: user is not rounded)

    def round_input_(self, node: fx.Node, value: fx.Node, qparams: QParams) -> None:
        """Lets `node` alone read `value` rounded."""
        with self.graph.inserting_before(node):
            node.replace_input_with(value, self.quantize_dequantize(value, qparams)[1])

    def quantize_dequantize(self, value: fx.Node, qparams: QParams) -> tuple[fx.Node, fx.Node]:
        """Writes the two operations that round `value`."""
        ops = torch.ops.quantized_decomposed
        dtype = torch.uint8 if self.format.activations == "uint8" else torch.int8
        settings = (qparams.scale, qparams.zero_point, qparams.low, qparams.high, dtype)
        rounded = self.graph.call_function(ops.quantize_per_tensor.default, (value, *settings))
        back = self.graph.create_node(
            "call_function", ops.dequantize_per_tensor.default, (rounded, *settings)
        )
        rounded.append(back)
        return rounded, back

    def dequantize_weight(self, weight: fx.Node, layer: LayerQuantization) -> fx.Node:
        """Writes codes and scales as buffers beside the weight, and the operation that makes the weight of them."""
        assert layer.codes is not None
        assert layer.scales is not None
        ops, graph, name = torch.ops.quantized_decomposed, self.graph, str(weight.target)
        codes, row = layer.codes, layer.codes[0].numel()
        if layer.group is not None:
            codes = F.pad(codes.reshape(len(codes), -1), (0, -row % layer.group))
        with graph.inserting_after(weight):
            held = graph.get_attr(self.add_(name + "_codes", codes.contiguous()))
        zeros = torch.zeros(layer.scales.shape, dtype=torch.int64)
        with graph.inserting_after(held):
            scales = graph.get_attr(self.add_(name + "_scales", layer.scales.contiguous()))
        with graph.inserting_after(scales):
            zero = graph.get_attr(self.add_(name + "_zeros", zeros))
        with graph.inserting_after(zero):
            if layer.group is None:
                settings: tuple[Any, ...] = (layer.axis, -127, 127, torch.int8)
                return graph.call_function(
                    ops.dequantize_per_channel.default, (held, scales, zero, *settings)
                )
            settings = (-127, 127, torch.int8, layer.group, torch.float32)
            made = graph.call_function(
                ops.dequantize_per_channel_group.default, (held, scales, zero, *settings)
            )
        if row % layer.group:
            with graph.inserting_after(made):
                made = graph.call_function(aten.slice.Tensor, (made, 1, 0, row))
        with graph.inserting_after(made):
            return graph.call_function(aten.view.default, (made, list(layer.codes.shape)))

    def tidy_(self) -> None:
        """Drops tensors that nothing reads any more: the artifact must not hold a weight twice."""
        self.graph.eliminate_dead_code()
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for name, _ in [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]:
            if name not in used:
                owner, _, key = name.rpartition(".")
                delattr(self.module.get_submodule(owner), key)
        self.module.recompile()


def argument(node: fx.Node, position: int) -> fx.Node:
    """Returns the operation or tensor that an argument is."""
    found = node.args[position]
    assert isinstance(found, fx.Node)
    return found


def before_rounding(node: fx.Node) -> fx.Node:
    """Looks through a rounding at the value that it rounds."""
    if node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default:
        return argument(argument(node, 0), 0)
    return node


def layer_of(tensor: str) -> str:
    """Returns the name of the layer whose weight this is."""
    return tensor.rpartition(".")[0]


def module_of(node: fx.Node) -> str:
    """Names the module in whose forward `node` stands; of a layer, the layer."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(name) for name, _ in reversed(list(stack.values())) if name), "")
    return path or node.name
