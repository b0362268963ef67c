"""Reads the label columns of a table; each kind of targets has its own reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from pyarrow import types
from torch import Tensor

from fedpress import tasks
from fedpress.data.cells import is_number
from fedpress.data.columns import Column, LabelColumn, refuse_missing
from fedpress.data.examples import TargetRows
from fedpress.data.partition_labels import (
    partition_labels_of_flags,
    partition_labels_of_numbers,
)
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError
from fedpress.tasks.base import Targets


class TargetReader(Protocol):
    """Reads the columns of the targets."""

    def partition_labels(self) -> Tensor:
        """Returns int64 [n]: the label of each row for partitioners."""
        ...

    def targets(self, public: Tensor) -> TargetRows:
        """Returns the targets of all rows; `public` are the positions of the public rows."""
        ...


def targets_of(settings: DataSettings) -> Targets:
    """Returns the kind of targets that the task of the recipe needs."""
    return tasks.find(tasks.kind_of(settings.task or tasks.Classification.kind)).targets


@dataclass(frozen=True)
class NumberColumns:
    """Columns of numbers, for a regression."""

    columns: tuple[Column, ...]
    settings: DataSettings

    def partition_labels(self) -> Tensor:
        """Returns int64 [n]: the decile of each row's value in the first column, from 0 to 9.

        Raises:
            DataError: if a value is missing in any column.
        """
        for column in self.columns:
            refuse_missing(column.values, f"label column '{column.name}'", self.settings)
        return partition_labels_of_numbers(torch.from_numpy(as_numbers(self.columns[0]).copy()))

    def targets(self, public: Tensor) -> TargetRows:
        """Returns float32 [n], or [n, k] for several columns.

        Raises:
            DataError: if a public row lacks a finite number, or every row lacks one.
        """
        y = torch.from_numpy(np.stack([as_numbers(column) for column in self.columns], 1))
        known = y.isfinite().all(1)
        for at, column in enumerate(self.columns):
            # An error may describe public rows. Private rows without a number are silently dropped.
            if not bool(y[public, at].isfinite().all()):
                raise DataError(
                    "some public rows hold no finite number",
                    place=f"label column '{column.name}'",
                    cure="name a column of numbers, or write its words as numbers: yes as 1, no as 0",
                )
        # Raised only if no row is usable: an error must not describe single private rows.
        if not bool(known.any()):
            raise DataError(
                "no row holds a number",
                place=f"label column '{self.columns[0].name}'",
                cure="name a column of numbers",
            )
        names = tuple(column.name for column in self.columns)
        return TargetRows(y[:, 0] if len(names) == 1 else y, names, known)


@dataclass(frozen=True)
class FlagColumns:
    """Columns of 0 and 1, or true and false, one for each label."""

    columns: tuple[Column, ...]
    settings: DataSettings

    def partition_labels(self) -> Tensor:
        """Returns int64 [n]: the same number for rows with the same labels.

        Raises:
            DataError: if a value is missing.
        """
        for column in self.columns:
            refuse_missing(column.values, f"label column '{column.name}'", self.settings)
        flags = np.stack([as_numbers(column) for column in self.columns], 1)
        return partition_labels_of_flags(torch.from_numpy(flags))

    def targets(self, public: Tensor) -> TargetRows:
        """Returns float32 [n, k] of 0 and 1.

        Raises:
            DataError: if a public row holds another value.
        """
        y = torch.from_numpy(np.stack([as_numbers(column) for column in self.columns], 1))
        # A missing label is NaN, which equals neither 0 nor 1, so its row is dropped.
        fits = (y == 0) | (y == 1)
        for at, column in enumerate(self.columns):
            if not bool(fits[public, at].all()):
                raise DataError(
                    "some public rows hold other values than 0 and 1",
                    place=f"label column '{column.name}'",
                    cure="name columns of 0 and 1, one for each label",
                )
        return TargetRows(y, tuple(column.name for column in self.columns), fits.all(1))


def as_numbers(column: Column) -> np.ndarray:
    """Returns float32 [n], with NaN for cells that are not numbers."""
    values: Any = column.values
    if column.text:
        values = column.cast(pa.float64())
        truth = column.cast(pa.bool_())
        # More cells are "true" or "false" than are numbers, so the column holds booleans.
        if truth.null_count < values.null_count:
            values = truth
    if types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    if not is_number(values.type):
        raise DataError(
            f"holds {values.type}",
            place=f"label column '{column.name}'",
            cure="expected numbers: set another task, or another column",
        )
    values = values.cast(pa.float64()).fill_null(np.nan)
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float32)


def _labels(columns: tuple[Column, ...], settings: DataSettings) -> LabelColumn:
    if len(columns) > 1:
        raise DataError(
            f"{len(columns)} columns, but a classification has one",
            place="label_column",
            cure="name one, or set task = 'multilabel' or 'regression'",
        )
    return LabelColumn(columns[0], settings)


READERS: dict[Targets, Callable[[tuple[Column, ...], DataSettings], TargetReader]] = {
    "classes": _labels,
    "numbers": NumberColumns,
    "flags": FlagColumns,
    "arrays": NumberColumns,
}
"""The reader of each kind of targets."""
