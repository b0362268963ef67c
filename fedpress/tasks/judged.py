"""What a classifier is worth beside its accuracy, which one large class alone can make look good."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

JUDGED = ("majority_share", "balanced_accuracy", "auc", "accuracy_warning")
"""The keys that stand beside `accuracy` wherever it is measured on the test set."""


def judged(
    logits: Tensor, labels: Tensor, class_names: Sequence[str]
) -> dict[str, float | str | None]:
    """Returns the numbers of `JUDGED` of a classifier on a test set.

    Args:
        logits: what it gives, [n, classes]; the larger, the surer.
        labels: the right classes [n], 0 .. classes - 1.
        class_names: a name for each class.

    Returns:
        `majority_share` (0..1) of the largest class among `labels`; `balanced_accuracy` (0..1), the mean share of right
        answers over the classes that occur; `auc` (see `auc`); `accuracy_warning`, a sentence where the accuracy is
        worth nothing, else None.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    answers = logits.argmax(1)
    counts = labels.bincount(minlength=logits.shape[1])
    right = labels[answers == labels].bincount(minlength=len(counts))
    occurs = counts > 0
    return {
        "majority_share": int(counts.max()) / len(labels),
        "balanced_accuracy": float((right[occurs].double() / counts[occurs]).mean()),
        "auc": auc(logits, labels),
        "accuracy_warning": _warning(logits, answers, labels, class_names),
    }


def auc(logits: Tensor, labels: Tensor) -> float | None:
    """Returns the area under the ROC curve: how often an example of a class is ranked above one of another.

    Ties count half (Mann-Whitney). Of two classes it is that of class 1; of more the plain mean over the classes that
    occur, each against the rest, ranked by its probability. None with fewer than two classes among `labels` [n], or
    where `logits` [n, classes] are not numbers.

    >>> import torch
    >>> auc(torch.tensor([[0.0, 0.1], [0.0, 0.4], [0.0, 0.3], [0.0, 0.4]]), torch.tensor([0, 0, 1, 1]))
    0.625
    """
    logits = logits.double()
    present = labels.unique().tolist()
    if len(present) < 2:
        return None
    if logits.shape[1] == 2:
        # The difference orders as the probability does, which rounds to 1 from a difference of 37 on.
        ranked, present = (logits[:, 1] - logits[:, 0])[:, None].expand(-1, 2), [1]
    else:
        ranked = logits.softmax(1)
    if ranked.isnan().any():
        return None
    areas = [_area(ranked[:, label], labels == label) for label in present]
    return sum(areas) / len(areas)


def _area(score: Tensor, positive: Tensor) -> float:
    """The AUC of `score` [n] for the examples that are `positive` [n], of which there are some but not all."""
    _, place, counts = score.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[
        place
    ].double()  # equal scores share their mean rank
    of, rest = int(positive.sum()), int((~positive).sum())
    return (float(ranks[positive].sum()) - of * (of + 1) / 2) / (of * rest)


def _warning(
    logits: Tensor, answers: Tensor, labels: Tensor, class_names: Sequence[str]
) -> str | None:
    """Says why the accuracy is worth nothing, or None."""
    n, counts = len(labels), labels.bincount()
    name, share = class_names[int(counts.argmax())], int(counts.max()) / len(labels)
    broken = int(logits.isnan().any(1).sum())
    if broken:
        return f"the model's outputs are not numbers (NaN) on {broken:,} of {n:,} test examples"
    if int(counts.max()) == n:
        return (
            f"all {n:,} test examples are '{name}', so accuracy says nothing of the other classes"
        )
    accuracy = int((answers == labels).sum()) / n
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    always = f"always answering '{name}' ({100 * share:.1f}% of the test examples)"
    if len(answers.unique()) == 1:
        only = class_names[int(answers[0])]
        return (
            f"the model answers '{only}' to all {n:,} test examples: it is no better than {always}"
        )
    if accuracy - share <= error:
        measured = f"at {100 * accuracy:.1f}% ± {100 * error:.1f}"
        return f"{measured} accuracy the model is no better than {always}"
    return None
