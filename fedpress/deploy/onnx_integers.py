"""Rewrites a quantized ONNX graph so that onnxruntime uses integer kernels and the file is small.

In this file *codes* are the integers of a quantized weight, and a DequantizeLinear node turns codes
and scales into the weight.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

SMALL_TYPES = (("INT2", 2, 25), ("INT4", 4, 21))
"""ONNX types of fewer than 8 bits: name, bits, and the first opset that has the type."""

# Integer kernels multiply and sum four 8-bit input channels in one instruction.
CHANNELS_AT_ONCE = 4
# The largest 7-bit code. 2 * 255 * 63 < 2^15: the sum of two products with a uint8 fits in int16.
NARROW = 63


def make_integer_(proto: Any, fewest_bits: int = 2) -> bool:
    """Rewrites an ONNX ModelProto with quantize and dequantize nodes, in place.

    The computed values do not change. The main steps:

    - Images with fewer than four channels are padded to four.
    - Biases become int32 with scale (input scale * weight scale), as integer kernels add them.
    - Means over the whole image become GlobalAveragePool, for which there is an integer kernel.
    - Weights that the graph transposes for a matrix product are stored transposed.
    - Weights that float operations read become a product of codes and scales. onnxruntime computes
      a product of constants once, when it loads the file. A DequantizeLinear would be computed
      in every run.
    - Codes that fit are stored as INT4 or INT2, followed by a Cast that is also computed once. So
      4-bit and ternary weights make the file small and still run on 8-bit kernels.

    Args:
        proto: the model.
        fewest_bits: 4 if the runtime cannot read INT2, else 2.

    Returns:
        Whether integer kernels read weights of more than 7 bits. Their products can overflow
        on processors that add two products in 16 bits.
    """
    graph = _Graph(proto.graph)
    _pool_means_(graph)
    _transpose_codes_(graph)
    _quantize_biases_(graph)
    _pad_input_channels_(graph)
    wide = _rewrite_weights_(graph)
    # After `_rewrite_weights_`, which adds the zero points that must be copied with the codes.
    _copy_shared_codes_(graph)
    _keep_float_weights_(graph)
    # Last, since the other steps read the codes as int8.
    bits, opset = _shrink_codes_(graph, fewest_bits)
    graph.write_()
    if bits:
        proto.opset_import[0].version = max(proto.opset_import[0].version, opset)
        # The first version of the file format (IR) with these types: 10 for INT4, 13 for INT2.
        proto.ir_version = max(proto.ir_version, 13 if opset >= 25 else 10)
    return wide


class _Graph:
    """The nodes and constants of an ONNX graph, with the producer and readers of each value."""

    def __init__(self, proto: Any) -> None:
        import onnx

        self.onnx, self.proto = onnx, proto
        self.inputs = {value.name for value in proto.input}
        self.nodes = list(proto.node)
        self.constants = {t.name: t for t in proto.initializer}
        self.makers = {name: n for n in self.nodes for name in n.output}
        self.reads = Counter(name for n in self.nodes for name in n.input)
        self.reads.update(value.name for value in proto.output)

    def readers(self, name: str) -> list[Any]:
        return [n for n in self.nodes if name in n.input]

    def made_by(self, name: str, op: str) -> Any | None:
        """Returns the node that computes a value if it is of type `op`, else None."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == op else None

    def of_type(self, *ops: str) -> list[Any]:
        """Returns the nodes of some types in a new list: callers change the graph as they loop."""
        return [n for n in self.nodes if n.op_type in ops]

    def dequantized(self, name: str) -> Any | None:
        return self.made_by(name, "DequantizeLinear")

    def array(self, name: str) -> np.ndarray | None:
        """Returns a constant by name; None if the value is computed."""
        if name not in self.constants:
            return None
        found: np.ndarray = self.onnx.numpy_helper.to_array(self.constants[name])
        return found

    def add(self, name: str, value: np.ndarray) -> str:
        """Adds a constant; returns its name."""
        self.constants[name] = self.onnx.numpy_helper.from_array(value, name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return self.onnx.helper.make_node(op, inputs, [output], **attributes)

    def replace_(self, old: Any, new: list[Any]) -> None:
        """Replaces one node by several nodes."""
        at = self.position(old)
        self.nodes[at : at + 1] = new
        for node in new:
            self.makers.update(dict.fromkeys(node.output, node))

    def position(self, node: Any) -> int:
        # By identity, because two different nodes with equal fields compare equal.
        return next(i for i, n in enumerate(self.nodes) if n is node)

    def write_(self) -> None:
        """Writes nodes and constants back into the message; drops constants that are not read."""
        read = {value.name for value in self.proto.output}
        for node in self.nodes:
            read.update(node.input)
            node.name = ""
        del self.proto.node[:], self.proto.initializer[:]
        # The stored shapes may be wrong after the changes above; the runtime infers them itself.
        del self.proto.value_info[:]
        self.proto.node.extend(self.nodes)
        self.proto.initializer.extend(t for name, t in self.constants.items() if name in read)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _pool_means_(graph: _Graph) -> None:
    """Turns each ReduceMean over height and width between dequantize and quantize into pooling."""
    for mean in graph.of_type("ReduceMean"):
        if not _is_quantized_spatial_mean(graph, mean):
            continue
        (quantize,) = graph.readers(mean.output[0])
        out, codes = mean.output[0], quantize.output[0]
        graph.replace_(mean, [graph.node("GlobalAveragePool", [mean.input[0]], out)])
        # Unlike the mean, the pool keeps both dimensions, so a Flatten is needed. It is put
        # after the quantize node: between pool and quantize it would prevent the integer kernel.
        if not _attribute(mean, "keepdims", 1):
            spatial = graph.node("QuantizeLinear", [out, *quantize.input[1:]], codes + "_wide")
            graph.replace_(quantize, [spatial, graph.node("Flatten", [codes + "_wide"], codes)])


def _is_quantized_spatial_mean(graph: _Graph, mean: Any) -> bool:
    """Returns whether a ReduceMean over height and width reads and gives quantized values."""
    axes = graph.array(mean.input[1]) if len(mean.input) == 2 else None
    if axes is None or graph.dequantized(mean.input[0]) is None:
        return False
    readers = graph.readers(mean.output[0])
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return False
    found = sorted(axes.tolist())
    if found == [-2, -1]:
        return bool(_attribute(mean, "keepdims", 1))
    return found == [2, 3]


def _copy_shared_codes_(graph: _Graph) -> None:
    """Copies 8-bit codes that several layers share, so that each layer reads its own.

    On processors without VNNI, onnxruntime 1.32 converts such codes from int8 to uint8, once for
    each reader. When it meets the same codes a second time, it refuses to load the file.
    """
    for dequantize in graph.of_type("DequantizeLinear"):
        codes = graph.array(dequantize.input[0])
        if codes is None or codes.dtype != np.int8 or not _is_wide(codes):
            continue
        for number, reader in enumerate(graph.readers(dequantize.output[0])[1:], start=2):
            codes_name, scale_name, *zero_points = dequantize.input
            inputs = [graph.add(f"{codes_name}_{number}", codes), scale_name]
            # Zero points are converted together with the codes.
            for name in zero_points:
                zeros = graph.array(name)
                assert zeros is not None, "zero points of weights are constants"
                inputs.append(graph.add(f"{name}_{number}", zeros))
            own = graph.node("DequantizeLinear", inputs, f"{dequantize.output[0]}_{number}")
            own.attribute.extend(dequantize.attribute)
            for at, name in enumerate(reader.input):
                if name == dequantize.output[0]:
                    reader.input[at] = own.output[0]
            graph.replace_(dequantize, [dequantize, own])


def _transpose_codes_(graph: _Graph) -> None:
    """Removes the Transpose of a dequantized weight; its codes [out, in] are stored transposed."""
    for transpose in graph.of_type("Transpose"):
        dequantize = graph.dequantized(transpose.input[0])
        if dequantize is None or _is_blocked(dequantize) or graph.reads[dequantize.input[0]] > 1:
            continue
        codes = graph.array(dequantize.input[0])
        if codes is None or codes.ndim != 2:
            continue
        stored = graph.add(f"{dequantize.input[0]}_turned", np.ascontiguousarray(codes.T))
        axis = 1 - _attribute(dequantize, "axis", 1)
        inputs = [stored, *dequantize.input[1:]]
        weight = graph.node("DequantizeLinear", inputs, transpose.output[0], axis=axis)
        graph.replace_(transpose, [weight])
        graph.nodes.remove(dequantize)


def _quantize_biases_(graph: _Graph) -> None:
    """Quantizes the float bias of each Gemm to int32; onnxruntime does so itself for a Conv."""
    for gemm in graph.of_type("Gemm"):
        if len(gemm.input) != 3:
            continue
        x, w = (graph.dequantized(name) for name in gemm.input[:2])
        bias = graph.array(gemm.input[2])
        if x is None or w is None or bias is None or _is_blocked(w):
            continue
        input_scale, weight_scales = graph.array(x.input[1]), graph.array(w.input[1])
        if input_scale is None or weight_scales is None:
            continue
        scales = (input_scale * weight_scales).astype(np.float32)
        scales = np.broadcast_to(scales, bias.shape).copy()
        codes = np.round(bias.astype(np.float64) / scales)
        # A bias too large for int32 stays float, and then the whole Gemm is computed in float.
        if np.abs(codes).max(initial=0) >= 2**31:
            continue
        name = gemm.input[2]
        stored = graph.add(f"{name}_codes", codes.astype(np.int32))
        steps = graph.add(f"{name}_scale", scales)
        dequantize = graph.node(
            "DequantizeLinear", [stored, steps], f"{name}_{gemm.output[0]}", axis=0
        )
        gemm.input[2] = dequantize.output[0]
        graph.replace_(gemm, [dequantize, gemm])


def _pad_input_channels_(graph: _Graph) -> None:
    """Pads the input of the first convolution with zeros from one to three channels to four.

    onnxruntime's kernels multiply four bytes at once. If the number of channels is not a multiple
    of four, they copy every patch first. The first layer of a ResNet-18 took 38 us; padded it takes
    22 us and the padding 3 us (AVX-512 with VNNI).
    """
    for conv in graph.of_type("Conv"):
        codes = _codes_on_an_image(graph, conv)
        if codes is None or not 1 <= codes.shape[1] < CHANNELS_AT_ONCE:
            continue
        x, w = (graph.makers[name] for name in conv.input[:2])
        more = CHANNELS_AT_ONCE - codes.shape[1]
        padded_codes = np.pad(codes, [(0, 0), (0, more), (0, 0), (0, 0)])
        w.input[0] = graph.add(f"{w.input[0]}_filled", np.ascontiguousarray(padded_codes))
        # How much to add before (first 4 numbers) and after (last 4) each dimension. The padded
        # value is the zero point, which stands for 0.
        sizes = graph.add(f"{x.input[0]}_sizes", np.array([0, 0, 0, 0, 0, more, 0, 0], np.int64))
        padded = f"{x.input[0]}_filled"
        pad = graph.node("Pad", [x.input[0], sizes, x.input[2]], padded)
        graph.nodes.insert(graph.position(x), pad)
        x.input[0] = padded


def _codes_on_an_image(graph: _Graph, conv: Any) -> np.ndarray | None:
    """Returns the codes [out, in, height, width] of a convolution of a quantized graph input.

    Returns None for any other convolution, and if another node reads the input or the codes.
    """
    x, w = (graph.dequantized(name) for name in conv.input[:2])
    if x is None or w is None or _is_blocked(w) or _attribute(conv, "group", 1) != 1:
        return None
    if graph.reads[x.output[0]] > 1 or graph.reads[w.output[0]] > 1:
        return None
    quantize = graph.made_by(x.input[0], "QuantizeLinear")
    if quantize is None or quantize.input[0] not in graph.inputs:
        return None
    codes = graph.array(w.input[0])
    return codes if codes is not None and codes.ndim == 4 else None


def _is_blocked(node: Any) -> bool:
    """Whether a DequantizeLinear has several scales per output channel."""
    return _attribute(node, "block_size", 0) > 0


def _is_wide(codes: np.ndarray) -> bool:
    """Whether int8 codes need more than 7 bits, so that two products may overflow int16."""
    # As int16, since the absolute value of -128 does not fit in int8.
    return bool(np.abs(codes.astype(np.int16)).max(initial=0) > NARROW)


def _rewrite_weights_(graph: _Graph) -> bool:
    """Writes weights of float layers as products, and adjusts the zero points of integer layers.

    Returns:
        Whether a layer that computes on integers reads codes of more than 7 bits.
    """
    any_wide = False
    for dequantize in graph.of_type("DequantizeLinear"):
        codes, scales = (graph.array(name) for name in dequantize.input[:2])
        if codes is None or scales is None or codes.dtype != np.int8:
            continue
        readers = graph.readers(dequantize.output[0])
        layers = [n for n in readers if n.op_type in ("Conv", "Gemm", "MatMul")]
        on_integers = any(graph.dequantized(n.input[0]) for n in layers)
        if _is_blocked(dequantize) or not on_integers:
            graph.replace_(dequantize, _product(graph, dequantize, codes, scales))
            continue
        # Weights are symmetric: their zero points are 0, and ONNX allows to leave them out.
        del dequantize.input[2:]
        wide = _is_wide(codes)
        if wide or any(n.op_type != "Conv" for n in layers):
            # Two parts of onnxruntime need zero points all the same, as a separate constant for
            # each weight: the protection against overflow, and the kernel QGemm.
            dequantize.input.append(
                graph.add(f"{dequantize.input[0]}_0", np.zeros(scales.shape, np.int8))
            )
        any_wide |= wide
    return any_wide


def _product(graph: _Graph, dequantize: Any, codes: np.ndarray, scales: np.ndarray) -> list[Any]:
    """Returns nodes that compute a weight: Cast of the codes, Mul by scales, Reshape of groups."""
    name, block = dequantize.output[0], _attribute(dequantize, "block_size", 0)
    if block:
        steps = graph.add(f"{name}_step", scales[:, :, None])
        codes = codes.reshape([len(codes), -1, block])
    else:
        axis = _attribute(dequantize, "axis", 1)
        shape = [1] * codes.ndim
        shape[axis] = -1
        steps = graph.add(f"{name}_step", scales.reshape(shape))
    stored = graph.add(dequantize.input[0], np.ascontiguousarray(codes))
    product = f"{name}_grouped" if block else name
    nodes = [
        graph.node("Cast", [stored], f"{name}_float", to=graph.onnx.TensorProto.FLOAT),
        graph.node("Mul", [f"{name}_float", steps], product),
    ]
    if block:
        rows = graph.add(f"{name}_shape", np.array([len(codes), -1], np.int64))
        nodes.append(graph.node("Reshape", [product, rows], name))
    return nodes


def _keep_float_weights_(graph: _Graph) -> None:
    """Prevents onnxruntime from quantizing float weights of layers whose inputs are integers.

    Such layers are transposed convolutions, and layers whose weights are quantized in groups or by
    a codebook. If the input of such a layer is dequantized with a single scale, onnxruntime
    quantizes the weights to 8 bits with a single scale (its `WeightBiasQuantization`), and they
    would differ from the model's weights. onnxruntime does not do this if the input has one scale
    for each channel. So the single scale is repeated for all channels, which changes no value.
    """
    shapes = {v.name: v.type.tensor_type.shape.dim for v in graph.proto.value_info}
    for layer in graph.of_type("Conv", "ConvTranspose", "Gemm"):
        dequantize = graph.dequantized(layer.input[0])
        if dequantize is None or graph.dequantized(layer.input[1]) is not None:
            continue
        scale, zero_point = (graph.array(name) for name in dequantize.input[1:3])
        if scale is None or zero_point is None or scale.size > 1:
            continue
        name = f"{dequantize.output[0]}_channels"
        layer.input[0] = name
        # Another layer that reads the same value may have added the node already.
        if name in graph.makers:
            continue
        channels = shapes[dequantize.output[0]][1].dim_value
        inputs = [dequantize.input[0]]
        for constant, value in zip(dequantize.input[1:3], (scale, zero_point), strict=True):
            repeated = np.full(channels, value.reshape(-1)[0], value.dtype)
            inputs.append(graph.add(f"{constant}_{channels}", repeated))
        graph.replace_(
            dequantize, [dequantize, graph.node("DequantizeLinear", inputs, name, axis=1)]
        )


def _shrink_codes_(graph: _Graph, fewest: int) -> tuple[int, int]:
    """Stores int8 codes in 2 or 4 bits where they fit.

    Returns:
        The fewest bits in use, and the opset that the file then needs; zeros if nothing changed.
    """
    used: list[tuple[int, int]] = []
    casts = []
    types = [row for row in SMALL_TYPES if row[1] >= fewest]
    read = {n.input[0] for n in graph.of_type("DequantizeLinear", "Cast")}
    for name, tensor in [*graph.constants.items()]:
        if tensor.data_type != graph.onnx.TensorProto.INT8 or name not in read:
            continue
        codes = graph.onnx.numpy_helper.to_array(tensor)
        fitting = [row for row in types if _fits(codes, row[1])]
        # For a few codes the Cast takes more bytes than it saves.
        if not fitting or codes.size < 16:
            continue
        kind, bits, opset = fitting[0]
        small = graph.onnx.TensorProto(
            name=f"{name}_int{bits}",
            dims=tensor.dims,
            data_type=getattr(graph.onnx.TensorProto, kind),
            raw_data=pack_bits(codes, bits),
        )
        del graph.constants[name]
        graph.constants[small.name] = small
        casts.append(graph.node("Cast", [small.name], name, to=graph.onnx.TensorProto.INT8))
        used.append((bits, opset))
    graph.nodes[:0] = casts
    if not used:
        return 0, 0
    return min(bits for bits, _ in used), max(opset for _, opset in used)


def _fits(codes: np.ndarray, bits: int) -> bool:
    """Returns whether all codes are between -2^(bits - 1) and 2^(bits - 1) - 1."""
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    limit = 1 << (bits - 1)
    return -limit <= low and high < limit


def pack_bits(codes: np.ndarray, bits: int) -> bytes:
    """Packs integers of 2 or 4 `bits` into bytes; the first is in the lowest bits, as in ONNX.

    >>> pack_bits(np.array([1, -1, 0], np.int8), 4).hex()
    'f100'
    """
    per_byte = 8 // bits
    flat = codes.reshape(-1).astype(np.int8).view(np.uint8) & (2**bits - 1)
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    joined: np.ndarray = np.bitwise_or.reduce(flat << shifts, axis=1)
    return joined.astype(np.uint8).tobytes()
