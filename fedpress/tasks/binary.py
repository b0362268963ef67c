"""Binary classification: one logit for each example; the primary metric is the AUC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import DataError, RecipeError
from fedpress.tasks import ranking, weights
from fedpress.tasks.base import Metric, Reduction, Sums, Task, json_number, reduced
from fedpress.tasks.classification import CALIBRATION_MEANING, Classification
from fedpress.tasks.weights import ClassWeights


@dataclass(frozen=True)
class Binary(Task):
    """Two classes: targets 0 and 1, int64 [n]; outputs are the logits of class 1, [n, 1].

    Attributes:
        names: names of class 0 and class 1.
        threshold: class 1 is predicted if its probability is at least this.
        specificity: share of class 0 that is recognised where `sensitivity` is measured; the
            threshold for that follows from the examples on which it is measured.
        class_weights: factors on the loss for class 0 and class 1; empty if both are 1.
        costs: what a false alarm costs (class 1 is predicted for an example of class 0), and what a
            miss costs, in any unit; empty if nothing is known of costs. In a recipe they also set
            the threshold, if that gives none: see `cheapest_threshold`.
    """

    names: tuple[str, ...]
    threshold: float = 0.5
    specificity: float = 0.9
    class_weights: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()

    weighs_classes = True
    kind = "binary"
    targets = "classes"
    shown_metrics = (
        Metric(
            "auc",
            "AUC",
            meaning="how often an example of class 1 scores above one of class 0; 0.5 is chance",
        ),
        Metric("accuracy", "accuracy", share=True),
        Metric("balanced_accuracy", "balanced accuracy", share=True),
        Metric("f1", "F1"),
        Metric(
            "sensitivity",
            "sensitivity",
            share=True,
            meaning="share of class 1 that is found at the fixed specificity, by default 90%",
        ),
        Metric(
            "mean_cost",
            "mean cost",
            "lower",
            meaning="false alarms and misses at their costs, per example, at the threshold",
        ),
        Metric("calibration_error", "calibration error", "lower", meaning=CALIBRATION_MEANING),
        Metric("loss", "log loss", "lower"),
    )
    other_keys = (
        "majority_share",
        "accuracy_warning",
        "accuracy_error",
        "balanced_accuracy_error",
        "auc_error",
        "sensitivity_error",
        "confusion",
    )

    def __post_init__(self) -> None:
        if len(self.names) != 2:
            raise DataError(
                f"the data has {len(self.names)} classes",
                place="task 'binary'",
                cure="use task = 'classification'",
            )
        if not 0 <= self.specificity <= 1:
            raise RecipeError(
                f"specificity is {self.specificity}",
                place="task 'binary'",
                cure="give a share from 0 to 1",
            )
        if self.costs and (len(self.costs) != 2 or not all(0 < c < math.inf for c in self.costs)):
            raise RecipeError(
                f"costs are {list(self.costs)}",
                place="task 'binary'",
                cure="give two positive numbers: of a false alarm and of a miss, such as [1, 5]",
            )

    @classmethod
    def made(cls, names: tuple[str, ...], public: Tensor, options: Mapping[str, Any]) -> Task:
        """Creates the task; costs without a threshold set the threshold."""
        task = super().made(names, public, options)
        if isinstance(task, Binary) and task.costs and "threshold" not in options:
            return replace(task, threshold=cheapest_threshold(*task.costs))
        return task

    @property
    def outputs(self) -> int:
        """One: the logit of class 1."""
        return 1

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the log loss in nats."""
        logits = outputs.float().reshape(len(targets))
        # torch's argument `pos_weight` is not used, because it only weighs class 1.
        if self.class_weights:
            each = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
            first, second = self.class_weights
            return reduced(each * torch.where(targets == 1, second, first), reduction)
        return F.binary_cross_entropy_with_logits(logits, targets.float(), reduction=reduction)

    def weighted(self, given: ClassWeights, public: Tensor) -> Binary:
        """Returns the task with class weights."""
        if given != "balanced":
            return replace(self, class_weights=weights.check(given, self.names))
        counts = public.bincount(minlength=2)
        return replace(self, class_weights=weights.balance(counts, self.names))

    @property
    def unweighted(self) -> Binary:
        """The task without class weights."""
        return replace(self, class_weights=())

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns T^2 KL(teacher || student) of the two class probabilities at temperature T."""
        return Classification(self.names).soft_loss(_both(outputs), _both(teacher), temperature)

    def agreement(self, first: Tensor, second: Tensor) -> float | None:
        """Returns the share of examples with equal predictions."""
        # Comparing logits, and not probabilities, saves two sigmoids.
        border = self._logit_of_threshold
        return ((first >= border) == (second >= border)).float().mean().item()

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns 1 where the probability of class 1 reaches the threshold, else 0."""
        return (outputs[:, 0] >= self._logit_of_threshold).long()

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the probabilities of class 0 and class 1, [n, 2]."""
        of_one = outputs[:, :1].sigmoid()
        return torch.cat([1 - of_one, of_one], dim=1)

    @property
    def _logit_of_threshold(self) -> float:
        return math.log(self.threshold / (1 - self.threshold))

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums of `Classification`, with predictions by the threshold."""
        logits = _both(outputs.detach().double())
        sums = dict(Classification(self.names).metrics(logits, targets))
        # `Classification` predicts at 0.5, so sums that depend on the threshold are replaced.
        answers = (logits[:, 1] >= self._logit_of_threshold).long()
        sums["answers"] = answers.bincount(minlength=2)
        sums["right"] = targets[answers == targets].bincount(minlength=2)
        sums["confusion"] = (2 * targets + answers).bincount(minlength=4).view(2, 2)
        return sums

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics and further values of `Classification` except `macro_f1`, and these.

        - `f1`: F1 of class 1.
        - `sensitivity`: share of class 1 that is found where the share `specificity` of class 0 is
          recognised.
        - `mean_cost`: what false alarms and misses cost per example; None without costs.
        - `auc_error`, `sensitivity_error`: their standard errors.
        """
        found = Classification(self.names).summary(sums)
        # For two classes F1 usually means the F1 of class 1, not the mean over both classes.
        found.pop("macro_f1")
        f1 = json_number(2 * sums["right"][1] / (sums["labels"][1] + sums["answers"][1]))
        # The primary metric comes first.
        auc = found.pop("auc")
        error = None
        if isinstance(auc, float):
            error = ranking.auc_standard_error(auc, int(sums["labels"][1]), int(sums["labels"][0]))
        at_fixed = at_fixed_error = None
        if auc is not None:
            at_fixed = json_number(ranking.sensitivity(sums["scores"], self.specificity)[0])
            at_fixed_error = ranking.sensitivity_standard_error(sums["scores"], self.specificity)
        cost = None
        if self.costs:
            false_alarm, miss = self.costs
            wrong = sums["confusion"]
            total = false_alarm * wrong[0, 1] + miss * wrong[1, 0]
            cost = json_number(total / wrong.sum())
        return {
            "auc": auc,
            **found,
            "f1": f1,
            "sensitivity": at_fixed,
            "mean_cost": cost,
            "auc_error": error,
            "sensitivity_error": at_fixed_error,
        }

    def to_json(self) -> dict[str, JsonValue]:
        """Returns the names, the threshold, the specificity and the costs, if there are any."""
        found = super().to_json()
        found |= {"threshold": self.threshold, "specificity": self.specificity}
        return {**found, "costs": list(self.costs)} if self.costs else found

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets are 0 or 1, int64 [n]."""
        Classification(self.names).check_targets(targets)
        if targets.dim() != 1:
            raise DataError(
                f"labels of {targets.dim()} dimensions",
                place="targets",
                cure="the task binary needs int64 [n]",
            )


def cheapest_threshold(false_alarm: float, miss: float) -> float:
    """Returns the threshold at which a false alarm and a miss cost the same on average.

    With right probabilities no other threshold has a lower mean cost: Elkan 2001, "The foundations
    of cost-sensitive learning", equation 2.

    >>> cheapest_threshold(false_alarm=1, miss=4)
    0.2
    """
    return false_alarm / (false_alarm + miss)


def _both(outputs: Tensor) -> Tensor:
    """Returns logits [n, 2] of both classes; the logit of class 0 is always 0."""
    # The softmax of (0, z) gives class 1 the probability sigmoid(z).
    logits = outputs.reshape(len(outputs), 1)
    return torch.cat([torch.zeros_like(logits), logits], 1)
