"""Lossless packing: the bytes of one tensor in whichever form is the smallest; `FORMAT.md` describes each form.

Packing knows no quantizer: it sees whole numbers or floats and gives the same bits back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.wire import ans
from fedpress.wire.classes import Ints
from fedpress.wire.reader import Reader, fail, varint, zigzag

RAW, NBIT, ANS, SPARSE = range(4)
DEEPEST = 3  # forms inside forms: sparse, its bitmap, the classes of the bitmap, their numbers
SAMPLE = 1 << 16
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def shrink(tensor: Tensor) -> bytes:
    """Returns the packed bytes of `tensor`, which hold neither its type nor its shape.

    >>> len(shrink(torch.zeros(1000))), len(shrink(torch.arange(1000)))
    (6, 1253)
    """
    rows = tensor.shape[0] if tensor.ndim == 2 and 2 <= tensor.shape[0] <= ans.MAX_ROWS else 1
    return _shrink(_array(tensor), tensor.is_floating_point(), rows)


def expand(data: memoryview, dtype: torch.dtype, shape: list[int], place: str) -> Tensor:
    """Returns the tensor that `shrink` packed; the caller has checked that its size fits in memory.

    Raises:
        WireError: naming a field below `place`, if the bytes are not what `shrink` could have made.
    """
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        _expand(Reader(data), _array(out), place)
    elif len(data):
        fail(place, f"{len(data)} bytes came for a tensor of no values")
    return out


def estimate_bits(values: Ints, *, rows: int = 1, share: float = 1.0) -> float:
    """Returns about how many bits the whole numbers `values` [n] take when packed as `rows` rows, in less time.

    `share` is n over the size of the whole vector where `values` are a sample of it.
    """
    if not len(values):
        return 0.0
    bits = _span(values)[1]
    plain = 8 * share * _nbit_bytes(0, bits) + bits * len(values)
    return min(ans.estimate(values, rows, share), plain) if bits else 0.0


def _array(tensor: Tensor) -> Ints:
    """The values as one row of whole numbers of the same bits; shares memory where `tensor` is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: Ints = (flat if flat.dtype == torch.uint8 else flat.view(WORDS[flat.itemsize])).numpy()
    return array


def _shrink(values: Ints, floats: bool, rows: int = 1, depth: int = 0) -> bytes:
    if not len(values):
        return b""

    def nested(inner: Ints) -> bytes:
        return _shrink(inner, False, depth=depth + 1)

    low, bits = (0, 0) if floats else _span(values)
    raw = 1 + values.nbytes
    nbit = raw if floats else _nbit_bytes(len(values), bits)
    size, best = min(raw, nbit), b""
    if depth < DEEPEST:
        if bits and _ans_pays(values, bits, size):
            coded = bytes([ANS]) + ans.encode(values, rows, nested)
            size, best = _shorter(coded, size, best)
        if (floats or values.itemsize > 2) and _sparse_pays(values, size):
            coded = bytes([SPARSE]) + _sparse(values, floats, nested)
            size, best = _shorter(coded, size, best)
    if best:
        return best
    if nbit < raw:
        return bytes([NBIT]) + _nbit(values, low, bits)
    return bytes([RAW]) + values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _shorter(coded: bytes, size: int, best: bytes) -> tuple[int, bytes]:
    """Returns what is shorter, with its size: `coded`, or what was the `best` of `size` bytes so far."""
    return (len(coded), coded) if len(coded) < size else (size, best)


def _expand(reader: Reader, out: Ints, place: str, depth: int = 0) -> None:
    """Fills `out` [n], n > 0, and leaves no byte unread."""

    def nested(inner: Reader, into: Ints) -> None:
        _expand(inner, into, place, depth + 1)

    form = reader.byte(f"{place}.form")
    if form == RAW:
        if reader.left != out.nbytes:
            fail(place, f"{reader.left} bytes came for {out.nbytes} bytes of values")
        out[:] = np.frombuffer(reader.take(out.nbytes, place), out.dtype.newbyteorder("<"))
    elif form == NBIT:
        _read_nbit(reader, out, place)
    elif form == ANS and depth < DEEPEST:
        ans.decode(reader, out, nested, place)
    elif form == SPARSE and depth < DEEPEST:
        _read_sparse(reader, out, nested, place)
    else:
        fail(
            f"{place}.form",
            f"got {form} at depth {depth}, expected one of {RAW}, {NBIT}, {ANS}, {SPARSE}",
        )
    if reader.left:
        fail(place, f"{reader.left} bytes are left over")


def _span(values: Ints) -> tuple[int, int]:
    """Returns the smallest value and how many bits the distance to the largest takes."""
    low, high = int(values.min()), int(values.max())
    return low, (high - low).bit_length()


def _nbit_bytes(count: int, bits: int) -> int:
    return bits // 8 * count + bits % 8 * -(-count // 8) + 8


def _nbit(values: Ints, low: int, bits: int) -> bytes:
    """Byte planes, the low one first, then planes of single bits: each is one pass over contiguous memory."""
    unsigned = values.view(f"u{values.itemsize}")
    unsigned = unsigned - np.array(low).astype(values.dtype).view(
        unsigned.dtype
    )  # wraps around, as it should
    planes = [zigzag(low), bytes([bits])]
    lanes = (
        unsigned.astype(unsigned.dtype.newbyteorder("<"), copy=False)
        .view(np.uint8)
        .reshape(-1, values.itemsize)
    )
    planes += [np.ascontiguousarray(lanes[:, at]).tobytes() for at in range(bits // 8)]
    if bits % 8:
        top = np.ascontiguousarray(lanes[:, bits // 8])
        planes += [
            np.packbits(top >> at & 1, bitorder="little").tobytes() for at in range(bits % 8)
        ]
    return b"".join(planes)


def _read_nbit(reader: Reader, out: Ints, place: str) -> None:
    low, bits = reader.zigzag(f"{place}.low"), reader.byte(f"{place}.bits")
    limits = np.iinfo(out.dtype)
    if bits > 8 * out.itemsize or not limits.min <= low <= limits.max:
        fail(f"{place}.bits", f"{bits} bits from {low} on do not fit {out.dtype}")
    size = len(out)
    lanes = out.view(np.uint8).reshape(-1, out.itemsize)
    lanes[:] = 0
    for at in range(bits // 8):
        lanes[:, at] = np.frombuffer(reader.take(size, f"{place}.bits"), np.uint8)
    if bits % 8:
        top = np.zeros(size, np.uint8)
        for at in range(bits % 8):
            plane = np.frombuffer(reader.take(-(-size // 8), f"{place}.bits"), np.uint8)
            top |= np.unpackbits(plane, count=size, bitorder="little") << at
        lanes[:, bits // 8] = top
    unsigned = out.view(f"u{out.itemsize}")
    if bits and int(unsigned.max()) > limits.max - low:
        fail(f"{place}.low", f"values above {limits.max} do not fit {out.dtype}")
    unsigned += np.array(low).astype(out.dtype).view(unsigned.dtype)


def _ans_pays(values: Ints, bits: int, size: int) -> bool:
    """Looks at a sample only where the values are many, so that uniform ones cost no time."""
    if len(values) < 16:
        return False
    if bits <= 8:  # the estimate would take a tenth of the time of trying
        return True
    if len(values) <= 2 * SAMPLE:
        return len(values) < 4096 or ans.estimate(values) < 8 * size
    return ans.estimate(_sampled(values)) < 8 * size * 0.98 * SAMPLE / len(values)


def _sampled(values: Ints, run: int = 1024) -> Ints:
    runs = len(values) // run
    chosen = np.linspace(0, runs - 1, SAMPLE // run).astype(np.intp)
    return values[: runs * run].reshape(runs, run)[chosen].reshape(-1)


def _sparse_pays(values: Ints, size: int) -> bool:
    full = int(np.count_nonzero(values))
    density = full / len(values)
    if density >= 0.5:
        return False
    positions = (
        0.0 if not full else -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    )
    return positions * len(values) / 8 + full * values.itemsize < size


def _sparse(values: Ints, floats: bool, nested: Callable[[Ints], bytes]) -> bytes:
    """A bitmap and the values that are not zero; minus zero has bits and stays."""
    full = values != 0
    kept = values[full]
    bitmap = nested(full.view(np.uint8))
    inner = _shrink(kept, floats, depth=DEEPEST if floats else 1)
    return varint(len(kept)) + varint(len(bitmap)) + bitmap + inner


def _read_sparse(
    reader: Reader, out: Ints, nested: Callable[[Reader, Ints], None], place: str
) -> None:
    count = reader.varint(f"{place}.nonzero", len(out) // 2)
    bitmap: NDArray[np.uint8] = np.empty(len(out), np.uint8)
    nested(reader.part(f"{place}.bitmap"), bitmap)
    if int(bitmap.max()) > 1 or int(np.count_nonzero(bitmap)) != count:
        fail(f"{place}.bitmap", f"expected {count} ones, the rest zeros")
    out[:] = 0
    if count:
        kept = np.empty(count, out.dtype)
        nested(Reader(reader.take(reader.left, place)), kept)
        out[bitmap.view(np.bool_)] = kept
