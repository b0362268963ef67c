"""Lossless packing: the bytes of one tensor in whichever form is smallest; see `FORMAT.md`.

Packing knows no codec: it sees whole numbers or floats and gives the same bits back.
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
from fedpress.wire.reader import ByteReader, fail, varint, zigzag

RAW, NBIT, ANS, SPARSE = range(4)

DEEPEST = 3
"""Packed bytes may contain packed bytes, so many levels deep: a sparse tensor has a packed bitmap,
which has packed class numbers, and so on. Without a limit a sender could nest them endlessly."""

SAMPLE = 1 << 16
"""Size of the sample of a long tensor that shows whether entropy coding is worth trying."""

# Floats are viewed as whole numbers of their size, so that every bit comes back.
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def shrink(tensor: Tensor) -> bytes:
    """Returns the packed bytes of `tensor`; its type and shape are not among them.

    >>> len(shrink(torch.zeros(1000))), len(shrink(torch.arange(1000)))
    (6, 1253)
    """
    # Codecs give a matrix with few rows where rows differ in their frequencies.
    rows = tensor.shape[0] if tensor.ndim == 2 and 2 <= tensor.shape[0] <= ans.MAX_ROWS else 1
    return _shrink(_array(tensor), tensor.is_floating_point(), rows)


def expand(data: memoryview, dtype: torch.dtype, shape: list[int], place: str) -> Tensor:
    """Returns the tensor that `shrink` packed.

    Args:
        data: the packed bytes.
        dtype: type of the tensor.
        shape: its shape; the caller has checked that it fits in memory.
        place: name of the tensor in errors.

    Raises:
        WireError: if the bytes are not what `shrink` could have made.
    """
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        _expand(ByteReader(data), _array(out), place)
    # A tensor without values has no packed bytes, not even a form.
    elif len(data):
        fail(place, f"{len(data)} bytes came for a tensor of no values")
    return out


def estimate_bits(values: Ints, *, rows: int = 1, share: float = 1.0) -> float:
    """Returns about how many bits whole numbers take when packed, faster than packing them.

    Args:
        values: whole numbers [n].
        rows: rows of the tensor that they are packed as.
        share: n / size of the whole vector, if `values` are a sample of it.
    """
    if not len(values):
        return 0.0
    bits = _range_of(values)[1]
    if not bits:
        return 0.0
    plain = 8 * share * _nbit_bytes(0, bits) + bits * len(values)
    return min(ans.coded_bits(values, rows, share), plain)


def _array(tensor: Tensor) -> Ints:
    """Returns the bits of the values as whole numbers [n]; no copy if `tensor` is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype != torch.uint8:
        flat = flat.view(WORDS[flat.itemsize])
    array: Ints = flat.numpy()
    return array


def _shrink(values: Ints, floats: bool, rows: int = 1, depth: int = 0) -> bytes:
    """Packs `values` [n] in the smallest form.

    Args:
        values: the bits of the values as whole numbers.
        floats: whether these are the bits of floats, whose order means nothing.
        rows: rows of the tensor.
        depth: how many packed forms contain this one.
    """
    if not len(values):
        return b""

    def nested(inner: Ints) -> bytes:
        return _shrink(inner, False, depth=depth + 1)

    # The bits of floats taken as numbers have no useful range.
    low, bits = (0, 0) if floats else _range_of(values)
    raw = 1 + values.nbytes
    nbit = raw if floats else _nbit_bytes(len(values), bits)
    size = min(raw, nbit)
    best = b""
    if depth < DEEPEST:
        if bits and _ans_pays(values, bits, size):
            coded = bytes([ANS]) + ans.encode_ints(values, rows, nested)
            size, best = _shorter(coded, size, best)
        # Zeros among whole numbers of one or two bytes are left to entropy coding.
        if (floats or values.itemsize > 2) and _sparse_pays(values, size):
            coded = bytes([SPARSE]) + _sparse(values, floats, nested)
            size, best = _shorter(coded, size, best)
    if best:
        return best
    if nbit < raw:
        return bytes([NBIT]) + _nbit(values, low, bits)
    return bytes([RAW]) + values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _shorter(coded: bytes, size: int, best: bytes) -> tuple[int, bytes]:
    """Returns (size, bytes) of the shorter of `coded` and of `best`, which takes `size` bytes."""
    if len(coded) < size:
        return len(coded), coded
    return size, best


def _expand(reader: ByteReader, out: Ints, place: str, depth: int = 0) -> None:
    """Fills `out` [n], n > 0, from `reader`; WireError unless exactly all its bytes are used."""

    def nested(inner: ByteReader, into: Ints) -> None:
        _expand(inner, into, place, depth + 1)

    form = reader.byte(f"{place}.form")
    if form == RAW:
        if reader.left != out.nbytes:
            fail(place, f"{reader.left} bytes came for {out.nbytes} bytes of values")
        out[:] = np.frombuffer(reader.take(out.nbytes, place), out.dtype.newbyteorder("<"))
    elif form == NBIT:
        _read_nbit(reader, out, place)
    elif form == ANS and depth < DEEPEST:
        ans.decode_ints(reader, out, nested, place)
    elif form == SPARSE and depth < DEEPEST:
        _read_sparse(reader, out, nested, place)
    else:
        fail(
            f"{place}.form",
            f"got {form} at depth {depth}, expected one of {RAW}, {NBIT}, {ANS}, {SPARSE}",
        )
    if reader.left:
        fail(place, f"{reader.left} bytes are left over")


def _range_of(values: Ints) -> tuple[int, int]:
    """Returns the smallest value, and the bits that its distance to the largest takes."""
    low = int(values.min())
    high = int(values.max())
    return low, (high - low).bit_length()


def _nbit_bytes(count: int, bits: int) -> int:
    # Eight bytes are about what form, lowest value and number of bits take.
    return bits // 8 * count + bits % 8 * -(-count // 8) + 8


def _nbit(values: Ints, low: int, bits: int) -> bytes:
    """Packs the distances of `values` from `low` into `bits` bits each.

    Whole bytes first, the low one before the others, then single bits. Each plane of bytes or bits
    is one pass over contiguous memory; packing value by value would be many times slower.
    """
    unsigned = values.view(f"u{values.itemsize}")
    # Unsigned, since a distance may be too large for the signed type; it wraps around correctly.
    unsigned = unsigned - np.array(low).astype(values.dtype).view(unsigned.dtype)
    little = unsigned.astype(unsigned.dtype.newbyteorder("<"), copy=False)
    lanes = little.view(np.uint8).reshape(-1, values.itemsize)
    planes = [zigzag(low), bytes([bits])]
    for at in range(bits // 8):
        planes.append(np.ascontiguousarray(lanes[:, at]).tobytes())
    if bits % 8:
        top = np.ascontiguousarray(lanes[:, bits // 8])
        for at in range(bits % 8):
            planes.append(np.packbits(top >> at & 1, bitorder="little").tobytes())
    return b"".join(planes)


def _read_nbit(reader: ByteReader, out: Ints, place: str) -> None:
    low = reader.zigzag(f"{place}.low")
    bits = reader.byte(f"{place}.bits")
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
    # Distances beyond the type would wrap around to small values without being noticed.
    if bits and int(unsigned.max()) > limits.max - low:
        fail(f"{place}.low", f"values above {limits.max} do not fit {out.dtype}")
    unsigned += np.array(low).astype(out.dtype).view(unsigned.dtype)


def _ans_pays(values: Ints, bits: int, size: int) -> bool:
    """Says whether entropy coding is worth trying to get below `size` bytes.

    Of long vectors only a sample is looked at, so that uniform values cost little time.
    """
    # The tables would take more than the values.
    if len(values) < 16:
        return False
    # At so few bits coding takes only ten times as long as estimating, so it is simply tried.
    if bits <= 8:
        return True
    if len(values) <= 2 * SAMPLE:
        return len(values) < 4096 or ans.coded_bits(values) < 8 * size
    # The estimate must be 2% below: from a sample it may be a little too low.
    return ans.coded_bits(_sampled(values)) < 8 * size * 0.98 * SAMPLE / len(values)


def _sampled(values: Ints, run: int = 1024) -> Ints:
    """Returns evenly spread runs of neighbours, which have much in common."""
    runs = len(values) // run
    chosen = np.linspace(0, runs - 1, SAMPLE // run).astype(np.intp)
    return values[: runs * run].reshape(runs, run)[chosen].reshape(-1)


def _sparse_pays(values: Ints, size: int) -> bool:
    """Says whether a bitmap and the nonzero values are likely below `size` bytes."""
    nonzero = int(np.count_nonzero(values))
    density = nonzero / len(values)
    if density >= 0.5:
        return False
    # The entropy of one position, in bits.
    position = 0.0
    if nonzero:
        position = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    return position * len(values) / 8 + nonzero * values.itemsize < size


def _sparse(values: Ints, floats: bool, nested: Callable[[Ints], bytes]) -> bytes:
    """Packs a bitmap and the values that are not zero.

    A float of minus zero has a bit set, so it counts as a value and comes back as it was.
    """
    nonzero = values != 0
    kept = values[nonzero]
    bitmap = nested(nonzero.view(np.uint8))
    # Kept floats are stored raw: no zeros are left in them, and their bits are not entropy coded.
    inner = _shrink(kept, floats, depth=DEEPEST if floats else 1)
    return varint(len(kept)) + varint(len(bitmap)) + bitmap + inner


def _read_sparse(
    reader: ByteReader, out: Ints, nested: Callable[[ByteReader, Ints], None], place: str
) -> None:
    # `shrink` uses this form for less than half of the values only.
    count = reader.varint(f"{place}.nonzero", len(out) // 2)
    bitmap: NDArray[np.uint8] = np.empty(len(out), np.uint8)
    nested(reader.part(f"{place}.bitmap"), bitmap)
    # Other bitmaps would not fit the number of values that follow.
    if int(bitmap.max()) > 1 or int(np.count_nonzero(bitmap)) != count:
        fail(f"{place}.bitmap", f"expected {count} ones, the rest zeros")
    out[:] = 0
    if count:
        kept = np.empty(count, out.dtype)
        nested(ByteReader(reader.take(reader.left, place)), kept)
        out[bitmap.view(np.bool_)] = kept
