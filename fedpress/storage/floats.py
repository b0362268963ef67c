"""Floats without loss: planes of bytes, since exponents repeat and mantissas do not, and no bytes for zeros."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.wire.packing import expand, shrink
from fedpress.wire.reader import Reader, fail, varint

WHOLE, PLANES, SPARSE = range(3)
WORDS: dict[int, type[np.unsignedinteger]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
Words = NDArray[np.unsignedinteger]


def shrink_floats(values: Tensor) -> bytes:
    """Returns the bytes of `values` [n], which hold neither their type nor their number; any bits come back.

    >>> len(shrink_floats(torch.ones(1000))), len(shrink_floats(torch.zeros(1000)))
    (18, 7)
    """
    words = _words(values)
    options = [bytes([WHOLE]) + shrink(values)]
    if len(words):
        options.append(bytes([PLANES]) + _planes(words))
        full = words != 0  # minus zero has a bit and stays
        if np.count_nonzero(full) < len(words):
            mask = shrink(torch.from_numpy(full.view(np.uint8)))
            options.append(bytes([SPARSE]) + varint(len(mask)) + mask + _planes(words[full]))
    return min(options, key=len)


def expand_floats(data: memoryview, dtype: torch.dtype, size: int, place: str) -> Tensor:
    """Returns the `size` floats that `shrink_floats` packed.

    Raises:
        WireError: naming a field below `place`, if the bytes are not what `shrink_floats` could have made.
    """
    reader = Reader(data)
    form = reader.byte(f"{place}.form")
    if form == WHOLE:
        return expand(reader.take(reader.left, place), dtype, [size], place)
    if form not in (PLANES, SPARSE):
        fail(f"{place}.form", f"got {form}, expected {WHOLE}, {PLANES} or {SPARSE}")
    kind = WORDS[dtype.itemsize]
    if form == PLANES:
        words = _read_planes(reader, size, kind, place)
    else:
        mask = expand(_part(reader, place), torch.uint8, [size], f"{place}.mask").numpy()
        if size and int(mask.max()) > 1:
            fail(f"{place}.mask", f"got {mask.max()}, expected 0 or 1")
        words = np.zeros(size, kind)
        words[mask.view(np.bool_)] = _read_planes(reader, int(np.count_nonzero(mask)), kind, place)
    if reader.left:
        fail(place, f"{reader.left} bytes are left over")
    return torch.from_numpy(words.view(np.uint8)).view(dtype)


def _words(values: Tensor) -> Words:
    flat = values.detach().cpu().contiguous().reshape(-1)
    words: Words = flat.view(torch.uint8).numpy().view(WORDS[flat.itemsize])
    return words


def _planes(words: Words) -> bytes:
    """The bytes of each word turned left by one bit, so that the exponent fills the top byte, plane by plane."""
    turned = np.ascontiguousarray(words << 1 | words >> (8 * words.itemsize - 1)).astype(
        f"<u{words.itemsize}"
    )
    lanes = turned.view(np.uint8).reshape(-1, words.itemsize)
    planes = [
        shrink(torch.from_numpy(np.ascontiguousarray(lanes[:, at]))) for at in range(words.itemsize)
    ]
    return b"".join(varint(len(plane)) + plane for plane in planes)


def _read_planes(reader: Reader, size: int, kind: type[np.unsignedinteger], place: str) -> Words:
    lanes = np.empty((size, kind().itemsize), np.uint8)
    for at in range(lanes.shape[1]):
        lanes[:, at] = expand(_part(reader, place), torch.uint8, [size], f"{place}.plane").numpy()
    turned = lanes.reshape(-1).view(f"<u{lanes.shape[1]}").astype(kind)
    words: Words = turned >> kind(1) | turned << kind(8 * lanes.shape[1] - 1)
    return words


def _part(reader: Reader, place: str) -> memoryview:
    return reader.take(reader.varint(f"{place}.size", reader.left), place)
