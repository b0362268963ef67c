"""Converts a column of lists, such as the readings of a sensor in each row, to one array."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from pyarrow import types

from fedpress.data.examples import InputRows
from fedpress.errors import DataError


def is_list(kind: Any) -> bool:
    """Returns whether a pyarrow type is a list, of fixed length or not."""
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def stacked(column: Any, name: str) -> InputRows:
    """Returns a column of lists as float32 [n, k], or [n, k, l] if the lists hold lists.

    Bytes [n, C, H, W] are images and stay uint8.

    Args:
        column: a `pyarrow.ChunkedArray` of lists of numbers.
        name: name of the column, for errors.

    Raises:
        DataError: if a list or a number is missing, lists have different lengths, or they hold
            something else than numbers.
    """
    place = f"feature column '{name}'"
    values = column.combine_chunks()
    shape = [len(values)]
    while is_list(values.type):
        # Of a fixed-size list only the flattened values leave out nulls, so these come first.
        if values.null_count:
            row = pc.index(values.is_null(), True).as_py()
            raise DataError(
                f"list {row} is missing", place=place, cure="fill it, or set missing = 'drop'"
            )
        lengths = pc.list_value_length(values).unique().to_pylist()
        if len(lengths) > 1:
            raise DataError(
                f"its lists have different lengths, from {min(lengths)} to {max(lengths)}",
                place=place,
                cure="make them equally long",
            )
        shape.append(lengths[0] if lengths else 0)
        values = values.flatten()
    if 0 in shape:
        raise DataError("its lists are empty", place=place, cure="name another column")
    if not (types.is_integer(values.type) or types.is_floating(values.type)):
        raise DataError(
            f"its lists hold {values.type}", place=place, cure="expected lists of numbers"
        )
    if values.null_count:
        raise DataError(
            "some numbers within its lists are missing",
            place=place,
            cure="fill them, or leave these rows out",
        )
    array = values.to_numpy(zero_copy_only=False).reshape(shape)
    if not (array.dtype == np.uint8 and array.ndim == 4):
        array = array.astype(np.float32)
    x = torch.from_numpy(np.array(array))
    return InputRows(x, torch.zeros(len(x), dtype=torch.bool))
