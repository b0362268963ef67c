"""Reads a folder that Hugging Face `datasets` wrote by `save_to_disk`, without that library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fedpress.data.arrow import read_arrow
from fedpress.data.raw_table import RawTable
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError, first_line, suggestion

SPLITS = "dataset_dict.json"
"""File that lists the splits of a `DatasetDict`, such as train and test; each has a folder."""
STATE = "state.json"
"""File that lists the Arrow files of one split."""
INFO = "dataset_info.json"
"""File with the types of the columns, such as the names of classes."""
TRAIN, TEST = "train", "test"


def read_huggingface(settings: DataSettings) -> RawTable:
    """Returns the rows of a data set; class numbers become the names of the classes.

    Of several splits, "train" gives the rows to divide and "test" the test set; the setting
    `table` names another split, which then is the only one.

    Raises:
        DataError: if the folder was not written by `save_to_disk`, or a file is missing or corrupt.
    """
    path = settings.path
    assert path is not None, "checked by DataSettings"
    if not path.is_dir():
        raise DataError(f"no folder '{path}'", place="source 'huggingface'", cure="check the path")
    if not (path / SPLITS).is_file():
        if settings.table is not None:
            raise DataError(f"'{path}' has no splits", place="table", cure="leave table out")
        return RawTable(path.name, _read_split(path), f"'{path}'")
    splits = [str(name) for name in _json(path / SPLITS).get("splits", ())]
    wanted = settings.table or TRAIN
    if wanted not in splits:
        raise DataError(
            f"no split '{wanted}' in '{path}' (it has {', '.join(splits)})",
            place="table",
            cure=suggestion(wanted, splits) or "name one that it has",
        )
    train = _read_split(path / wanted)
    # A split that is named is the only one.
    if settings.table is not None or TEST not in splits:
        return RawTable(path.name, train, f"'{path}'")
    test = _read_split(path / TEST)
    is_test = torch.zeros(train.num_rows + test.num_rows, dtype=torch.bool)
    is_test[train.num_rows :] = True
    return RawTable(path.name, _concatenated([train, test], path), f"'{path}'", is_test)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot be read ({first_line(error)})",
            place=f"'{path}'",
            cure="write the data set anew with save_to_disk",
        ) from error
    return found if isinstance(found, dict) else {}


def _read_split(folder: Path) -> Any:
    """Returns one split as a `pyarrow.Table`."""
    if not (folder / STATE).is_file():
        raise DataError(
            f"no file '{folder / STATE}'",
            place="source 'huggingface'",
            cure="give a folder that save_to_disk of Hugging Face datasets wrote",
        )
    state = _json(folder / STATE)
    # A name from a file must not lead out of the folder.
    names = [Path(str(file.get("filename"))).name for file in state.get("_data_files", ())]
    if not names:
        raise DataError("it lists no Arrow file", place=f"'{folder / STATE}'", cure="write it anew")
    table = _concatenated([read_arrow(folder / name) for name in names], folder)
    columns = _json(folder / INFO).get("features") or {}
    for name, about in columns.items():
        if name in table.column_names and isinstance(about, dict):
            table = _with_class_names(table, name, about)
    return table


def _with_class_names(table: Any, name: str, about: dict[str, Any]) -> Any:
    """Replaces the class numbers of a `ClassLabel` column by their names; -1 becomes null."""
    if about.get("_type") != "ClassLabel" or not about.get("names"):
        return table
    words = pa.array([str(word) for word in about["names"]])
    numbers = table[name].cast(pa.int64()).fill_null(-1).to_numpy()
    if numbers.size and numbers.max() >= len(words):
        raise DataError(
            f"it holds class {numbers.max()}, but {INFO} names {len(words)} classes",
            place=f"column '{name}'",
            cure="write the data set anew with save_to_disk",
        )
    # Hugging Face writes -1 where a test set keeps its labels secret.
    indices = pa.array(np.maximum(numbers, 0), mask=numbers < 0)
    return table.set_column(table.column_names.index(name), name, [words.take(indices)])


def _concatenated(tables: list[Any], path: Path) -> Any:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"its files have columns of different types ({first_line(error)})",
            place=f"'{path}'",
            cure="write the data set anew with save_to_disk",
        ) from error
