"""Codes integers in four passes; each value's frequency table follows from its decoded neighbours.

Pass 0 codes every eighth value. Each further pass codes the values halfway between those that are
known, so a value has known neighbours on both sides: large neighbours make it likely to be large,
and neighbours of one sign make it likely to have that sign. No value depends on another one of its
pass, so a pass is coded with array operations. The size and sign of the neighbours give the
*context* of a value, and each context has a frequency table. Only integer arithmetic decides on
contexts, so every machine finds the same ones. `ans` has the tables and the coder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpress.wire import ans
from fedpress.wire.classes import BlockClasses, Ints
from fedpress.wire.reader import ByteReader, fail, varint

PASSES = (4, 2, 1)
"""Offsets of the passes after pass 0. The pass of offset 4 codes the values 4, 12, 20, ..."""

STRIDE = 8
"""Pass 0 codes the values 0, 8, 16, ..."""

MIN_SIZE = 1 << 13
"""For shorter vectors the tables take more bytes than they save."""

FINE_SIZE = 1 << 19
"""From this size on, contexts are fine and each pass has tables of its own."""

CAP = 31
"""A neighbour beyond this size counts as one of this size."""

LIMIT = 120
"""A value beyond this size is escaped: it is sent separately (see `ans`)."""

REACH = 8
"""Number of neighbours on each side that a context looks at."""

SIZES = 22
"""Number of classes of neighbours by size, two for each doubling."""

SIGNS = 6
"""Number of classes of neighbours by sign: from mixed signs to one sign."""

CHUNK = 1 << 17
"""Number of values of a piece. The stream has a piece's values by context, so this is part of the
format."""

PART = 1 << 15
"""Number of values for which contexts are computed at a time. So few stay in the processor's
cache, which is faster."""


_Tables: TypeAlias = "list[ans.FrequencyTable | None]"
"""The table of each context, None for one that does not occur."""


@dataclass(frozen=True, eq=False)
class ContextPiece:
    """Some values of a pass.

    Attributes:
        where: their positions in the vector, as a slice.
        contexts: context of each value, uint8.
        flips: whether the neighbours are mostly negative. Such a value is coded with the opposite
            sign, so that contexts need no copy for negative neighbours.
    """

    where: slice
    contexts: NDArray[np.uint8]
    flips: NDArray[np.bool_]


def encode_contexts(values: Ints, nested: Callable[[Ints], bytes]) -> bytes:
    """Returns the coded bytes of `values` [n], signed integers.

    Args:
        values: [n].
        nested: function that packs the values of pass 0 and the escaped values.
    """
    fine = len(values) >= FINE_SIZE
    first = nested(first_of(values))
    body = bytearray([int(fine)]) + varint(len(first)) + first
    counts, parts = _counted(values, fine)
    tables = _tables(counts)
    for of_set in tables:
        used = np.array([table is not None for table in of_set])
        body += np.packbits(used, bitorder="little").tobytes()
        for table in of_set:
            body += b"" if table is None else ans.table_bytes(table)

    coder = ans.Coder()
    escaped: list[Ints] = []
    # ANS is a stack: what is encoded last is decoded first.
    for number in reversed(range(len(PASSES))):
        of_set = tables[number if fine else 0]
        models = [table and ans.model_of(table) for table in of_set]
        for part in reversed(parts[number]):
            _encode_piece(coder, part, of_set, models, escaped)
    body += varint(sum(map(len, escaped)))
    if escaped:
        outliers = nested(np.concatenate(escaped[::-1]))
        body += varint(len(outliers)) + outliers
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return bytes(body) + words


def _encode_piece(
    coder: Any,
    sorted_part: tuple[Ints, list[int]],
    tables: _Tables,
    models: list[Any],
    escaped: list[Ints],
) -> None:
    """Encodes a piece, its last context first, and appends its escaped values to `escaped`."""
    folded, ends = sorted_part
    # constriction needs int32.
    symbols = folded.astype(np.int32)
    for context in range(len(tables) - 1, -1, -1):
        table = tables[context]
        model = models[context]
        where = slice(ends[context], ends[context + 1])
        if table is None or model is None or where.start == where.stop:
            continue
        index = symbols[where]
        index -= table.low
        if table.escape:
            # Compared before the subtraction, which may overflow for values far away.
            part = folded[where]
            outside = (part < table.low) | (part > table.low + (table.symbols - 1))
            # A table of nothing but the escape has one symbol without weight.
            if table.codes[0] == ans.ABSENT:
                outside[:] = True
            index[outside] = table.symbols
            if outside.any():
                escaped.append(part[outside])
        coder.encode_reverse(index, model)


def decode_contexts(
    reader: ByteReader, out: Ints, nested: Callable[[ByteReader, Ints], None], place: str
) -> None:
    """Decodes the bytes of `encode_contexts` into `out` [n].

    Args:
        reader: the coded bytes.
        out: receives the values, of the type that was encoded.
        nested: function that unpacks the values of pass 0 and the escaped values.
        place: name of the tensor in errors.

    Raises:
        WireError: if the bytes are invalid.
    """
    fine = reader.byte(f"{place}.contexts")
    if fine > 1 or out.dtype.kind != "i" or out.size < MIN_SIZE:
        fail(f"{place}.contexts", f"got {fine} for {out.size} values of {out.dtype}")
    first = np.empty(-(-out.size // STRIDE), out.dtype)
    nested(reader.part(f"{place}.first"), first)
    out[::STRIDE] = first
    tables = [_read_set(reader, bool(fine), out.dtype, place) for _ in range(_sets(bool(fine)))]
    escaped = np.empty(reader.varint(f"{place}.escapes", out.size), out.dtype)
    if len(escaped):
        nested(reader.part(f"{place}.escapes"), escaped)
    stream = ans.Stream.of(reader, escaped, place)
    for number, offset in enumerate(PASSES):
        of_set = tables[number if fine else 0]
        models = [table and ans.model_of(table) for table in of_set]
        for piece in pieces_of(out, offset, bool(fine)):
            order, ends = _grouped(piece.contexts, len(of_set))
            folded = np.empty(len(order), out.dtype)
            for context, table in enumerate(of_set):
                size = ends[context + 1] - ends[context]
                if not size:
                    continue
                if table is None:
                    fail(f"{place}.used", f"context {context} occurs but has no table")
                part = stream.read(models[context], table, size, out.dtype)
                folded[ends[context] : ends[context + 1]] = part
            values = np.empty_like(folded)
            values[order] = folded
            out[piece.where] = _flipped(values, piece.flips)
    if not stream.finished():
        fail(f"{place}.words", "the stream does not end where the values do")


def context_bits(
    values: Ints, share: float = 1.0, first_layout: BlockClasses | None = None
) -> float:
    """Estimates the bits that `encode_contexts` needs, without coding.

    They are infinite for vectors that are not coded this way: short ones, unsigned ones, and those
    of which more than one value in 32 would be escaped.

    Args:
        values: signed integers [n].
        share: n / size of the full vector, if `values` are a sample of it; see `ans.coded_bits`.
        first_layout: `ans.layout_of` the values of pass 0, if it is known.
    """
    if len(values) < MIN_SIZE * share or values.dtype.kind != "i":
        return math.inf
    if np.count_nonzero((values > LIMIT) | (values < -LIMIT)) * 32 > len(values):
        return math.inf
    fine = len(values) >= FINE_SIZE * share
    counts, _ = _counted(values, fine, keep=False)
    bits = ans.coded_bits(first_of(values), share=share, layout=first_layout)
    bits += float(counts[..., -1].sum()) * ans.escape_bits(values)
    return bits + ans.bits_of(counts.reshape(-1, counts.shape[-1]), share)


def last_bits(values: Ints, share: float = 1.0) -> float:
    """Estimates the bits of the values of the last pass; see `context_bits`."""
    counts, _ = _counted(values, len(values) >= FINE_SIZE * share, PASSES[-1:], keep=False)
    bits = float(counts[..., -1].sum()) * ans.escape_bits(values)
    return bits + ans.bits_of(counts.reshape(-1, counts.shape[-1]), share)


def first_of(values: Ints) -> Ints:
    """Returns the values of pass 0."""
    return np.ascontiguousarray(values[::STRIDE])


def _sets(fine: bool) -> int:
    """Returns the number of sets of tables: one for each pass, or one for all."""
    return len(PASSES) if fine else 1


def _number_of_contexts(fine: bool) -> int:
    return SIZES * SIGNS if fine else SIZES // 2 * 3


def _read_set(reader: ByteReader, fine: bool, dtype: np.dtype, place: str) -> _Tables:
    """Reads which contexts occur, and a table for each of them."""
    size = _number_of_contexts(fine)
    data = np.frombuffer(reader.take(-(-size // 8), f"{place}.used"), np.uint8)
    bits = np.unpackbits(data, bitorder="little")
    if bits[size:].any():
        fail(f"{place}.used", f"got a context beyond {size}")
    return [ans.read_table(reader, dtype, place) if used else None for used in bits[:size]]


def _tables(counts: NDArray[np.int64]) -> list[_Tables]:
    """Returns the tables [set][context] for `counts` [sets, contexts, symbols]."""
    tables: list[_Tables] = []
    for of_set in counts:
        made = ans.trimmed_tables(of_set, 1 - of_set.shape[1] // 2)
        occurs = of_set.any(1)
        tables.append([table if occurs[at] else None for at, table in enumerate(made)])
    return tables


def _counted(
    values: Ints, fine: bool, passes: tuple[int, ...] = PASSES, *, keep: bool = True
) -> tuple[NDArray[np.int64], list[list[tuple[Ints, list[int]]]]]:
    """Counts symbols in each context, and sorts values by context.

    Args:
        values: [n].
        fine: whether contexts are fine.
        passes: offsets of the passes.
        keep: whether to sort the values; only the encoder needs them.

    Returns:
        How often each symbol occurs, int64 [sets, contexts, symbols], where symbol 0 is the value
        -`limit` for [..., 2 * `limit` + 2] and the last symbol stands for all values beyond; and
        for each pass and piece the values by context, and where each context begins among them and
        the last one ends.
    """
    limit, beyond = _limit(values)
    width = 2 * limit + 2
    number = _number_of_contexts(fine)
    counts = np.zeros((_sets(fine), number * width), np.int64)
    parts: list[list[tuple[Ints, list[int]]]] = [[] for _ in passes]
    for at, offset in enumerate(passes):
        for piece in pieces_of(values, offset, fine):
            folded = _flipped(values[piece.where], piece.flips)
            if beyond:
                inside = (folded >= -limit) & (folded <= limit)
                symbols = np.where(inside, folded, limit + 1).astype(np.int32)
            else:
                symbols = folded.astype(np.int32)
            # Symbol and context are combined to one number, so that one pass counts all contexts.
            keys = piece.contexts.astype(np.int32)
            keys *= np.int32(width)
            keys += symbols
            keys += np.int32(limit)
            found = np.bincount(keys.astype(np.intp), minlength=number * width)
            counts[at if fine else 0] += found
            if keep:
                order = np.argsort(piece.contexts, kind="stable")
                sizes = found.reshape(number, width).sum(1)
                parts[at].append((folded[order], [0, *np.cumsum(sizes).tolist()]))
    return counts.reshape(-1, number, width), parts


def _limit(values: Ints) -> tuple[int, bool]:
    """Returns the largest size of a value that has a symbol, and whether some are larger."""
    largest = max(int(values.max()), -int(values.min()))
    return min(largest, LIMIT), largest > LIMIT


def _flipped(values: Ints, flips: NDArray[np.bool_]) -> Ints:
    """Returns the values with the opposite sign where `flips` says so.

    The smallest integer has no opposite; it stays, and so does its escape.
    """
    # -x is (x ^ -1) + 1. Two passes without branches take a tenth of the time of `np.where`.
    ones = flips.view(np.int8)
    flipped: Ints = values ^ -ones
    flipped += ones
    return flipped


def _grouped(contexts: NDArray[np.uint8], number: int) -> tuple[NDArray[np.intp], list[int]]:
    """Returns the order by context, and where each context begins in it and the last one ends."""
    order = np.argsort(contexts, kind="stable")
    counts = np.bincount(contexts, minlength=number)
    return order, [0, *np.cumsum(counts).tolist()]


def pieces_of(values: Ints, offset: int, fine: bool) -> Iterator[ContextPiece]:
    """Yields the pieces of a pass; reads only values of earlier passes.

    A piece is computed when it is asked for, so that `values` may be filled meanwhile.
    """
    stride = 2 * offset
    known = values[::stride]
    number = len(range(offset, len(values), stride))
    table = _contexts_of_sums(fine)
    for start in range(0, number, CHUNK):
        end = min(start + CHUNK, number)
        contexts = np.empty(end - start, np.uint8)
        flips = np.empty(end - start, np.bool_)
        for at in range(start, end, PART):
            stop = min(at + PART, end)
            size, sign = _neighbours(known, at, stop)
            part = slice(at - start, stop - start)
            np.less(sign, 0, out=flips[part])
            row = size.astype(np.int32)
            row *= np.int32(CAP * 8 + 1)
            row += np.abs(sign)
            # numpy reads a table fastest at positions of type intp. Every row is in the table;
            # "clip" lets numpy write into `out` without a copy.
            table.take(row.astype(np.intp), out=contexts[part], mode="clip")
        where = slice(offset + start * stride, offset + (end - 1) * stride + 1, stride)
        yield ContextPiece(where, contexts, flips)


def _neighbours(known: Ints, start: int, end: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Returns weighted sums of the sizes, and of the values, of the neighbours of each gap.

    Gap j is between known[j] and known[j + 1]. Sizes: the nearest neighbour on each side counts 14
    times, the next three 3 times, and four more once. Values: 3 times and, the next ones, once.
    """
    number = end - start
    part = np.zeros(number + 2 * REACH - 1, np.int16)
    low = start - REACH + 1
    inside = known[max(low, 0) : end + REACH]
    at = max(low, 0) - low
    capped = np.minimum(inside, inside.dtype.type(CAP))
    part[at : at + len(inside)] = np.maximum(capped, inside.dtype.type(-CAP), out=capped)
    # Sums over 2, 4 and 8 neighbouring values that begin at each value.
    sizes = np.abs(part)
    two = sizes[:-1] + sizes[1:]
    four = two[:-2] + two[2:]
    eight = four[:-4] + four[4:]
    size = two[7 : 7 + number] * np.int16(11)
    size += eight[4 : 4 + number] * np.int16(2)
    size += eight[:number]
    size += eight[8 : 8 + number]
    pair = part[:-1] + part[1:]
    sign = pair[7 : 7 + number] * np.int16(2)
    sign += pair[6 : 6 + number]
    sign += pair[8 : 8 + number]
    return size, sign


@cache
def _contexts_of_sums(fine: bool) -> NDArray[np.uint8]:
    """Returns the context for each weighted sum of sizes and each |weighted sum of values|.

    It is flat: a row for each sum of sizes. One look-up here takes half the time of two, in a table
    of classes and in `_context_table`.
    """
    contexts: NDArray[np.uint8] = _context_table(fine)[_size_classes()].reshape(-1)
    return contexts


@cache
def _size_classes() -> NDArray[np.uint8]:
    """Returns the class of each weighted sum of sizes: floor(2 * log2(sum + 1))."""
    sums = [(s + 1) ** 2 for s in range(CAP * (2 * 11 + 8 * 2 + 16) + 1)]
    # bit_length of the square is floor(2 * log2) + 1, by integers alone.
    return np.array([square.bit_length() - 1 for square in sums], np.uint8)


@cache
def _context_table(fine: bool) -> NDArray[np.uint8]:
    """Returns the context for each class of sizes and each |weighted sum of values|.

    A class by sign is the ratio of both sums, rounded. The middle of a class of sizes is taken as
    3/4 of its upper end, which is 2^((class + 1) / 2), squared here to stay with integers.
    """
    table = np.zeros((SIZES, CAP * 8 + 1), np.uint8)
    for size in range(SIZES):
        for total in range(table.shape[1]):
            # The largest k with (2k - 1) * middle <= 54 * total, compared by squares.
            k = 0
            middle = 9 * 2 ** (size + 1)
            while k < SIGNS - 1 and (2 * k + 1) ** 2 * middle <= 16 * (54 * total) ** 2:
                k += 1
            if fine:
                table[size, total] = size * SIGNS + k
            else:
                table[size, total] = size // 2 * 3 + min((k + 1) // 2, 2)
    return table
