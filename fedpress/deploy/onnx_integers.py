"""An exported graph takes the form in which onnxruntime finds its integer kernels, and holds codes in few bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

SMALL = (("INT2", 2, 25), ("INT4", 4, 21))
"""Types for codes of few bits: name, bits, and the first opset that has it."""


QUAD = 4  # bytes that one instruction multiplies and adds up
NARROW = 63  # 2 * 255 * 63 < 2^15: two products of such codes with bytes add up in 16 bits


def make_integer_(proto: Any, fewest_bits: int = 2) -> bool:
    """Rewrites `proto` (an ONNX ModelProto with quantize and dequantize nodes) in place; its values stay the same.

    The channels of images are filled up to four. Biases become int32 on the grid of the products, as the integer
    kernels add them. Means over the whole image become GlobalAveragePool, for which there is a kernel; weights that are
    turned for a matrix product are turned here. Weights that float arithmetic reads are written as a product, which
    onnxruntime computes once when it loads the file; a dequantized constant it would make anew on each run. Codes that
    fit are stored as INT4 or INT2 behind a Cast, which it computes once too: so 4-bit and ternary weights make the file
    small and still run on 8-bit kernels.

    Args:
        proto: the model.
        fewest_bits: 4 for a reader that does not know INT2.

    Returns:
        Whether integer kernels read weights beyond 7 bits, which processors that add products in 16 bits get wrong.
    """
    graph = _Graph(proto.graph)
    _pool_means_(graph)
    _transpose_codes_(graph)
    _round_biases_(graph)
    _fill_input_channels_(graph)
    wide = _multiply_out_(graph)
    _part_shared_codes_(graph)
    _keep_float_weights_(graph)
    bits, opset = _shrink_codes_(graph, fewest_bits)
    graph.write_()
    if bits:
        proto.opset_import[0].version = max(proto.opset_import[0].version, opset)
        proto.ir_version = max(proto.ir_version, 13 if opset >= 25 else 10)
    return wide


class _Graph:
    """The nodes and constants of a graph, with who makes and who reads each value."""

    def __init__(self, proto: Any) -> None:
        import onnx

        self.onnx, self.proto = onnx, proto
        self.inputs = {value.name for value in proto.input}
        self.nodes = list(proto.node)
        self.constants = {t.name: t for t in proto.initializer}
        self.makers = {name: n for n in self.nodes for name in n.output}
        self.reads = Counter(name for n in self.nodes for name in n.input)
        self.reads.update(value.name for value in proto.output)

    def readers(self, name: str) -> Iterator[Any]:
        return (n for n in self.nodes if name in n.input)

    def made_by(self, name: str, op: str) -> Any | None:
        node = self.makers.get(name)
        return node if node is not None and node.op_type == op else None

    def of_type(self, *ops: str) -> list[Any]:
        """The nodes of some types as they are now: what is put in meanwhile is not among them."""
        return [n for n in self.nodes if n.op_type in ops]

    def dequantized(self, name: str) -> Any | None:
        return self.made_by(name, "DequantizeLinear")

    def array(self, name: str) -> np.ndarray | None:
        return (
            self.onnx.numpy_helper.to_array(self.constants[name])
            if name in self.constants
            else None
        )

    def add(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(value, name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return self.onnx.helper.make_node(op, inputs, [output], **attributes)

    def put(self, old: Any, new: list[Any]) -> None:
        """Puts nodes in the place of one."""
        at = next(i for i, n in enumerate(self.nodes) if n is old)
        self.nodes[at : at + 1] = new
        self.makers.update({name: n for n in new for name in n.output})

    def write_(self) -> None:
        read = {name for n in self.nodes for name in n.input} | {v.name for v in self.proto.output}
        del self.proto.node[:], self.proto.initializer[:]
        for node in self.nodes:
            node.name = ""
        del self.proto.value_info[:]  # shapes that the runtime infers
        self.proto.node.extend(self.nodes)
        self.proto.initializer.extend(t for name, t in self.constants.items() if name in read)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _pool_means_(graph: _Graph) -> None:
    """Dequantize -> ReduceMean over all places -> quantize becomes dequantize -> GlobalAveragePool -> quantize."""
    for mean in [n for n in graph.of_type("ReduceMean") if len(n.input) == 2]:
        axes = graph.array(mean.input[1])
        readers = [*graph.readers(mean.output[0])]
        rounded = (
            readers[0] if len(readers) == 1 and readers[0].op_type == "QuantizeLinear" else None
        )
        known = axes is not None and sorted(axes.tolist()) in ([2, 3], [-2, -1])
        if rounded is None or not known or graph.dequantized(mean.input[0]) is None:
            continue
        if axes is not None and min(axes.tolist()) < 0 and not _attribute(mean, "keepdims", 1):
            continue
        out, codes = mean.output[0], rounded.output[0]
        graph.put(mean, [graph.node("GlobalAveragePool", [mean.input[0]], out)])
        if not _attribute(
            mean, "keepdims", 1
        ):  # the codes are flattened: between pool and rounding it would hinder
            wide = graph.node("QuantizeLinear", [out, *rounded.input[1:]], codes + "_wide")
            graph.put(rounded, [wide, graph.node("Flatten", [codes + "_wide"], codes)])


def _part_shared_codes_(graph: _Graph) -> None:
    """Gives each reader of 8-bit weights codes of its own where layers share them.

    On processors without VNNI onnxruntime 1.32 moves such codes from int8 to uint8, once for each
    reader, and refuses to load the file when it meets the same ones again.
    """
    for made in graph.of_type("DequantizeLinear"):
        codes = graph.array(made.input[0])
        if codes is None or codes.dtype != np.int8 or not _is_wide(codes):
            continue
        for number, reader in enumerate([*graph.readers(made.output[0])][1:], start=2):
            codes_name, scale_name, *zeros_name = made.input
            inputs = [graph.add(f"{codes_name}_{number}", codes), scale_name]
            for name in zeros_name:  # moved too
                zeros = graph.array(name)
                assert zeros is not None, "zero points of weights are constants"
                inputs.append(graph.add(f"{name}_{number}", zeros))
            own = graph.node("DequantizeLinear", inputs, f"{made.output[0]}_{number}")
            own.attribute.extend(made.attribute)
            for at, name in enumerate(reader.input):
                if name == made.output[0]:
                    reader.input[at] = own.output[0]
            graph.put(made, [made, own])


def _transpose_codes_(graph: _Graph) -> None:
    """Turns codes: dequantize -> Transpose of a weight [out, in] becomes dequantize of the codes [in, out]."""
    for turn in graph.of_type("Transpose"):
        made = graph.dequantized(turn.input[0])
        codes = graph.array(made.input[0]) if made is not None else None
        if (
            made is None
            or codes is None
            or codes.ndim != 2
            or _is_blocked(made)
            or graph.reads[made.input[0]] > 1
        ):
            continue
        held = graph.add(f"{made.input[0]}_turned", np.ascontiguousarray(codes.T))
        axis = 1 - _attribute(made, "axis", 1)
        graph.put(
            turn,
            [graph.node("DequantizeLinear", [held, *made.input[1:]], turn.output[0], axis=axis)],
        )
        graph.nodes.remove(made)


def _round_biases_(graph: _Graph) -> None:
    """The float bias of a Gemm becomes int32; of a Conv onnxruntime does that itself."""
    for gemm in [n for n in graph.of_type("Gemm") if len(n.input) == 3]:
        x, w = (graph.dequantized(name) for name in gemm.input[:2])
        bias = graph.array(gemm.input[2])
        if x is None or w is None or bias is None or _is_blocked(w):
            continue
        steps = [graph.array(n.input[1]) for n in (x, w)]
        if steps[0] is None or steps[1] is None:
            continue
        scale = np.broadcast_to((steps[0] * steps[1]).astype(np.float32), bias.shape).copy()
        codes = np.round(bias.astype(np.float64) / scale)
        if np.abs(codes).max(initial=0) >= 2**31:
            continue
        name = gemm.input[2]
        held, step = (
            graph.add(f"{name}_codes", codes.astype(np.int32)),
            graph.add(f"{name}_scale", scale),
        )
        made = graph.node("DequantizeLinear", [held, step], f"{name}_{gemm.output[0]}", axis=0)
        gemm.input[2] = made.output[0]
        graph.put(gemm, [made, gemm])


def _fill_input_channels_(graph: _Graph) -> None:
    """Gives the first convolution four input channels where it has one to three, as images do: the new ones are 0.

    onnxruntime's kernels multiply four bytes at once, and copy every patch where the channels do not come in fours:
    the first layer of a ResNet-18 takes 38 us, and filled up 22 us and 3 us for the filling (AVX-512 with VNNI).
    """
    for conv in graph.of_type("Conv"):
        codes = _codes_on_an_image(graph, conv)
        if codes is None or not 1 <= codes.shape[1] < QUAD:
            continue
        x, w = (graph.makers[name] for name in conv.input[:2])
        more = QUAD - codes.shape[1]
        wide = np.pad(codes, [(0, 0), (0, more), (0, 0), (0, 0)])
        w.input[0] = graph.add(f"{w.input[0]}_filled", np.ascontiguousarray(wide))
        sizes = graph.add(f"{x.input[0]}_sizes", np.array([0, 0, 0, 0, 0, more, 0, 0], np.int64))
        filled = f"{x.input[0]}_filled"
        at = next(i for i, n in enumerate(graph.nodes) if n is x)
        graph.nodes.insert(at, graph.node("Pad", [x.input[0], sizes, x.input[2]], filled))
        x.input[0] = filled


def _codes_on_an_image(graph: _Graph, conv: Any) -> np.ndarray | None:
    """Returns the codes [out, in, height, width] of a convolution that alone reads a rounded input of the graph."""
    x, w = (graph.dequantized(name) for name in conv.input[:2])
    if x is None or w is None or _is_blocked(w) or _attribute(conv, "group", 1) != 1:
        return None
    if graph.reads[x.output[0]] > 1 or graph.reads[w.output[0]] > 1:
        return None
    rounded = graph.made_by(x.input[0], "QuantizeLinear")
    if rounded is None or rounded.input[0] not in graph.inputs:
        return None
    codes = graph.array(w.input[0])
    return codes if codes is not None and codes.ndim == 4 else None


def _is_blocked(node: Any) -> bool:
    return _attribute(node, "block_size", 0) > 0


def _is_wide(codes: np.ndarray) -> bool:
    """Whether int8 codes go beyond 7 bits, so that products of them may overflow 16 bits."""
    return bool(np.abs(codes.astype(np.int16)).max(initial=0) > NARROW)


def _multiply_out_(graph: _Graph) -> bool:
    """The weight of a layer whose input is float: Cast, Mul; of the others, says whether one is wide."""
    wide = False
    for made in graph.of_type("DequantizeLinear"):
        codes, scales = (graph.array(name) for name in made.input[:2])
        if codes is None or scales is None or codes.dtype != np.int8:
            continue
        readers = graph.readers(made.output[0])
        layers = [n for n in readers if n.op_type in ("Conv", "Gemm", "MatMul")]
        integer = any(graph.dequantized(n.input[0]) for n in layers)
        if _is_blocked(made) or not integer:
            graph.put(made, _product(graph, made, codes, scales))
            continue
        del made.input[2:]  # zero points of zeros
        far = _is_wide(codes)
        if far or any(n.op_type != "Conv" for n in layers):
            # onnxruntime's way round the overflow, and its QGemm, need zero points, of each weight its own.
            made.input.append(graph.add(f"{made.input[0]}_0", np.zeros(scales.shape, np.int8)))
        wide |= far
    return wide


def _product(graph: _Graph, made: Any, codes: np.ndarray, scales: np.ndarray) -> list[Any]:
    """Returns the nodes that compute a dequantized weight as a product: Cast, Mul and, of groups, Reshape."""
    name, block = made.output[0], _attribute(made, "block_size", 0)
    if block:
        steps = graph.add(f"{name}_step", scales[:, :, None])
        codes = codes.reshape([len(codes), -1, block])
    else:
        axis = _attribute(made, "axis", 1)
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        steps = graph.add(f"{name}_step", scales.reshape(shape))
    held = graph.add(made.input[0], np.ascontiguousarray(codes))
    product = f"{name}_grouped" if block else name
    nodes = [
        graph.node("Cast", [held], f"{name}_float", to=graph.onnx.TensorProto.FLOAT),
        graph.node("Mul", [f"{name}_float", steps], product),
    ]
    if block:
        rows = graph.add(f"{name}_shape", np.array([len(codes), -1], np.int64))
        nodes.append(graph.node("Reshape", [product, rows], name))
    return nodes


def _keep_float_weights_(graph: _Graph) -> None:
    """Dequantizes the inputs of layers with float weights by one number for each channel, all of them the same.

    Behind a dequantization by one number for the whole tensor onnxruntime takes a layer for an integer one, and rounds
    its float weights to bytes of one scale (its `WeightBiasQuantization`): those of transposed convolutions, groups and
    codebooks would be others than in the model.
    """
    sizes = {v.name: v.type.tensor_type.shape.dim for v in graph.proto.value_info}
    for layer in graph.of_type("Conv", "ConvTranspose", "Gemm"):
        made = graph.dequantized(layer.input[0])
        if made is None or graph.dequantized(layer.input[1]) is not None:
            continue
        step, zero = (graph.array(name) for name in made.input[1:3])
        if step is None or zero is None or step.size > 1:
            continue
        channels = sizes[made.output[0]][1].dim_value
        parts = [
            graph.add(f"{name}_{channels}", np.full(channels, value.reshape(-1)[0], value.dtype))
            for name, value in zip(made.input[1:3], (step, zero), strict=True)
        ]
        name = f"{made.output[0]}_channels"
        if name not in graph.makers:
            graph.put(
                made, [made, graph.node("DequantizeLinear", [made.input[0], *parts], name, axis=1)]
            )
        layer.input[0] = name


def _shrink_codes_(graph: _Graph, fewest: int) -> tuple[int, int]:
    """Stores int8 codes that fit in 2 or 4 bits so; returns the fewest bits and the opset that all need, or zeros."""
    used: list[tuple[int, int]] = []
    casts = []
    kinds = [row for row in SMALL if row[1] >= fewest]
    read = {n.input[0] for n in graph.of_type("DequantizeLinear", "Cast")}
    for name, tensor in [*graph.constants.items()]:
        if tensor.data_type != graph.onnx.TensorProto.INT8 or name not in read:
            continue
        codes = graph.onnx.numpy_helper.to_array(tensor)
        fits = [row for row in kinds if _fits(codes, row[1])]
        if not fits or codes.size < 16:
            continue
        kind, bits, opset = fits[0]
        small = graph.onnx.TensorProto(
            name=f"{name}_int{bits}", dims=tensor.dims, data_type=getattr(graph.onnx.TensorProto, kind),
            raw_data=packed(codes, bits),
        )  # fmt: skip
        del graph.constants[name]
        graph.constants[small.name] = small
        casts.append(graph.node("Cast", [small.name], name, to=graph.onnx.TensorProto.INT8))
        used.append((bits, opset))
    graph.nodes[:0] = casts
    if not used:
        return 0, 0
    return min(bits for bits, _ in used), max(opset for _, opset in used)


def _fits(codes: np.ndarray, bits: int) -> bool:
    """Whether whole numbers lie within -2^(bits - 1) and 2^(bits - 1) - 1."""
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    limit = 1 << (bits - 1)
    return -limit <= low and high < limit


def packed(codes: np.ndarray, bits: int) -> bytes:
    """Packs whole numbers into `bits` (2 or 4) each, the first in the lowest bits, as ONNX does.

    >>> packed(np.array([1, -1, 0], np.int8), 4).hex()
    'f100'
    """
    each = 8 // bits
    flat = codes.reshape(-1).astype(np.int8).view(np.uint8) & (2**bits - 1)
    flat = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    joined: np.ndarray = np.bitwise_or.reduce(flat << shifts, axis=1)
    return joined.astype(np.uint8).tobytes()
