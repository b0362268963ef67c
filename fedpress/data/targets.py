"""Columns that hold what is to be predicted: one way of reading for each kind of targets.

Partitioners deal rows by their labels. Numbers are dealt by tenths: rows are sorted by value and cut into ten groups of
equal size, so `dirichlet` and `shards` give some clients mostly high values and others low ones. Several labels are
dealt by which of them occur together.
"""

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
from fedpress.data.columns import Column, Labels, refuse_missing
from fedpress.data.examples import TargetRows
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError
from fedpress.tasks.base import Targets

GROUPS = 10


class TargetReader(Protocol):
    """Reads the columns of the targets."""

    def dealing(self) -> Tensor:
        """Returns int64 [n], equal where partitioners are to see equal labels."""
        ...

    def targets(self, public: Tensor) -> TargetRows:
        """Returns the targets of all rows, with what is learned from the positions `public` of public rows."""
        ...


def targets_of(settings: DataSettings) -> Targets:
    """Returns what kind of targets the data are to give."""
    return tasks.find(tasks.kind_of(settings.task or tasks.Classification.kind)).targets


def partition_labels_of_numbers(values: Tensor) -> Tensor:
    """Returns int64 [n]: the tenth of the (first) number [n] or [n, k] of each row.

    >>> partition_labels_of_numbers(torch.arange(20.0)).bincount().tolist()
    [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """
    first = values if values.dim() == 1 else values[:, 0]
    rank = torch.empty(len(first), dtype=torch.int64)
    rank[first.argsort(stable=True)] = torch.arange(len(first))
    return rank * GROUPS // max(1, len(first))


def partition_labels_of_flags(flags: Tensor) -> Tensor:
    """Returns int64 [n], equal where the labels [n, k] are."""
    kind: Tensor = flags.nan_to_num().unique(dim=0, return_inverse=True)[1]
    return kind.flatten()


@dataclass(frozen=True)
class Numbers:
    """Columns of numbers, for a regression."""

    columns: tuple[Column, ...]
    settings: DataSettings

    def dealing(self) -> Tensor:
        """Returns the tenth of the first column's values.

        Raises:
            DataError: if a value is missing.
        """
        for column in self.columns:
            refuse_missing(column.values, f"label column '{column.name}'")
        return partition_labels_of_numbers(torch.from_numpy(_as_numbers(self.columns[0]).copy()))

    def targets(self, public: Tensor) -> TargetRows:
        """Returns float32 [n], or [n, k] of several columns.

        Raises:
            DataError: if a public row holds something that is no finite number.
        """
        y = torch.from_numpy(np.stack([_as_numbers(column) for column in self.columns], 1))
        known = y.isfinite().all(1)
        for at, column in enumerate(self.columns):
            if not bool(y[public, at].isfinite().all()):  # public rows, so that it may be told
                raise DataError(
                    "some public rows hold no finite number",
                    place=f"label column '{column.name}'",
                    cure="name a column of numbers",
                )
        if not bool(known.any()):
            raise DataError(
                "no row holds a number",
                place=f"label column '{self.columns[0].name}'",
                cure="name a column of numbers",
            )
        names = tuple(column.name for column in self.columns)
        return TargetRows(y[:, 0] if len(names) == 1 else y, names, known)


@dataclass(frozen=True)
class Flags:
    """Columns of 0 and 1, or of truth values, one for each label."""

    columns: tuple[Column, ...]
    settings: DataSettings

    def dealing(self) -> Tensor:
        """Returns int64 [n], equal where all labels are.

        Raises:
            DataError: if a value is missing.
        """
        for column in self.columns:
            refuse_missing(column.values, f"label column '{column.name}'")
        flags = np.stack([_as_numbers(column) for column in self.columns], 1)
        return partition_labels_of_flags(torch.from_numpy(flags))

    def targets(self, public: Tensor) -> TargetRows:
        """Returns float32 [n, k] of 0 and 1.

        Raises:
            DataError: if a public row holds something else.
        """
        y = torch.from_numpy(np.stack([_as_numbers(column) for column in self.columns], 1))
        fits = (y == 0) | (y == 1)
        for at, column in enumerate(self.columns):
            if not bool(fits[public, at].all()):
                raise DataError(
                    "some public rows hold something else than 0 and 1",
                    place=f"label column '{column.name}'",
                    cure="name columns that say whether a label is there",
                )
        return TargetRows(y, tuple(column.name for column in self.columns), fits.all(1))


def _as_numbers(column: Column) -> np.ndarray:
    """Returns float32 [n]; NaN for what is no number."""
    values: Any = column.values
    if column.text:
        values = column.cast(pa.float64())
        truth = column.cast(pa.bool_())
        if truth.null_count < values.null_count:  # the cells say "true" and "false"
            values = truth
    if types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    if not (
        types.is_integer(values.type)
        or types.is_floating(values.type)
        or types.is_decimal(values.type)
    ):
        raise DataError(
            f"holds {values.type}",
            place=f"label column '{column.name}'",
            cure="expected numbers: set another task, or another column",
        )
    values = values.cast(pa.float64()).fill_null(np.nan)
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float32)


def _labels(columns: tuple[Column, ...], settings: DataSettings) -> Labels:
    if len(columns) > 1:
        raise DataError(
            f"{len(columns)} columns, but a classification has one",
            place="label_column",
            cure="name one, or set task = 'multilabel' or 'regression'",
        )
    return Labels(columns[0], settings)


READERS: dict[Targets, Callable[[tuple[Column, ...], DataSettings], TargetReader]] = {
    "classes": _labels,
    "numbers": Numbers,
    "flags": Flags,
}
"""How each kind of targets is read from a table."""
