"""Regression: predicts one or several numbers for each example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import DataError
from fedpress.tasks.base import Metric, Reduction, Sums, Task, json_number, reduced, standard_error
from fedpress.tasks.library import library_sums, library_values


@dataclass(frozen=True)
class Regression(Task):
    """Task with numbers as targets, float32 [n] or [n, k]; outputs [n, k] are standardised.

    The network learns `(target - mean) / std`, so that the same learning rate works for targets in
    any unit. Metrics are in the units of the targets. `mean` and `std` are published with the
    model, so they are computed from public targets only.

    Attributes:
        names: names of the k numbers.
        mean: mean of each number on the public part.
        std: standard deviation of each number on the public part. Mean and std are empty if there
            are no public targets; outputs are then in the units of the targets.

    >>> task = Regression(("price",), mean=(100.0,), std=(20.0,))
    >>> task.to_targets(torch.tensor([[0.5]]))
    tensor([[110.]])
    """

    names: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    kind = "regression"
    targets = "numbers"
    shown_metrics = (
        Metric("mae", "MAE", "lower", meaning="mean absolute error, in the units of the targets"),
        Metric("rmse", "RMSE", "lower", meaning="root of the mean squared error"),
        Metric(
            "r2",
            "R²",
            meaning="share of the variance that is explained; always predicting the mean has 0",
        ),
        Metric(
            "mae_of_mean",
            "MAE of the mean",
            "lower",
            meaning="MAE if the prediction is always the public mean",
        ),
        Metric("loss", "loss", "lower"),
    )
    other_keys = ("mae_warning", "mae_error")

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, len(self.names)):
            raise DataError(
                (
                    f"{len(self.names)} numbers but {len(self.mean)} means and {len(self.std)} "
                    "standard deviations"
                ),
                place="task 'regression'",
                cure="give one mean and one standard deviation for every number",
            )

    @classmethod
    def fit(cls, names: tuple[str, ...], public: Tensor) -> Regression:
        """Computes mean and standard deviation of public targets [n] or [n, k]."""
        if not len(public):
            return cls(names)
        columns = public.double().reshape(len(public), len(names))
        std = columns.std(0, correction=0)
        # A constant target has std 0. It gets 1 instead, because the loss divides by std.
        std = torch.where(std > torch.finfo(torch.float32).tiny, std, 1.0)
        return cls(names, tuple(columns.mean(0).tolist()), tuple(std.tolist()))

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the squared error of standardised targets, averaged over the k numbers."""
        columns = self._columns(targets)
        if self.mean:
            columns = (columns - columns.new_tensor(self.mean)) / columns.new_tensor(self.std)
        each = (outputs.float().reshape(columns.shape) - columns).square()
        return reduced(each.mean(1), reduction)

    def _columns(self, targets: Tensor) -> Tensor:
        return targets.reshape(len(targets), len(self.names))

    def to_targets(self, outputs: Tensor) -> Tensor:
        """Converts outputs [n, k] to the units of the targets."""
        if not self.mean:
            return outputs
        return outputs * outputs.new_tensor(self.std) + outputs.new_tensor(self.mean)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the states of torchmetrics' MAE, RMSE and R2, and sums of absolute errors.

        "error" is the sum of the model's absolute errors, "standard_error" the sum of those of the
        public mean.
        """
        # In float64: a sum over a million examples would lose digits in float32.
        columns = self._columns(targets).double()
        predicted = self.to_targets(self._columns(outputs.detach().double()))
        sums = library_sums(self._library_metrics, predicted, columns)
        broken = ~predicted.isfinite().all(1)
        # Without a public mean, any value will do: `summary` does not use this sum.
        mean = columns.new_tensor(self.mean or [0.0] * len(self.names))
        # The standard error of the MAE needs the sum of squared absolute errors, which torchmetrics
        # does not give.
        each = (predicted - columns).abs().mean(1)
        return {
            **sums,
            "error": each.sum(),
            "error_squared": each.square().sum(),
            "standard_error": (columns - mean).abs().mean(1).sum(),
            "examples": torch.tensor(len(columns)),
            "broken": broken.sum(),
        }

    @staticmethod
    def _library_metrics() -> Mapping[str, Any]:
        # Imported when first used: torchmetrics takes two seconds to import.
        from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

        return {
            "mae": MeanAbsoluteError(),
            "rmse": MeanSquaredError(squared=False),
            "r2": R2Score(),
        }

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key, and these further values.

        - `mae_warning`: a sentence if an output is not finite, or the MAE or R² is no better than
          that of always predicting the mean; else None.
        - `mae_error`: standard error of the MAE.
        """
        values = library_values(self._library_metrics, sums)
        n, broken = int(sums["examples"]), int(sums["broken"])
        of_mean = json_number(sums["standard_error"] / n) if n and self.mean else None
        warning = None
        if broken:
            warning = f"the model's outputs are not finite on {broken:,} of {n:,} test examples"
        elif of_mean is not None and values["mae"] is not None and values["mae"] >= of_mean:
            warning = (
                f"with a mean absolute error of {values['mae']:.4g} the model is no better than "
                f"always answering the mean of the public part ({of_mean:.4g})"
            )
        # A model may have a better MAE than the mean, but a worse squared error.
        elif values["r2"] is not None and values["r2"] <= 0:
            warning = "R² is not above 0: the model is no better than always answering the mean"
        return {
            **values,
            "mae_of_mean": of_mean,
            "mae_warning": warning,
            "mae_error": standard_error(sums["error"], sums["error_squared"], n),
        }

    def to_json(self) -> dict[str, JsonValue]:
        """Returns names, mean and std; a device predicts `output * std + mean`."""
        return {**super().to_json(), "mean": list(self.mean), "std": list(self.std)}
