"""Segmentation: predicts the class of each pixel; measured by overlap, not by accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import DataError, ModelError
from fedpress.tasks.base import IGNORED, Metric, Reduction, Sums, Task, json_number
from fedpress.tasks.classification import Classification
from fedpress.tasks.weights import ClassWeights


@dataclass(frozen=True)
class Segmentation(Task):
    """One class for each pixel: targets int64 [n, h, w], outputs are logits [n, classes, h, w].

    Pixels with the target `IGNORED` (-100) count for nothing. The loss of an example is the mean
    over its own pixels; an example without any counted pixel has the loss 0.

    Attributes:
        names: names of classes 0, 1, ...
        label_smoothing: share of the target that is spread over all classes.
        class_weights: factors on the loss by class; empty if all are 1.

    >>> task = Segmentation(("background", "cell"))
    >>> targets = torch.tensor([[[0, 0], [1, 1]]])
    >>> answered = torch.tensor([[[0, 1], [1, 1]]])  # one pixel of the background is missed
    >>> logits = torch.nn.functional.one_hot(answered, 2).movedim(-1, 1).float()
    >>> found = task.summary(task.metrics(logits, targets))
    >>> [round(value, 3) for value in found["iou_by_class"]], round(found["mean_iou"], 3)
    ([0.5, 0.667], 0.583)
    """

    names: tuple[str, ...]
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    weighs_classes = True
    kind = "segmentation"
    targets = "classes"
    shown_metrics = (
        Metric(
            "mean_iou",
            "mean IoU",
            share=True,
            meaning="mean over the classes of overlap / union of predicted and true pixels",
        ),
        Metric(
            "dice",
            "Dice",
            share=True,
            meaning="mean over the classes of 2 overlap / (predicted + true pixels)",
        ),
        Metric("pixel_accuracy", "pixel accuracy", share=True),
        Metric("loss", "log loss", "lower"),
    )
    by_part = (
        Metric("iou_by_class", "IoU", share=True),
        Metric("dice_by_class", "Dice", share=True),
    )
    other_keys = ("iou_by_class", "dice_by_class", "mean_iou_warning")

    @property
    def _of_pixels(self) -> Classification:
        """The classification of single pixels, which has the same loss."""
        return Classification(self.names, self.label_smoothing, self.class_weights)

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the cross-entropy in nats; the loss of an example is the mean over its pixels."""
        return self._of_pixels.loss(outputs, targets, reduction=reduction)

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns T^2 KL(teacher || student) at temperature T in nats, the mean over all pixels."""
        return self._of_pixels.soft_loss(outputs, teacher, temperature)

    def agreement(self, first: Tensor, second: Tensor) -> float | None:
        """Returns the share of pixels with equal predictions."""
        return self._of_pixels.agreement(first, second)

    def smoothed(self, amount: float) -> Segmentation:
        """Returns the task with label smoothing; the same task if `amount` is 0."""
        return replace(self, label_smoothing=amount) if amount else self

    def weighted(self, given: ClassWeights, public: Tensor) -> Segmentation:
        """Returns the task with class weights; "balanced" counts public pixels."""
        return replace(self, class_weights=self._of_pixels.weighted(given, public).class_weights)

    @property
    def unweighted(self) -> Segmentation:
        """The task without class weights."""
        return replace(self, class_weights=())

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns the class of each pixel, int64 [n, h, w]."""
        return outputs.argmax(1)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the softmax of the logits, [n, classes, h, w]."""
        return outputs.softmax(1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns pixels by class: true ones, predicted ones, and those that are both."""
        counted = targets != IGNORED
        labels, answers = targets[counted], outputs.detach().argmax(1)[counted]
        classes = len(self.names)
        broken = outputs.isnan().flatten(1).any(1)
        return {
            "labels": labels.bincount(minlength=classes),
            "answers": answers.bincount(minlength=classes),
            "right": labels[answers == labels].bincount(minlength=classes),
            "examples": torch.tensor(len(targets)),
            "broken": broken.sum(),
        }

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key, and these further values.

        A class that is neither in the targets nor predicted has no IoU and no Dice (None), and does
        not count in their means.

        - `iou_by_class`, `dice_by_class`: one number for each class.
        - `mean_iou_warning`: a sentence if outputs are NaN, all answers are one class, or the mean
          IoU is no better than that of such answers; else None.
        """
        labels, answers, right = (sums[key].double() for key in ("labels", "answers", "right"))
        iou = right / (labels + answers - right)
        dice = 2 * right / (labels + answers)
        n = float(labels.sum())
        return {
            "mean_iou": json_number(iou.nanmean()),
            "dice": json_number(dice.nanmean()),
            "pixel_accuracy": json_number(right.sum() / n) if n else None,
            "iou_by_class": [json_number(value) for value in iou],
            "dice_by_class": [json_number(value) for value in dice],
            "mean_iou_warning": self._warning(sums, float(iou.nanmean())) if n else None,
        }

    def _warning(self, sums: Sums, mean_iou: float) -> str | None:
        """Returns a sentence if the mean IoU says that the model is useless, else None."""
        labels, answers, broken = sums["labels"], sums["answers"], int(sums["broken"])
        if broken:
            n = int(sums["examples"])
            return f"the model's outputs are not numbers (NaN) on {broken:,} of {n:,} test examples"
        if int((labels > 0).sum()) == 1:
            only = self.names[int(labels.argmax())]
            return f"all test pixels are '{only}', so the IoU says nothing of the other classes"
        if int((answers > 0).sum()) == 1:
            answer = self.names[int(answers.argmax())]
            share = float(sums["right"].sum()) / float(labels.sum())
            return (
                f"the model answers '{answer}' at every pixel, which is right at {share:.1%} of "
                "them: it finds no other class"
            )
        # Always answering the largest class: its IoU is its share, that of the others is 0.
        largest = int(labels.argmax())
        guess = float(labels[largest] / labels.sum() / (labels > 0).sum())
        if math.isfinite(mean_iou) and mean_iou <= guess:
            return (
                f"with a mean IoU of {mean_iou:.1%} the model is no better than always answering "
                f"'{self.names[largest]}' ({guess:.1%})"
            )
        return None

    def check(self, outputs: object, targets: Tensor) -> None:
        """Checks that outputs are logits [n, classes, h, w] and targets class numbers [n, h, w]."""
        self.check_targets(targets)
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got == [len(targets), len(self.names), *targets.shape[1:]]:
            return
        of_one = got[1:] if isinstance(got, list) else got
        wanted = [len(self.names), *targets.shape[1:]]
        raise ModelError(
            f"gives outputs {of_one} for one example, expected {wanted}: a logit per class and "
            "pixel",
            place="outputs",
            cure=f"make it return {len(self.names)} numbers for each pixel of the target",
        )

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets are class numbers or `IGNORED`, int64 [n, h, w]."""
        if targets.dim() != 3:
            raise DataError(
                f"labels of {targets.dim()} dimensions",
                place="targets",
                cure="the task segmentation needs int64 [n, h, w], a class for each pixel",
            )
        self._of_pixels.check_targets(targets)
