"""Codes integers by their frequencies (ANS), with a frequency table for each class of blocks.

ANS is asymmetric numeral systems (Duda 2013, arXiv:1311.2540); the library constriction does the
coding. A block has neighbouring values of a vector; blocks with similar values form a class (see
`classes`). A symbol is the position of a value in a range: in the range from -3 on, -3 has symbol
0. Writer and reader need identical probabilities of symbols. So a table is sent as logarithms in
eighths of a bit, which become integer weights by bit shifts only; floating-point logarithms could
differ between machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import constriction  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from fedpress.wire.classes import MAX_CLASSES, BlockClasses, Ints, choose_classes, smallest_width
from fedpress.wire.reader import ByteReader, fail, varint, zigzag

Coder: Any = constriction.stream.stack.AnsCoder
Categorical: Any = constriction.stream.model.Categorical

MAX_SYMBOLS = 4096
"""Limit of the number of symbols of a table. A value outside of the table's range is escaped: it is
coded as the escape symbol, and sent separately."""

MAX_ROWS = 16
"""Limit of the number of rows of a tensor; each row has its own tables."""

CHUNK = 1 << 16
"""Symbols decoded at a time, to bound memory and to stay in the processor's cache."""

ABSENT = 255
"""The code of a symbol that does not occur (see `FrequencyTable.codes`)."""

ESCAPE_BYTES = 2
"""Estimated size of an escaped value, in bytes: most are packed in one or two."""

EIGHTHS = np.array([round(2 ** (30 - i / 8)) for i in range(8)], np.int64)
"""Weights (relative frequencies) of the codes 0 to 7: 2^30 down to 2^(30 - 7/8)."""


def _weight(code: int) -> int:
    # At least 1, because a symbol that occurs needs a probability above 0.
    return max(int(EIGHTHS[code % 8]) >> (code // 8), 1)


WEIGHTS = np.array([*map(_weight, range(ABSENT)), 0], np.float64)
"""The weight of each code, as FORMAT.md defines it."""


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """The frequencies of the symbols in one class and row.

    Attributes:
        low: the value of the first symbol; the next symbol is `low` + 1, and so on.
        codes: code of each symbol, uint8: 8 * log2(largest frequency / its frequency), rounded;
            `ABSENT` if the symbol does not occur. If there is an escape symbol, the last code
            belongs to it.
        escape: whether there is an escape symbol, which represents all other values.
    """

    low: int
    codes: NDArray[np.uint8]
    escape: bool

    @property
    def symbols(self) -> int:
        """Number of symbols without the escape."""
        return len(self.codes) - self.escape

    def model(self) -> Any:
        """Returns the probability model for constriction; needs two or more symbols."""
        return Categorical(WEIGHTS[self.codes], perfect=False)


def encode_ints(values: Ints, rows: int, nested: Callable[[Ints], bytes]) -> bytes:
    """Returns the coded bytes of `values` [n].

    Args:
        values: whole numbers within 64 bits.
        rows: number of rows, each with its own tables; a divisor of n, at most `MAX_ROWS`.
        nested: function that packs class numbers and escaped values.
    """
    window = _window(values)
    matrix = window.symbols.reshape(rows, -1)
    layout = choose_classes(matrix, window.center)
    body = bytearray([rows, layout.count])
    if layout.count > 1:
        body += _coded_ids(layout, nested)

    originals = values.reshape(rows, -1)
    coded = []
    escaped = []
    parts = zip(
        _tables(matrix, layout, window),
        _parts(matrix, layout),
        _parts(originals, layout),
        strict=True,
    )
    for table, part, original in parts:
        symbols = part()
        # constriction needs int32.
        index = symbols.astype(np.int32)
        index -= table.low - window.low
        if table.escape:
            outside = (index < 0) | (index >= table.symbols)
            index[outside] = table.symbols
            escaped.append(original()[outside])
        coded.append((table, index))

    coder = Coder()
    # ANS is a stack: what is encoded last is decoded first.
    for table, index in reversed(coded):
        if len(table.codes) > 1:
            coder.encode_reverse(index, table.model())

    for table, _ in coded:
        body += table_bytes(table)
    count = sum(map(len, escaped))
    body += varint(count)
    if count:
        outliers = nested(np.concatenate(escaped))
        body += varint(len(outliers)) + outliers
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return bytes(body) + words


def layout_of(values: Ints, rows: int = 1, share: float = 1.0) -> BlockClasses:
    """Returns the blocks and classes that `encode_ints` chooses; see `coded_bits`."""
    window = _window(values)
    return choose_classes(window.symbols.reshape(rows, -1), window.center, share)


def coded_bits(
    values: Ints, rows: int = 1, share: float = 1.0, layout: BlockClasses | None = None
) -> float:
    """Estimates the bits that `encode_ints` needs, from classes and tables without coding.

    Args:
        values: whole numbers [n].
        rows: as in `encode_ints`.
        share: n / size of the full vector, if `values` are a sample of it. Tables are sent once
            per vector, so only this share of their bits counts.
        layout: blocks and classes, if they are known.
    """
    if not len(values):
        return 0.0
    window = _window(values)
    matrix = window.symbols.reshape(rows, -1)
    if layout is None:
        layout = choose_classes(matrix, window.center, share)
    # The other fields take about twelve bytes.
    bits = share * 8.0 * 12
    if layout.count > 1:
        ids = layout.ids.astype(np.int64)
        delta = np.diff(ids, prepend=0) % layout.count
        bits += min(_entropy(np.bincount(ids)), _entropy(np.bincount(delta)))
    for row in matrix:
        counts = _counts_by_class(row, layout, window.size + 1)
        escapes = int(counts[:, window.size].sum())
        bits += bits_of(counts, share) + escapes * escape_bits(values)
    return bits


def escape_bits(values: Ints) -> int:
    """Estimates the bits of an escaped value: those of a number between the extremes, or more."""
    return max(8 * ESCAPE_BYTES, (int(values.max()) - int(values.min())).bit_length() + 1)


def _counts_by_class(row: Ints, layout: BlockClasses, width: int) -> NDArray[np.int64]:
    """Returns how often each of `width` symbols occurs in each class, int64 [classes, width]."""
    whole = row.size // layout.width
    in_blocks = row[: whole * layout.width].reshape(whole, -1)
    offsets = (layout.ids.astype(np.intp) * width)[:, None]
    size = width * layout.count
    # Symbol and class are combined to one number, so that one pass counts all classes; in pieces
    # that stay in the processor's cache.
    counts = np.bincount(row[whole * layout.width :] + offsets[-1], minlength=size)
    piece = max(CHUNK // layout.width, 1)
    for at in range(0, whole, piece):
        keys = in_blocks[at : at + piece] + offsets[at : min(at + piece, whole)]
        counts += np.bincount(keys.reshape(-1), minlength=size)
    return counts.reshape(-1, width)


def bits_of(counts: NDArray[np.int64], share: float) -> float:
    """Estimates the bits of all symbols and their tables.

    Args:
        counts: how often each symbol occurs, int64 [tables, symbols].
        share: share of the tables' bits that counts.
    """
    used = counts > 0
    occurring = counts[used]
    totals = np.broadcast_to(counts.sum(1)[:, None], counts.shape)[used]
    # The entropy of a sample is too small by about half a nat for each symbol that occurs (Miller
    # 1955).
    correction = (1 - share) * len(occurring) / (2 * np.log(2))
    bits = occurring @ np.log2(totals / occurring) + correction
    # A table lists all symbols between the first and the last, or escapes some of them.
    number = used.sum(1)
    length = used.shape[1] - used.argmax(1) - used[:, ::-1].argmax(1)
    # One with a single symbol is two bytes long.
    tables = np.where(number > 1, np.minimum(length, ESCAPE_BYTES * number) + 3, 2 * number)
    return float(bits + share * 8 * tables.sum())


def decode_ints(
    reader: ByteReader, out: Ints, nested: Callable[[ByteReader, Ints], None], place: str
) -> None:
    """Decodes the bytes of `encode_ints` into `out` [n], with little extra memory.

    Args:
        reader: the coded bytes.
        out: receives the values, of the type that was encoded.
        nested: function that unpacks class numbers and escaped values.
        place: name of the tensor in errors.

    Raises:
        WireError: if the bytes are invalid.
    """
    rows = reader.byte(f"{place}.rows")
    if not 1 <= rows <= MAX_ROWS or out.size % rows:
        fail(
            f"{place}.rows",
            f"got {rows} for {out.size} values, expected a divisor of at most {MAX_ROWS}",
        )
    matrix = out.reshape(rows, -1)
    layout = _read_ids(reader, *matrix.shape, nested, place)
    tables = [read_table(reader, out.dtype, place) for _ in range(layout.count * rows)]
    escaped = np.empty(reader.varint(f"{place}.escapes", out.size), out.dtype)
    if len(escaped):
        nested(reader.part(f"{place}.escapes"), escaped)
    stream = Stream.of(reader, escaped, place)
    blocks_of = layout.groups(matrix.shape[1] // layout.width)
    for at, table in enumerate(tables):
        number = at // rows
        _decode_part(stream, table, matrix[at % rows], layout, number, blocks_of[number])
    if not stream.finished():
        fail(f"{place}.words", "the stream does not end where the values do")


class Stream:
    """Reads values from an ANS stream, and escaped values from their list."""

    def __init__(self, coder: Any, escaped: Ints, place: str) -> None:
        self._coder = coder
        self._escaped = escaped
        self._place = place
        self._used = 0

    @classmethod
    def of(cls, reader: ByteReader, escaped: Ints, place: str) -> Stream:
        """Returns the stream of all bytes that are left; `WireError` if they are not complete."""
        # The stream is the last field and takes all remaining bytes.
        words = reader.take(reader.left, f"{place}.words")
        # The coder refuses a stream that ends in a zero word.
        if len(words) % 4 or (len(words) and not any(words[-4:])):
            fail(f"{place}.words", f"{len(words)} bytes are not a complete stream")
        return cls(Coder(np.frombuffer(words, "<u4").astype(np.uint32)), escaped, place)

    def finished(self) -> bool:
        """Returns whether all words and all escaped values were used."""
        return self._used == len(self._escaped) and bool(self._coder.is_empty())

    def read(self, model: Any, table: FrequencyTable, size: int, dtype: np.dtype) -> Ints:
        """Returns the next values of one class and row.

        Args:
            model: `table.model()`; None if the table has a single symbol.
            table: the frequency table of the class and row.
            size: number of values.
            dtype: type of the values.
        """
        # A single symbol needs no bits.
        if model is None:
            return np.full(size, table.low, dtype)
        index = self._coder.decode(model, size)
        if not table.escape:
            return _shifted(index, table.low, dtype)
        outside = index == table.symbols
        count = int(np.count_nonzero(outside))
        if count > len(self._escaped) - self._used:
            fail(f"{self._place}.escapes", f"more values than the {len(self._escaped)} announced")
        index[outside] = 0
        values = _shifted(index, table.low, dtype)
        values[outside] = self._escaped[self._used : self._used + count]
        self._used += count
        return values


@dataclass(frozen=True, eq=False)
class _Window:
    """Values as symbols.

    A value in the range of `size` values from `low` on has the symbol value - low. All other values
    have the symbol `size`.

    Attributes:
        symbols: the symbol of each value, uint8 or uint16 [n].
        low: the value of symbol 0.
        size: number of values in the range.
        center: the symbol of the approximate median.
    """

    symbols: Ints
    low: int
    size: int
    center: int


def _window(values: Ints) -> _Window:
    """Chooses a range of at most `MAX_SYMBOLS` - 1 values, and converts values to symbols."""
    low = int(values.min())
    high = int(values.max())
    sample = values[:: max(1, len(values) // 4096)]
    center = int(np.partition(sample, len(sample) // 2)[len(sample) // 2])
    if high - low < MAX_SYMBOLS - 1:
        kind = np.uint8 if high - low < 255 else np.uint16
        unsigned = f"u{values.itemsize}"
        # Unsigned arithmetic modulo 2^n gives the right difference even if it overflows.
        symbols = values.view(unsigned) - np.array(low).astype(values.dtype).view(unsigned)
        return _Window(symbols.astype(kind), low, high - low + 1, center - low)

    size = MAX_SYMBOLS - 1
    start = min(max(center - size // 2, low), high - size + 1)
    inside = (values >= start) & (values <= start + size - 1)
    # Values outside are replaced first, because their differences might overflow.
    shifted = np.where(inside, values, values.dtype.type(start)).astype(np.int64) - start
    return _Window(np.where(inside, shifted, size).astype(np.uint16), start, size, center - start)


def _parts(matrix: Ints, layout: BlockClasses) -> list[Callable[[], Ints]]:
    """Returns one function for each class and row, in the order of the stream.

    The function gathers the values of this class and row. Arrays would take more memory; with
    functions only one part is in memory at a time.
    """
    whole = matrix.shape[1] // layout.width
    groups = layout.groups(whole)

    def gather(row: Ints, number: int) -> Ints:
        if layout.count == 1:
            return row
        in_blocks = row[: whole * layout.width].reshape(whole, layout.width)
        blocks = in_blocks[groups[number]].reshape(-1)
        # The last block may be shorter than the others.
        if len(layout.ids) > whole and layout.ids[-1] == number:
            blocks = np.concatenate([blocks, row[whole * layout.width :]])
        return blocks

    return [partial(gather, row, number) for number in range(layout.count) for row in matrix]


def _tables(matrix: Ints, layout: BlockClasses, window: _Window) -> Iterator[FrequencyTable]:
    """Yields the table of each class and row, in the order of the stream."""
    width = window.size + 1
    counts = np.empty((layout.count, len(matrix), width), np.int64)
    for at, row in enumerate(matrix):
        if layout.count == 1:
            counts[0, at] = _histogram(row, width)
        else:
            counts[:, at] = _counts_by_class(row, layout, width)
    # Many at once, because a call for each table takes longer than the coding of a short part; but
    # not all at once, to bound memory.
    of_parts = counts.reshape(-1, width)
    step = max(CHUNK // width, 1)
    for start in range(0, len(of_parts), step):
        yield from trimmed_tables(of_parts[start : start + step], window.low)


def trimmed_tables(counts: NDArray[np.int64], low: int) -> Iterator[FrequencyTable]:
    """Yields the table of each row of `counts`.

    Rare symbols at both ends are left out if escaping them takes fewer bytes than table entries.

    Args:
        counts: how often each symbol occurs [tables, symbols + 1]; the last column counts values
            outside of the window.
        low: the value of symbol 0.
    """
    inner = counts[:, :-1]
    size = inner.shape[1]
    at = np.arange(size)
    # A table of the symbols from a to b - 1 has b - a entries of one byte, and saves the escapes of
    # these symbols. So it is best where worth[b] - worth[a] is largest.
    worth = np.zeros((len(inner), size + 1), np.int64)
    np.cumsum(inner, axis=1, out=worth[:, 1:])
    worth *= ESCAPE_BYTES
    worth -= np.arange(size + 1)
    gain = worth[:, 1:] - np.minimum.accumulate(worth[:, :-1], axis=1)
    last = gain.argmax(1)[:, None] + 1
    most = np.iinfo(np.int64).max
    first = np.where(at < last, worth[:, :-1], most).argmin(1)[:, None]

    kept = np.where((at >= first) & (at < last), inner, 0)
    escapes = counts.sum(1) - kept.sum(1)
    codes = _codes(np.concatenate([kept, escapes[:, None]], 1))
    occurs = inner.sum(1) > 0
    for number, row in enumerate(codes):
        start = int(first[number, 0])
        end = int(last[number, 0])
        if not occurs[number]:
            # All values of this part are outside of the window.
            yield FrequencyTable(low, np.array([ABSENT, 0], np.uint8), True)
        elif escapes[number]:
            yield FrequencyTable(low + start, np.append(row[start:end], row[size]), True)
        else:
            yield FrequencyTable(low + start, row[start:end], False)


def _codes(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns the code of each symbol (see `FrequencyTable.codes`) for tables [n, symbols]."""
    # The maxima avoid 0 / 0 for symbols, and tables, that do not occur.
    ratios = np.maximum(counts.max(1, keepdims=True), 1) / np.maximum(counts, 1)
    codes: NDArray[np.uint8] = np.minimum(np.rint(8 * np.log2(ratios)), ABSENT - 1).astype(np.uint8)
    codes[counts == 0] = ABSENT
    return codes


def _histogram(symbols: Ints, size: int) -> NDArray[np.int64]:
    """Returns how often each of `size` symbols occurs, int64 [size]."""
    if symbols.dtype != np.uint8 or len(symbols) < 1 << 16:
        return np.bincount(symbols, minlength=size)
    # Two neighbouring bytes are counted as one 16-bit symbol, which is faster than counting bytes.
    even = len(symbols) // 2 * 2
    pairs = np.bincount(symbols[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: NDArray[np.int64] = pairs.sum(0) + pairs.sum(1)
    # An odd number of symbols leaves one to be counted.
    counts[symbols[even:]] += 1
    return counts[:size]


def _entropy(counts: NDArray[np.integer]) -> float:
    """Returns the total bits of symbols with these `counts`, by their entropy."""
    used = counts[counts > 0].astype(np.float64)
    return float(used @ np.log2(used.sum() / used))


def _coded_ids(layout: BlockClasses, nested: Callable[[Ints], bytes]) -> bytes:
    """Codes the block size, and the class numbers or their differences, whichever are shorter."""
    # Neighbouring blocks often have the same class; then the differences are mostly zero.
    delta = np.mod(np.diff(layout.ids.astype(np.int16), prepend=0), layout.count).astype(np.uint8)
    options = [nested(layout.ids), nested(delta)]
    smaller = int(len(options[1]) < len(options[0]))
    return varint(2 * layout.width + smaller) + varint(len(options[smaller])) + options[smaller]


def _read_ids(
    reader: ByteReader,
    rows: int,
    columns: int,
    nested: Callable[[ByteReader, Ints], None],
    place: str,
) -> BlockClasses:
    count = reader.byte(f"{place}.classes")
    if not 1 <= count <= MAX_CLASSES:
        fail(f"{place}.classes", f"got {count}, expected 1 to {MAX_CLASSES}")
    if count == 1:
        return BlockClasses(max(columns, 1), 1, np.zeros(1, np.uint8))
    # The lowest bit is 1 if the class numbers are coded as differences.
    width, delta = divmod(reader.varint(f"{place}.block", 2 * max(columns, 1) + 1), 2)
    # With at least 32 values in a block, class numbers take little memory.
    if not smallest_width(rows) <= width <= columns:
        fail(f"{place}.block", f"got {width}, expected {smallest_width(rows)} to {columns}")
    ids: NDArray[np.uint8] = np.empty(-(-columns // width), np.uint8)
    nested(reader.part(f"{place}.classes"), ids)
    if delta:
        ids = np.mod(np.cumsum(ids, dtype=np.int64), count).astype(np.uint8)
    if ids.size and int(ids.max()) >= count:
        fail(f"{place}.classes", f"got class {ids.max()} of {count}")
    return BlockClasses(width, count, ids)


def table_bytes(table: FrequencyTable) -> bytes:
    """Returns the coded table, which `read_table` reads."""
    # A single symbol has probability 1, so its code is not sent.
    codes = table.codes.tobytes() if len(table.codes) > 1 else b""
    return zigzag(table.low) + varint(2 * table.symbols + table.escape) + codes


def model_of(table: FrequencyTable) -> Any:
    """Returns the probability model of a table; None for a single symbol, which needs no bits."""
    return table.model() if len(table.codes) > 1 else None


def read_table(reader: ByteReader, dtype: np.dtype, place: str) -> FrequencyTable:
    """Reads the table of one class or context, for values of type `dtype`.

    Raises:
        WireError: if it is invalid.
    """
    low = reader.zigzag(f"{place}.low")
    symbols, escape = divmod(reader.varint(f"{place}.symbols", 2 * MAX_SYMBOLS + 1), 2)
    if not symbols:
        fail(f"{place}.symbols", "got 0, expected at least 1")
    limits = np.iinfo(dtype)
    if low < limits.min or low + symbols - 1 > limits.max:
        fail(f"{place}.low", f"{symbols} symbols from {low} on do not fit {dtype}")
    if symbols + escape == 1:
        return FrequencyTable(low, np.zeros(1, np.uint8), False)
    codes = np.frombuffer(reader.take(symbols + escape, f"{place}.codes"), np.uint8)
    # A model needs at least one symbol with a weight.
    if codes.min() == ABSENT:
        fail(f"{place}.codes", "no symbol occurs")
    return FrequencyTable(low, codes, bool(escape))


def _decode_part(
    stream: Stream,
    table: FrequencyTable,
    row: Ints,
    layout: BlockClasses,
    number: int,
    blocks_of_class: NDArray[np.intp],
) -> None:
    """Fills the blocks of class `number` in one row."""
    model = model_of(table)
    if layout.count == 1:
        for at in range(0, row.size, CHUNK):
            size = min(CHUNK, row.size - at)
            row[at : at + CHUNK] = stream.read(model, table, size, row.dtype)
        return

    width = layout.width
    whole = row.size // width
    blocks = row[: whole * width].reshape(whole, width)
    step = max(CHUNK // width, 1)
    for at in range(0, len(blocks_of_class), step):
        some = blocks_of_class[at : at + step]
        blocks[some] = stream.read(model, table, len(some) * width, row.dtype).reshape(-1, width)
    # The last block may be shorter than the others.
    if len(layout.ids) > whole and layout.ids[-1] == number:
        row[whole * width :] = stream.read(model, table, row.size - whole * width, row.dtype)


def _shifted(index: NDArray[np.int32], low: int, dtype: np.dtype) -> Ints:
    values: Ints = index.astype(dtype)
    # Intermediate overflow does no harm; the range of the result was checked by `read_table`.
    values += dtype.type(low)
    return values
