"""Reads the user's tables from CSV or parquet files, with label, feature and client columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch
from pyarrow import types
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.data import columns, csv, features, images
from fedpress.data.columns import Column
from fedpress.data.examples import InputRows, Progress, SourceRows
from fedpress.data.settings import DataSettings
from fedpress.data.targets import READERS, targets_of
from fedpress.errors import DataError, suggestion

# With `client_column = "file"` each file is a client with the name of the file, unless the table
# has a column "file".
FILE = "file"


def read_tables(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns the rows of all files; features and targets are computed after the split.

    Raises:
        DataError: if a file is missing or corrupt, or a column is missing or of the wrong type.
    """
    assert settings.path is not None, "checked by DataSettings"
    files = find(settings.path, settings.source)
    table = _concatenate([_read_file(file, settings) for file in files], files)
    names = _feature_names(table, settings)
    # Incomplete rows are dropped before the split, so that shares refer to rows that are used.
    if settings.missing == "drop":
        used = [*names, *settings.label_columns]
        if settings.client_column:
            used.append(settings.client_column)
        table = table.filter(_complete(table, used))
    if table.num_rows == 0:
        raise DataError(
            "there are no rows", place=f"'{settings.path}'", cure="check the path and missing"
        )
    kind = targets_of(settings)
    labels = tuple(Column.of(table, name, settings) for name in settings.label_columns)
    targets = READERS[kind](labels, settings)
    y = targets.partition_labels()
    owners: Tensor | None = None
    owner_names: tuple[str, ...] = ()
    if settings.client_column:
        column = Column.of(table, settings.client_column, settings).typed()
        owners, owner_names = columns.class_codes(column, settings.client_column, "client")
    name = files[0].stem if len(files) == 1 else files[0].parent.name
    # The inputs are computed after the split; until then `x` holds row numbers.
    rows = Arrays(torch.arange(len(y))[:, None], y)
    found = SourceRows(
        name, rows, owners=owners, owner_names=owner_names, targets=targets.targets, kind=kind
    )
    # A column of images must be the only feature: other columns would need inputs of their own.
    if len(names) == 1 and types.is_struct(table[names[0]].type):
        column = table[names[0]]
        return replace(
            found, inputs=lambda public: _images(column, names[0], settings, public, progress)
        )
    if settings.missing == "error":
        _refuse_gaps(table, names)
    inputs_of = features.FeatureColumns(
        tuple(Column.of(table, name, settings) for name in names), settings
    )
    return replace(found, inputs=inputs_of.inputs)


def find(path: Path, kind: str) -> list[Path]:
    """Returns the file `path`, or the files in a folder, or the files that match a name with `*`.

    Args:
        path: the file, folder or pattern.
        kind: suffix of the files in a folder, such as "csv".

    Raises:
        DataError: if there is no such file.
    """
    if path.is_file():
        return [path]
    folder, pattern = path, f"*.{kind}"
    if "*" in path.name:
        folder, pattern = path.parent, path.name
    # Sorted, because the order in a folder is arbitrary, and a seed must give the same rows.
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    if not files:
        missing = f"no such path '{path}'"
        if folder.is_dir():
            missing = f"no file '{folder / pattern}'"
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
            f"not a readable parquet file ({_brief(error)})",
            place=f"'{path}'",
            cure="copy it again",
        ) from error


def _read_file(path: Path, settings: DataSettings) -> Any:
    table = read_parquet(path) if settings.source == "parquet" else csv.read_csv(path, settings)
    if settings.client_column == FILE and FILE not in table.column_names:
        table = table.append_column(FILE, pa.array([path.stem] * table.num_rows, pa.string()))
    return table


def _concatenate(tables: list[Any], files: list[Path]) -> Any:
    for table, file in zip(tables, files, strict=True):
        names = table.column_names
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(
                f"two columns are named '{twice[0]}'",
                place=f"'{file}'",
                cure="give each a different name",
            )
    # "permissive", because one file may have integers where another file has decimals.
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            (f"the {len(files)} files have columns of different types ({_brief(error)})"),
            place=f"'{files[0]}'",
            cure="make them alike",
        ) from error


# Keys of `[data]` that name columns.
COLUMN_KEYS = (
    "label_column",
    "client_column",
    "feature_columns",
    "drop_columns",
    "words",
    "public_words",
)


def _check_columns(table: Any, settings: DataSettings) -> None:
    """Checks that the table has every column that the settings name."""
    for key in COLUMN_KEYS:
        given = getattr(settings, key) or ()
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
            f"no column {listed} in '{settings.path}' (it has {known})",
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


def _feature_names(table: Any, settings: DataSettings) -> list[str]:
    _check_columns(table, settings)
    left_out = {*settings.label_columns, settings.client_column, *settings.drop_columns}
    candidates = settings.feature_columns or table.column_names
    names = [name for name in candidates if name not in left_out]
    if not names:
        raise DataError(
            "no feature column is left",
            place=f"'{settings.path}'",
            cure="check feature_columns and drop_columns",
        )
    return names


def _complete(table: Any, names: list[str]) -> Any:
    """Returns a mask of the rows that have a value in every column of `names`."""
    complete = pa.array([True] * table.num_rows)
    for name in names:
        complete = pc.and_(complete, pc.invert(_is_missing(table[name])))
    return complete


def _refuse_gaps(table: Any, names: list[str]) -> None:
    for name in names:
        gaps = _is_missing(table[name])
        count = pc.sum(gaps).as_py()
        if count:
            first = pc.index(gaps, True).as_py()
            raise DataError(
                f"{count} of {table.num_rows} rows have no value (first: row {first})",
                place=f"feature column '{name}'",
                cure="set missing = 'drop' or 'mean', or name it in drop_columns",
            )


def _is_missing(column: Any) -> Any:
    # pyarrow can compare with NaN only in columns of floats.
    return pc.is_null(column, nan_is_null=bool(types.is_floating(column.type)))


def _images(
    column: Any, name: str, settings: DataSettings, public: Tensor, progress: Progress | None
) -> InputRows:
    """Decodes a column of images: structs with `bytes`, as in data sets of the Hugging Face hub."""
    if column.type.get_field_index("bytes") < 0:
        raise DataError(
            f"holds {column.type}",
            place=f"feature column '{name}'",
            cure="expected numbers, words, or images as bytes",
        )
    blobs = pc.struct_field(column, "bytes").to_pylist()
    where = f"'{settings.path}' column '{name}' row"
    # The first public image decides the channels and the size.
    like = int(public.min()) if len(public) else 0
    x = images.decode(
        blobs,
        where=lambda i: f"{where} {i}",
        size=settings.image_size,
        like=like,
        progress=progress,
    )
    return InputRows(x, torch.zeros(len(x), dtype=torch.bool))


def _brief(error: BaseException) -> str:
    if not str(error):
        return type(error).__name__
    return str(error).splitlines()[0].rstrip(". ")
