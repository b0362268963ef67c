"""Reads labelled rows of a table for a network that was trained on another table.

The preparation and the classes are those of the training. So equal rows become equal inputs, even
if this table has other words, other classes or other means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.data import tables
from fedpress.data.cells import as_text, positions_in
from fedpress.data.classes import OTHER
from fedpress.data.column_types import WORDS
from fedpress.data.columns import Column
from fedpress.data.gaps import complete
from fedpress.data.new_rows import prepare
from fedpress.data.paths import TABLES
from fedpress.data.preparation import Preparation
from fedpress.data.settings import DataSettings
from fedpress.data.targets import READERS
from fedpress.errors import DataError
from fedpress.tasks.base import Task


def labelled_rows(
    path: Path, about: Preparation, settings: DataSettings, task: Task
) -> tuple[Arrays, int]:
    """Reads the rows of a table.

    Args:
        path: a .csv, .parquet or Arrow file with the columns of the training.
        about: the columns of the network's inputs, with their words.
        settings: label columns, and how to read the file (delimiter, decimal, encoding, types of
            labels, missing, unknown); its path, classes and task are ignored.
        task: the network's task, with its classes.

    Returns:
        The examples, not standardised, and how many rows were left out: rows without a label, with
        a label that the task does not know, with a word that cannot be encoded, or, with
        missing = "drop", with a missing cell.

    Raises:
        DataError: if the file cannot be read, lacks columns, or has no row that can be used.
    """
    settings = settings_of_rows(path, settings, task)
    table = tables.READERS_OF_FILES[settings.source](path, settings)
    needed = [column.name for column in about.columns]
    labels = settings.label_columns
    refuse_lacking(path, table, needed, labels)
    read = tuple(Column.of(table, name, settings) for name in labels)
    targets = READERS[task.targets](read, settings).targets(torch.arange(0))
    keep = targets.known & _complete(table, needed, settings) & known_words(table, about)
    rows = table.select(needed).filter(keep.numpy()).to_pylist()
    if not rows:
        raise DataError(
            "no row has a label and words that the recipe knows",
            place=f"'{path}'",
            cure=_expected(task, labels),
        )
    # Mean 0 and std 1 leave the numbers as they are: whoever uses the rows standardises them. If
    # they were standardised here, it would happen twice.
    raw = replace(about, mean=(0.0,) * about.width, std=(1.0,) * about.width)
    return Arrays(prepare(rows, raw), targets.y[keep]), table.num_rows - len(rows)


def settings_of_rows(path: Path, settings: DataSettings, task: Task) -> DataSettings:
    """Returns the settings by which another table than that of the training is read.

    Args:
        path: the table.
        settings: those of the training.
        task: the network's task, with its classes.
    """
    return settings.model_copy(
        update={
            "source": TABLES[path.suffix],
            "path": path,
            "task": task.kind,
            "classes": task.names if task.targets == "classes" else None,
            # A label that the task does not know cannot be learned or measured: its row is dropped,
            # unless the training has made it one of the class "other".
            "unknown": OTHER if settings.unknown == OTHER else "drop",
            # An integer id is one of the classes, or its row is dropped as well.
            "types": {
                name: "word" if given in WORDS else given
                for name, given in settings.types.items()
                if name in settings.label_columns
            },
        }
    )


def refuse_lacking(path: Path, table: Any, needed: Sequence[str], labels: Sequence[str]) -> None:
    """Checks that a table has the columns of the inputs and of the labels.

    Raises:
        DataError: if it lacks some; the error names similar ones.
    """
    missing = [name for name in dict.fromkeys([*needed, *labels]) if name not in table.column_names]
    if missing:
        has = f"it has {', '.join(table.column_names)}"
        if meant := tables.similar_columns(missing, table.column_names):
            has = f"{meant} {has}"
        raise DataError(
            f"it lacks the columns {', '.join(missing)} ({has})",
            place=f"'{path}'",
            cure="name its columns as the recipe does",
        )


def _complete(table: Any, needed: Sequence[str], settings: DataSettings) -> Tensor:
    """Returns for each row whether it has the cells that it must have, bool [n]."""
    names = [*settings.label_columns, *(needed if settings.missing == "drop" else ())]
    mask: np.ndarray = complete(table, names).to_numpy(zero_copy_only=False)
    return torch.from_numpy(mask.copy())


def _expected(task: Task, labels: Sequence[str]) -> str:
    """Returns what the label columns must hold."""
    listed = ", ".join(labels)
    if task.targets != "classes":
        return f"give numbers in {listed}"
    few = ", ".join(task.names[:12]) + (", ..." if len(task.names) > 12 else "")
    return f"give in {listed} one of {few}"


def known_words(table: Any, about: Preparation) -> Tensor:
    """Returns for each row whether it can be encoded, bool [n].

    A column with `unknown == "refused"` has no code for words that are not in its list.
    """
    known = torch.ones(table.num_rows, dtype=torch.bool)
    for column in about.columns:
        if column.kind == "words" and column.unknown == "refused":
            words = as_text(table[column.name])
            known &= torch.from_numpy(positions_in(words, column.words) >= 0)
    return known
