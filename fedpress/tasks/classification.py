"""Classification: predicts one of several classes, for an example or each of its positions.

The positions of a text, for example, are its tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import ModelError
from fedpress.tasks import ranking, weights
from fedpress.tasks.base import (
    IGNORED,
    Metric,
    Reduction,
    Sums,
    Task,
    check_classes,
    json_number,
    reduced,
)
from fedpress.tasks.weights import ClassWeights

# With more classes no AUC is computed: it needs two histograms of 4,096 bins for each class.
MAX_AUC_CLASSES = 1000
# With more classes no confusion matrix is computed: it has a row and a column for each class.
MAX_CONFUSION_CLASSES = 50

AUC_MEANING = "AUC of class 1 if there are two classes, else mean over the classes; 0.5 is chance"
"""Explanation of the metric in reports."""
CALIBRATION_MEANING = "mean difference between the model's confidence and its accuracy"
"""Explanation of the metric in reports."""


@dataclass(frozen=True)
class Classification(Task):
    """One of several classes, for each example or each of its positions.

    Targets are int64 [n] or [n, ...]; outputs are logits [n, classes] or [n, classes, ...].

    Attributes:
        names: names of classes 0, 1, ...
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016,
            section 7).
        class_weights: factors on the loss by class; empty if all are 1.

    >>> task = Classification(("no", "yes"))
    >>> sums = task.metrics(torch.eye(2), torch.tensor([0, 1]))
    >>> task.summary(sums)["accuracy"]
    1.0
    """

    names: tuple[str, ...]
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    weighs_classes = True
    kind = "classification"
    targets = "classes"
    shown_metrics = (
        Metric("accuracy", "accuracy", share=True),
        Metric(
            "balanced_accuracy",
            "balanced accuracy",
            share=True,
            meaning="mean over the classes of the accuracy on their examples",
        ),
        Metric("auc", "AUC", meaning=AUC_MEANING),
        Metric("macro_f1", "macro F1", meaning="mean over the classes of their F1"),
        Metric("calibration_error", "calibration error", "lower", meaning=CALIBRATION_MEANING),
        Metric("loss", "log loss", "lower"),
    )
    other_keys = (
        "majority_share",
        "accuracy_warning",
        "accuracy_error",
        "balanced_accuracy_error",
        "confusion",
    )

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the cross-entropy in nats; the loss of an example is the mean over its positions.

        With class weights, the sum is divided by the number of examples. torch divides by the sum
        of weights, but then the loss of an example would depend on other examples.
        """
        # A needless cast would be exported as an operation that the device must compute.
        if outputs.dtype != torch.float32:
            outputs = outputs.float()
        smoothing = self.label_smoothing
        weight = outputs.new_tensor(self.class_weights) if self.class_weights else None
        if targets.dim() == 1 and weight is None:
            return F.cross_entropy(outputs, targets, reduction=reduction, label_smoothing=smoothing)
        each = F.cross_entropy(
            outputs, targets, weight, reduction="none", label_smoothing=smoothing
        )
        if targets.dim() == 1:
            return reduced(each, reduction)
        # An example without any label gets the loss 0 instead of 0 / 0.
        counted = (targets != IGNORED).flatten(1).sum(1).clamp_min(1)
        return reduced(each.flatten(1).sum(1) / counted, reduction)

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns T^2 KL(teacher || student) at temperature T in nats, the mean over all positions.

        Hinton, Vinyals, Dean (2015, arXiv:1503.02531), section 2. The factor T^2 makes the size of
        the gradient independent of T.
        """
        soft = (outputs / temperature).log_softmax(1)
        target = (teacher / temperature).log_softmax(1)
        positions = math.prod(outputs.shape[2:])
        divergence = F.kl_div(soft, target, reduction="batchmean", log_target=True)
        return divergence * temperature**2 / positions

    def agreement(self, first: Tensor, second: Tensor) -> float | None:
        """Returns the share of examples (or positions) with equal predictions."""
        return (first.argmax(1) == second.argmax(1)).float().mean().item()

    def smoothed(self, amount: float) -> Classification:
        """Returns the task with label smoothing; the same task if `amount` is 0."""
        return replace(self, label_smoothing=amount) if amount else self

    def weighted(self, given: ClassWeights, public: Tensor) -> Classification:
        """Returns the task with class weights."""
        if given != "balanced":
            return replace(self, class_weights=weights.check(given, self.names))
        counted = public[public != IGNORED]
        counts = counted.bincount(minlength=len(self.names))
        return replace(self, class_weights=weights.balance(counts, self.names))

    @property
    def unweighted(self) -> Classification:
        """The task without class weights."""
        return replace(self, class_weights=())

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the number of right predictions and the number of labels."""
        counted = targets != IGNORED
        right = ((outputs.argmax(1) == targets) & counted).sum()
        return {"right": right, "examples": counted.sum()}

    def score(self, sums: Sums) -> float:
        """Returns the accuracy, 0..1."""
        examples = int(sums["examples"])
        return int(sums["right"]) / examples if examples else math.nan

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns the class of the largest logit."""
        return outputs.argmax(1)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the softmax of the logits."""
        return outputs.softmax(1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums: labels, predictions and right predictions by class, and histograms.

        The histograms are those of `fedpress.tasks.ranking`, for AUC and calibration error.
        "broken" counts the predictions with NaN, "unranked" those without a softmax.
        """
        # To [examples * positions, classes].
        logits = outputs.detach().double().movedim(1, -1).flatten(0, -2)
        labels = targets.reshape(-1)
        logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
        classes = logits.shape[1]
        answers = logits.argmax(1)
        right = answers == labels
        broken = logits.isnan().any(1)
        confidence = logits.softmax(1).amax(1)
        # NaN and some infinite logits have no softmax. They are not in the histograms; if there are
        # any, `summary` gives neither AUC nor calibration error.
        sure = confidence.isfinite()
        sums = {
            "labels": labels.bincount(minlength=classes),
            "answers": answers.bincount(minlength=classes),
            "right": labels[right].bincount(minlength=classes),
            "broken": broken.sum(),
            "examples": torch.tensor(len(targets)),
            "unranked": (~sure).sum(),
            "calibration": ranking.calibration_counts(confidence[sure], right[sure]),
        }
        if classes <= MAX_AUC_CLASSES:
            sums["scores"] = self._score_counts(logits[sure], labels[sure])
        if classes <= MAX_CONFUSION_CLASSES:
            pairs = labels * classes + answers
            sums["confusion"] = pairs.bincount(minlength=classes**2).view(classes, classes)
        return sums

    def _score_counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns histograms of scores for each class against the rest.

        With two classes there is only the histogram for class 1. The score of a class with
        probability p is log(p / (1 - p)).
        """
        classes = logits.shape[1]
        if classes == 2:
            scores = logits[:, 1:] - logits[:, :1]
            return ranking.score_counts(scores, labels[:, None] == 1)
        log_p = logits.log_softmax(1)
        # log(1 - p) by expm1 is precise for a small p. The clamp keeps it finite for p = 1.
        log_rest = torch.log(-torch.expm1(log_p.clamp_max(-1e-300)))
        return ranking.score_counts(log_p - log_rest, F.one_hot(labels, classes).bool())

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key, and these further values.

        - `accuracy_error`, `balanced_accuracy_error`: their standard errors; None if examples have
          several positions.
        - `majority_share`: share of the most frequent class, 0 to 1.
        - `accuracy_warning`: a sentence if the accuracy means nothing, else None.
        - `confusion`: for each class, how often each class was predicted; None if there are more
          than `MAX_CONFUSION_CLASSES` classes.
        """
        labels, answers, right = (sums[key].double() for key in ("labels", "answers", "right"))
        n = float(labels.sum())
        # The binomial formula needs independent predictions. Predictions at positions of the same
        # example are not independent.
        independent = n <= int(sums["examples"])
        # Recall needs examples of the class. F1 is also defined if the class was only predicted.
        occurs = labels > 0
        has_f1 = labels + answers > 0
        f1 = 2 * right[has_f1] / (labels + answers)[has_f1]
        auc: float | None = None
        calibration: float | None = None
        if not int(sums["unranked"]):
            calibration = json_number(ranking.calibration_error(sums["calibration"]))
            if "scores" in sums and int(occurs.sum()) > 1:
                area = ranking.aucs(sums["scores"])
                auc = json_number(area[~area.isnan()].mean())
        accuracy = float(right.sum()) / n if n else math.nan
        recall = right[occurs] / labels[occurs]
        error = balanced_error = None
        if n and independent:
            error = json_number(math.sqrt(accuracy * (1 - accuracy) / n))
            # The recalls of the classes are independent; the variance of each is binomial.
            variance = (recall * (1 - recall) / labels[occurs]).sum()
            balanced_error = json_number(variance.sqrt() / len(recall))
        confusion = sums.get("confusion")
        return {
            "accuracy": json_number(accuracy),
            "majority_share": json_number(labels.max() / n) if n else None,
            "balanced_accuracy": json_number(recall.mean()),
            "auc": auc,
            "accuracy_warning": self._warning(sums) if n else None,
            "accuracy_error": error,
            "balanced_accuracy_error": balanced_error,
            "macro_f1": json_number(f1.mean()),
            "calibration_error": calibration,
            "confusion": None if confusion is None else confusion.tolist(),
        }

    def _warning(self, sums: Sums) -> str | None:
        """Returns a sentence if the accuracy means nothing, else None.

        This is so, for instance, if all labels or all predictions are the same class.
        """
        labels, answers = sums["labels"], sums["answers"]
        n, largest = int(labels.sum()), int(labels.argmax())
        name, share = self.names[largest], int(labels.max()) / n
        broken = int(sums["broken"])
        if broken:
            return f"the model's outputs are not numbers (NaN) on {broken:,} of {n:,} test examples"
        if int(labels.max()) == n:
            only = f"all {n:,} test examples are '{name}'"
            return f"{only}, so there is no AUC, and accuracy says nothing of the other classes"
        accuracy = int(sums["right"].sum()) / n
        error = math.sqrt(accuracy * (1 - accuracy) / n)
        always = f"always answering '{name}' ({100 * share:.1f}% of the test examples)"
        if int((answers > 0).sum()) == 1:
            answer = self.names[int(answers.argmax())]
            same = f"the model answers '{answer}' to all {n:,} test examples"
            return f"{same}: it is no better than {always}"
        # Within one standard error the difference may be chance.
        if accuracy - share <= error:
            measured = f"at {100 * accuracy:.1f}% ± {100 * error:.1f}"
            return f"{measured} accuracy the model is no better than {always}"
        return None

    def to_json(self) -> dict[str, JsonValue]:
        """Returns an empty dictionary: files have another entry for the class names."""
        return {}

    def check(self, outputs: object, targets: Tensor) -> None:
        """Checks that outputs are logits of these classes, and that targets are class numbers."""
        self.check_targets(targets)
        expected = [len(targets), len(self.names), *targets.shape[1:]]
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got == expected:
            return
        of_one = got[1:] if isinstance(got, list) else got
        if not isinstance(got, list) or len(got) != len(expected):
            raise ModelError(
                f"gives outputs {of_one} for one example, not [classes] as a classifier does, "
                "and accuracy needs a classifier",
                place="outputs",
                cure=f"make it return {len(self.names)} numbers for each label",
            )
        raise ModelError(
            f"gives outputs {of_one} for one example but the data has {len(self.names)} classes",
            place="outputs",
            cure=f"make it return {len(self.names)} numbers",
        )

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets are class numbers; at positions also `IGNORED` is valid."""
        check_classes(targets, len(self.names))
