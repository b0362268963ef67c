"""Entropy coding of whole numbers: blocks in classes of like activity, a frequency table each, one ANS stream.

ANS: J. Duda, "Asymmetric numeral systems" (2013), by the library constriction. Both ends must hold identical models,
so a table travels as logarithms in eighths of a bit that turn into whole weights by shifts alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import constriction  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from fedpress.wire.classes import MAX_CLASSES, Ints, Plan, plan, smallest_width
from fedpress.wire.reader import Reader, fail, varint, zigzag

Coder: Any = constriction.stream.stack.AnsCoder
Categorical: Any = constriction.stream.model.Categorical

MAX_SYMBOLS = 4096
MAX_ROWS = 16
CHUNK = 1 << 16  # symbols decoded at a time: bounds memory and stays in the cache
ABSENT = 255  # the code of a symbol that does not occur
ESCAPE_BYTES = 5  # about what an escaped value costs
EIGHTHS = np.array([round(2 ** (30 - i / 8)) for i in range(8)], np.int64)
WEIGHTS = np.array(
    [max(int(EIGHTHS[c % 8]) >> (c // 8), 1) for c in range(ABSENT)] + [0], np.float64
)


@dataclass(frozen=True, eq=False)
class Table:
    """The symbols `low`, `low + 1`, ... with their `codes` (uint8), the last of which is the escape if there is one."""

    low: int
    codes: NDArray[np.uint8]
    escape: bool

    @property
    def symbols(self) -> int:
        """Number of symbols without the escape."""
        return len(self.codes) - self.escape

    def model(self) -> Any:
        """The model for two or more symbols."""
        return Categorical(WEIGHTS[self.codes], perfect=False)


def encode(values: Ints, rows: int, nested: Callable[[Ints], bytes]) -> bytes:
    """Returns the coded bytes of `values` [n], seen as `rows` rows that have tables of their own.

    Args:
        values: whole numbers within 64 bits.
        rows: a divisor of n, at most `MAX_ROWS`.
        nested: codes the class numbers and the escaped values.
    """
    window = _window(values)
    matrix = window.symbols.reshape(rows, -1)
    layout = plan(matrix, window.center)
    body = bytearray([rows, layout.count])
    if layout.count > 1:
        body += _coded_ids(layout, nested)
    outside = values.reshape(rows, -1)
    parts, escaped = [], []
    for part, source in zip(_parts(matrix, layout), _parts(outside, layout), strict=True):
        symbols = part()
        counts = _histogram(symbols, window.size + 1)
        table = _table(counts, window.low, window.size)
        index = symbols.astype(np.int32)
        index -= table.low - window.low
        if table.escape:
            wrong = (index < 0) | (index >= table.symbols)
            index[wrong] = table.symbols
            escaped.append(source()[wrong])
        parts.append((table, index))
    coder = Coder()
    for table, index in reversed(parts):
        if len(table.codes) > 1:
            coder.encode_reverse(index, table.model())
    for table, _ in parts:
        body += zigzag(table.low) + varint(2 * table.symbols + table.escape) + _coded_codes(table)
    outliers = nested(np.concatenate(escaped)) if escaped else b""
    count = sum(map(len, escaped))
    body += varint(count) + (varint(len(outliers)) + outliers if count else b"")
    coded: bytes = coder.get_compressed().astype("<u4").tobytes()
    return bytes(body) + coded


def estimate(values: Ints, rows: int = 1, share: float = 1.0) -> float:
    """Returns about how many bits `encode` needs for `values` [n]: its plan and its tables, without coding.

    `share` below 1 says that `values` are a sample of that size: what tables cost counts by as much.
    """
    if not len(values):
        return 0.0
    window = _window(values)
    matrix = window.symbols.reshape(rows, -1)
    layout = plan(matrix, window.center, share)
    bits = share * 8.0 * 12
    if layout.count > 1:
        ids = layout.ids.astype(np.int64)
        delta = np.diff(ids, prepend=0) % layout.count
        bits += min(_entropy(np.bincount(ids)), _entropy(np.bincount(delta)))
    width = window.size + 1
    for row in matrix:
        whole = row.size // layout.width
        keyed = row.astype(np.intp)
        keyed[: whole * layout.width].reshape(whole, -1)[:] += (
            layout.ids[:whole].astype(np.intp) * width
        )[:, None]
        keyed[whole * layout.width :] += int(layout.ids[-1]) * width
        counts = np.bincount(keyed, minlength=width * layout.count).reshape(-1, width)
        bits += _bits_of(counts, share) + int(counts[:, window.size].sum()) * 8 * ESCAPE_BYTES
    return bits


def _bits_of(counts: NDArray[np.int64], share: float) -> float:
    """Bits of symbols with these `counts` [tables, symbols] and of their tables, of which `share` counts."""
    used = counts > 0
    occurring = counts[used]
    totals = np.broadcast_to(counts.sum(1)[:, None], counts.shape)[used]
    # a sample has too small an entropy, by about half a nat a symbol of the alphabet (Miller 1955)
    bits = occurring @ np.log2(totals / occurring) + (1 - share) * len(occurring) / (2 * np.log(2))
    number = used.sum(1)
    spans = np.where(number > 0, used.shape[1] - used.argmax(1) - used[:, ::-1].argmax(1), 1)
    return float(bits + share * 8 * (np.minimum(spans, ESCAPE_BYTES * number) + 3).sum())


def decode(reader: Reader, out: Ints, nested: Callable[[Reader, Ints], None], place: str) -> None:
    """Fills `out` [n] from what `encode` made; takes no more memory than a few chunks.

    Raises:
        WireError: naming `place`, if the bytes are not what `encode` could have made.
    """
    rows = reader.byte(f"{place}.rows")
    if not 1 <= rows <= MAX_ROWS or out.size % rows:
        fail(
            f"{place}.rows",
            f"got {rows} for {out.size} values, expected a divisor of at most {MAX_ROWS}",
        )
    matrix = out.reshape(rows, -1)
    layout = _read_ids(reader, *matrix.shape, nested, place)
    tables = [_read_table(reader, out.dtype, place) for _ in range(layout.count * rows)]
    escaped = np.empty(reader.varint(f"{place}.escapes", out.size), out.dtype)
    if len(escaped):
        nested(reader.part(f"{place}.escapes"), escaped)
    words = reader.take(reader.left, f"{place}.words")
    if len(words) % 4 or (len(words) and not any(words[-4:])):
        fail(f"{place}.words", f"{len(words)} bytes are no whole stream")
    coder = Coder(np.frombuffer(words, "<u4").astype(np.uint32))
    used = 0
    groups = layout.groups(matrix.shape[1] // layout.width)
    for at, table in enumerate(tables):
        number = at // rows
        used = _decode_part(
            coder, table, matrix[at % rows], layout, number, groups[number], escaped, used, place
        )
    if used != len(escaped) or not coder.is_empty():
        fail(f"{place}.words", "the stream does not end where the values do")


@dataclass(frozen=True, eq=False)
class _Window:
    """Values as symbols: `low` is 0, and `size` stands for everything outside."""

    symbols: Ints
    low: int
    size: int
    center: int


def _window(values: Ints) -> _Window:
    low, high = int(values.min()), int(values.max())
    sample = values[:: max(1, len(values) // 4096)]
    center = int(np.partition(sample, len(sample) // 2)[len(sample) // 2])
    if high - low < MAX_SYMBOLS - 1:
        kind = np.uint8 if high - low < 255 else np.uint16
        size = high - low + 1
        # wraps around within the type, where the difference is the same
        symbols = values.view(f"u{values.itemsize}") - np.array(low).astype(values.dtype).view(
            f"u{values.itemsize}"
        )
        return _Window(symbols.astype(kind), low, size, center - low)
    size = MAX_SYMBOLS - 1
    start = min(max(center - size // 2, low), high - size + 1)
    inside = (values >= start) & (values <= start + size - 1)
    shifted = np.where(inside, values, values.dtype.type(start)).astype(np.int64) - start
    return _Window(np.where(inside, shifted, size).astype(np.uint16), start, size, center - start)


def _parts(matrix: Ints, layout: Plan) -> list[Callable[[], Ints]]:
    """One function for each class and row that gathers its values, in the order of the stream."""
    whole = matrix.shape[1] // layout.width
    groups = layout.groups(whole)

    def gather(row: Ints, number: int) -> Ints:
        if layout.count == 1:
            return row
        blocks = (
            row[: whole * layout.width].reshape(whole, layout.width)[groups[number]].reshape(-1)
        )
        if len(layout.ids) > whole and layout.ids[-1] == number:
            blocks = np.concatenate([blocks, row[whole * layout.width :]])
        return blocks

    return [partial(gather, row, number) for number in range(layout.count) for row in matrix]


def _histogram(symbols: Ints, size: int) -> NDArray[np.int64]:
    if symbols.dtype != np.uint8 or len(symbols) < 1 << 16:
        return np.bincount(symbols, minlength=size)
    # half as many, wider symbols: two values are counted at once
    even = len(symbols) // 2 * 2
    pairs = np.bincount(symbols[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: NDArray[np.int64] = pairs.sum(0) + pairs.sum(1)
    counts[symbols[even:]] += 1  # at most one
    return counts[:size]


def _table(counts: NDArray[np.int64], low: int, size: int) -> Table:
    """Cuts the rare ends off where escapes cost less than table entries and turns counts into codes."""
    inner = counts[:size]
    used = np.flatnonzero(inner)
    if not len(used):  # all of them lie outside
        return Table(low, np.array([ABSENT, 0], np.uint8), True)
    first, last = int(used[0]), int(used[-1]) + 1
    first = first + _cheapest(inner[first:last])
    last = last - _cheapest(inner[first:last][::-1])
    out = int(counts.sum() - inner[first:last].sum())
    kept = inner[first:last]
    if out:
        kept = np.append(kept, out)
    with np.errstate(divide="ignore"):
        codes = np.minimum(np.rint(8 * np.log2(kept.max() / kept)), ABSENT - 1)
    return Table(low + first, np.where(kept > 0, codes, ABSENT).astype(np.uint8), out > 0)


def _cheapest(counts: NDArray[np.int64]) -> int:
    """Returns how many entries at the front are better escaped than listed."""
    saved = np.arange(len(counts)) - ESCAPE_BYTES * (np.cumsum(counts) - counts)
    return int(saved.argmax())


def _entropy(counts: NDArray[np.integer]) -> float:
    used = counts[counts > 0].astype(np.float64)
    return float(used @ np.log2(used.sum() / used))


def _coded_ids(layout: Plan, nested: Callable[[Ints], bytes]) -> bytes:
    delta = np.mod(np.diff(layout.ids.astype(np.int16), prepend=0), layout.count).astype(np.uint8)
    options = [nested(layout.ids), nested(delta)]
    smaller = int(len(options[1]) < len(options[0]))
    return varint(2 * layout.width + smaller) + varint(len(options[smaller])) + options[smaller]


def _read_ids(
    reader: Reader, rows: int, columns: int, nested: Callable[[Reader, Ints], None], place: str
) -> Plan:
    count = reader.byte(f"{place}.classes")
    if not 1 <= count <= MAX_CLASSES:
        fail(f"{place}.classes", f"got {count}, expected 1 to {MAX_CLASSES}")
    if count == 1:
        return Plan(max(columns, 1), 1, np.zeros(1, np.uint8))
    width, delta = divmod(reader.varint(f"{place}.block", 2 * max(columns, 1) + 1), 2)
    if not smallest_width(rows) <= width <= columns:
        fail(f"{place}.block", f"got {width}, expected {smallest_width(rows)} to {columns}")
    ids: NDArray[np.uint8] = np.empty(-(-columns // width), np.uint8)
    nested(reader.part(f"{place}.classes"), ids)
    if delta:
        ids = np.mod(np.cumsum(ids, dtype=np.int64), count).astype(np.uint8)
    if ids.size and int(ids.max()) >= count:
        fail(f"{place}.classes", f"got class {ids.max()} of {count}")
    return Plan(width, count, ids)


def _coded_codes(table: Table) -> bytes:
    return table.codes.tobytes() if len(table.codes) > 1 else b""


def _read_table(reader: Reader, dtype: np.dtype, place: str) -> Table:
    low = reader.zigzag(f"{place}.low")
    symbols, escape = divmod(reader.varint(f"{place}.symbols", 2 * MAX_SYMBOLS + 1), 2)
    if not symbols:
        fail(f"{place}.symbols", "got 0, expected at least 1")
    limits = np.iinfo(dtype)
    if low < limits.min or low + symbols - 1 > limits.max:
        fail(f"{place}.low", f"{symbols} symbols from {low} on do not fit {dtype}")
    if symbols + escape == 1:
        return Table(low, np.zeros(1, np.uint8), False)
    codes = np.frombuffer(reader.take(symbols + escape, f"{place}.codes"), np.uint8)
    if codes.min() == ABSENT:
        fail(f"{place}.codes", "no symbol occurs")
    return Table(low, codes, bool(escape))


def _decode_part(
    coder: Any,
    table: Table,
    row: Ints,
    layout: Plan,
    number: int,
    mine: NDArray[np.intp],
    escaped: Ints,
    used: int,
    place: str,
) -> int:
    """Fills the blocks of one class in one row; returns how many escaped values are used up."""
    model = table.model() if len(table.codes) > 1 else None

    def next_values(size: int) -> Ints:
        nonlocal used
        if model is None:
            return np.full(size, table.low, row.dtype)
        index = coder.decode(model, size)
        if not table.escape:
            return _shifted(index, table.low, row.dtype)
        wrong = index == table.symbols
        count = int(np.count_nonzero(wrong))
        if count > len(escaped) - used:
            fail(f"{place}.escapes", f"more than the {len(escaped)} announced")
        index[wrong] = 0
        values = _shifted(index, table.low, row.dtype)
        values[wrong] = escaped[used : used + count]
        used += count
        return values

    if layout.count == 1:
        for at in range(0, row.size, CHUNK):
            row[at : at + CHUNK] = next_values(min(CHUNK, row.size - at))
        return used
    width, whole = layout.width, row.size // layout.width
    blocks = row[: whole * width].reshape(whole, width)
    step = max(CHUNK // width, 1)
    for at in range(0, len(mine), step):
        some = mine[at : at + step]
        blocks[some] = next_values(len(some) * width).reshape(-1, width)
    if len(layout.ids) > whole and layout.ids[-1] == number:
        row[whole * width :] = next_values(row.size - whole * width)
    return used


def _shifted(index: NDArray[np.int32], low: int, dtype: np.dtype) -> Ints:
    values = index.astype(dtype)
    values += np.array(low).astype(
        dtype
    )  # wraps around within the type; the reader checked the range
    return values
