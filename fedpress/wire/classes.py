"""Divides an integer vector into blocks; blocks with similar values share a frequency table.

The entropy coder (`ans`) uses the tables. A model update has large values in one layer and small
values in the next, and often many values of a filter have the same sign. With one table for all
values, coding takes more bits; with a table per block, the tables take more bits. So blocks are
grouped into classes by their mean absolute value, and by mean value / mean absolute value (the
sign). Block size and number of classes are chosen to minimise the estimated bits, including class
numbers and tables.

A symbol is the position of a value in a range of values: in the range from -3 on, -3 has symbol 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]

MAX_CLASSES = 64
"""Limit of the number of classes: 12 magnitudes with up to 5 signs, rounded up."""

MAX_MAGNITUDES = 12
"""Limit of the number of classes by mean absolute value."""

SIGN_CUTS: tuple[tuple[float, ...], ...] = ((), (-0.25, 0.25), (-0.5, -0.15, 0.15, 0.5))
"""Three choices of bounds on mean value / mean absolute value that separate classes by sign."""

BINS = 32
"""Bins of the logarithm of the mean absolute value; classes are ranges of bins."""

MIN_BLOCK = 32
"""Minimum number of values in a block."""

DOUBLINGS = (1, 2, 3, 4, 6)
"""Block sizes that are tried: the minimum block, doubled this many times."""

SIGNED_SIZE = 8
"""Classes by sign are always tried with blocks of the size of this many minimum blocks."""

PIECE = 1 << 15
"""Number of values summed at a time."""

SAMPLE = 1 << 16
"""Number of values from which the bits of a choice of classes are measured."""


@dataclass(frozen=True, eq=False)
class BlockClasses:
    """Blocks of columns, and the class of each block.

    Attributes:
        width: columns of a block; the last block may have fewer.
        count: number of classes.
        ids: the class of each block, uint8 [blocks].
    """

    width: int
    count: int
    ids: NDArray[np.uint8]

    def groups(self, whole: int) -> list[NDArray[np.intp]]:
        """Returns for each class the sorted positions of its blocks.

        Args:
            whole: number of blocks with `width` columns; a shorter last block is left out.
        """
        # A stable sort, because the stream has a class's blocks in the order of the row.
        order = np.argsort(self.ids[:whole], kind="stable")
        ends = np.searchsorted(self.ids[:whole][order], np.arange(1, self.count))
        return np.split(order, ends)


def smallest_width(rows: int) -> int:
    """Returns the columns of a minimum block: `MIN_BLOCK` values in `rows` rows, rounded up."""
    return -(-MIN_BLOCK // rows)


def choose_classes(values: Ints, center: int, share: float = 1.0) -> BlockClasses:
    """Chooses blocks and classes for the columns of `values`.

    Args:
        values: symbols [rows, columns].
        center: the symbol of the median value.
        share: size of `values` / size of the full vector, if `values` are a sample of it. Tables
            are sent once per vector, so only this share of their bits counts.
    """
    rows, columns = values.shape
    one_class = BlockClasses(max(columns, 1), 1, np.zeros(1, np.uint8))
    width = smallest_width(rows)
    # For so short a vector, several tables take more bits than they save.
    if columns // width < 8:
        return one_class
    # Sums of larger blocks are sums over minimum blocks, so the values are read only once.
    sums, signed_sums = _block_sums(values, center, width)
    layouts = []
    for option in _by_magnitude(sums, width, rows, share):
        for cuts in SIGN_CUTS:
            times = option.width // width
            layouts.append(_split_by_sign(option, sums, signed_sums, times, cuts))
    if not layouts:
        return one_class
    # Estimates from mean values are rough, so the remaining choices are measured.
    chosen = min(layouts, key=lambda layout: _measured_bits(values, layout, share))
    if chosen.count == 1:
        return one_class
    # Columns after the last full block get the class of that block.
    missing = -(-columns // chosen.width) - len(chosen.ids)
    ids = np.concatenate([chosen.ids, chosen.ids[-1:].repeat(missing)])
    return BlockClasses(chosen.width, chosen.count, ids)


def _by_magnitude(sums: Floats, width: int, rows: int, share: float) -> list[BlockClasses]:
    """Returns up to two choices of classes by mean absolute value, which are later split by sign.

    One choice has the fewest estimated bits. The other has blocks of `SIGNED_SIZE` minimum blocks:
    the estimate ignores signs, and in larger blocks positive and negative values average out.

    Args:
        sums: sum of the absolute values of each minimum block.
        width: columns of a minimum block.
        rows: number of rows.
        share: see `choose_classes`.
    """
    size = width * rows
    mean = np.array(sums.sum() / (len(sums) * size))
    least = float(len(sums) * size * _bits(mean) + share * _table_bits(mean, rows))
    best: BlockClasses | None = None
    options: list[BlockClasses] = []
    for doublings in DOUBLINGS:
        times = 1 << doublings
        whole = len(sums) // times
        if whole < 4:
            break
        cost, ids = _cut(_grouped(sums, times) / (size * times), size * times, rows, share)
        # Scaled up to include the values after the last full block.
        cost *= len(sums) / (whole * times)
        layout = BlockClasses(width * times, int(ids.max()) + 1, ids)
        if times == SIGNED_SIZE:
            options.append(layout)
        if cost < least:
            least = cost
            best = layout
    if best is not None and best not in options:
        options.append(best)
    return options


def _block_sums(values: Ints, center: int, width: int) -> tuple[Floats, Floats]:
    """Returns for each block the sums of |value - center| and of (value - center)."""
    blocks = values.shape[1] // width
    sums = np.zeros(blocks)
    signed_sums = np.zeros(blocks)
    ones = np.ones(width, np.float32)
    # Whole blocks, in pieces that stay in the processor's cache. The sums are exact.
    piece = max(PIECE // width, 1)
    for row in values:
        in_blocks = row[: blocks * width].reshape(blocks, width)
        for at in range(0, blocks, piece):
            away = in_blocks[at : at + piece].astype(np.float32)
            away -= center
            signed_sums[at : at + piece] += away @ ones
            np.abs(away, out=away)
            sums[at : at + piece] += away @ ones
    return sums, signed_sums


def _grouped(sums: Floats, times: int) -> Floats:
    """Returns the sums over groups of `times` neighbouring blocks; drops an incomplete group."""
    whole = len(sums) // times
    grouped: Floats = sums[: whole * times].reshape(whole, times).sum(1)
    return grouped


def _bits(mean: Floats) -> Floats:
    """Estimates the bits of a value by the entropy of a two-sided geometric distribution.

    Args:
        mean: mean absolute value of the distribution.
    """
    mean = np.maximum(mean, 1e-12)
    return (1 + mean) * np.log2(1 + mean) - mean * np.log2(mean) + mean / (1 + mean)


def _table_bits(mean: Floats, rows: int) -> Floats:
    """Estimates the bits of a class's tables: larger values mean more symbols."""
    return 8.0 * rows * (4 + 8 * np.minimum(mean, 100.0))


def _cut(means: Floats, size: int, rows: int, share: float) -> tuple[float, NDArray[np.uint8]]:
    """Divides blocks into classes by their mean absolute value.

    Dynamic programming over bins finds the optimal boundaries.

    Args:
        means: mean absolute value of each block.
        size: values in a block.
        rows: rows of the tensor, each with its own table.
        share: share of the tables' bits that counts.

    Returns:
        Estimated bits, and the class of each block, uint8 [blocks].
    """
    # The added constant keeps the logarithm finite for blocks of zeros.
    logs = np.log2(means + 1 / (4 * size))
    low = float(logs.min())
    high = float(logs.max())
    bins = np.minimum(((logs - low) * (BINS / max(high - low, 1e-9))).astype(np.intp), BINS - 1)
    cost = _costs(means, bins, size, rows, share)

    # reach[b]: the least cost of the bins before b, divided into the current number of classes.
    reach = cost[0]
    steps = []
    every = np.arange(BINS + 1)
    best = float(reach[-1])
    best_count = 1
    for count in range(2, MAX_MAGNITUDES + 1):
        options = reach[:, None] + cost
        step = options.argmin(0)
        steps.append(step)
        reach = options[step, every]
        if reach[-1] < best:
            best = float(reach[-1])
            best_count = count
        elif count > best_count + 1:
            # Two more classes did not help: their tables take more bits than they save.
            break

    cuts = []
    at = BINS
    for count in range(best_count, 1, -1):
        at = int(steps[count - 2][at])
        cuts.append(at)
    # The class of each bin, with classes that have no block left out of the numbering.
    of_bins = np.searchsorted(np.array(cuts[::-1]), every[:BINS], side="right")
    used = np.bincount(of_bins, np.bincount(bins, minlength=BINS)) > 0
    return best, (np.cumsum(used) - 1).astype(np.uint8)[of_bins][bins]


def _costs(
    means: Floats, bins: NDArray[np.intp], size: int, rows: int, share: float
) -> NDArray[np.float64]:
    """Returns a matrix: [a, b] has the bits of a class with the bins from a to b - 1."""
    counts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=BINS))]).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(np.bincount(bins, means, minlength=BINS))])
    number = counts[None, :] - counts[:, None]
    mean = (sums[None, :] - sums[:, None]) / np.maximum(number, 1)
    cost: NDArray[np.float64] = number * size * _bits(mean) + share * _table_bits(mean, rows)
    # The class number of a block takes about the entropy of the classes.
    cost += number * np.log2(len(means) / np.maximum(number, 1))
    # A class must have at least one bin.
    cost[np.tril_indices(BINS + 1)] = np.inf
    return cost


def _split_by_sign(
    layout: BlockClasses, sums: Floats, signed_sums: Floats, times: int, cuts: tuple[float, ...]
) -> BlockClasses:
    """Splits each class by the sign of its blocks' values.

    Args:
        layout: the classes by mean absolute value.
        sums: sum of the absolute values of each minimum block.
        signed_sums: sum of the values of each minimum block.
        times: minimum blocks in a block of `layout`.
        cuts: bounds on mean value / mean absolute value.
    """
    # The lower bound avoids 0 / 0 for blocks of zeros.
    sign = _grouped(signed_sums, times) / np.maximum(_grouped(sums, times), 1e-9)
    ids = layout.ids * np.uint8(len(cuts) + 1)
    for cut in cuts:
        ids += sign > cut
    ids, count = _numbered(ids)
    return BlockClasses(layout.width, count, ids)


def _numbered(ids: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """Renumbers the classes so that none is empty; returns each block's class and their number."""
    used = np.bincount(ids) > 0
    return (np.cumsum(used) - 1).astype(np.uint8)[ids], int(used.sum())


def _measured_bits(values: Ints, layout: BlockClasses, share: float) -> float:
    """Estimates the bits with these classes, from the frequencies in a sample of blocks."""
    whole = len(layout.ids)
    rows = len(values)
    some = min(whole, max(SAMPLE // (layout.width * rows), 1))
    at = np.linspace(0, whole - 1, some).astype(np.intp)
    blocks = values[:, : whole * layout.width].reshape(rows, whole, layout.width)[:, at]
    symbols = int(blocks.max()) + 1
    # Symbol and class are combined to one number, so that one pass counts all classes.
    keys = layout.ids[at].astype(np.intp)[:, None] * symbols + blocks
    counts = np.bincount(keys.reshape(-1), minlength=symbols * layout.count)
    counts = counts.reshape(layout.count, symbols)
    used = counts > 0
    frequencies = counts[used]
    totals = np.broadcast_to(counts.sum(1)[:, None], counts.shape)[used]
    # The second term corrects the entropy of a sample, which is too small (Miller 1955).
    bits = frequencies @ np.log2(totals / frequencies) + used.sum() / (2 * np.log(2))
    tables = 8.0 * rows * (used.sum() + 3 * layout.count)
    number = np.bincount(layout.ids, minlength=layout.count)
    names = number @ np.log2(whole / np.maximum(number, 1))
    return float(bits * values.shape[1] / (some * layout.width) + share * tables + names)
