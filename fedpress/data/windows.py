"""Finds the windows of series in sorted rows, and divides them by time without shared rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedpress.data.series_settings import SeriesSettings
from fedpress.errors import DataError


@dataclass(frozen=True)
class Windows:
    """Windows over the rows of a table.

    Attributes:
        rows: int64 [m, window]: positions in the table of the rows of each window, in time.
        targets: int64 [m, h]: positions of the rows that hold the targets of a forecast.
        spans: int64 [m, 3]: number of the series; first and last + 1 of the rows that a window, its
            lags and its targets take, counted in the order of all sorted rows.
        lagged: int64 [n, l]: for each row of the table the position of the row so many rows before
            it; its own position where there is none (no window has such a row).
    """

    rows: Tensor
    targets: Tensor
    spans: Tensor
    lagged: Tensor


def find_windows(
    series: np.ndarray,
    order: np.ndarray | None,
    usable: np.ndarray,
    settings: SeriesSettings,
    *,
    new_rows: Callable[[int], str] | None = None,
    until_the_end: bool = False,
) -> Windows:
    """Finds all windows that lie within one series, without a gap or an unusable row.

    Args:
        series: int64 [n]: number of the series of each row.
        order: numbers [n] by which the rows of a series are sorted; None: the order of the file.
        usable: bool [n]; a row that is not usable ends a series as a gap does.
        settings: the table `series` of the recipe.
        new_rows: returns where a row is, for errors of rows that are to be predicted, which may have
            no window. None: the rows are for training.
        until_the_end: whether the window that ends with the last row of an unbroken stretch is
            found too if the stride passes it over.

    Raises:
        DataError: if two rows of a series have the same place in the order, or, for training, no
            series is long enough.
    """
    count = len(series)
    # lexsort is stable: ties keep the order of the file.
    place = np.lexsort((series,) if order is None else (order, series))
    begins = np.ones(count, dtype=bool)
    begins[1:] = np.diff(series[place]) != 0
    if order is not None:
        steps = np.diff(order[place])
        inside = ~begins[1:]
        equal = inside & (steps == 0)
        if settings.ties == "error" and equal.any():
            raise _tie(place, int(equal.argmax()), new_rows)
        if settings.max_gap is not None:
            begins[1:] |= steps > settings.max_gap
    broken = ~usable[place]
    begins |= broken
    begins[1:] |= broken[:-1]
    edges = [*np.flatnonzero(begins).tolist(), count]
    starts = _starts(edges, broken, settings, until_the_end=until_the_end)
    if not len(starts) and new_rows is None:
        raise _too_short(edges, broken, settings)
    rows = place[starts[:, None] + np.arange(settings.window)]
    last = starts + settings.window - 1
    targets = place[last[:, None] + np.array(settings.horizon, dtype=np.int64)]
    first = starts - settings.before
    spans = np.stack([series[rows[:, 0]], first, first + settings.reach], 1)
    return Windows(
        torch.from_numpy(rows),
        torch.from_numpy(targets),
        torch.from_numpy(spans),
        torch.from_numpy(_lagged(place, begins, settings.lags)),
    )


def _starts(
    edges: list[int], broken: np.ndarray, settings: SeriesSettings, *, until_the_end: bool
) -> np.ndarray:
    """Returns the sorted positions int64 [m] at which windows begin.

    Args:
        edges: positions at which unbroken stretches begin, and the number of rows.
        broken: bool [n]: whether a sorted row cannot be used.
        settings: the table `series` of the recipe.
        until_the_end: see `find_windows`.
    """
    found = [np.zeros(0, dtype=np.int64)]
    for begin, end in pairwise(edges):
        if broken[begin]:
            continue
        first, last = begin + settings.before, end - settings.window - settings.after
        found.append(np.arange(first, last + 1, settings.step))
        if until_the_end and last > first and (last - first) % settings.step:
            found.append(np.array([last]))
    return np.concatenate(found)


def _lagged(place: np.ndarray, begins: np.ndarray, lags: tuple[int, ...]) -> np.ndarray:
    count = len(place)
    # Sorted position at which the stretch of each row begins.
    stretch = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
    found = np.empty((count, len(lags)), dtype=np.int64)
    for at, lag in enumerate(lags):
        source = np.arange(count) - lag
        source = np.where(source >= stretch, source, np.arange(count))
        found[place, at] = place[source]
    return found


def _tie(place: np.ndarray, at: int, new_rows: Callable[[int], str] | None) -> DataError:
    first, second = int(place[at]), int(place[at + 1])
    if new_rows is not None:
        return DataError(
            f"it has the same time as {new_rows(first)}, which is of the same series",
            place=new_rows(second),
            cure="leave one of the two out",
        )
    return DataError(
        f"rows {first} and {second} are of one series and have the same value",
        place="series.order_column",
        cure='name the columns that tell series apart in by, or set ties = "keep"',
    )


def _too_short(edges: list[int], broken: np.ndarray, settings: SeriesSettings) -> DataError:
    lengths = [e - b for b, e in pairwise(edges) if not broken[b]]
    parts = f"{settings.window} rows of a window"
    if settings.before:
        parts += f", {settings.before} before it"
    if settings.after:
        parts += f", {settings.after} after it"
    return DataError(
        f"{parts}, but the longest series has {max(lengths, default=0)} rows without a gap",
        place="series.window",
        cure="lower it, or raise max_gap, or name fewer columns in by",
    )


def overlap(spans: Tensor) -> bool:
    """Returns whether two windows share a row."""
    ordered = spans[spans[:, 1].argsort()]
    return bool((ordered[1:, 1] < ordered[:-1, 2]).any())


def split_by_time(
    spans: Tensor, rows: Tensor, share: float, *, last: bool
) -> tuple[Tensor, Tensor]:
    """Splits off the first or the last windows of each series.

    Windows that share a row with a window of the other part are in neither part. Otherwise a test
    set would hold readings that a model was trained on.

    Args:
        spans: `Windows.spans` of all windows.
        rows: positions of the windows to split.
        share: share of each series' windows, from 0 to 1.
        last: whether the last windows are split off, not the first.

    Returns:
        The positions that are split off, and the others.
    """
    taken, rest = [rows[:0]], [rows[:0]]
    for series in spans[rows, 0].unique():
        own = rows[spans[rows, 0] == series]
        own = own[spans[own, 1].argsort()]
        # The small addition is needed because 0.29 * 100 is slightly below 29 in floating point.
        count = int(share * len(own) + 1e-9)
        if not count:
            rest.append(own)
            continue
        if last:
            mine, others = own[len(own) - count :], own[: len(own) - count]
            others = others[spans[others, 2] <= spans[mine, 1].min()]
        else:
            mine, others = own[:count], own[count:]
            others = others[spans[others, 1] >= spans[mine, 2].max()]
        taken.append(mine)
        rest.append(others)
    return torch.cat(taken).sort().values, torch.cat(rest).sort().values
