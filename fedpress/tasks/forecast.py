"""Forecast: predicts a number at several times ahead, and compares itself with persistence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import DataError
from fedpress.tasks.base import (
    Metric,
    Reduction,
    Sums,
    Task,
    check_numbers,
    json_number,
    standard_error,
)
from fedpress.tasks.regression import Regression

NOW = "now"
"""Name of a first target column that holds the last observed value."""

NO_SKILL = (
    "the skill against persistence is unknown, because the targets do not hold the last observed "
    "value: put it before them and set task = { kind = 'forecast', now = true }"
)


@dataclass(frozen=True)
class Forecast(Task):
    """One number at h times ahead: outputs [n, h] are standardised as those of `Regression` are.

    Targets are float32 [n, h]: the value at each horizon. With `now`, they are [n, 1 + h], and the
    first column is the last observed value. It is no target: the loss does not use it. It tells the
    error of *persistence*, the forecast that the value stays as it is. So nobody has to know where
    among the inputs the last value stands, or how inputs were scaled; and since the column travels
    with each example, the error of persistence is a sum over examples like every other metric.

    Attributes:
        names: names of the h horizons, such as "t+1".
        now: whether the first column of the targets is the last observed value.
        mean: mean of each horizon on the public part.
        std: standard deviation of each horizon on the public part. Mean and std are empty if there
            are no public targets; outputs are then in the units of the targets.

    >>> task = Forecast(("t+1", "t+2"), now=True)
    >>> targets = torch.tensor([[10.0, 12.0, 14.0]])  # now it is 10, then 12 and 14
    >>> found = task.summary(task.metrics(torch.tensor([[11.0, 13.0]]), targets))
    >>> found["mae"], found["mae_of_persistence"], round(found["skill"], 3)
    (1.0, 3.0, 0.667)
    """

    names: tuple[str, ...]
    now: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    kind = "forecast"
    targets = "numbers"
    shown_metrics = (
        Metric("mae", "MAE", "lower", meaning="mean absolute error over all horizons"),
        Metric("rmse", "RMSE", "lower", meaning="root of the mean squared error"),
        Metric(
            "skill",
            "skill against persistence",
            meaning="1 - MAE / MAE of persistence; 0 is no better than the last observed value",
        ),
        Metric(
            "mae_of_persistence",
            "MAE of persistence",
            "lower",
            meaning="MAE if the prediction is always the last observed value",
        ),
        Metric("loss", "loss", "lower"),
    )
    by_part = (
        Metric("mae_by_horizon", "MAE", "lower"),
        Metric("rmse_by_horizon", "RMSE", "lower"),
        Metric("skill_by_horizon", "skill against persistence"),
    )
    other_keys = (
        "mae_by_horizon",
        "rmse_by_horizon",
        "skill_by_horizon",
        "mae_warning",
        "skill_note",
        "mae_error",
    )

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, len(self.names)):
            raise DataError(
                (
                    f"{len(self.names)} horizons but {len(self.mean)} means and {len(self.std)} "
                    "standard deviations"
                ),
                place="task 'forecast'",
                cure="give one mean and one standard deviation for every horizon",
            )

    @classmethod
    def fit(cls, names: tuple[str, ...], public: Tensor) -> Forecast:
        """Computes mean and standard deviation of each horizon on public targets."""
        return cls.made(names, public, {})

    @classmethod
    def made(cls, names: tuple[str, ...], public: Tensor, options: Mapping[str, Any]) -> Forecast:
        """Creates the task; a first column that is the last observed value is no horizon.

        That is so if the option `now` is true, or if it is not given and the first name is `NOW`.

        Raises:
            DataError: if no horizon is left.
        """
        now = options.get("now", names[:1] == (NOW,))
        if not now:
            return cls._with(names, public, {**options, "now": False})
        if len(names) < 2:
            raise DataError(
                "the targets hold the last observed value, but no horizon",
                place="task 'forecast'",
                cure="give one column for each horizon after it, or leave the option now out",
            )
        return cls._with(names[1:], public[:, 1:], {**options, "now": True})

    @classmethod
    def _with(cls, names: tuple[str, ...], public: Tensor, options: Mapping[str, Any]) -> Forecast:
        scale = Regression.fit(names, public)
        return cls(names, **{"mean": scale.mean, "std": scale.std, **options})

    @property
    def _scale(self) -> Regression:
        return Regression(self.names, self.mean, self.std)

    def _horizons(self, targets: Tensor) -> Tensor:
        """Returns the targets [n, h] without the last observed value."""
        columns = self._columns(targets)
        return columns[:, 1:] if self.now else columns

    def _columns(self, targets: Tensor) -> Tensor:
        return targets.reshape(len(targets), len(self.names) + self.now)

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the squared error of standardised targets, averaged over the horizons."""
        return self._scale.loss(outputs, self._horizons(targets), reduction=reduction)

    def to_targets(self, outputs: Tensor) -> Tensor:
        """Converts outputs [n, h] to the units of the targets."""
        return self._scale.to_targets(outputs)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns sums of absolute and squared errors by horizon, and of those of persistence."""
        # In float64: a sum over a million examples would lose digits in float32.
        columns = self._columns(targets).double()
        wanted = self._horizons(columns)
        predicted = self.to_targets(outputs.detach().double().reshape(wanted.shape))
        errors = (predicted - wanted).abs()
        each = errors.mean(1)
        sums = {
            "absolute": errors.sum(0),
            "squared": errors.square().sum(0),
            "error": each.sum(),
            "error_squared": each.square().sum(),
            "examples": torch.tensor(len(targets)),
            "broken": (~predicted.isfinite().all(1)).sum(),
        }
        if self.now:
            sums["persistence"] = (columns[:, :1] - wanted).abs().sum(0)
        return sums

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums for the MAE."""
        wanted = self._horizons(targets.double())
        predicted = self.to_targets(outputs.detach().double().reshape(wanted.shape))
        error = (predicted - wanted).abs().mean(1).sum()
        return {"error": error, "examples": torch.tensor(len(targets))}

    def score(self, sums: Sums) -> float:
        """Returns the MAE."""
        return float(sums["error"] / sums["examples"])

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key, and these further values.

        - `mae_by_horizon`, `rmse_by_horizon`, `skill_by_horizon`: one number for each horizon.
        - `mae_warning`: a sentence if an output is not finite, or persistence is as good; else
          None.
        - `skill_note`: a sentence if the skill is unknown because the targets do not hold the last
          observed value, else None.
        - `mae_error`: standard error of the MAE.
        """
        n, broken = int(sums["examples"]), int(sums["broken"])
        mae, persistence = sums["absolute"] / n, None
        if "persistence" in sums:
            persistence = sums["persistence"] / n
        skill = _skill(mae.mean(), None if persistence is None else persistence.mean())
        warning = None
        if broken:
            warning = f"the model's outputs are not finite on {broken:,} of {n:,} test examples"
        elif persistence is not None and skill is not None and skill <= 0:
            warning = (
                f"with a mean absolute error of {float(mae.mean()):.4g} the model is no better "
                "than always answering the last observed value "
                f"({float(persistence.mean()):.4g})"
            )
        of_horizon: list[JsonValue] | None = None
        if persistence is not None:
            pairs = zip(mae, persistence, strict=True)
            of_horizon = [_skill(error, of_same) for error, of_same in pairs]
        return {
            "mae": json_number(mae.mean()),
            "rmse": json_number((sums["squared"].mean() / n).sqrt()),
            "skill": skill,
            "mae_of_persistence": None if persistence is None else json_number(persistence.mean()),
            "mae_by_horizon": [json_number(value) for value in mae],
            "rmse_by_horizon": [json_number(value) for value in (sums["squared"] / n).sqrt()],
            "skill_by_horizon": of_horizon,
            "mae_warning": warning,
            "skill_note": None if self.now else NO_SKILL,
            "mae_error": standard_error(sums["error"], sums["error_squared"], n),
        }

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets are finite float32 [n, h], or [n, 1 + h] with `now`."""
        check_numbers(targets, len(self.names) + self.now, self.kind)

    def example_targets(self, outputs: Tensor) -> Tensor:
        """Returns zeros [n, h], or [n, 1 + h] with `now`."""
        return torch.zeros(len(outputs), len(self.names) + self.now)

    def to_json(self) -> dict[str, JsonValue]:
        """Returns names, mean, std and `now`; a device predicts `output * std + mean`."""
        scale: dict[str, JsonValue] = {"mean": list(self.mean), "std": list(self.std)}
        return {**super().to_json(), **scale, "now": self.now}


def _skill(mae: Tensor, persistence: Tensor | None) -> float | None:
    """Returns 1 - MAE / MAE of persistence; None if persistence is unknown or without error."""
    if persistence is None or not float(persistence) > 0:
        return None
    return json_number(1 - mae / persistence)
