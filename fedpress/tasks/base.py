"""What every task says: its loss, the sums of its metrics, what it checks, and the words to tell results in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import DataError, ModelError, RecipeError
from fedpress.tasks.weights import ClassWeights

Reduction = Literal["mean", "sum", "none"]
Sums = Mapping[str, Tensor]
"""Numbers that are added up over examples, by name: those of two parts added are those of the whole."""

Targets = Literal["classes", "flags", "numbers"]
"""What the data must give: class numbers int64 [n, ...]; 0 and 1 as float32 [n, k]; or float32 [n] or [n, k]."""


@dataclass(frozen=True)
class Metric:
    """How one metric is told.

    Attributes:
        key: in records and results, such as `balanced_accuracy`.
        name: for people, such as "balanced accuracy".
        better: which values are good ones.
        share: whether it is a share (0..1) that people read in percent.
        digits: after the point, where it is no share.
        says: for the report: what it says, in words.
    """

    key: str
    name: str
    better: Literal["higher", "lower"] = "higher"
    share: bool = False
    digits: int = 3
    says: str = ""

    def formatted(self, value: float | None) -> str:
        """Returns a value as people read it.

        >>> Metric("accuracy", "accuracy", share=True).formatted(0.9712)
        '97.12%'
        >>> Metric("mae", "MAE", "lower").formatted(12.3456)
        '12.346'
        """
        if value is None or math.isnan(value):
            return "–"
        return f"{value:.2%}" if self.share else f"{value:.{self.digits}f}"


class Task(ABC):
    """What is learned. A new task is a frozen dataclass in a file of its own, and a row in `fedpress.tasks.TASKS`.

    Attributes:
        kind: the word in a recipe.
        targets: what the data must give.
        words: the metrics that people see, the most important one first: choices are made by that.
        beside: further keys that `summary` gives.
        primary: the key of the first of `words`: patience, `target_metric`, sweep and report go by it.
        higher_is_better: whether a larger value of it is better.
        keys: all that `summary` gives.
        names: of the classes, or of the numbers that are predicted.
        weighs_classes: whether there are classes that may count differently in the loss.
        class_weights: one for each class, see `weighted`; empty where all count alike.
    """

    kind: ClassVar[str]
    targets: ClassVar[Targets]
    words: ClassVar[tuple[Metric, ...]]
    beside: ClassVar[tuple[str, ...]] = ()
    names: tuple[str, ...]
    class_weights: tuple[float, ...] = ()

    weighs_classes: ClassVar[bool] = False
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool]
    keys: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        """Reads from `words` by which metric models are compared, in which direction, and what `summary` gives."""
        super().__init_subclass__()
        cls.primary = cls.words[0].key
        cls.higher_is_better = cls.words[0].better == "higher"
        cls.keys = (*(word.key for word in cls.words if word.key != "loss"), *cls.beside)

    @classmethod
    def fit(cls, names: tuple[str, ...], public: Tensor) -> Task:
        """Makes the task of a data set.

        Args:
            names: of the classes, or of the columns that hold the numbers.
            public: the public targets [n, ...], n may be 0. Private ones must not decide anything here.
        """
        del public
        return cls(names)  # type: ignore[call-arg]

    @property
    def worst(self) -> float:
        """The value that any other one is better than."""
        return -math.inf if self.higher_is_better else math.inf

    @classmethod
    def formatted(cls, score: float | None) -> str:
        """Returns a value of the primary metric as people read it: `97.12%`, or `12.3`."""
        return cls.words[0].formatted(score)

    def better(self, new: float | None, old: float | None) -> bool:
        """Says whether `new` is a better value of the primary metric than `old`; any number is better than none."""
        if new is None or math.isnan(new):
            return False
        if old is None or math.isnan(old):
            return True
        return new > old if self.higher_is_better else new < old

    @property
    def outputs(self) -> int:
        """How many numbers the network gives for one example (for each position, where targets are maps)."""
        return len(self.names)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the loss of a batch.

        Args:
            outputs: of the network, [n, ...].
            targets: [n, ...].
            reduction: "mean" or "sum" over examples, or "none": that of each example, [n]. The last one is what
                clipping per example needs, so an example must not depend on another.
        """

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums from which `summary` makes the metrics; add those of several batches with `merged`."""

    @abstractmethod
    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Returns the metrics by their keys; None for one that is not defined on these examples.

        A key that ends in `_warning` holds a sentence where the model is worth nothing, else None. The
        primary metric's key with `_error` behind it, such as `accuracy_error`, holds its standard error: how far
        another draw of as many test examples would move it. Leave it out where there is no simple formula.
        """

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns what the primary metric alone needs: give a cheap way if all metrics cost much more."""
        return self.metrics(outputs, targets)

    def score(self, sums: Sums) -> float:
        """Returns the primary metric from the `score_sums`, NaN where it is not defined."""
        value = self.summary(sums)[self.primary]
        return float(value) if isinstance(value, int | float) else math.nan

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns how far the outputs [n, ...] are from those of a teacher: their mean squared difference here."""
        del temperature
        return (outputs - teacher).square().mean()

    def agreement(self, first: Tensor, second: Tensor) -> float | None:
        """Returns the share of examples to which two networks give the same answer; None where answers are numbers."""
        return None

    def smoothed(self, amount: float) -> Task:
        """Returns the task with label smoothing.

        Raises:
            RecipeError: if its targets are no classes.
        """
        if amount:
            raise RecipeError(
                f"the task is {self.kind}, which has no labels to smooth",
                place="label_smoothing",
                cure="leave it out",
            )
        return self

    def weighted(self, given: ClassWeights, public: Tensor) -> Task:
        """Returns the task with weights in its loss; its metrics stay as they are.

        Args:
            given: "balanced", or a weight for each class.
            public: the public targets [n, ...]. Private ones must not decide anything here.

        Raises:
            RecipeError: if its targets are no classes, or the weights do not fit them.
            DataError: if the public targets cannot be balanced.
        """
        del given, public
        raise no_classes(self.kind)

    @property
    def unweighted(self) -> Task:
        """The task in whose loss all examples count alike, as results tell it."""
        return self

    def check(self, outputs: object, targets: Tensor) -> None:
        """Refuses outputs or targets that do not belong to this task.

        Raises:
            ModelError: if the network gives something else than the task needs.
            DataError: if a target has the wrong shape, type or range.
        """
        self.check_targets(targets)
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != [len(targets), self.outputs]:
            of_one = got[1:] if isinstance(got, list) else got
            raise ModelError(
                f"gives outputs {of_one} for one example, expected {self.expected}",
                place="outputs",
                cure=f"make it return {self.outputs} numbers",
            )

    @property
    def expected(self) -> str:
        """The shape of one example's outputs, in words."""
        return f"[{self.outputs}] for the task {self.kind}"

    def check_targets(self, targets: Tensor) -> None:
        """Refuses targets that do not belong to this task; says nothing about single values, which may be private.

        Raises:
            DataError: saying what was expected.
        """
        check_numbers(targets, len(self.names), self.kind)

    def made_up(self, n: int, like: Tensor) -> Tensor:
        """Returns `n` valid targets of the shape and type of `like` [m, ...], to try a network before private data."""
        shape = (n, *like.shape[1:])
        if self.targets == "classes":
            each = torch.arange(n) % len(self.names)
        elif self.targets == "flags":
            each = torch.arange(n) % 2
        else:
            each = torch.linspace(0, 1, n)
        return each.to(like.dtype).reshape(n, *[1] * (like.dim() - 1)).expand(shape).contiguous()

    def about(self) -> dict[str, JsonValue]:
        """Returns what a device must know to read the outputs, as JSON: the kind and the names at least."""
        return {"kind": self.kind, "names": list(self.names)}

    def to_targets(self, outputs: Tensor) -> Tensor:
        """Returns outputs in the units of the targets; unchanged by default."""
        return outputs

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns what the model answers: class numbers, 0 or 1 for each label, or numbers in the targets' units."""
        return self.to_targets(outputs)

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """Returns the probability of each class or label, [n, k, ...]; None for a task of numbers."""
        del outputs
        return None


def no_classes(kind: str) -> RecipeError:
    """Returns the error of class weights for a task without classes."""
    return RecipeError(
        f"the task is {kind}, which has no classes to weigh",
        place="class_weights",
        cure="leave it out",
    )


def merged(first: Sums, *others: Sums) -> dict[str, Tensor]:
    """Adds up the sums of several parts.

    >>> merged({"n": torch.tensor(2)}, {"n": torch.tensor(3)})
    {'n': tensor(5)}
    """
    total = dict(first)
    for sums in others:
        for name, value in sums.items():
            total[name] = total[name] + value
    return total


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """Returns the mean or the sum of the losses of single examples [n], or them as they are."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def number(value: Tensor | float) -> float | None:
    """Returns a number for JSON: None for NaN and infinity, which it does not know."""
    value = float(value)
    return value if math.isfinite(value) else None


def error_of_mean(total: Tensor, squares: Tensor, n: int) -> float | None:
    """Returns the standard error of a mean, from the sum of `n` independent values and that of their squares.

    >>> error_of_mean(torch.tensor(6.0), torch.tensor(14.0), 3)  # of 1, 2 and 3
    0.5773502691896258
    """
    if n < 2:
        return None
    mean = float(total) / n
    variance = (float(squares) / n - mean**2) * n / (n - 1)
    if not math.isfinite(variance):
        return None
    # Rounding may leave a variance of 0 slightly negative.
    return math.sqrt(max(0.0, variance) / n)


def check_numbers(targets: Tensor, width: int, kind: str) -> None:
    """Refuses targets that are not float32 [n, width] ([n] where width is 1), or not finite."""
    shapes = [[width], []] if width == 1 else [[width]]
    if targets.dtype != torch.float32 or list(targets.shape[1:]) not in shapes:
        raise DataError(
            f"targets of type {targets.dtype} and shape {list(targets.shape)}",
            place="targets",
            cure=f"the task {kind} needs float32 [n, {width}]{(' or [n]' if width == 1 else '')}",
        )
    if not bool(targets.isfinite().all()):
        raise DataError(
            "some targets are NaN or infinite",
            place="targets",
            cure="fill or leave out those rows",
        )
