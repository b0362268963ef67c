"""Sorts the blocks of an integer vector into classes of like values, so that each class gets a frequency table.

An update is quiet in one layer and loud in the next, and the values of one filter mostly have one sign. One table for
all would cost bits; a table for every block would cost more. So blocks with a like mean absolute value, and of those
the ones that lean to the same side, share a class. Block size and number of classes are those with the fewest
estimated bits, class numbers and tables included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]

MAX_CLASSES = 64
ACTIVITIES = 12
SIDES = (
    (),
    (-0.25, 0.25),
    (-0.5, -0.15, 0.15, 0.5),
)  # where the mean over the mean absolute value is cut
BINS = 32  # activities on a logarithmic scale, from which the classes are cut
SMALLEST = 32  # values in the smallest block
DOUBLINGS = (1, 2, 3, 4, 6)  # block sizes that are tried: SMALLEST times two to this power
SIDED = 8  # smallest blocks in a block whose side is always tried
SAMPLE = 1 << 16  # values from which the bits of the finished classes are measured


@dataclass(frozen=True, eq=False)
class Plan:
    """`width` columns make a block and `ids` [blocks] name the class of each; the last block may be shorter."""

    width: int
    count: int
    ids: NDArray[np.uint8]

    def groups(self, whole: int) -> list[NDArray[np.intp]]:
        """Returns for each class which of the first `whole` blocks are its own, in rising order."""
        order = np.argsort(self.ids[:whole], kind="stable")
        return np.split(order, np.searchsorted(self.ids[:whole][order], np.arange(1, self.count)))


def smallest_width(rows: int) -> int:
    """Returns the fewest columns of a block of `rows` rows."""
    return -(-SMALLEST // rows)


def plan(values: Ints, center: int, share: float = 1.0) -> Plan:
    """Chooses blocks and classes for the columns of `values` [rows, columns], whose usual value is `center`.

    `share` below 1 says that the values are a sample of that size, so that tables cost less by as much.
    """
    rows, columns = values.shape
    one = Plan(max(columns, 1), 1, np.zeros(1, np.uint8))
    width = smallest_width(rows)
    if columns // width < 8:
        return one
    sums, leans = _block_sums(values, center, width)
    size = width * rows
    mean = np.array(sums.sum() / (len(sums) * size))
    best, chosen = float(len(sums) * size * _bits(mean) + share * _table_bits(mean, rows)), one
    options: list[Plan] = []
    for doublings in DOUBLINGS:
        times = 1 << doublings
        whole = len(sums) // times
        if whole < 4:
            break
        cost, ids = _cut(_grouped(sums, times) / (size * times), size * times, rows, share)
        cost *= len(sums) / (whole * times)  # what does not fill a block counts as well
        layout = Plan(width * times, int(ids.max()) + 1, ids)
        if times == SIDED:
            options.append(layout)  # the cost says nothing of sides, and wide blocks have none
        if cost < best:
            best, chosen = cost, layout
    if chosen is not one and chosen not in options:
        options.append(chosen)
    if options:
        split = [
            _split(option, sums, leans, option.width // width, cuts)
            for option in options
            for cuts in SIDES
        ]
        chosen = min(split, key=lambda layout: _measured_bits(values, layout, share))
    if chosen.count == 1:
        return one
    missing = -(-columns // chosen.width) - len(
        chosen.ids
    )  # what the smallest block left over joins the last class
    return Plan(
        chosen.width, chosen.count, np.concatenate([chosen.ids, chosen.ids[-1:].repeat(missing)])
    )


def _block_sums(values: Ints, center: int, width: int) -> tuple[Floats, Floats]:
    """Sums over blocks [blocks] of the absolute and of the signed distance from `center`."""
    blocks = values.shape[1] // width
    sums, leans, ones = np.zeros(blocks), np.zeros(blocks), np.ones(width, np.float32)
    for row in values:
        away = row[: blocks * width].astype(np.float32)
        away -= center
        leans += away.reshape(blocks, width) @ ones
        np.abs(away, out=away)
        sums += away.reshape(blocks, width) @ ones
    return sums, leans


def _grouped(sums: Floats, times: int) -> Floats:
    whole = len(sums) // times
    grouped: Floats = sums[: whole * times].reshape(whole, times).sum(1)
    return grouped


def _bits(mean: Floats) -> Floats:
    """Entropy of a two-sided geometric variable with this mean absolute value: the estimate of all bits here."""
    mean = np.maximum(mean, 1e-12)
    return (1 + mean) * np.log2(1 + mean) - mean * np.log2(mean) + mean / (1 + mean)


def _table_bits(mean: Floats, rows: int) -> Floats:
    """About what a table costs: the more active its class, the more symbols."""
    return 8.0 * rows * (4 + 8 * np.minimum(mean, 100.0))


def _cut(means: Floats, size: int, rows: int, share: float) -> tuple[float, NDArray[np.uint8]]:
    """Returns estimated bits and the class of each block of `size` values.

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
    reach, steps, every = cost[0], [], np.arange(BINS + 1)
    best, best_count = float(reach[-1]), 1
    for count in range(2, ACTIVITIES + 1):
        options = reach[:, None] + cost
        step = options.argmin(0)
        steps.append(step)
        reach = options[step, every]
        if reach[-1] < best:
            best, best_count = float(reach[-1]), count
        elif count > best_count + 1:
            break  # more tables only cost more
    cuts, at = [], BINS
    for count in range(best_count, 1, -1):
        at = int(steps[count - 2][at])
        cuts.append(at)
    return best, _numbered(np.searchsorted(np.array(cuts[::-1]), bins, side="right"))[0]


def _split(layout: Plan, sums: Floats, leans: Floats, times: int, cuts: tuple[float, ...]) -> Plan:
    """Splits each class by the side to which its blocks, of `times` smallest blocks, lean."""
    lean = _grouped(leans, times) / np.maximum(_grouped(sums, times), 1e-9)
    ids, count = _numbered(
        layout.ids.astype(np.intp) * (len(cuts) + 1) + np.searchsorted(cuts, lean)
    )
    return Plan(layout.width, count, ids)


def _numbered(ids: NDArray[np.intp]) -> tuple[NDArray[np.uint8], int]:
    """Numbers the classes that occur from 0 on."""
    used = np.bincount(ids) > 0
    return (np.cumsum(used) - 1)[ids].astype(np.uint8), int(used.sum())


def _measured_bits(values: Ints, layout: Plan, share: float) -> float:
    """Estimates the bits of a layout from the frequencies in some of its blocks."""
    whole, rows = len(layout.ids), len(values)
    some = min(whole, max(SAMPLE // (layout.width * rows), 1))
    at = np.linspace(0, whole - 1, some).astype(np.intp)
    blocks = values[:, : whole * layout.width].reshape(rows, whole, layout.width)[:, at]
    symbols = int(blocks.max()) + 1
    keys = layout.ids[at].astype(np.intp)[:, None] * symbols + blocks
    counts = np.bincount(keys.reshape(-1), minlength=symbols * layout.count).reshape(
        layout.count, symbols
    )
    used = counts > 0
    frequencies = counts[used]
    totals = np.broadcast_to(counts.sum(1)[:, None], counts.shape)[used]
    # the entropy of few samples is too small by about this (Miller 1955)
    bits = frequencies @ np.log2(totals / frequencies) + used.sum() / (2 * np.log(2))
    tables = 8.0 * rows * (used.sum() + 3 * layout.count)
    number = np.bincount(layout.ids, minlength=layout.count)
    names = number @ np.log2(whole / np.maximum(number, 1))
    return float(bits * values.shape[1] / (some * layout.width) + share * tables + names)
