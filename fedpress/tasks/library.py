"""Metrics of torchmetrics as sums: any of its classes whose states are added up over parts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedpress.tasks.base import Sums, number

Rows = Callable[[], Mapping[str, Any]]
"""Makes fresh metrics by key; it imports torchmetrics inside, which takes two seconds."""


def library_sums(rows: Rows, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Returns the states of fresh metrics after one batch, by `key.state`; those of no example are zeros.

    Args:
        rows: makes the metrics.
        predictions: [n, ...], as the metrics take them.
        targets: [n, ...].

    Raises:
        TypeError: if a state is not a sum: the mean of two parts is not that of the whole.
    """
    found: dict[str, Tensor] = {}
    for key, metric in rows().items():
        metric.set_dtype(torch.float64)
        for state, reduction in metric._reductions.items():
            if getattr(reduction, "__name__", "") != "dim_zero_sum":
                raise TypeError(
                    f"{type(metric).__name__}: its state '{state}' is no sum; give it thresholds=, or take another"
                )
        if len(predictions):
            metric.update(predictions, targets)
        found |= {f"{key}.{name}": value.clone() for name, value in metric.metric_state.items()}
    return found


def library_values(rows: Rows, sums: Sums) -> dict[str, float | None]:
    """Returns the metrics from their sums; None where one is not defined, such as R2 of a single example."""
    found: dict[str, float | None] = {}
    for key, metric in rows().items():
        metric.set_dtype(torch.float64)
        for state in metric._reductions:
            setattr(metric, state, sums[f"{key}.{state}"])
        metric._update_count = 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                value = float(metric.compute())
            except ValueError:  # too few examples
                value = math.nan
        found[key] = number(value)
    return found
