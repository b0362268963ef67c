"""Packs a tensor losslessly in the shortest of five forms.

The forms are raw, n-bit integers, entropy-coded integers with a table for each class of blocks
(ANS) or for each context of neighbours, and sparse. All but the first two are only
tried if they are likely to be shorter. Floats are raw, unless the sender asks for the shortest
form: then zeros are left out. Unpacking returns the same bits. The file `FORMAT.md` in
this folder describes the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.wire import ans, contexts
from fedpress.wire.classes import BlockClasses, Ints
from fedpress.wire.reader import ByteReader, fail, varint, zigzag

RAW, NBIT, ANS, SPARSE, CONTEXTS = range(5)
"""The number of each form, the first byte of packed values."""

FEW = 16
"""Shorter vectors are not entropy-coded: tables of frequencies would take more than the values."""
MIN_TRIED = 1 << 14
"""Longer vectors of up to 8 bits a value are entropy-coded without asking whether it may pay."""
MAX_DEPTH = 3
"""Packed bytes may contain packed bytes up to this depth: a sparse tensor has a packed bitmap, and
the bitmap has packed class numbers. Without a limit an attacker could nest them endlessly."""

SAMPLE = 1 << 16
"""Number of values of a long tensor from which its entropy is estimated."""

# Floats are viewed as integers of the same size, so that all bits are preserved.
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def shrink(tensor: Tensor, *, pack_floats: bool = False) -> bytes:
    """Returns the packed values of `tensor`, without its type and shape.

    Args:
        tensor: the values.
        pack_floats: whether floats are packed in the shortest form. Otherwise they are raw, so
            their number of bytes follows from the shape.

    >>> len(shrink(torch.zeros(1000))), len(shrink(torch.zeros(1000), pack_floats=True))
    (4001, 6)
    >>> len(shrink(torch.arange(1000)))
    1253
    """
    return b"".join(shrunk_parts(tensor, pack_floats=pack_floats))


def shrunk_parts(tensor: Tensor, *, pack_floats: bool = False) -> list[bytes | memoryview]:
    """Returns the bytes of `shrink` in parts, without a copy of values that are sent raw.

    A raw part reads the memory of `tensor`: do not change the tensor while the part is used.
    """
    if not tensor.numel():
        return []
    values = _array(tensor)
    if _is_raw(tensor, pack_floats):
        return _raw_parts(values)
    return [smallest_form(values, tensor.is_floating_point(), _rows_of(tensor))]


def shrunk_size(tensor: Tensor, *, pack_floats: bool = False, random: bool = False) -> int:
    """Returns the number of bytes of `shrink`, exactly.

    Only entropy coding and zeros need the packer to run. The sizes of the forms raw and n-bit are
    computed. For `FEW` or more `random` integers no other form is shorter, so none is tried.

    >>> shrunk_size(torch.zeros(1000)), shrunk_size(torch.arange(1000))
    (4001, 1253)
    """
    if not tensor.numel():
        return 0
    if _is_raw(tensor, pack_floats):
        return 1 + tensor.numel() * tensor.element_size()
    values = _array(tensor)
    # A few random values may all be zero, and are then sent as a sparse tensor.
    depth = MAX_DEPTH if random and len(values) >= FEW else 0
    plain, coded = _choose(values, tensor.is_floating_point(), _rows_of(tensor), depth)
    return len(coded) or plain.size


def random_size(count: int, bits: int, itemsize: int) -> int:
    """Returns the number of bytes of `shrink` for random integers, without making them.

    Args:
        count: number of integers, uniformly random from -2^(bits-1) to 2^(bits-1) - 1. For 4096 of
            them the size is right except with a probability below 2^-1000; fewer should be made.
        bits: number of bits of each.
        itemsize: bytes of an integer in the tensor.

    >>> random_size(10_000, 16, 4)
    20005
    """
    # Their smallest value is so near to -2^(bits-1) that its varint has the same length.
    head = 2 + len(zigzag(-(1 << (bits - 1)) + 1))
    nbit, raw = _nbit_bytes(count, bits), 1 + count * itemsize
    return head + _plane_bytes(count, bits) if nbit < raw else raw


def expand(data: memoryview, dtype: torch.dtype, shape: list[int], place: str) -> Tensor:
    """Returns the tensor that `shrink` packed.

    Args:
        data: the packed bytes.
        dtype: type of the tensor.
        shape: shape of the tensor; the caller has checked that the tensor fits in memory.
        place: name of the tensor in errors.

    Raises:
        WireError: if the bytes are not a valid packed tensor of this type and shape.
    """
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        _expand(ByteReader(data), _array(out), place)
    # A tensor without values has no packed bytes, not even the byte of the form.
    elif len(data):
        fail(place, f"{len(data)} bytes came for a tensor of no values")
    return out


def estimate_bits(values: Ints, *, rows: int = 1, share: float = 1.0) -> float:
    """Estimates the packed size of whole numbers in bits, faster than packing them.

    Args:
        values: whole numbers [n].
        rows: number of rows of the tensor, each with its own frequency tables.
        share: n / size of the full vector, if `values` are a sample of it. Tables are sent once
            per vector, so only this share of their bits counts.
    """
    return SizeEstimator(rows, share).bits(values)


class SizeEstimator:
    """Estimates the packed sizes of vectors that resemble each other, one after the other.

    An example are the levels of one update on grids of different steps. The form and the classes of
    blocks are chosen once and kept, which saves most of the time; they are chosen again if the size
    has changed much.
    """

    def __init__(self, rows: int = 1, share: float = 1.0) -> None:
        """Takes the arguments of `estimate_bits`."""
        self._rows = rows
        self._share = share
        self._chosen_at = 0.0
        self._layout: BlockClasses | None = None
        self._with_contexts = False

    def bits(self, values: Ints) -> float:
        """Returns the estimated bits of `values` [n], whole numbers."""
        width = _range_of(values)[1] if len(values) else 0
        if not width:
            return 0.0
        plain = 8 * self._share * _nbit_bytes(0, width) + width * len(values)
        if self._layout is not None:
            coded = self._coded(values)
            if 0.7 < coded / self._chosen_at < 1.4:
                return min(coded, plain)
        return min(self._choose(values), plain)

    def forget(self) -> None:
        """Lets the next call of `bits` choose again.

        The packer chooses for the levels of the final step. A search that ends near its target with
        an older choice may miss it by a percent.
        """
        self._layout = None

    def ratio(self, whole: Ints, sample: Ints) -> float:
        """Returns the bits per value of `whole` over those of `sample`, rounded with one step.

        Of values with contexts it looks at the last pass only, which has half of the values and
        nearly half of the bits, and so tells the difference of both vectors in half the time.
        """
        if not self._with_contexts:
            ours = ans.coded_bits(sample, self._rows, self._share)
            theirs = ans.coded_bits(whole, self._rows)
        else:
            ours = contexts.last_bits(sample, self._share)
            theirs = contexts.last_bits(whole)
        return theirs / len(whole) / max(ours / len(sample), 1e-9)

    def _coded(self, values: Ints) -> float:
        if self._with_contexts:
            return contexts.context_bits(values, self._share, self._layout)
        return ans.coded_bits(values, self._rows, self._share, self._layout)

    def _choose(self, values: Ints) -> float:
        """Chooses form and classes, and returns the bits."""
        self._with_contexts = False
        self._layout = ans.layout_of(values, self._rows, self._share)
        coded = self._coded(values)
        if self._rows == 1 and values.dtype.kind == "i":
            first = ans.layout_of(contexts.first_of(values), share=self._share)
            by_contexts = contexts.context_bits(values, self._share, first)
            if by_contexts < coded:
                self._with_contexts = True
                self._layout = first
                coded = by_contexts
        self._chosen_at = coded
        return coded


def _array(tensor: Tensor) -> Ints:
    """Returns the values' bits as integers [n]; without a copy if `tensor` is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype != torch.uint8:
        flat = flat.view(WORDS[flat.itemsize])
    array: Ints = flat.numpy()
    return array


def _is_raw(tensor: Tensor, pack_floats: bool) -> bool:
    return tensor.is_floating_point() and not pack_floats


def _rows_of(tensor: Tensor) -> int:
    """Returns the number of rows of a tensor, each of which gets its own frequency tables."""
    # A matrix with few rows comes from a codec (a compression of model updates) whose rows have
    # different frequencies of values. Any other tensor is one row.
    if tensor.ndim == 2 and 2 <= tensor.shape[0] <= ans.MAX_ROWS:
        return tensor.shape[0]
    return 1


@dataclass(frozen=True)
class _Plain:
    """How values are packed without entropy coding: raw or as n-bit integers.

    Attributes:
        form: `RAW` or `NBIT`.
        low: the smallest value.
        bits: number of bits of a value's distance from `low`.
        size: number of bytes, with the byte of the form.
    """

    form: int
    low: int
    bits: int
    size: int


def smallest_form(values: Ints, floats: bool, rows: int = 1, depth: int = 0) -> bytes:
    """Packs `values` [n] in the smallest form; see `_choose` for the arguments."""
    if not len(values):
        return b""
    plain, coded = _choose(values, floats, rows, depth)
    if coded:
        return coded
    if plain.form == NBIT:
        return bytes([NBIT]) + _nbit(values, plain.low, plain.bits)
    return b"".join(_raw_parts(values))


def _choose(values: Ints, floats: bool, rows: int = 1, depth: int = 0) -> tuple[_Plain, bytes]:
    """Returns the smaller plain form, and the coded bytes (empty if they are not smaller).

    Args:
        values: integers, or the bits of floats viewed as integers; at least one.
        floats: whether `values` are bits of floats; only the forms raw and sparse pack floats.
        rows: number of rows of the tensor.
        depth: nesting depth; 0 for the tensor itself, 1 for a bitmap inside, and so on.
    """

    def nested(inner: Ints) -> bytes:
        return smallest_form(inner, False, depth=depth + 1)

    # For the bits of floats, the range of the integers is meaningless.
    low, bits = (0, 0) if floats else _range_of(values)
    raw = 1 + values.nbytes
    nbit = raw if floats else _nbit_bytes(len(values), bits)
    size = min(raw, nbit)
    best = b""
    if depth < MAX_DEPTH:
        if bits and _ans_pays(values, bits, size):
            if depth == 0 and rows == 1 and contexts_pay(values):
                coded = bytes([CONTEXTS]) + contexts.encode_contexts(values, nested)
            else:
                coded = bytes([ANS]) + ans.encode_ints(values, rows, nested)
            size, best = _shorter(coded, size, best)
        # For integers of one or two bytes, entropy coding handles zeros well enough.
        if (floats or values.itemsize > 2) and _sparse_pays(values, size):
            coded = bytes([SPARSE]) + _sparse(values, floats, nested)
            size, best = _shorter(coded, size, best)
    if nbit < raw:
        # `nbit` is an estimate that decides between the forms; this is the exact size.
        head = 2 + len(zigzag(low))
        return _Plain(NBIT, low, bits, head + _plane_bytes(len(values), bits)), best
    return _Plain(RAW, 0, 0, raw), best


def _raw_parts(values: Ints) -> list[bytes | memoryview]:
    """Returns the form, and the values as they are in memory, in little-endian order."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    # As bytes, so that the length of the view is its number of bytes.
    return [bytes([RAW]), little.data.cast("B")]


def _shorter(coded: bytes, size: int, best: bytes) -> tuple[int, bytes]:
    """Returns (size, bytes) of `coded` if it is shorter than `size`, else (`size`, `best`)."""
    if len(coded) < size:
        return len(coded), coded
    return size, best


def _expand(reader: ByteReader, out: Ints, place: str, depth: int = 0) -> None:
    """Fills `out` [n], n > 0, from `reader`.

    Raises:
        WireError: if the bytes are invalid, or some are left over.
    """

    def nested(inner: ByteReader, into: Ints) -> None:
        _expand(inner, into, place, depth + 1)

    form = reader.byte(f"{place}.form")
    if form == RAW:
        if reader.left != out.nbytes:
            fail(place, f"{reader.left} bytes came for {out.nbytes} bytes of values")
        out[:] = np.frombuffer(reader.take(out.nbytes, place), out.dtype.newbyteorder("<"))
    elif form == NBIT:
        _read_nbit(reader, out, place)
    elif form == ANS and depth < MAX_DEPTH:
        ans.decode_ints(reader, out, nested, place)
    elif form == CONTEXTS and not depth:
        contexts.decode_contexts(reader, out, nested, place)
    elif form == SPARSE and depth < MAX_DEPTH:
        _read_sparse(reader, out, nested, place)
    else:
        fail(
            f"{place}.form",
            f"got {form} at depth {depth}, expected one of {RAW} to {CONTEXTS}",
        )
    if reader.left:
        fail(place, f"{reader.left} bytes are left over")


def _range_of(values: Ints) -> tuple[int, int]:
    """Returns the smallest value, and the number of bits of (largest - smallest)."""
    low = int(values.min())
    high = int(values.max())
    return low, (high - low).bit_length()


def _nbit_bytes(count: int, bits: int) -> int:
    # Eight bytes are an estimate for form, lowest value and number of bits.
    return _plane_bytes(count, bits) + 8


def _plane_bytes(count: int, bits: int) -> int:
    """Returns the bytes of the planes of `_nbit`."""
    return bits // 8 * count + bits % 8 * -(-count // 8)


def _nbit(values: Ints, low: int, bits: int) -> bytes:
    """Packs the differences `values` - `low` into `bits` bits each.

    They are written as planes: first the low byte of all values, then further bytes, then the
    remaining bits one by one. Example: 11 bits are one plane of bytes and three planes of bits.
    Each plane is one pass over contiguous memory; packing value by value would be many times
    slower.
    """
    unsigned = values.view(f"u{values.itemsize}")
    # Unsigned, because a difference may exceed the signed type; unsigned arithmetic modulo 2^n
    # gives the right result.
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
    # Checked here: larger differences would silently wrap around to small values.
    if bits and int(unsigned.max()) > limits.max - low:
        fail(f"{place}.low", f"values above {limits.max} do not fit {out.dtype}")
    unsigned += np.array(low).astype(out.dtype).view(unsigned.dtype)


def _ans_pays(values: Ints, bits: int, size: int) -> bool:
    """Returns whether entropy coding is likely to take less than `size` bytes.

    For long vectors this is estimated from a sample, so that incompressible values cost little
    time.
    """
    if len(values) < FEW:
        return False
    # For a range of up to 8 bits the estimate would save little time, so coding is simply tried,
    # except for short vectors such as keys and ciphertexts, of which a secure sum sends dozens.
    if bits <= 8:
        return len(values) > MIN_TRIED or _repeats(values, size)
    if len(values) <= 2 * SAMPLE:
        return len(values) < 4096 or ans.coded_bits(values) < 8 * size
    # The estimate must be 2% below `size`, because from a sample it may be slightly too low.
    return ans.coded_bits(_sampled(values)) < 8 * size * 0.98 * SAMPLE / len(values)


def _repeats(values: Ints, size: int) -> bool:
    """Returns whether values of up to 8 bits repeat so often that a table may pay.

    Judged with one table for all, and with one for each quarter, as for sorted values.
    """
    return min(_with_tables([values]), _with_tables(np.array_split(values, 4))) < size


def _with_tables(parts: Sequence[Ints]) -> float:
    """Returns about how many bytes the parts take, each with a table of its own.

    It is the entropy, 4 bytes for a table, and half a byte for each value in it.
    """
    total = 0.0
    for part in parts:
        counts = np.unique_counts(part).counts
        bits = len(part) * math.log2(len(part)) - float(counts @ np.log2(counts))
        total += 4 + bits / 8 + len(counts) / 2
    return total


def contexts_pay(values: Ints) -> bool:
    """Returns whether a table for each context is likely to take fewer bytes than one a block."""
    sample = values if len(values) <= 2 * SAMPLE else _sampled(values)
    share = len(sample) / len(values)
    return contexts.context_bits(sample, share) < ans.coded_bits(sample, share=share)


def _sampled(values: Ints, run: int = 1024) -> Ints:
    """Returns `SAMPLE` values: runs of `run` neighbours, evenly spread.

    Neighbours often have similar values, and the entropy coder makes use of this. Single values
    would not show it.
    """
    runs = len(values) // run
    chosen = np.linspace(0, runs - 1, SAMPLE // run).astype(np.intp)
    return values[: runs * run].reshape(runs, run)[chosen].reshape(-1)


def _sparse_pays(values: Ints, size: int) -> bool:
    """Returns whether a bitmap and the nonzero values are likely to take less than `size` bytes."""
    nonzero = int(np.count_nonzero(values))
    density = nonzero / len(values)
    if density >= 0.5:
        return False
    # Entropy of one bit of the bitmap.
    position = 0.0
    if nonzero:
        position = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    return position * len(values) / 8 + nonzero * values.itemsize < size


def _sparse(values: Ints, floats: bool, nested: Callable[[Ints], bytes]) -> bytes:
    """Packs a bitmap and the nonzero values.

    Minus zero has its sign bit set, so it counts as nonzero here, and its bits are preserved.
    """
    nonzero = values != 0
    kept = values[nonzero]
    bitmap = nested(nonzero.view(np.uint8))
    # Nonzero floats are stored raw: they have no zeros, and bits of floats are not entropy coded.
    inner = smallest_form(kept, floats, depth=MAX_DEPTH if floats else 1)
    return varint(len(kept)) + varint(len(bitmap)) + bitmap + inner


def _read_sparse(
    reader: ByteReader, out: Ints, nested: Callable[[ByteReader, Ints], None], place: str
) -> None:
    # `shrink` uses this form only if less than half of the values are nonzero.
    count = reader.varint(f"{place}.nonzero", len(out) // 2)
    bitmap: NDArray[np.uint8] = np.empty(len(out), np.uint8)
    nested(reader.part(f"{place}.bitmap"), bitmap)
    # The number of ones must be the number of values that follow.
    if int(bitmap.max()) > 1 or int(np.count_nonzero(bitmap)) != count:
        fail(f"{place}.bitmap", f"expected {count} ones, the rest zeros")
    out[:] = 0
    if count:
        kept = np.empty(count, out.dtype)
        nested(ByteReader(reader.take(reader.left, place)), kept)
        out[bitmap.view(np.bool_)] = kept
