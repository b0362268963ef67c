"""Reads the user's tables (files or a database) with label, feature and client columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch
from pyarrow import types
from torch import Tensor

from fedpress import tasks
from fedpress.core.examples import Arrays
from fedpress.data import columns, csv, features, huggingface, images, sql
from fedpress.data.arrow import read_arrow
from fedpress.data.batches import BATCHES, TableFiles, concatenated, with_file
from fedpress.data.column_facts import ColumnFacts
from fedpress.data.columns import Column
from fedpress.data.examples import InputRows, Progress, SourceRows
from fedpress.data.gaps import complete, refuse_gaps
from fedpress.data.list_columns import is_list, stacked
from fedpress.data.paths import cure_of_unreadable, refuse_no_path
from fedpress.data.raw_table import RawTable, refuse_equal_names
from fedpress.data.series import Forecasts, LabelsOfWindows, window_inputs, with_windows
from fedpress.data.series_settings import SeriesSettings
from fedpress.data.settings import DataSettings
from fedpress.data.streamed import StreamedColumns, is_larger_than_memory
from fedpress.data.targets import READERS, targets_of
from fedpress.errors import Argument, DataError, first_line, suggestion
from fedpress.tasks.forecast import Forecast


def read_tables(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns the rows of a table; features and targets are computed after the split.

    Raises:
        DataError: if a file is missing or corrupt, or a column is missing or of the wrong type.
    """
    if streams(settings):
        return _read_streamed(settings, progress)
    raw = TABLES[settings.source](settings)
    refuse_equal_names(raw.values.column_names, raw.where)
    names = _feature_names(raw, settings)
    if settings.series is not None:
        return _read_series(raw, names, settings)
    whole = raw.values
    # Incomplete rows are dropped before the split, so that shares refer to rows that are used.
    if settings.missing == "drop":
        raw = raw.filtered(complete(raw.values, [*names, *_known_before(settings)]))
    return replace(
        _rows(raw, settings),
        inputs=_inputs(raw, names, settings, progress),
        facts=_facts(whole, raw.values, names, settings),
    )


def _known_before(settings: DataSettings) -> list[str]:
    """Returns the columns that must be known before the split: labels and clients."""
    return [*settings.label_columns, *filter(None, (settings.client_column,))]


def _rows(raw: RawTable, settings: DataSettings) -> SourceRows:
    """Returns targets and owners of the rows, without inputs."""
    table = raw.values
    if table.num_rows == 0:
        raise DataError("there are no rows", place=raw.where, cure="check the path and missing")
    kind = targets_of(settings)
    labels = tuple(Column.of(table, name, settings) for name in settings.label_columns)
    targets = READERS[kind](labels, settings)
    y = targets.partition_labels()
    owners, owner_names = _owners(table, settings)
    # The inputs are computed after the split; until then `x` holds row numbers.
    rows = Arrays(torch.arange(len(y))[:, None], y)
    return SourceRows(
        raw.name,
        rows,
        owners=owners,
        owner_names=owner_names,
        targets=targets.targets,
        kind=kind,
        is_test=raw.is_test,
    )


def streams(settings: DataSettings) -> bool:
    """Returns whether a table is read in batches: the recipe says so, or it is large.

    Raises:
        DataError: if the recipe says so, and the source cannot be read in batches.
    """
    possible = settings.source in BATCHES and settings.series is None
    if settings.stream is None:
        if not possible or settings.path is None:
            return False
        files = find(settings.path, settings.source)
        return is_larger_than_memory(sum(file.stat().st_size for file in files))
    if settings.stream and not possible:
        what = f"source '{settings.source}'" if settings.series is None else "a table with series"
        raise DataError(
            f"{what} is not read in batches",
            place="stream",
            cure="leave stream out, or write the rows to parquet files",
        )
    return settings.stream


def _read_streamed(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns the rows of a table that is not kept in memory."""
    assert settings.path is not None, "checked by DataSettings"
    files = find(settings.path, settings.source)
    table = TableFiles(files, settings)
    where = f"'{settings.path}'"
    first = RawTable(_name_of(files), table.columns, where)
    names = _feature_names(first, settings)
    for name in names:
        kind = first.values.schema.field(name).type
        if types.is_struct(kind) or is_list(kind):
            raise DataError(
                f"holds {kind}, and a table that is read in batches has numbers, words and dates",
                place=f"feature column '{name}'",
                cure="set stream = false, if the table fits into memory",
            )
    known = _known_before(settings)
    kept = None
    if settings.missing == "drop":
        # Rows are dropped before the split, so that shares refer to rows that are used.
        masks = [complete(part, [*names, *known]) for part in table.batches([*names, *known])]
        kept = np.concatenate([mask.to_numpy(zero_copy_only=False) for mask in masks])
    none = table.columns.select(known)
    raw = replace(first, values=pa.concat_tables([none, *table.batches(known)]))
    if kept is not None:
        raw = raw.filtered(pa.array(kept))
    columns = StreamedColumns(table, names, raw.values.num_rows, kept, settings, progress)
    return replace(_rows(raw, settings), inputs=columns.inputs, facts=_facts_of_batches(columns))


def _facts_of_batches(
    columns: StreamedColumns,
) -> Callable[[Tensor | None], tuple[ColumnFacts, ...]]:
    """Returns the function that describes the columns of a table that is not in memory."""
    settings = columns.settings
    shown = _described(columns.names, settings)

    def facts(rows: Tensor | None) -> tuple[ColumnFacts, ...]:
        if rows is None:
            # Imported here, because only `fedpress check` needs it.
            from fedpress.data.tally import describe_batches

            return describe_batches(columns.files, shown, settings, columns.progress)
        part = replace(columns, names=shown).rows_at(rows)
        return _facts(part, part, columns.names, settings)(torch.arange(len(part)))

    return facts


def _described(names: Sequence[str], settings: DataSettings) -> list[str]:
    """Returns the columns that are described: the features, and the labels after them."""
    return list(dict.fromkeys([*names, *settings.label_columns]))


def _facts(
    whole: Any, used: Any, names: Sequence[str], settings: DataSettings
) -> Callable[[Tensor | None], tuple[ColumnFacts, ...]]:
    """Returns the function that describes the columns (see `SourceRows.facts`).

    Args:
        whole: the table with all rows that were read.
        used: the rows that examples were made of.
        names: names of the feature columns; the labels follow them.
        settings: the `[data]` table of the recipe.
    """
    shown = _described(names, settings)

    def facts(rows: Tensor | None) -> tuple[ColumnFacts, ...]:
        # Imported here, because only `fedpress check` needs it.
        from fedpress.data.describe_column import describe_column

        part = whole if rows is None else used.take(pa.array(rows.numpy()))
        # Notes name lines of a file, which parts of a table do not know.
        found = [describe_column(Column.of(part, name, settings), settings) for name in shown]
        return tuple(found if rows is None else (replace(one, note="") for one in found))

    return facts


def _owners(table: Any, settings: DataSettings) -> tuple[Tensor | None, tuple[str, ...]]:
    """Returns the natural client of each row int64 [n], and the clients' names."""
    if not settings.client_column:
        return None, ()
    column = Column.of(table, settings.client_column, settings).typed()
    return columns.class_codes(column, settings.client_column, "client", settings)


def _read_series(raw: RawTable, names: list[str], settings: DataSettings) -> SourceRows:
    """Returns the windows of a table whose rows follow each other in time."""
    ask = settings.series
    assert ask is not None, "checked by the caller"
    whole = raw.values
    usable = np.ones(raw.values.num_rows, dtype=bool)
    if settings.missing == "drop":
        # A row without a place in a series is left out; one with a gap ends its series.
        placed = [*ask.by, *ask.order_columns, *filter(None, (settings.client_column,))]
        raw = raw.filtered(complete(raw.values, placed))
        mask = complete(raw.values, [*names, *settings.label_columns])
        usable = mask.to_numpy(zero_copy_only=False)
    elif settings.missing == "error":
        refuse_gaps(raw.values, names, settings)
    if not raw.values.num_rows:
        raise DataError("there are no rows", place=raw.where, cure="check the path and missing")
    raw, added, windows = with_windows(raw, usable, settings)
    table = raw.values
    kind = targets_of(settings)
    labels = tuple(Column.of(table, name, settings) for name in settings.label_columns)
    targets: Forecasts | LabelsOfWindows
    if ask.horizon:
        kind, task = "numbers", settings.task or Forecast.kind
        # The task compares itself with the last value, which the data knows here; `now = false`
        # switches that off.
        is_forecast = tasks.kind_of(task) == Forecast.kind and len(labels) == 1
        with_now = is_forecast and not (isinstance(task, dict) and task.get("now") is False)
        targets = Forecasts(labels, windows, ask, with_now=with_now)
    else:
        targets = LabelsOfWindows(READERS[kind](labels, settings), windows, ask)
    y = targets.partition_labels()
    owners, owner_names = _owners(table, settings)
    if owners is not None:
        owners = owners[windows.rows[:, 0]]
        _refuse_short_clients(owners, owner_names, ask)
    read = tuple(Column.of(table, name, settings) for name in [*names, *added])
    facts_of_rows = _facts(whole, table, names, settings)

    def facts(public: Tensor | None) -> tuple[ColumnFacts, ...]:
        return facts_of_rows(None if public is None else windows.rows[public].unique())

    inputs = window_inputs(features.FeatureColumns(read, settings).inputs, windows, settings)
    return SourceRows(
        raw.name,
        Arrays(torch.arange(len(y))[:, None], y),
        owners=owners,
        owner_names=owner_names,
        targets=targets.targets,
        inputs=inputs,
        kind=kind,
        default_task=Forecast.kind if ask.horizon else None,
        spans=windows.spans,
        facts=facts,
    )


def _refuse_short_clients(owners: Tensor, names: Sequence[str], ask: SeriesSettings) -> None:
    counts = owners.bincount(minlength=len(names)).tolist()
    for name, count in zip(names, counts, strict=True):
        if not count:
            raise DataError(
                f"no series of client '{name}' has {ask.reach} rows without a gap",
                place="series.window",
                cure="lower it, or leave this client out of the table",
            )


def _inputs(
    raw: RawTable, names: list[str], settings: DataSettings, progress: Progress | None
) -> Callable[[Tensor], InputRows]:
    """Returns the function that computes the inputs from the positions of the public rows."""
    table = raw.values
    first = table[names[0]]
    # Images or arrays must be the only feature: other columns would need inputs of their own.
    if len(names) == 1 and (types.is_struct(first.type) or is_bytes(first.type)):
        return lambda public: _images(first, names[0], raw.where, settings, public, progress)
    if len(names) == 1 and is_list(first.type):
        return lambda public: stacked(first, names[0])
    if settings.missing == "error":
        refuse_gaps(table, names, settings)
    read = tuple(Column.of(table, name, settings) for name in names)
    return features.FeatureColumns(read, settings).inputs


def is_bytes(kind: Any) -> bool:
    """Returns whether a pyarrow type is bytes."""
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def find(path: Path, kind: str) -> list[Path]:
    """Returns the file `path`, or the files in a folder, or the files that match a name with `*`.

    Args:
        path: the file, folder or pattern.
        kind: the source, such as "csv"; files in a folder are those of its suffixes.

    Raises:
        DataError: if there is no such file.
    """
    if path.is_file():
        return [path]
    folder, patterns = path, [f"*.{suffix}" for suffix in SUFFIXES.get(kind, (kind,))]
    if "*" in path.name:
        folder, patterns = path.parent, [path.name]
    # Sorted, because the order in a folder is arbitrary, and a seed must give the same rows.
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    if not files:
        refuse_no_path(path, f"source '{kind}'")
        missing = f"no file '{folder / patterns[0]}'"
        raise DataError(missing, place=f"source '{kind}'", cure="check the path")
    return files


def read_parquet(path: Path) -> Any:
    """Returns the `pyarrow.Table` of a parquet file.

    Raises:
        DataError: if the file is missing or corrupt.
    """
    try:
        return pyarrow.parquet.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"not a readable parquet file ({first_line(error)})",
            place=f"'{path}'",
            cure=cure_of_unreadable(path, "parquet"),
        ) from error


READERS_OF_FILES: dict[str, Callable[[Path, DataSettings], Any]] = {
    "csv": csv.read_csv,
    "parquet": lambda path, settings: read_parquet(path),
    "arrow": lambda path, settings: read_arrow(path),
}
"""Source -> the function that reads one file as a `pyarrow.Table`."""

SUFFIXES = {"arrow": ("arrow", "feather", "ipc")}
"""Source -> suffixes of its files, if they are others than its name."""


def read_files(settings: DataSettings) -> RawTable:
    """Returns the rows of all files that `path` names.

    Raises:
        DataError: if a file is missing or corrupt, or columns of two files differ in type.
    """
    assert settings.path is not None, "checked by DataSettings"
    files = find(settings.path, settings.source)
    table = concatenated([_read_file(file, settings) for file in files], files)
    return RawTable(_name_of(files), table, f"'{settings.path}'")


def _name_of(files: Sequence[Path]) -> str:
    """Returns the name of a table for the report."""
    return files[0].stem if len(files) == 1 else files[0].parent.name


TABLES: dict[str, Callable[[DataSettings], RawTable]] = {
    **dict.fromkeys(READERS_OF_FILES, read_files),
    "sql": sql.read_sql,
    "huggingface": huggingface.read_huggingface,
}
"""Source -> the function that reads its table."""


def _read_file(path: Path, settings: DataSettings) -> Any:
    return with_file(READERS_OF_FILES[settings.source](path, settings), path, settings)


COLUMN_KEYS = (
    "label_column",
    "client_column",
    "feature_columns",
    "drop_columns",
    "types",
    "words",
    "public_words",
)
"""Keys of `[data]` that name columns."""


def _check_columns(table: Any, settings: DataSettings, where: str) -> None:
    """Checks that the table has every column that the settings name."""
    asked = {key: getattr(settings, key) or () for key in COLUMN_KEYS}
    if settings.series is not None:
        asked["series.by"] = settings.series.by
        asked["series.order_column"] = settings.series.order_columns
    for key, given in asked.items():
        names = [given] if isinstance(given, str) else given
        missing = [name for name in names if name not in table.column_names]
        if not missing:
            continue
        # With a wrong delimiter the header is one long name, and no column is found.
        if settings.source == "csv":
            csv.refuse_other_delimiter(settings, table.column_names)
        known = ", ".join(table.column_names[:12])
        if len(table.column_names) > 12:
            known += ", ..."
        listed = ", ".join(f"'{name}'" for name in missing)
        raise DataError(
            f"no column {listed} in {where} (it has {known})",
            place=key,
            cure=similar_columns(missing, table.column_names) or "name one that it has",
        )


def similar_columns(missing: Sequence[str], there: Sequence[str]) -> str:
    """Returns for each missing column which one may be meant; "" if none is similar.

    >>> similar_columns(["pressure"], ["age", "blood_pressure"])
    "did you mean 'blood_pressure'?"
    >>> similar_columns(["pressure", "job"], ["blood_pressure", "jobs"])
    "'pressure': did you mean 'blood_pressure'? 'job': did you mean 'jobs'?"
    """
    if len(missing) == 1:
        return suggestion(missing[0], there)
    found = [(name, suggestion(name, there)) for name in missing]
    return " ".join(f"'{name}': {meant}" for name, meant in found if meant)


def _feature_names(raw: RawTable, settings: DataSettings) -> list[str]:
    _check_columns(raw.values, settings, raw.where)
    left_out = {*settings.label_columns, settings.client_column, *settings.drop_columns}
    if settings.series is not None:
        # A forecast may use the values of the label until now.
        if settings.series.horizon:
            left_out -= {*settings.label_columns}
        # Columns that only name or sort a series are inputs if feature_columns says so.
        if settings.feature_columns is None:
            left_out |= {*settings.series.by, *settings.series.order_columns}
    candidates = settings.feature_columns or raw.values.column_names
    names = [name for name in candidates if name not in left_out]
    if not names:
        raise DataError(
            "no feature column is left",
            place=raw.where,
            cure="check feature_columns and drop_columns",
        )
    _refuse_media(raw.values, names, settings)
    return names


OWN_SOURCES = {
    "audio": 'save recordings as client/label/sound.wav, and set source = "audio"',
    "text": 'save texts as client.txt, and set source = "text", which predicts the next token',
}
"""Type of a column that a table cannot have -> what to do instead."""


def _refuse_media(table: Any, names: list[str], settings: DataSettings) -> None:
    """Refuses columns of recordings and texts, and images that are no bytes or not alone."""
    for name in names:
        asked = settings.type_of(name)
        place = f"feature column '{name}'"
        if asked is not None and asked.name in OWN_SOURCES:
            raise DataError(
                f"a column of a table cannot be of the type {asked.name}",
                place=place,
                cure=OWN_SOURCES[asked.name],
            )
        if asked is None or asked.name != "image":
            continue
        kind = table.schema.field(name).type
        if not (types.is_struct(kind) or is_bytes(kind)):
            raise DataError(
                f"it holds {kind}, but images of a table are bytes",
                place=place,
                cure='save images as client/label/image.png, and set source = "folders"',
            )
        if len(names) > 1:
            raise DataError(
                "an image must be the only feature",
                place=place,
                cure=("set ", Argument("feature_columns", (name,))),
            )


def _images(
    column: Any,
    name: str,
    place: str,
    settings: DataSettings,
    public: Tensor,
    progress: Progress | None,
) -> InputRows:
    """Decodes a column of images: bytes, or structs with `bytes` as in the Hugging Face hub."""
    if types.is_struct(column.type) and column.type.get_field_index("bytes") < 0:
        raise DataError(
            f"holds {column.type}",
            place=f"feature column '{name}'",
            cure="expected numbers, words, or images as bytes",
        )
    content = pc.struct_field(column, "bytes") if types.is_struct(column.type) else column
    blobs = content.to_pylist()
    where = f"{place} column '{name}' row"
    # The first public image decides the channels and the size.
    like = int(public.min()) if len(public) else 0
    x = images.decode(
        blobs,
        where=lambda i: f"{where} {i}",
        size=settings.image_size,
        like=like,
        progress=progress,
    )
    return images.prepared(x, resized=settings.image_size is not None)
