"""Uses metrics of torchmetrics whose states are sums, so that they add up over batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedpress.tasks.base import Sums, json_number

MetricMaker = Callable[[], Mapping[str, Any]]
"""Returns new metrics of torchmetrics by key. It imports the library, which takes two seconds."""


def library_sums(
    make_metrics: MetricMaker, predictions: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Returns the states of new metrics after one batch, by `key.state`; zeros if it is empty.

    Args:
        make_metrics: makes the metrics.
        predictions: [n, ...], as the metrics take them.
        targets: [n, ...].

    Raises:
        TypeError: if a state is no sum, such as a mean: it does not add up over batches.
    """
    found: dict[str, Tensor] = {}
    for key, metric in make_metrics().items():
        metric.set_dtype(torch.float64)
        for state, reduction in metric._reductions.items():
            if getattr(reduction, "__name__", "") != "dim_zero_sum":
                raise TypeError(
                    f"{type(metric).__name__}: its state '{state}' is no sum; "
                    "give it thresholds=, or take another"
                )
        if len(predictions):
            metric.update(predictions, targets)
        found |= {f"{key}.{name}": value.clone() for name, value in metric.metric_state.items()}
    return found


def library_values(make_metrics: MetricMaker, sums: Sums) -> dict[str, float | None]:
    """Returns the metrics from their sums; None if undefined, such as R2 of a single example."""
    found: dict[str, float | None] = {}
    for key, metric in make_metrics().items():
        metric.set_dtype(torch.float64)
        for state in metric._reductions:
            setattr(metric, state, sums[f"{key}.{state}"])
        # Otherwise compute() warns that update() was never called.
        metric._update_count = 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # It raises a ValueError for too few examples.
            try:
                value = float(metric.compute())
            except ValueError:
                value = math.nan
        found[key] = json_number(value)
    return found
