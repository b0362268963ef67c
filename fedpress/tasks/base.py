"""The base class of tasks: loss, metrics from sums, and checks of outputs and targets."""

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
"""Sums over examples, by name. The sums of two parts of the data add up to those of the whole."""

Targets = Literal["classes", "flags", "numbers"]
"""Kinds of targets: class numbers int64 [n, ...]; 0 and 1 float32 [n, k]; float32 [n] or [n, k]."""


@dataclass(frozen=True)
class Metric:
    """How one metric is named and formatted.

    Attributes:
        key: in records and results, such as `balanced_accuracy`.
        name: for people, such as "balanced accuracy".
        better: whether higher or lower values are better.
        share: whether it is a share, 0 to 1, which is shown in percent.
        digits: decimals, if it is no share.
        meaning: what it means, for the report.
    """

    key: str
    name: str
    better: Literal["higher", "lower"] = "higher"
    share: bool = False
    digits: int = 3
    meaning: str = ""

    def formatted(self, value: float | None) -> str:
        """Returns a value as text.

        >>> Metric("accuracy", "accuracy", share=True).formatted(0.9712)
        '97.12%'
        >>> Metric("mae", "MAE", "lower").formatted(12.3456)
        '12.346'
        """
        if value is None or math.isnan(value):
            return "–"
        return f"{value:.2%}" if self.share else f"{value:.{self.digits}f}"


class Task(ABC):
    """What is learned: a loss, metrics, and the form of outputs and targets.

    A new task is a frozen dataclass in a file of its own, and a row in `fedpress.tasks.TASKS`.

    Attributes:
        kind: its name in a recipe.
        targets: the kind of targets that it needs.
        shown_metrics: the metrics that people see; the first one is the primary metric.
        other_keys: further keys that `summary` returns.
        primary: key of the primary metric, by which early stopping, `target_metric`, sweeps and the
            report compare models.
        higher_is_better: whether a larger value of it is better.
        keys: all keys that `summary` returns.
        names: of the classes, or of the predicted numbers.
        weighs_classes: whether it has classes that may count differently in the loss.
        class_weights: one for each class, see `weighted`; empty if all count alike.
    """

    kind: ClassVar[str]
    targets: ClassVar[Targets]
    shown_metrics: ClassVar[tuple[Metric, ...]]
    other_keys: ClassVar[tuple[str, ...]] = ()
    names: tuple[str, ...]
    class_weights: tuple[float, ...] = ()

    weighs_classes: ClassVar[bool] = False
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool]
    keys: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        """Derives `primary`, `higher_is_better` and `keys` from the metrics of a new task."""
        super().__init_subclass__()
        cls.primary = cls.shown_metrics[0].key
        cls.higher_is_better = cls.shown_metrics[0].better == "higher"
        # The loss is measured by the evaluation itself.
        measured = [metric.key for metric in cls.shown_metrics if metric.key != "loss"]
        cls.keys = (*measured, *cls.other_keys)

    @classmethod
    def fit(cls, names: tuple[str, ...], public: Tensor) -> Task:
        """Makes the task of a data set.

        Args:
            names: of the classes, or of the predicted numbers.
            public: the public targets [n, ...]; n may be 0. Private targets must have no influence,
                since what is fitted goes out with the model.
        """
        del public
        return cls(names)  # type: ignore[call-arg]

    @property
    def worst(self) -> float:
        """The worst value of the primary metric, to start a search with."""
        return -math.inf if self.higher_is_better else math.inf

    @classmethod
    def formatted(cls, score: float | None) -> str:
        """Returns a value of the primary metric as text: `97.12%`, or `12.3`."""
        return cls.shown_metrics[0].formatted(score)

    def better(self, new: float | None, old: float | None) -> bool:
        """Whether `new` is a better value of the primary metric than `old`.

        None and NaN are worse than any number.
        """
        if new is None or math.isnan(new):
            return False
        if old is None or math.isnan(old):
            return True
        return new > old if self.higher_is_better else new < old

    @property
    def outputs(self) -> int:
        """Number of outputs of the network for one example, or for each position of an example."""
        return len(self.names)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the loss of a batch.

        Args:
            outputs: of the network, [n, ...].
            targets: [n, ...].
            reduction: "mean" or "sum" over examples, or "none": the loss of each example, [n].
                Per-example clipping uses the last, so no example may influence another's loss.
        """

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums of a batch from which `summary` computes the metrics.

        Add the sums of several batches with `merged`.
        """

    @abstractmethod
    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Returns the metrics by key; None for one that is undefined on these examples.

        A key that ends in `_warning` holds a sentence if the model is useless, else None. The
        primary metric's key and `_error`, such as `accuracy_error`, is its standard error: how far
        another draw of as many test examples would move it. Leave it out if it has no simple
        formula.
        """

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums that the primary metric needs.

        Override it if all metrics cost much more than the primary one.
        """
        return self.metrics(outputs, targets)

    def score(self, sums: Sums) -> float:
        """Returns the primary metric from the `score_sums`; NaN if it is undefined."""
        value = self.summary(sums)[self.primary]
        return float(value) if isinstance(value, int | float) else math.nan

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns the distillation loss of outputs [n, ...] against a teacher's outputs.

        Here it is the mean squared difference.
        """
        del temperature
        return (outputs - teacher).square().mean()

    def agreement(self, first: Tensor, second: Tensor) -> float | None:
        """Returns the share of examples with equal predictions; None if predictions are numbers."""
        return None

    def smoothed(self, amount: float) -> Task:
        """Returns the task with label smoothing.

        Raises:
            RecipeError: if its targets are not classes.
        """
        if amount:
            raise RecipeError(
                f"the task is {self.kind}, which has no labels to smooth",
                place="label_smoothing",
                cure="leave it out",
            )
        return self

    def weighted(self, given: ClassWeights, public: Tensor) -> Task:
        """Returns the task with class weights in its loss. They do not change its metrics.

        Args:
            given: "balanced", or a weight for each class.
            public: the public targets [n, ...]. Private targets must have no influence.

        Raises:
            RecipeError: if its targets are not classes, or the weights do not fit them.
            DataError: if the public targets cannot be balanced.
        """
        del given, public
        raise no_classes_error(self.kind)

    @property
    def unweighted(self) -> Task:
        """The task without class weights, whose loss stands in results."""
        return self

    def check(self, outputs: object, targets: Tensor) -> None:
        """Checks that outputs and targets fit this task.

        Raises:
            ModelError: if the network returns another shape.
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
        """The expected shape of one example's outputs, for errors."""
        return f"[{self.outputs}] for the task {self.kind}"

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets fit this task. Its errors quote no value, since it may be private.

        Raises:
            DataError: saying what was expected.
        """
        check_numbers(targets, len(self.names), self.kind)

    def made_up_targets(self, n: int, like: Tensor) -> Tensor:
        """Returns `n` valid targets in shape and dtype of `like` [m, ...].

        With them a network is tried before any private data is used.
        """
        shape = (n, *like.shape[1:])
        if self.targets == "classes":
            each = torch.arange(n) % len(self.names)
        elif self.targets == "flags":
            each = torch.arange(n) % 2
        else:
            each = torch.linspace(0, 1, n)
        # The same value at all positions of an example.
        column = each.to(like.dtype).reshape(n, *[1] * (like.dim() - 1))
        return column.expand(shape).contiguous()

    def to_json(self) -> dict[str, JsonValue]:
        """Returns what a device must know to use the outputs: kind, names, and options."""
        return {"kind": self.kind, "names": list(self.names)}

    def to_targets(self, outputs: Tensor) -> Tensor:
        """Returns outputs in the units of the targets; unchanged by default."""
        return outputs

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns answers: class numbers, 0 or 1 per label, or numbers in the targets' units."""
        return self.to_targets(outputs)

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """Returns the probability of each class or label, [n, k, ...]; None for numbers."""
        del outputs
        return None


def no_classes_error(kind: str) -> RecipeError:
    """Returns the error for class weights of a task that has no classes."""
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
    """Returns mean or sum of the losses of examples [n], or the losses themselves."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def json_number(value: Tensor | float) -> float | None:
    """Returns a number for JSON: None for NaN and infinity, since JSON has neither."""
    value = float(value)
    return value if math.isfinite(value) else None


def standard_error(total: Tensor, squares: Tensor, n: int) -> float | None:
    """Returns the standard error of a mean; None for fewer than two values.

    Args:
        total: sum of `n` independent values.
        squares: sum of their squares.
        n: number of values.

    >>> standard_error(torch.tensor(6.0), torch.tensor(14.0), 3)  # of 1, 2 and 3
    0.5773502691896258
    """
    if n < 2:
        return None
    # From sums, so that it needs no second pass. Dividing by n - 1 makes the variance unbiased.
    mean = float(total) / n
    variance = (float(squares) / n - mean**2) * n / (n - 1)
    if not math.isfinite(variance):
        return None
    # Rounding may leave a variance of 0 slightly negative.
    return math.sqrt(max(0.0, variance) / n)


def check_numbers(targets: Tensor, width: int, kind: str) -> None:
    """Checks that targets are float32 [n, width], or [n] if width is 1, and finite.

    Raises:
        DataError: naming the task `kind`.
    """
    shapes, expected = [[width]], f"[n, {width}]"
    if width == 1:
        shapes, expected = [[1], []], "[n, 1] or [n]"
    if targets.dtype != torch.float32 or list(targets.shape[1:]) not in shapes:
        raise DataError(
            f"targets of type {targets.dtype} and shape {list(targets.shape)}",
            place="targets",
            cure=f"the task {kind} needs float32 {expected}",
        )
    if not bool(targets.isfinite().all()):
        raise DataError(
            "some targets are NaN or infinite",
            place="targets",
            cure="fill or leave out those rows",
        )
