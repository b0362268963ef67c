"""Gives each row one label by which partitioners divide the rows, also where targets are no classes.

If the target is a number, this label is the decile of the number. So with `dirichlet` some clients
get mostly high values and other clients mostly low values. If the target is several labels, each
combination of labels counts as one label.

A file of its own, because the readers of tables need pyarrow, which other sources do not import.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers are divided into this many groups (deciles).
GROUPS = 10


def partition_labels_of_numbers(values: Tensor) -> Tensor:
    """Returns int64 [n]: the decile of each row's number, from 0 to 9.

    If a row has several numbers, the first is used.

    >>> partition_labels_of_numbers(torch.arange(20.0)).bincount().tolist()
    [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """
    first = values if values.dim() == 1 else values[:, 0]
    rank = torch.empty(len(first), dtype=torch.int64)
    rank[first.argsort(stable=True)] = torch.arange(len(first))
    # By rank, not by value, so that all ten groups have the same number of rows.
    return rank * GROUPS // max(1, len(first))


def partition_labels_of_flags(flags: Tensor) -> Tensor:
    """Returns int64 [n]: the same number for rows with the same labels [n, k] of 0 and 1."""
    numbers: Tensor = flags.nan_to_num().unique(dim=0, return_inverse=True)[1]
    return numbers.flatten()
