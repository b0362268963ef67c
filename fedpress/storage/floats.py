"""Lossless compression of floats by byte planes and by masks of nonzero values.

A byte plane has the first bytes of all floats, or all second bytes, and so on. Many weights have
the same exponent, but their mantissas differ. Each plane has its own frequency table for entropy
coding, so the plane with the exponents compresses well.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.wire.packing import expand, shrink
from fedpress.wire.reader import ByteReader, fail, varint

# Forms in the file: plain values; byte planes; or a mask that marks the nonzero values, followed by
# the byte planes of these values.
WHOLE, PLANES, SPARSE = range(3)
# The unsigned integer type for the bits of a float, by the float's size in bytes.
WORDS: dict[int, type[np.unsignedinteger]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
Words = NDArray[np.unsignedinteger]
"""The bits of floats as unsigned integers."""


def shrink_floats(values: Tensor) -> bytes:
    """Compresses `values` [n] without loss, including NaN and -0.0.

    The bytes contain neither the dtype nor n, which are arguments of `expand_floats`.

    >>> len(shrink_floats(torch.ones(1000))), len(shrink_floats(torch.zeros(1000)))
    (18, 7)
    """
    words = _words(values)
    options = [bytes([WHOLE]) + shrink(values, pack_floats=True)]
    if len(words):
        options.append(bytes([PLANES]) + _planes(words))
        # Compared as integers, so that -0.0 counts as nonzero: its sign bit is set.
        nonzero = words != 0
        if np.count_nonzero(nonzero) < len(words):
            mask = shrink(torch.from_numpy(nonzero.view(np.uint8)))
            options.append(bytes([SPARSE]) + varint(len(mask)) + mask + _planes(words[nonzero]))
    # The values decide which form is the smallest, so all are tried.
    return min(options, key=len)


def expand_floats(data: memoryview, dtype: torch.dtype, size: int, place: str) -> Tensor:
    """Returns the floats that `shrink_floats` compressed.

    Args:
        data: the compressed bytes.
        dtype: type of the floats.
        size: number of floats.
        place: name of the data in errors.

    Raises:
        WireError: if the bytes are no valid output of `shrink_floats`.
    """
    reader = ByteReader(data)
    form = reader.byte(f"{place}.form")
    if form == WHOLE:
        return expand(reader.take(reader.left, place), dtype, [size], place)
    if form not in (PLANES, SPARSE):
        fail(f"{place}.form", f"got {form}, expected {WHOLE}, {PLANES} or {SPARSE}")
    kind = WORDS[dtype.itemsize]
    if form == PLANES:
        words = _read_planes(reader, size, kind, place)
    else:
        stream = _next_stream(reader, place)
        mask = expand(stream, torch.uint8, [size], f"{place}.mask").numpy()
        if size and int(mask.max()) > 1:
            fail(f"{place}.mask", f"got {mask.max()}, expected 0 or 1")
        nonzero = int(np.count_nonzero(mask))
        words = np.zeros(size, kind)
        words[mask.view(np.bool_)] = _read_planes(reader, nonzero, kind, place)
    if reader.left:
        fail(place, f"there are {reader.left} surplus bytes at the end")
    return torch.from_numpy(words.view(np.uint8)).view(dtype)


def _words(values: Tensor) -> Words:
    """Returns the bits of floats as unsigned integers."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    words: Words = flat.view(torch.uint8).numpy().view(WORDS[flat.itemsize])
    return words


def _planes(words: Words) -> bytes:
    """Compresses all first bytes, all second bytes and so on, each as a stream of its own.

    Every word is first rotated left by one bit. This moves the sign to the lowest bit. In float32
    the 8 bits of the exponent then fill the top byte.
    """
    size = words.itemsize
    rotated = np.ascontiguousarray(words << 1 | words >> (8 * size - 1)).astype(f"<u{size}")
    planes = rotated.view(np.uint8).reshape(-1, size)
    out = bytearray()
    for at in range(size):
        stream = shrink(torch.from_numpy(np.ascontiguousarray(planes[:, at])))
        out += varint(len(stream)) + stream
    return bytes(out)


def _read_planes(
    reader: ByteReader, size: int, kind: type[np.unsignedinteger], place: str
) -> Words:
    """Decompresses `size` words of type `kind` from the output of `_planes`."""
    planes = np.empty((size, kind().itemsize), np.uint8)
    for at in range(planes.shape[1]):
        stream = _next_stream(reader, place)
        planes[:, at] = expand(stream, torch.uint8, [size], f"{place}.plane").numpy()
    rotated = planes.reshape(-1).view(f"<u{planes.shape[1]}").astype(kind)
    words: Words = rotated >> kind(1) | rotated << kind(8 * planes.shape[1] - 1)
    return words


def _next_stream(reader: ByteReader, place: str) -> memoryview:
    return reader.take(reader.varint(f"{place}.size", reader.left), place)
