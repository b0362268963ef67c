"""Sorts the blocks of an integer vector into classes of like activity, so that each class gets a frequency table.

An update is quiet in one layer and loud in the next. One table for all of it would cost bits; a table for every block
would cost more. Blocks with a like mean absolute value share a class; block size and number of classes are those with
the fewest estimated bits, the class numbers and tables included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]

MAX_CLASSES = 16
BINS = 48  # activities on a logarithmic scale, from which the classes are cut
SMALLEST = 32  # values in the smallest block
DOUBLINGS = (0, 1, 2, 3, 4, 5, 7)  # block sizes that are tried: SMALLEST times two to this power


@dataclass(frozen=True, eq=False)
class Plan:
    """`width` columns make a block and `ids` [blocks] name the class of each; the last block may be shorter."""

    width: int
    count: int
    ids: NDArray[np.uint8]


def plan(values: Ints, center: int, share: float = 1.0) -> Plan:
    """Chooses blocks and classes for the columns of `values` [rows, columns], whose usual value is `center`.

    `share` below 1 says that the values are a sample of that size, so that tables cost less by as much.
    """
    rows, columns = values.shape
    one = Plan(max(columns, 1), 1, np.zeros(1, np.uint8))
    width = smallest_width(rows)
    blocks = columns // width
    if blocks < 4:
        return one
    sums = np.zeros(blocks)
    for row in values:
        away = row[: blocks * width].astype(np.float32)
        away -= center
        np.abs(away, out=away)
        sums += away.reshape(blocks, width) @ np.ones(width, np.float32)
    total = float(sums.sum())
    mean = np.array(total / (blocks * width * rows))
    best = float(blocks * width * rows * _bits(mean) + share * _table_bits(mean, rows))
    chosen = one
    for doublings in DOUBLINGS:
        times = 1 << doublings
        whole = len(sums) // times
        if whole < 4:
            break
        means = sums[: whole * times].reshape(whole, times).sum(1) / (width * times * rows)
        cost, cuts, bins = _cut(means, width * times * rows, rows, share)
        if cost < best:
            best = cost
            ids = np.searchsorted(np.array(cuts), bins, side="right").astype(np.uint8)
            chosen = Plan(width * times, len(cuts) + 1, ids)
    if chosen.count == 1:
        return one
    missing = -(-columns // chosen.width) - len(chosen.ids)  # what the smallest block left over joins the last class
    return Plan(chosen.width, chosen.count, np.concatenate([chosen.ids, chosen.ids[-1:].repeat(missing)]))


def smallest_width(rows: int) -> int:
    """Returns the fewest columns of a block of `rows` rows."""
    return -(-SMALLEST // rows)


def _bits(mean: Floats) -> Floats:
    """Entropy of a two-sided geometric variable with this mean absolute value: the estimate of all bits here."""
    mean = np.maximum(mean, 1e-12)
    return (1 + mean) * np.log2(1 + mean) - mean * np.log2(mean) + mean / (1 + mean)


def _table_bits(mean: Floats, rows: int) -> Floats:
    """About what a table costs: the more active its class, the more symbols."""
    return 8.0 * rows * (4 + 8 * np.minimum(mean, 100.0))


def _cut(means: Floats, size: int, rows: int, share: float) -> tuple[float, list[int], NDArray[np.intp]]:
    """Returns estimated bits, the first bins of classes 1, 2, ... and the bin of each block.

    The optimal cuts of sorted activities by dynamic programming over bins.
    """
    logs = np.log2(means + 1 / (4 * size))
    low, high = float(logs.min()), float(logs.max())
    bins = np.minimum(((logs - low) * (BINS / max(high - low, 1e-9))).astype(np.intp), BINS - 1)
    counts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=BINS))]).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(np.bincount(bins, means, minlength=BINS))])
    number = counts[None, :] - counts[:, None]  # [from, to) of the bins
    mean = (sums[None, :] - sums[:, None]) / np.maximum(number, 1)
    cost = number * size * _bits(mean) + share * _table_bits(mean, rows)
    # a block names its class at about the entropy of the classes
    cost += number * np.log2(len(means) / np.maximum(number, 1))
    cost[np.tril_indices(BINS + 1)] = np.inf
    reach, steps = cost[0], []
    best, best_count = float(reach[-1]), 1
    for count in range(2, MAX_CLASSES + 1):
        options = reach[:, None] + cost
        steps.append(options.argmin(0))
        reach = options.min(0)
        if reach[-1] < best:
            best, best_count = float(reach[-1]), count
    cuts, at = [], BINS
    for count in range(best_count, 1, -1):
        at = int(steps[count - 2][at])
        cuts.append(at)
    return best, cuts[::-1], bins
