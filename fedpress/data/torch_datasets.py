"""Reads all examples of a torch Dataset or DataLoader into arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fedpress.errors import DataError


def is_dataset(value: object) -> bool:
    """Returns whether a value is a torch Dataset or DataLoader."""
    return isinstance(value, Dataset | DataLoader)


def as_pair(dataset: Any, where: str) -> tuple[Any, np.ndarray]:
    """Returns the inputs, an array [n, ...] or a dictionary of arrays, and the targets [n, ...].

    Args:
        dataset: its items are pairs (x, y), or batches of pairs if it is a DataLoader; x is an
            array, an image or a dictionary of arrays.
        where: name of the data in errors.

    Raises:
        DataError: if there are no items, an item is no pair, or items differ in shape.
    """
    xs: list[Any] = []
    ys: list[np.ndarray] = []
    for at, item in enumerate(_items(dataset)):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(
                f"item {at} of the Dataset is {type(item).__name__}",
                place=where,
                cure="expected pairs (x, y)",
            )
        xs.append(item[0])
        ys.append(np.asarray(item[1]))
    if not xs:
        raise DataError("the Dataset has no items", place=where, cure="leave it out")
    x: Any
    join = np.concatenate if isinstance(dataset, DataLoader) else np.stack
    try:
        if isinstance(xs[0], Mapping):
            x = {name: join([np.asarray(one[name]) for one in xs]) for name in xs[0]}
        else:
            x = join([np.asarray(one) for one in xs])
        return x, join(ys)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"items of the Dataset differ in shape ({error})",
            place=where,
            cure="make them alike, for instance by padding",
        ) from error


def _items(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, DataLoader | IterableDataset) or not hasattr(dataset, "__len__"):
        yield from dataset
        return
    # Many Datasets end by their length alone: their __getitem__ never raises IndexError.
    for at in range(len(dataset)):
        yield dataset[at]
