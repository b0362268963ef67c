"""Reads labelled windows over the rows of a table for a network that was trained on another table.

Windows, lags, calendar and targets are made as in the training. So equal rows become equal examples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.data import tables
from fedpress.data.batches import FILE
from fedpress.data.columns import Column
from fedpress.data.gaps import complete, refuse_gaps
from fedpress.data.labelled_rows import known_words, refuse_lacking, settings_of_rows
from fedpress.data.lines import place_of
from fedpress.data.new_rows import AS_TRAINED, raw_inputs
from fedpress.data.preparation import Preparation
from fedpress.data.preparation_parts import SeriesPart
from fedpress.data.raw_table import RawTable
from fedpress.data.raw_windows import columns_of_file
from fedpress.data.series import (
    Forecasts,
    LabelsOfWindows,
    inputs_of_windows,
    order_of_rows,
    series_of_rows,
    with_lags_and_calendar,
)
from fedpress.data.settings import DataSettings
from fedpress.data.targets import READERS
from fedpress.data.windows import Windows, find_windows
from fedpress.errors import DataError
from fedpress.tasks.base import Task
from fedpress.tasks.forecast import Forecast


def labelled_windows(
    path: Path, about: Preparation, settings: DataSettings, task: Task
) -> tuple[Arrays, int]:
    """Reads the windows over the rows of a table.

    Takes and returns what `labelled_rows` does. A file that lacks the client column has the rows of
    one client.

    Raises:
        DataError: if the file cannot be read, lacks columns, or has no window that can be used.
    """
    part = about.part
    assert isinstance(part, SeriesPart), "checked by the caller"
    ask = part.settings
    order = {} if part.form is None else dict.fromkeys(ask.order_columns, f"date {part.form}")
    settings = settings_of_rows(path, settings, task)
    types = {**settings.types, **order}
    settings = settings.model_copy(update={"series": ask, "types": types})
    table = _of_one_client(tables.READERS_OF_FILES[settings.source](path, settings), settings)
    inputs = columns_of_file(about, ask)
    placed = [*ask.by, *ask.order_columns]
    refuse_lacking(path, table, [*dict.fromkeys([*placed, *inputs])], settings.label_columns)
    usable = np.ones(table.num_rows, dtype=bool)
    if part.missing == "drop":
        table = table.filter(complete(table, placed))
        mask = complete(table, [*inputs, *settings.label_columns])
        usable = mask.to_numpy(zero_copy_only=False)
    else:
        refuse_gaps(table, placed if part.missing == "mean" else [*placed, *inputs], settings)
    raw = RawTable("", table, f"'{path}'")
    windows, table = _windows(raw, usable, settings)
    y, known = _targets(table, windows, settings, task)
    keep = known & known_words(table, about)[windows.rows].all(1)
    if not bool(keep.any()):
        raise DataError(
            "no window has a label and words that the recipe knows",
            place=f"'{path}'",
            cure=f"expected the labels {', '.join(map(str, task.names))}",
        )
    x = _inputs(table, windows.rows[keep], about)
    return Arrays(x, y[keep]), int((~keep).sum())


def _of_one_client(table: Any, settings: DataSettings) -> Any:
    """Adds the column that names clients, if the table lacks it."""
    ask = settings.series
    assert ask is not None, "set by the caller"
    for name in ask.by:
        if name not in table.column_names and name in (FILE, settings.client_column):
            table = table.append_column(name, pa.array(["one"] * table.num_rows))
    return table


def _windows(raw: RawTable, usable: np.ndarray, settings: DataSettings) -> tuple[Windows, Any]:
    """Returns the windows, and the table with lags and calendar."""
    ask = settings.series
    assert ask is not None, "set by the caller"

    def place(row: int) -> str:
        return place_of(row, settings)

    order = order_of_rows(raw, settings, place)
    values = None if order is None else order.values
    series = series_of_rows(raw, settings)
    windows = find_windows(series, values, usable, ask, new_rows=place)
    if not len(windows.rows):
        # How long the series are is not said: the server of a network reads this.
        raise DataError(
            f"no series has the {ask.reach} rows without a gap that an example takes",
            place=raw.where,
            cure="give more of its rows",
        )
    return windows, with_lags_and_calendar(raw.values, order, windows, settings)[0]


def _targets(
    table: Any, windows: Windows, settings: DataSettings, task: Task
) -> tuple[Tensor, Tensor]:
    """Returns the targets of all windows, and whether they are known, bool [m]."""
    ask = settings.series
    assert ask is not None, "set by the caller"
    labels = tuple(Column.of(table, name, settings) for name in settings.label_columns)
    reader: Forecasts | LabelsOfWindows
    if ask.horizon:
        with_now = isinstance(task, Forecast) and task.now
        reader = Forecasts(labels, windows, ask, with_now=with_now)
    else:
        reader = LabelsOfWindows(READERS[task.targets](labels, settings), windows, ask)
    # No row is public, so an error describes none.
    found = reader.targets(torch.arange(0))
    return found.y, found.known


def _inputs(table: Any, rows: Tensor, about: Preparation) -> Tensor:
    """Returns the inputs of windows, not standardised; `rows` are those of each window."""
    # Other rows may lack values, such as the first ones, without lags.
    used, at = rows.unique(return_inverse=True)
    taken = pa.array(used.numpy())
    cells = {column.name: table[column.name].take(taken).to_pylist() for column in about.columns}
    return inputs_of_windows(raw_inputs(cells, about, AS_TRAINED), at.reshape(rows.shape))
