"""Multilabel classification: an example has any number of labels, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import DataError
from fedpress.tasks import ranking, weights
from fedpress.tasks.base import Metric, Reduction, Sums, Task, check_numbers, json_number, reduced
from fedpress.tasks.library import library_sums, library_values
from fedpress.tasks.weights import ClassWeights


@dataclass(frozen=True)
class Multilabel(Task):
    """Task with several labels per example: targets are 0 or 1, float32 [n, labels].

    Outputs are logits [n, labels].

    Attributes:
        names: names of the labels.
        class_weights: factor on the loss of each label for examples that have the label; empty if
            all factors are 1.
    """

    names: tuple[str, ...]
    class_weights: tuple[float, ...] = ()

    weighs_classes = True
    kind = "multilabel"
    targets = "flags"
    shown_metrics = (
        Metric("macro_f1", "macro F1"),
        Metric("micro_f1", "micro F1"),
        Metric("auc", "AUC"),
        Metric("exact_match", "exact match", share=True),
        Metric("loss", "log loss", "lower"),
    )
    by_part = (
        Metric("f1_by_label", "F1"),
        Metric("auc_by_label", "AUC"),
    )
    other_keys = ("f1_by_label", "auc_by_label", "macro_f1_warning")

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the log loss in nats; the loss of an example is the mean over its labels."""
        logits = outputs.float()
        # A weight acts only on examples that have the label. Examples without it have weight 1.
        factor = logits.new_tensor(self.class_weights) if self.class_weights else None
        each = F.binary_cross_entropy_with_logits(
            logits, targets, reduction="none", pos_weight=factor
        )
        return reduced(each.mean(1), reduction)

    def weighted(self, given: ClassWeights, public: Tensor) -> Multilabel:
        """Returns the task with class weights: factors on the loss of a label where it is 1."""
        if given != "balanced":
            return replace(self, class_weights=weights.check(given, self.names))
        positive = public.long().sum(0)
        found = weights.balance_labels(positive, len(public), self.names)
        return replace(self, class_weights=found)

    @property
    def unweighted(self) -> Multilabel:
        """The task without class weights."""
        return replace(self, class_weights=())

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns T^2 times the cross-entropy with the teacher's probabilities at temperature T."""
        # Labels are independent, so there is no softmax over them: each is distilled by itself.
        soft = (teacher / temperature).sigmoid()
        loss = F.binary_cross_entropy_with_logits(outputs / temperature, soft)
        return loss * temperature**2

    def agreement(self, first: Tensor, second: Tensor) -> float | None:
        """Returns the share of examples with equal predictions for all labels."""
        return ((first > 0) == (second > 0)).all(1).float().mean().item()

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns 1 for each label whose probability is above one half, else 0."""
        return (outputs > 0).long()

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the probability of each label."""
        return outputs.sigmoid()

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the states of torchmetrics' F1 and exact match, and histograms for the AUC."""
        logits, flags = outputs.detach().double(), targets.long()
        # A logit above 0 means a probability above one half.
        answers = logits > 0
        broken = logits.isnan().any(1)
        return {
            **library_sums(self._library_metrics, answers.long(), flags),
            "scores": ranking.score_counts(logits, flags.bool()),
            "answers": answers.sum(0),
            "examples": torch.tensor(len(flags)),
            "broken": broken.sum(),
        }

    def _library_metrics(self) -> Mapping[str, Any]:
        # Imported when first used: torchmetrics takes two seconds to import.
        from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score

        k = len(self.names)
        return {
            "macro_f1": MultilabelF1Score(k, average="macro"),
            "micro_f1": MultilabelF1Score(k, average="micro"),
            "exact_match": MultilabelExactMatch(k),
        }

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key, and these further values.

        - `f1_by_label`: one number for each label; None for a label that no example has and that is
          never predicted.
        - `auc_by_label`: one number for each label; None for a label that every example has, or no
          example, and for all labels if an output is NaN.
        - `macro_f1_warning`: a sentence if an output is NaN or all examples get the same labels,
          else None.
        """
        found: dict[str, JsonValue] = {**library_values(self._library_metrics, sums)}
        n, broken = int(sums["examples"]), int(sums["broken"])
        area = ranking.aucs(sums["scores"])
        if broken:
            area = torch.full_like(area, torch.nan)
        # A label without an AUC is left out of the mean.
        found["auc"] = json_number(area[~area.isnan()].mean())
        found["auc_by_label"] = [json_number(value) for value in area]
        right, extra, lost = (sums[f"macro_f1.{state}"].double() for state in ("tp", "fp", "fn"))
        found["f1_by_label"] = [json_number(v) for v in 2 * right / (2 * right + extra + lost)]
        warning = None
        answers = sums["answers"]
        if broken:
            warning = (
                f"the model's outputs are not numbers (NaN) on {broken:,} of {n:,} test examples"
            )
        # A single example always gets the same labels as itself.
        elif n > 1 and bool(((answers == 0) | (answers == n)).all()):
            warning = f"the model gives the same labels to all {n:,} test examples"
        return found | {"macro_f1_warning": warning}

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets are 0 or 1 for each label."""
        check_numbers(targets, len(self.names), self.kind)
        if targets.dim() != 2 or not bool(((targets == 0) | (targets == 1)).all()):
            raise DataError(
                f"some targets are not 0 or 1 for each of {len(self.names)} labels",
                place="targets",
                cure="give float32 [n, labels]",
            )
