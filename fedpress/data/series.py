"""Turns a table whose rows follow each other in time into windows with labels or forecasts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fedpress.data import columns
from fedpress.data.columns import Column
from fedpress.data.dates import calendar_columns
from fedpress.data.examples import InputRows, TargetRows
from fedpress.data.partition_labels import partition_labels_of_numbers
from fedpress.data.preparation_parts import SeriesPart
from fedpress.data.raw_table import RawTable
from fedpress.data.series_order import PlaceOfRow, RowOrder, row_order
from fedpress.data.series_settings import SeriesSettings
from fedpress.data.settings import DataSettings
from fedpress.data.targets import TargetReader, as_numbers
from fedpress.data.windows import Windows, find_windows
from fedpress.errors import DataError
from fedpress.tasks.forecast import NOW


def with_windows(
    raw: RawTable, usable: np.ndarray, settings: DataSettings
) -> tuple[RawTable, list[str], Windows]:
    """Finds the windows of a table, and adds its lags and calendar columns.

    Args:
        raw: the table.
        usable: bool [n]; a row that is not usable ends a series.
        settings: the `[data]` table of the recipe, with `series`.

    Returns:
        The table with further columns, their names, and the windows.

    Raises:
        DataError: if a row has no date, two rows of a series have the same one, no series is long
            enough, or the source has a test set of its own.
    """
    series = settings.series
    assert series is not None, "checked by the caller"
    if raw.is_test is not None:
        raise DataError(
            "the source has a test set of its own",
            place="series",
            cure='read one split alone, with table = "train"',
        )
    order = order_of_rows(raw, settings)
    numbers = series_of_rows(raw, settings)
    found = find_windows(numbers, None if order is None else order.values, usable, series)
    table, names = with_lags_and_calendar(raw.values, order, found, settings)
    return replace(raw, values=table), names, found


def order_of_rows(
    raw: RawTable, settings: DataSettings, place: PlaceOfRow | None = None
) -> RowOrder | None:
    """Returns where each row stands in time; None for the order of the file.

    Args:
        raw: the table.
        settings: the `[data]` table of the recipe, with `series`.
        place: see `row_order`.

    Raises:
        DataError: if a row has no date.
    """
    assert settings.series is not None, "checked by the caller"
    read = [Column.of(raw.values, name, settings) for name in settings.series.order_columns]
    return row_order(read, place) if read else None


def with_lags_and_calendar(
    table: Any, order: RowOrder | None, windows: Windows, settings: DataSettings
) -> tuple[Any, list[str]]:
    """Adds the columns of lags and of the calendar to a `pyarrow.Table`.

    Args:
        table: the table.
        order: where each row stands in time; None: in the order of the file.
        windows: the windows of the table.
        settings: the `[data]` table of the recipe, with `series`.

    Returns:
        The table with further columns, and their names.

    Raises:
        DataError: if there are no dates for the calendar.
    """
    series = settings.series
    assert series is not None, "checked by the caller"
    added: dict[str, object] = {}
    if series.calendar:
        if order is None or order.dates is None:
            raise DataError(
                f"order_column {', '.join(series.order_columns)} holds numbers, no dates",
                place="series.calendar",
                cure="name a column of dates, or leave calendar out",
            )
        for name, values in calendar_columns(order.dates, series.calendar).items():
            added[name] = pa.chunked_array([pa.array(values)])
    for at, lag in enumerate(series.lags):
        for name in settings.label_columns:
            before = pa.array(windows.lagged[:, at].numpy())
            added[lag_name(name, lag)] = Column.of(table, name, settings).values.take(before)
    for name, column in added.items():
        table = table.append_column(name, column)
    return table, list(added)


def lag_name(label: str, lag: int) -> str:
    """Returns the name of the column with the values of `label` so many rows before."""
    return f"{label} lag {lag}"


def series_of_rows(raw: RawTable, settings: DataSettings) -> np.ndarray:
    """Returns int64 [n]: the number of the series of each row."""
    assert settings.series is not None, "checked by the caller"
    names = [*settings.series.by]
    if settings.client_column and settings.client_column not in names:
        names.append(settings.client_column)
    codes = np.zeros((raw.values.num_rows, 1), dtype=np.int64)
    for name in names:
        values = Column.of(raw.values, name, settings).values
        columns.refuse_missing(values, f"column '{name}'")
        distinct = values.dictionary_encode().combine_chunks()
        # Numbered by sorted values, so that the order of the file does not matter.
        rank = np.empty(len(distinct.dictionary), dtype=np.int64)
        rank[pc.sort_indices(distinct.dictionary).to_numpy()] = np.arange(len(rank))
        codes = np.column_stack([codes, rank[distinct.indices.to_numpy()]])
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def window_inputs(
    inputs_of_rows: Callable[[Tensor], InputRows], windows: Windows, settings: DataSettings
) -> Callable[[Tensor], InputRows]:
    """Returns the function that computes the inputs of windows from the inputs of rows.

    The inputs are float32 [m, columns, window], or [m, columns] for windows of one row.

    Args:
        inputs_of_rows: computes the inputs of the rows from the positions of the public ones.
        windows: the windows.
        settings: the `[data]` table of the recipe, with `series`.
    """

    def inputs(public: Tensor) -> InputRows:
        # Words and means are taken from the rows of public windows alone.
        found = inputs_of_rows(windows.rows[public].unique())
        assert isinstance(found.x, Tensor), "a table has one tensor of inputs"
        assert found.preparation is not None, "columns always have one"
        about = replace(found.preparation, part=_part(settings))
        left_out = found.left_out[windows.rows].any(1)
        return InputRows(inputs_of_windows(found.x, windows.rows), left_out, about)

    return inputs


def inputs_of_windows(x: Tensor, rows: Tensor) -> Tensor:
    """Returns the inputs of windows, float32 [m, columns, window]; [m, columns] for one row each.

    Args:
        x: inputs of the rows, float32 [n, columns].
        rows: int64 [m, window]: positions of the rows of each window.
    """
    found = x[rows].transpose(1, 2)
    return (found[:, :, 0] if found.shape[2] == 1 else found).contiguous()


def _part(settings: DataSettings) -> SeriesPart:
    """Returns how rows become windows, for the model's file."""
    series = settings.series
    assert series is not None, "checked by the caller"
    by = list(series.by)
    if settings.client_column and settings.client_column not in by:
        by.append(settings.client_column)
    asked = [settings.type_of(name) for name in series.order_columns]
    form = next((one.form for one in asked if one is not None), None)
    return SeriesPart(series.model_copy(update={"by": tuple(by)}), settings.missing, form)


@dataclass(frozen=True)
class LabelsOfWindows:
    """The labels of windows, from the labels of their rows."""

    reader: TargetReader
    windows: Windows
    settings: SeriesSettings

    def partition_labels(self) -> Tensor:
        """Returns int64 [m]: the label of each window's last row, for partitioners."""
        return self.reader.partition_labels()[self.windows.rows[:, -1]]

    def targets(self, public: Tensor) -> TargetRows:
        """Returns the targets of all windows; `public` are the positions of the public ones."""
        rows = self.windows.rows
        found = self.reader.targets(rows[public].unique())
        last = rows[:, -1]
        if self.settings.label == "last" or found.y.is_floating_point():
            return TargetRows(found.y[last], found.names, found.known[last])
        y = found.y[rows]
        # Unknown labels are -1, and have votes of their own.
        votes = torch.zeros(len(y), len(found.names) + 1, dtype=torch.int64)
        votes.scatter_add_(1, y + 1, torch.ones_like(y))
        return TargetRows.of_classes(votes.argmax(1) - 1, found.names)


@dataclass(frozen=True)
class Forecasts:
    """The targets of forecasts: numbers of later rows."""

    columns: tuple[Column, ...]
    windows: Windows
    settings: SeriesSettings
    with_now: bool = False

    def _values(self) -> Tensor:
        """Returns float32 [m, columns x horizons], with NaN where a number is missing.

        With `with_now` the last value of the window comes before them.
        """
        values = torch.from_numpy(np.stack([as_numbers(column) for column in self.columns], 1))
        later: Tensor = values[self.windows.targets].transpose(1, 2).flatten(1)
        if not self.with_now:
            return later
        return torch.cat([values[self.windows.rows[:, -1]], later], 1)

    def partition_labels(self) -> Tensor:
        """Returns int64 [m]: the decile of the first target, for partitioners."""
        return partition_labels_of_numbers(self._values().nan_to_num())

    def targets(self, public: Tensor) -> TargetRows:
        """Returns float32 [m], or [m, k] for several targets.

        Raises:
            DataError: if no public window has all its targets.
        """
        y = self._values()
        known = y.isfinite().all(1)
        if not bool(known.any()) or (len(public) and not bool(known[public].any())):
            raise DataError(
                "no public window has a number in all the rows of its horizon",
                place=f"label column '{self.columns[0].name}'",
                cure="name a column of numbers, or lower series.horizon",
            )
        names = [
            f"{column.name} +{ahead}" for column in self.columns for ahead in self.settings.horizon
        ]
        if self.with_now:
            names.insert(0, NOW)
        return TargetRows(y[:, 0] if len(names) == 1 else y, tuple(names), known)
