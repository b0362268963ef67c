"""Computes metrics of torchmetrics from sums over batches and clients.

A metric object of torchmetrics has a state of a few tensors. Example: the state of MAE is the sum
of absolute errors and the number of examples. The states of batches and clients are added.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedpress.tasks.base import Sums, json_number

MetricMaker = Callable[[], Mapping[str, Any]]
"""A function that returns new torchmetrics objects by key. It is called only when metrics are
computed, because importing torchmetrics takes two seconds."""


def library_sums(
    make_metrics: MetricMaker, predictions: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Returns the states of the metrics after one batch, such as "mae.sum_abs_error".

    Args:
        make_metrics: creates the metrics.
        predictions: predictions [n, ...]; n may be 0.
        targets: targets [n, ...].

    Raises:
        TypeError: if a state is not a sum, such as a list of all examples.
    """
    found: dict[str, Tensor] = {}
    for key, metric in make_metrics().items():
        metric.set_dtype(torch.float64)
        for state, reduction in metric._reductions.items():
            if getattr(reduction, "__name__", "") != "dim_zero_sum":
                raise TypeError(
                    f"{type(metric).__name__}: its state '{state}' is no sum; "
                    "give it thresholds=, or take another metric"
                )
        if len(predictions):
            metric.update(predictions, targets)
        found |= {f"{key}.{name}": value.clone() for name, value in metric.metric_state.items()}
    return found


def library_values(make_metrics: MetricMaker, sums: Sums) -> dict[str, float | None]:
    """Computes metrics from sums of `library_sums`; None for an undefined metric.

    Example: R2 is undefined for a single example.
    """
    found: dict[str, float | None] = {}
    for key, metric in make_metrics().items():
        metric.set_dtype(torch.float64)
        for state in metric._reductions:
            setattr(metric, state, sums[f"{key}.{state}"])
        # Otherwise compute() warns that update() was never called.
        metric._update_count = 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # R2, for instance, raises a ValueError for fewer than two examples.
            try:
                value = float(metric.compute())
            except ValueError:
                value = math.nan
        found[key] = json_number(value)
    return found
