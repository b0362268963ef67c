"""Codes of quantized weights without loss: a weight's class follows from its output, input and position.

In a trained layer some channels are louder than others. Three small whole numbers - one for the output channel, the
input channel and the position in the kernel of a weight - add up to the logarithm of how far its code is likely to lie
from the middle. Codes of one sum, from all layers, share a frequency table; the numbers travel in front.
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
from fedpress.wire.reader import Reader, fail, varint

STEPS = (0, 6)  # parts of an octave that the encoder tries; 0 is one class for all
MOST = 64  # classes
Codes = NDArray[np.int8]


def shrink_codes(tensors: Sequence[Tensor]) -> bytes:
    """Returns the bytes of int8 `tensors` [out, in, ...] that share one grid; they hold no shapes.

    >>> len(shrink_codes([torch.zeros(64, 64, 3, 3, dtype=torch.int8)])) < 100
    True
    """
    cubes = [_cube(t.numpy()) for t in tensors]
    return min((_shrink(cubes, step) for step in STEPS), key=len)


def expand_codes(data: memoryview, shapes: Sequence[Sequence[int]], place: str) -> list[Tensor]:
    """Returns the int8 tensors of these `shapes` that `shrink_codes` packed.

    Raises:
        WireError: naming a field below `place`, if the bytes are not what `shrink_codes` could have made.
    """
    out = [torch.empty(tuple(shape), dtype=torch.int8) for shape in shapes]
    cubes = [_cube(t.numpy()) for t in out]
    reader = Reader(data)
    parts = [_expand(reader, [c.shape[axis] for c in cubes], f"{place}.axis") for axis in range(3)]
    sums = _sums(cubes, parts)
    low, high = _span(sums)
    table = expand(_part(reader, place), torch.uint8, [high - low + 1], f"{place}.classes").numpy()
    every = _ids(sums, low, table)
    counts = np.bincount(every, minlength=int(table.max()) + 1)
    flat = np.empty(len(every), np.int8)
    order = np.argsort(every, kind="stable")
    at = 0
    for count in counts:
        values = expand(_part(reader, place), torch.int8, [int(count)], f"{place}.codes").numpy()
        flat[order[at : at + count]] = values
        at += int(count)
    if reader.left:
        fail(place, f"{reader.left} bytes are left over")
    at = 0
    for cube in cubes:
        cube[...] = flat[at : at + cube.size].reshape(cube.shape)
        at += cube.size
    return out


def _shrink(cubes: Sequence[Codes], step: int) -> bytes:
    fits = [_fit(cube, step) for cube in cubes]
    parts = [[fit[axis] for fit in fits] for axis in range(3)]
    sums = _sums(cubes, parts)
    low, high = _span(sums)
    flat = np.concatenate([c.reshape(-1) for c in cubes] or [np.empty(0, np.int8)])
    table = _table(_ids(sums, low, np.arange(high - low + 1)), flat)
    every = _ids(sums, low, table)
    order, counts = (
        np.argsort(every, kind="stable"),
        np.bincount(every, minlength=int(table.max()) + 1),
    )
    streams = [
        shrink(torch.from_numpy(np.concatenate(part or [np.empty(0, np.int8)]))) for part in parts
    ]
    streams.append(shrink(torch.from_numpy(table)))
    streams += [
        shrink(torch.from_numpy(run)) for run in np.split(flat[order], np.cumsum(counts)[:-1])
    ]
    return b"".join(varint(len(stream)) + stream for stream in streams)


def _cube(codes: Codes) -> Codes:
    """A view [out, in, positions]; what has fewer dimensions gets some of size 1."""
    return codes.reshape(*(*codes.shape, 1, 1)[:2], prod(codes.shape[2:]))


def _fit(cube: Codes, step: int) -> list[Codes]:
    """Whole numbers along each axis of `cube`, in parts of an octave, whose sum is about log2 of the mean distance.

    The maximum-likelihood fit of a product of three factors: each in turn is what the others leave.
    """
    zero = [np.zeros(size, np.int8) for size in cube.shape]
    if not step or not cube.size:
        return zero
    center = int(np.median(cube[: 1 + 4096 // max(1, cube[0].size)]))
    away = np.abs(cube.astype(np.float32) - center) + 0.02
    factors = [np.ones((1, 1, 1), np.float32)] * 3
    for _ in range(3):
        for axis in range(3):
            others = [factors[i] for i in range(3) if i != axis]
            rest = tuple(i for i in range(3) if i != axis)
            factors[axis] = (away / (others[0] * others[1])).mean(axis=rest, keepdims=True)
    logs = [np.rint(step * np.log2(f)).reshape(-1).clip(-127, 127).astype(np.int8) for f in factors]
    return [np.broadcast_to(log, zero[i].shape).copy() for i, log in enumerate(logs)]


def _sums(cubes: Sequence[Codes], parts: Sequence[Sequence[Codes]]) -> list[NDArray[np.int16]]:
    return [
        np.broadcast_to(
            a.astype(np.int16)[:, None, None] + b.astype(np.int16)[:, None] + c.astype(np.int16),
            cube.shape,
        )
        for cube, a, b, c in zip(cubes, *parts, strict=True)
    ]


def _span(sums: Sequence[NDArray[np.int16]]) -> tuple[int, int]:
    full = [s for s in sums if s.size]
    return (min(int(s.min()) for s in full), max(int(s.max()) for s in full)) if full else (0, 0)


def _table(sums: NDArray[np.int64], codes: Codes) -> NDArray[np.uint8]:
    """The class of each sum, from 0 on: neighbours join as long as that saves more of tables than it costs of codes."""
    number = int(sums.max(initial=0)) + 1
    counts = np.bincount(256 * sums + codes.view(np.uint8), minlength=256 * number).reshape(
        number, 256
    )
    classes = [counts[at] for at in range(number)]
    widths = [1] * number
    bits = [_bits(c) for c in classes]
    while len(classes) > 1:
        joined = [_bits(a + b) for a, b in pairwise(classes)]
        saved = [a + b - j for (a, b), j in zip(pairwise(bits), joined, strict=True)]
        at = int(np.argmax(saved))
        if saved[at] < 0 and len(classes) <= MOST:
            break
        classes[at : at + 2], bits[at : at + 2] = [classes[at] + classes[at + 1]], [joined[at]]
        widths[at : at + 2] = [widths[at] + widths[at + 1]]
    return np.repeat(np.arange(len(widths), dtype=np.uint8), widths)


def _bits(counts: NDArray[np.int64]) -> float:
    """About what codes with these counts take: their entropy, and a byte for each that occurs in the table."""
    used = counts[counts > 0]
    return float(used @ np.log2(used.sum() / used)) + 8.0 * (len(used) + 6)


def _ids(sums: Sequence[NDArray[np.int16]], low: int, table: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([table[s.reshape(-1) - low] for s in sums] or [np.empty(0, table.dtype)])


def _expand(reader: Reader, sizes: Sequence[int], place: str) -> list[Codes]:
    whole = expand(_part(reader, place), torch.int8, [sum(sizes)], place).numpy()
    return np.split(whole, np.cumsum(sizes)[:-1])


def _part(reader: Reader, place: str) -> memoryview:
    return reader.take(reader.varint(f"{place}.size", reader.left), place)
