"""Classes of blocks: parts of an integer vector with similar values share a frequency table.

An update has large values in one layer and small ones in the next, and the values of one filter
mostly have one sign. One table for all would cost bits; a table for every block would cost more. So
blocks share a class if their mean absolute values are similar, and if they lean to the same sign
by a similar degree. Block size and number of classes are those with the fewest estimated bits,
class numbers and tables included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]

MAX_CLASSES = 64
"""Most classes that a reader accepts: 12 activities with up to 5 signs, rounded up."""

ACTIVITIES = 12
"""Most classes by mean absolute value."""

SIGN_CUTS: tuple[tuple[float, ...], ...] = ((), (-0.25, 0.25), (-0.5, -0.15, 0.15, 0.5))
"""Where classes are cut by sign: bounds on mean value / mean absolute value; three choices."""

BINS = 32
"""Steps of the logarithmic scale of activities between which classes are cut."""

SMALLEST = 32
"""Fewest values in a block."""

DOUBLINGS = (1, 2, 3, 4, 6)
"""Block sizes that are tried: the smallest block doubled so many times."""

SIGNED_SIZE = 8
"""A block of this many smallest blocks is always tried for signs."""

SAMPLE = 1 << 16
"""Values from which the bits of a choice of classes are measured."""


@dataclass(frozen=True, eq=False)
class BlockClasses:
    """Blocks of columns and the class of each.

    Attributes:
        width: columns of a block; the last block may have fewer.
        count: number of classes.
        ids: the class of each block, uint8 [blocks].
    """

    width: int
    count: int
    ids: NDArray[np.uint8]

    def groups(self, whole: int) -> list[NDArray[np.intp]]:
        """Returns for each class the numbers of its blocks among the first `whole`, rising."""
        # Stable: the stream has the blocks of a class in their order in the row.
        order = np.argsort(self.ids[:whole], kind="stable")
        ends = np.searchsorted(self.ids[:whole][order], np.arange(1, self.count))
        return np.split(order, ends)


def smallest_width(rows: int) -> int:
    """Returns the fewest columns of a block, so that it holds `SMALLEST` values in `rows` rows."""
    return -(-SMALLEST // rows)


def choose_classes(values: Ints, center: int, share: float = 1.0) -> BlockClasses:
    """Chooses blocks and classes for the columns of `values`.

    Args:
        values: symbols [rows, columns].
        center: the usual symbol.
        share: size / size of the whole vector, if `values` are a sample of it; only this share of
            the tables' cost counts.
    """
    rows, columns = values.shape
    one_class = BlockClasses(max(columns, 1), 1, np.zeros(1, np.uint8))
    width = smallest_width(rows)
    # Too short for several tables to pay.
    if columns // width < 8:
        return one_class
    # Sums of the smallest blocks are added up for the larger ones, so the values are read once.
    sums, leans = _block_sums(values, center, width)
    options = _by_activity(sums, width, rows, share)
    layouts = [
        _split_by_sign(option, sums, leans, option.width // width, cuts)
        for option in options
        for cuts in SIGN_CUTS
    ]
    if not layouts:
        return one_class
    # The estimates by mean values are rough, so the last few choices are measured.
    chosen = min(layouts, key=lambda layout: _measured_bits(values, layout, share))
    if chosen.count == 1:
        return one_class
    # Columns that did not fill a block join the class of the last one.
    missing = -(-columns // chosen.width) - len(chosen.ids)
    ids = np.concatenate([chosen.ids, chosen.ids[-1:].repeat(missing)])
    return BlockClasses(chosen.width, chosen.count, ids)


def _by_activity(sums: Floats, width: int, rows: int, share: float) -> list[BlockClasses]:
    """Returns the choices of classes by mean absolute value that may be cut by sign.

    They are the one with the fewest estimated bits, and always one with blocks of `SIGNED_SIZE`:
    the estimate knows nothing of signs, and in wide blocks signs even out.
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
        # What does not fill a block counts as well.
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
    """Returns for each block the sums of the absolute and of the signed distance from `center`."""
    blocks = values.shape[1] // width
    sums = np.zeros(blocks)
    leans = np.zeros(blocks)
    ones = np.ones(width, np.float32)
    for row in values:
        away = row[: blocks * width].astype(np.float32)
        away -= center
        leans += away.reshape(blocks, width) @ ones
        np.abs(away, out=away)
        sums += away.reshape(blocks, width) @ ones
    return sums, leans


def _grouped(sums: Floats, times: int) -> Floats:
    """Returns the sums of `times` neighbouring blocks each; a rest is left out."""
    whole = len(sums) // times
    grouped: Floats = sums[: whole * times].reshape(whole, times).sum(1)
    return grouped


def _bits(mean: Floats) -> Floats:
    """Returns about the bits of a value: the entropy of a two-sided geometric variable.

    Args:
        mean: its mean absolute value.
    """
    mean = np.maximum(mean, 1e-12)
    return (1 + mean) * np.log2(1 + mean) - mean * np.log2(mean) + mean / (1 + mean)


def _table_bits(mean: Floats, rows: int) -> Floats:
    """Returns about the bits of a class's tables: the larger its values, the more symbols."""
    return 8.0 * rows * (4 + 8 * np.minimum(mean, 100.0))


def _cut(means: Floats, size: int, rows: int, share: float) -> tuple[float, NDArray[np.uint8]]:
    """Cuts blocks into classes by their mean absolute value.

    The optimal cuts of the sorted means, by dynamic programming over bins.

    Args:
        means: mean absolute value of each block.
        size: values in a block.
        rows: rows of the tensor, each with a table of its own.
        share: share of the tables' cost that counts.

    Returns:
        Estimated bits, and the class of each block, uint8 [blocks].
    """
    # The constant keeps the logarithm finite for blocks of zeros.
    logs = np.log2(means + 1 / (4 * size))
    low = float(logs.min())
    high = float(logs.max())
    bins = np.minimum(((logs - low) * (BINS / max(high - low, 1e-9))).astype(np.intp), BINS - 1)
    cost = _costs(means, bins, size, rows, share)

    # reach[b]: the least cost of the bins before b, cut into the classes so far.
    reach = cost[0]
    steps = []
    every = np.arange(BINS + 1)
    best = float(reach[-1])
    best_count = 1
    for count in range(2, ACTIVITIES + 1):
        options = reach[:, None] + cost
        step = options.argmin(0)
        steps.append(step)
        reach = options[step, every]
        if reach[-1] < best:
            best = float(reach[-1])
            best_count = count
        elif count > best_count + 1:
            # From here on more tables only cost more.
            break

    cuts = []
    at = BINS
    for count in range(best_count, 1, -1):
        at = int(steps[count - 2][at])
        cuts.append(at)
    return best, _numbered(np.searchsorted(np.array(cuts[::-1]), bins, side="right"))[0]


def _costs(
    means: Floats, bins: NDArray[np.intp], size: int, rows: int, share: float
) -> NDArray[np.float64]:
    """Returns the bits of a class that takes the bins from a to b - 1, at [a, b]."""
    counts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=BINS))]).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(np.bincount(bins, means, minlength=BINS))])
    number = counts[None, :] - counts[:, None]
    mean = (sums[None, :] - sums[:, None]) / np.maximum(number, 1)
    cost: NDArray[np.float64] = number * size * _bits(mean) + share * _table_bits(mean, rows)
    # Naming its class costs a block about the entropy of the classes.
    cost += number * np.log2(len(means) / np.maximum(number, 1))
    # A class takes at least one bin.
    cost[np.tril_indices(BINS + 1)] = np.inf
    return cost


def _split_by_sign(
    layout: BlockClasses, sums: Floats, leans: Floats, times: int, cuts: tuple[float, ...]
) -> BlockClasses:
    """Splits each class by the sign of its blocks' values.

    Args:
        layout: the classes by mean absolute value.
        sums: sum of the absolute values of each smallest block.
        leans: sum of the values of each smallest block.
        times: smallest blocks in a block of `layout`.
        cuts: bounds on mean value / mean absolute value.
    """
    # A block of zeros leans to no side, and is not divided by zero.
    lean = _grouped(leans, times) / np.maximum(_grouped(sums, times), 1e-9)
    side = np.searchsorted(cuts, lean)
    ids, count = _numbered(layout.ids.astype(np.intp) * (len(cuts) + 1) + side)
    return BlockClasses(layout.width, count, ids)


def _numbered(ids: NDArray[np.intp]) -> tuple[NDArray[np.uint8], int]:
    """Returns the class of each block and the number of classes, without empty classes."""
    used = np.bincount(ids) > 0
    return (np.cumsum(used) - 1)[ids].astype(np.uint8), int(used.sum())


def _measured_bits(values: Ints, layout: BlockClasses, share: float) -> float:
    """Returns about the bits of these classes, from the frequencies in some of the blocks."""
    whole = len(layout.ids)
    rows = len(values)
    some = min(whole, max(SAMPLE // (layout.width * rows), 1))
    at = np.linspace(0, whole - 1, some).astype(np.intp)
    blocks = values[:, : whole * layout.width].reshape(rows, whole, layout.width)[:, at]
    symbols = int(blocks.max()) + 1
    # Symbol and class make one number, so that one pass counts all classes.
    keys = layout.ids[at].astype(np.intp)[:, None] * symbols + blocks
    counts = np.bincount(keys.reshape(-1), minlength=symbols * layout.count)
    counts = counts.reshape(layout.count, symbols)
    used = counts > 0
    frequencies = counts[used]
    totals = np.broadcast_to(counts.sum(1)[:, None], counts.shape)[used]
    # The entropy of few samples is too small by about the second term (Miller 1955).
    bits = frequencies @ np.log2(totals / frequencies) + used.sum() / (2 * np.log(2))
    tables = 8.0 * rows * (used.sum() + 3 * layout.count)
    number = np.bincount(layout.ids, minlength=layout.count)
    names = number @ np.log2(whole / np.maximum(number, 1))
    return float(bits * values.shape[1] / (some * layout.width) + share * tables + names)
