"""Lossless compression of quantized weights, with a frequency table for each class of weights.

A code is the integer of a quantized weight. In a trained layer some channels have larger weights
than others, so the distribution of their codes is wider. The file has one small integer for each
output channel, one for each input channel and one for each kernel position of a layer. So every
weight has three of these integers. Their sum, divided by a constant, estimates log2 of the distance
between the weight's code and the median code. Weights with similar sums form a class, and each
class has its own frequency table for entropy coding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.wire.packing import expand, shrink
from fedpress.wire.reader import ByteReader, fail, varint

# The encoder tries these resolutions of the logarithms and keeps the smaller result. With 6, adding
# 6 to an integer means twice the distance. With 0 all integers are 0, so all weights are in one
# class; this gives the smaller result if all channels are alike.
STEPS = (0, 6)
# Maximum number of classes. Each class adds a frequency table to the file.
MAX_CLASSES = 64
Codes = NDArray[np.int8]
"""Codes of weights, or the small integers of channels and positions."""


def shrink_codes(tensors: Sequence[Tensor]) -> bytes:
    """Compresses the codes of several weights, int8 [out, in, ...], with the same quantization.

    The bytes do not contain the shapes, which are an argument of `expand_codes`.

    >>> len(shrink_codes([torch.zeros(64, 64, 3, 3, dtype=torch.int8)])) < 100
    True
    """
    cubes = [_cube(t.numpy()) for t in tensors]
    return min((_shrink(cubes, step) for step in STEPS), key=len)


def expand_codes(data: memoryview, shapes: Sequence[Sequence[int]], place: str) -> list[Tensor]:
    """Returns the int8 tensors that `shrink_codes` compressed.

    Args:
        data: the compressed bytes.
        shapes: shapes of the tensors.
        place: name of the data in errors.

    Raises:
        WireError: if the bytes are no valid output of `shrink_codes`.
    """
    out = [torch.empty(tuple(shape), dtype=torch.int8) for shape in shapes]
    # These are views of `out`, so writing to them below fills the result.
    cubes = [_cube(t.numpy()) for t in out]
    reader = ByteReader(data)
    logs = []
    for axis in range(3):
        sizes = [cube.shape[axis] for cube in cubes]
        logs.append(_read_logs(reader, sizes, f"{place}.axis"))
    sums = _sums(cubes, logs)
    low, high = _span(sums)
    stream = _next_stream(reader, place)
    class_of_sum = expand(stream, torch.uint8, [high - low + 1], f"{place}.classes").numpy()
    classes = _classes_of(sums, low, class_of_sum)
    counts = np.bincount(classes, minlength=int(class_of_sum.max()) + 1)

    flat = np.empty(len(classes), np.int8)
    # The file has the codes class by class. The same stable sort as in `_shrink` tells to which
    # weight each code belongs.
    order = np.argsort(classes, kind="stable")
    at = 0
    for count in counts:
        stream = _next_stream(reader, place)
        values = expand(stream, torch.int8, [int(count)], f"{place}.codes").numpy()
        flat[order[at : at + count]] = values
        at += int(count)
    if reader.left:
        fail(place, f"there are {reader.left} surplus bytes at the end")

    at = 0
    for cube in cubes:
        cube[...] = flat[at : at + cube.size].reshape(cube.shape)
        at += cube.size
    return out


def _shrink(cubes: Sequence[Codes], step: int) -> bytes:
    """Compresses tensors [out, in, positions]; `step` is the resolution of the logarithms."""
    fits = [_fit(cube, step) for cube in cubes]
    # Transposed: `fits` is indexed by [tensor][axis], `logs` by [axis][tensor].
    logs = []
    for axis in range(3):
        logs.append([fit[axis] for fit in fits])
    sums = _sums(cubes, logs)
    low, high = _span(sums)
    flat = _joined([cube.reshape(-1) for cube in cubes])
    every_sum = np.arange(high - low + 1)
    class_of_sum = _join_classes(_classes_of(sums, low, every_sum), flat)
    classes = _classes_of(sums, low, class_of_sum)
    order = np.argsort(classes, kind="stable")
    counts = np.bincount(classes, minlength=int(class_of_sum.max()) + 1)

    arrays: list[NDArray[Any]] = [_joined(of_axis) for of_axis in logs]
    arrays.append(class_of_sum)
    arrays.extend(np.split(flat[order], np.cumsum(counts)[:-1]))
    out = bytearray()
    for array in arrays:
        stream = shrink(torch.from_numpy(array))
        out += varint(len(stream)) + stream
    return bytes(out)


def _joined(arrays: Sequence[Codes]) -> Codes:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int8)


def _cube(codes: Codes) -> Codes:
    """Returns a view [out, in, positions]; dimensions that `codes` lacks get size 1."""
    return codes.reshape(*(*codes.shape, 1, 1)[:2], prod(codes.shape[2:]))


def _fit(cube: Codes, step: int) -> list[Codes]:
    """Returns an integer for each output channel, each input channel and each position of `cube`.

    The sum of a weight's three integers, divided by `step`, is about log2 of the expected distance
    between its code and the median. The expected distance is modelled as a product of three
    factors. They are fitted by maximum likelihood for exponentially distributed distances: each
    factor in turn becomes the mean of the distances divided by the other two factors.
    """
    zero = [np.zeros(size, np.int8) for size in cube.shape]
    if not step or not cube.size:
        return zero
    # The first rows, about 4096 codes, are enough for the median.
    center = int(np.median(cube[: 1 + 4096 // max(1, cube[0].size)]))
    # The small number keeps the logarithm finite for a channel whose codes all equal the center.
    distances = np.abs(cube.astype(np.float32) - center) + 0.02
    factors = [np.ones((1, 1, 1), np.float32)] * 3
    # Each update depends on the other factors, so it is repeated; three rounds are enough.
    for _ in range(3):
        for axis in range(3):
            first, second = (i for i in range(3) if i != axis)
            rest = distances / (factors[first] * factors[second])
            factors[axis] = rest.mean(axis=(first, second), keepdims=True)
    logs = []
    for factor, template in zip(factors, zero, strict=True):
        log = np.rint(step * np.log2(factor)).reshape(-1).clip(-127, 127).astype(np.int8)
        logs.append(np.broadcast_to(log, template.shape).copy())
    return logs


def _sums(cubes: Sequence[Codes], logs: Sequence[Sequence[Codes]]) -> list[NDArray[np.int16]]:
    """Returns the sum of the three integers of each weight, in the shape of each tensor."""
    found = []
    for cube, *of_axis in zip(cubes, *logs, strict=True):
        # int16, since three int8 numbers may sum to 381.
        a, b, c = (log.astype(np.int16) for log in of_axis)
        found.append(np.broadcast_to(a[:, None, None] + b[:, None] + c, cube.shape))
    return found


def _span(sums: Sequence[NDArray[np.int16]]) -> tuple[int, int]:
    """Returns the smallest and the largest sum; (0, 0) if there is no weight."""
    full = [s for s in sums if s.size]
    if not full:
        return 0, 0
    return min(int(s.min()) for s in full), max(int(s.max()) for s in full)


def _join_classes(sums: NDArray[np.int64], codes: Codes) -> NDArray[np.uint8]:
    """Returns the class number of each possible sum; the first class is 0.

    At first every sum is a class of its own. Each step joins the two neighbouring classes whose
    union saves the most bits: the union needs one frequency table less, but its weights take more
    bits. The steps end when every union would take more bits than it saves and there are at most
    `MAX_CLASSES` classes, or when one class is left.

    Args:
        sums: the sum of each weight, minus the smallest sum.
        codes: the code of each weight.
    """
    number = int(sums.max(initial=0)) + 1
    pairs = 256 * sums + codes.view(np.uint8)
    counts = np.bincount(pairs, minlength=256 * number).reshape(number, 256)
    classes = [counts[at] for at in range(number)]
    widths = [1] * number
    bits = [_bits(c) for c in classes]
    while len(classes) > 1:
        joined = [_bits(a + b) for a, b in pairwise(classes)]
        saved = [a + b - j for (a, b), j in zip(pairwise(bits), joined, strict=True)]
        at = int(np.argmax(saved))
        if saved[at] < 0 and len(classes) <= MAX_CLASSES:
            break
        classes[at : at + 2] = [classes[at] + classes[at + 1]]
        bits[at : at + 2] = [joined[at]]
        widths[at : at + 2] = [widths[at] + widths[at + 1]]
    return np.repeat(np.arange(len(widths), dtype=np.uint8), widths)


def _bits(counts: NDArray[np.int64]) -> float:
    """Estimates the bits of a class: the entropy of its codes, a frequency table, and a header.

    The table has a byte for each value that occurs among the codes. The header has about 6 bytes.

    Args:
        counts: how often each value occurs.
    """
    used = counts[counts > 0]
    return float(used @ np.log2(used.sum() / used)) + 8.0 * (len(used) + 6)


def _classes_of(
    sums: Sequence[NDArray[np.int16]], low: int, class_of_sum: NDArray[Any]
) -> NDArray[Any]:
    """Returns the class of every weight of all tensors, flat.

    Args:
        sums: the sum of each weight of each tensor.
        low: the smallest sum.
        class_of_sum: the class of each possible sum, from `low` on.
    """
    found = [class_of_sum[s.reshape(-1) - low] for s in sums]
    return np.concatenate(found) if found else np.empty(0, class_of_sum.dtype)


def _read_logs(reader: ByteReader, sizes: Sequence[int], place: str) -> list[Codes]:
    whole = expand(_next_stream(reader, place), torch.int8, [sum(sizes)], place).numpy()
    return np.split(whole, np.cumsum(sizes)[:-1])


def _next_stream(reader: ByteReader, place: str) -> memoryview:
    return reader.take(reader.varint(f"{place}.size", reader.left), place)
