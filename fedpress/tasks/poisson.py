"""Poisson regression: predicts the rates of counts, such as visits in a month."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor
from torch.nn.functional import poisson_nll_loss

from fedpress.errors import DataError
from fedpress.tasks.base import Metric, Reduction, Sums, Task, json_number, reduced, standard_error


@dataclass(frozen=True)
class Poisson(Task):
    """Task with counts 0, 1, 2, ... as targets, float32 [n] or [n, k].

    Outputs [n, k] are logarithms of the rates.

    Attributes:
        names: names of the k counts.
        mean: mean of each count on the public part, as a baseline for the metrics; empty if there
            are no public targets.

    >>> task = Poisson(("visits",), mean=(3.0,))
    >>> task.to_targets(torch.tensor([[0.0]]))
    tensor([[1.]])
    """

    names: tuple[str, ...]
    mean: tuple[float, ...] = ()

    kind = "poisson"
    targets = "numbers"
    shown_metrics = (
        Metric(
            "deviance",
            "Poisson deviance",
            "lower",
            meaning="mean Poisson deviance; 0 if every prediction equals the count",
        ),
        Metric("mae", "MAE", "lower", meaning="mean absolute error, in counts"),
        Metric(
            "deviance_of_mean",
            "deviance of the mean",
            "lower",
            meaning="deviance if the prediction is always the public mean",
        ),
        Metric("loss", "loss", "lower"),
    )
    other_keys = ("deviance_warning", "deviance_error")

    def __post_init__(self) -> None:
        if len(self.mean) not in (0, len(self.names)):
            raise DataError(
                f"{len(self.names)} counts but {len(self.mean)} means",
                place="task 'poisson'",
                cure="give one mean for every count",
            )

    @classmethod
    def fit(cls, names: tuple[str, ...], public: Tensor) -> Poisson:
        """Computes the mean of public targets [n] or [n, k]."""
        if not len(public):
            return cls(names)
        columns = public.double().reshape(len(public), len(names))
        return cls(names, tuple(columns.mean(0).tolist()))

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the loss `rate - count * log(rate)`, averaged over the k counts of an example.

        This is the negative log-likelihood without the term `log(count!)`, which does not depend on
        the outputs. Without this term the loss may be negative.
        """
        counts = self._columns(targets)
        log_rates = self._columns(outputs.float())
        each = poisson_nll_loss(log_rates, counts, log_input=True, reduction="none")
        return reduced(each.mean(1), reduction)

    def _columns(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), len(self.names))

    def to_targets(self, outputs: Tensor) -> Tensor:
        """Returns the rates, in counts."""
        return outputs.exp()

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns sums over examples of deviance and absolute error.

        The deviance and the error of an example are means over its k counts.
        """
        # In float64: a sum over a million examples would lose digits in float32.
        counts = self._columns(targets).double()
        log_rates = self._columns(outputs.detach().double())
        rates = self.to_targets(log_rates)
        # Without a public mean, any value will do: `summary` does not use this sum.
        log_means = counts.new_tensor(self.mean or [1.0] * len(self.names)).log()
        broken = ~(log_rates.isfinite() & rates.isfinite()).all(1)
        each = deviances(log_rates, counts).mean(1)
        return {
            "deviance": each.sum(),
            "deviance_squared": each.square().sum(),
            "mae": (rates - counts).abs().mean(1).sum(),
            "deviance_of_mean": deviances(log_means.expand_as(counts), counts).mean(1).sum(),
            "examples": torch.tensor(len(counts)),
            "broken": broken.sum(),
        }

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key, and these further values.

        - `deviance_warning`: a sentence if a rate is not finite, or the model is no better than
          always predicting the public mean; else None.
        - `deviance_error`: standard error of the mean deviance.
        """
        n, broken = int(sums["examples"]), int(sums["broken"])
        # Without examples, 0 / 0 is NaN, which `json_number` turns into None.
        deviance = json_number(sums["deviance"] / n)
        of_mean = json_number(sums["deviance_of_mean"] / n) if self.mean else None
        warning = None
        if broken:
            warning = f"the predicted rates are not finite on {broken:,} of {n:,} test examples"
        elif deviance is not None and of_mean is not None and deviance >= of_mean:
            warning = (
                f"with a mean Poisson deviance of {deviance:.4g} the model is no better than "
                f"always answering the mean of the public part ({of_mean:.4g})"
            )
        return {
            "deviance": deviance,
            "mae": json_number(sums["mae"] / n),
            "deviance_of_mean": of_mean,
            "deviance_warning": warning,
            "deviance_error": standard_error(sums["deviance"], sums["deviance_squared"], n),
        }

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets are counts: integers of at least 0.

        Raises:
            DataError: if a target is negative or no integer.
        """
        super().check_targets(targets)
        if not bool(((targets >= 0) & (targets == targets.floor())).all()):
            raise DataError(
                "some targets are negative or no integers",
                place="targets",
                cure=(
                    "the task poisson needs counts (0, 1, 2, ...): leave out those rows, "
                    'or take task = "regression"'
                ),
            )

    def made_up_targets(self, n: int, like: Tensor) -> Tensor:
        """Returns the counts 0, 1, 2, 0, 1, ... in shape and dtype of `like` [m, ...]."""
        # The base class makes numbers between 0 and 1, which are no counts.
        each = (torch.arange(n) % 3).to(like.dtype)
        return each.reshape(n, *[1] * (like.dim() - 1)).expand(n, *like.shape[1:]).contiguous()

    def to_json(self) -> dict[str, JsonValue]:
        """Returns the names and the public mean; a device predicts `exp(output)`."""
        return {**super().to_json(), "mean": list(self.mean)}


def deviances(log_rates: Tensor, counts: Tensor) -> Tensor:
    """Returns the Poisson deviance of each count (McCullagh and Nelder 1989, section 2.3).

    Args:
        log_rates: predicted logarithms of the rates [n, k].
        counts: targets [n, k].

    >>> deviances(torch.tensor([[0.0]]), torch.tensor([[0.0]]))
    tensor([[2.]])
    """
    # For a count of 0 the first term is 0, but the formula gives 0 * log(0), which is NaN.
    log_ratio = torch.where(counts > 0, counts * (counts.log() - log_rates), 0.0)
    return 2 * (log_ratio - counts + log_rates.exp())
