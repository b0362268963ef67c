"""Makes windows of raw rows that are to be predicted, as the training made its own.

For a forecast there is a window that ends with the last row of each series, too: it predicts the
future.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from fedpress.data import raw_rows
from fedpress.data.batches import FILE
from fedpress.data.dates import calendar_names
from fedpress.data.new_rows import Strictness, raw_inputs
from fedpress.data.preparation import Preparation
from fedpress.data.preparation_parts import SeriesPart
from fedpress.data.raw_inputs import RawInputs, Table, UnknownWords
from fedpress.data.raw_rows import GivenTable
from fedpress.data.raw_table import RawTable
from fedpress.data.series import (
    inputs_of_windows,
    lag_name,
    order_of_rows,
    series_of_rows,
    with_lags_and_calendar,
)
from fedpress.data.series_order import PlaceOfRow, RowOrder
from fedpress.data.series_settings import SeriesSettings
from fedpress.data.settings import DataSettings
from fedpress.data.windows import Windows, find_windows
from fedpress.errors import DataError

TIME = "time"
"""Column of predictions with the date of a window's last row, if several columns make the date."""
HORIZON = "horizon"
"""Column of predictions with the number of rows after the window."""


def read_windows(rows: Any, about: Preparation, unknown: UnknownWords) -> RawInputs:
    """Makes windows of raw rows.

    Args:
        rows: a table, as `raw_rows.read_rows` takes it.
        about: the preparation of the model.
        unknown: what a word without an input does.

    Raises:
        DataError: if a column is missing, a cell cannot be used, a row has no place in its series,
            or a series is too short.
    """
    part = about.part
    assert isinstance(part, SeriesPart), "checked by the caller"
    ask = part.settings
    given = raw_rows.read_table(rows, about)
    # With this name each file of the training was a series of its own.
    if FILE in ask.by and FILE not in given.columns and isinstance(rows, str | Path):
        given.columns[FILE] = [Path(rows).stem] * len(next(iter(given.columns.values()), []))
    inputs = columns_of_file(about, ask)
    placed = [*ask.by, *ask.order_columns]
    needed = list(dict.fromkeys([*placed, *inputs]))
    given.refuse_missing(needed)
    table, kept = _as_arrow(given, needed, about)
    usable = np.ones(len(kept), dtype=bool)
    if part.missing == "drop":
        whole = _complete(table, placed)
        table, kept = table.filter(pa.array(whole)), kept[whole]
        usable = _complete(table, inputs)

    def place(row: int) -> str:
        return given.place(int(kept[row]))

    _refuse_gaps(table, placed, place)
    settings = _settings(about, part)
    raw = RawTable("", table, given.where)
    order = order_of_rows(raw, settings, place)
    windows = _windows(raw, order, usable, settings, place, future=bool(ask.horizon))
    x, last = _inputs(table, order, windows, about, settings, place, unknown)
    names = _names(table, order, last, ask, kept)
    return RawInputs(
        x,
        given.others([*needed, *about.labels]),
        names=names,
        table=_forecast_table(names, about, ask) if ask.horizon else None,
    )


def columns_of_file(about: Preparation, ask: SeriesSettings) -> list[str]:
    """Returns the columns of inputs that a file must have: all but lags and calendar."""
    made = {lag_name(label, lag) for label in about.labels for lag in ask.lags}
    made |= {*calendar_names(ask.calendar)}
    names = [column.name for column in about.columns if column.name not in made]
    return [*names, *(about.labels if ask.lags else ())]


def _as_arrow(
    given: GivenTable, needed: list[str], about: Preparation
) -> tuple[pa.Table, np.ndarray]:
    """Returns the needed columns as a `pyarrow.Table`, and the number of each row, int64 [n]."""
    columns = {}
    for name in needed:
        cells = []
        for cell in given.columns[name]:
            missing = cell in about.gaps if isinstance(cell, str) else cell != cell
            cells.append(None if missing else cell)
        try:
            columns[name] = pa.array(cells)
        except pa.ArrowException as error:
            raise DataError(
                f"column '{name}' holds values of different types",
                place=given.where,
                cure="give all its cells as text, or all as numbers",
            ) from error
        # A column without any value has no type, and counts as one of numbers.
        if pa.types.is_null(columns[name].type):
            columns[name] = columns[name].cast(pa.float64())
    table = pa.table(columns)
    return table, np.arange(table.num_rows)


def _complete(table: pa.Table, names: list[str]) -> np.ndarray:
    """Returns bool [n]: whether a row has a value in each of the columns."""
    complete = np.ones(table.num_rows, dtype=bool)
    for name in names:
        complete &= table[name].is_valid().to_numpy()
    return complete


def _refuse_gaps(table: pa.Table, placed: list[str], place: PlaceOfRow) -> None:
    """Checks that each row has a series and a place in it."""
    for name in placed:
        gaps = np.flatnonzero(~_complete(table, [name]))
        if len(gaps):
            raise DataError(
                f"column '{name}' has no value, so the row has no place in a series",
                place=place(int(gaps[0])),
                cure="fill it, or leave the row out",
            )


def _settings(about: Preparation, part: SeriesPart) -> DataSettings:
    """Returns the settings that the functions of the training need."""
    ask, types = part.settings, {}
    if part.form is not None:
        types = dict.fromkeys(ask.order_columns, f"date {part.form}")
    return DataSettings.model_validate(
        {
            "source": "csv",
            # No file is read: the rows are there.
            "path": "rows",
            "label_column": about.labels,
            "delimiter": about.delimiter,
            "decimal": about.decimal,
            "types": types,
            # Targets are not known yet.
            "series": ask.model_copy(update={"horizon": ()}),
        }
    )


def _windows(
    raw: RawTable,
    order: RowOrder | None,
    usable: np.ndarray,
    settings: DataSettings,
    place: PlaceOfRow,
    *,
    future: bool,
) -> Windows:
    """Finds the windows.

    Raises:
        DataError: if two rows have the same place in the order, or a series has no window.
    """
    ask = settings.series
    assert ask is not None, "set above"
    series = series_of_rows(raw, settings)
    values = None if order is None else order.values
    found = find_windows(series, values, usable, ask, new_rows=place, until_the_end=future)
    without = np.setdiff1d(series, found.spans[:, 0].numpy())
    if not len(without):
        return found
    row = int(np.flatnonzero(series == without[0])[0])
    count = int(((series == without[0]) & usable).sum())
    told = ", ".join(f"{name} {raw.values[name][row].as_py()}" for name in ask.by)
    before = f" after {ask.before} for its lags" if ask.before else ""
    raise DataError(
        f"the series {told or 'of all rows'} has {count} rows, too few without a gap: a window "
        f"takes {ask.window}{before}",
        place=raw.where,
        cure="give more of its rows, or leave the series out",
    )


def _inputs(
    table: pa.Table,
    order: RowOrder | None,
    windows: Windows,
    about: Preparation,
    settings: DataSettings,
    place: PlaceOfRow,
    unknown: UnknownWords,
) -> tuple[Tensor, Tensor]:
    """Returns the inputs of the windows, and the position int64 [m] of each window's last row."""
    table, _ = with_lags_and_calendar(table, order, windows, settings)
    # Only rows of windows are read: others may lack values, such as the first ones, without lags.
    used, rows = windows.rows.unique(return_inverse=True)
    taken = pa.array(used.numpy())
    cells = {column.name: table[column.name].take(taken).to_pylist() for column in about.columns}
    strictness = Strictness(
        texts=True, words=unknown == "error", place=lambda row: place(int(used[row]))
    )
    x = raw_inputs(cells, about, strictness)
    return inputs_of_windows(x, rows.reshape(windows.rows.shape)), windows.rows[:, -1]


def _names(
    table: pa.Table,
    order: RowOrder | None,
    last: Tensor,
    ask: SeriesSettings,
    kept: np.ndarray,
) -> dict[str, list[Any]]:
    """Returns the columns that tell windows apart: their series, and the time of the last row."""
    taken = pa.array(last.numpy())
    found = {name: table[name].take(taken).to_pylist() for name in ask.by}
    if order is None:
        # Counted from 1, without the header.
        found["row"] = (kept[last.numpy()] + 1).tolist()
    elif len(ask.order_columns) == 1:
        (name,) = ask.order_columns
        found[name] = table[name].take(taken).to_pylist()
    else:
        assert order.dates is not None, "several columns are a date"
        dates = order.dates[last.numpy()].astype("datetime64[s]")
        found[TIME] = [str(date).replace("T", " ") for date in dates]
    return found


def _forecast_table(
    names: dict[str, list[Any]], about: Preparation, ask: SeriesSettings
) -> Callable[[Tensor], Table]:
    """Returns the function that makes a row for each window and horizon."""

    def table(answers: Tensor) -> Table:
        windows = len(answers)
        values = answers.reshape(windows, len(about.labels), len(ask.horizon))
        rows = []
        for at in range(windows):
            own = [column[at] for column in names.values()]
            for number, ahead in enumerate(ask.horizon):
                rows.append([*own, ahead, *values[at, :, number].tolist()])
        return [*names, HORIZON, *about.labels], rows

    return table
