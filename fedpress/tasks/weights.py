"""Class weights: factors on the loss by class, so that rare classes count more.

Balanced weights are computed from public examples only, because the counts of private examples are
private.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fedpress.errors import Argument, DataError, RecipeError

ClassWeights = Literal["balanced"] | Sequence[float]
"""The value of the key `class_weights` in a recipe: "balanced", or a weight for each class."""

# An error shows an example of a list of weights only for at most so many classes.
MOST_SHOWN = 8


def check(given: Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    """Checks the class weights of a recipe and returns them as a tuple.

    Raises:
        RecipeError: if `given` is a string, or does not have one finite number above 0 for each
            class.

    >>> check([1, 3], ("no", "yes"))
    (1.0, 3.0)
    """
    # A string such as "balance" is also a sequence, of letters.
    if isinstance(given, str):
        raise RecipeError(
            f"got '{given}'",
            place="class_weights",
            cure=("give ", _BALANCED, " or ", _list(names)),
        )
    weights = tuple(float(weight) for weight in given)
    if len(weights) != len(names):
        raise RecipeError(
            f"{len(weights)} weights for {len(names)} classes ({', '.join(names)[:80]})",
            place="class_weights",
            cure=("give one for each, ", _list(names), ", or ", _BALANCED),
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise RecipeError(
            f"got {list(weights)}, expected finite numbers above 0",
            place="class_weights",
            cure=("give for instance ", _list(names)),
        )
    return weights


def balance(counts: Tensor, names: Sequence[str]) -> tuple[float, ...]:
    """Returns balanced weights n / (k * count) of k classes, as in scikit-learn.

    The mean of the weights over the n examples is 1.

    Args:
        counts: number of public examples of each class, int64 [k]; their sum is n.
        names: names of the classes.

    Raises:
        DataError: if a class has no public example.

    >>> import torch
    >>> balance(torch.tensor([90, 10]), ("no", "yes"))
    (0.5555555555555556, 5.0)
    """
    _check_all_there(counts, names, "of class")
    n, k = int(counts.sum()), len(names)
    return tuple(n / (k * count) for count in counts.tolist())


def balance_labels(positive: Tensor, n: int, names: Sequence[str]) -> tuple[float, ...]:
    """Returns the weight (n - positive) / positive for each label.

    With this weight, the examples with the label and those without it have the same total weight.

    Args:
        positive: number of public examples with each label, int64 [k].
        n: number of public examples.
        names: names of the labels.

    Raises:
        DataError: if there is a label that all public examples have, or that none has.
    """
    _check_all_there(positive, names, "with label")
    _check_all_there(n - positive, names, "without label")
    return tuple((n - count) / count for count in positive.tolist())


def _check_all_there(counts: Tensor, names: Sequence[str], what: str) -> None:
    # A count of 0 would give an infinite weight.
    missing = []
    for name, count in zip(names, counts.tolist(), strict=True):
        if not count:
            missing.append(repr(name))
    if missing:
        raise DataError(
            f"there is no public example {what} {', '.join(missing[:3])} to balance by",
            place="class_weights",
            cure=("give a list, ", _list(names), ", or declare more examples public"),
        )


_BALANCED = Argument("class_weights", "balanced")


def _list(names: Sequence[str]) -> Argument:
    example = (1.0,) * len(names) if len(names) <= MOST_SHOWN else "LIST"
    return Argument("class_weights", example)
