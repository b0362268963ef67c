"""The base class of tasks: loss, metrics, and checks of outputs and targets.

Metrics are computed from sums over examples, such as the number of right answers. Sums of batches,
files or clients can be added, so no outputs need to be stored.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from fedpress.core.outputs import is_plain, output_tensors, outputs_text
from fedpress.errors import DataError, ModelError, RecipeError
from fedpress.tasks.weights import ClassWeights

Reduction = Literal["mean", "sum", "none"]
"""What is returned for the losses of a batch's examples: their mean, their sum, or all of them."""
Sums = Mapping[str, Tensor]
"""Name -> sum over examples. Example: {"right": tensor(90), "examples": tensor(100)}."""

Targets = Literal["classes", "flags", "numbers", "arrays"]
"""Kinds of targets. "classes": class numbers, int64 [n, ...]. "flags": 0 or 1 for each of k labels,
float32 [n, k]. "numbers": float32 [n] or [n, k]. "arrays": float32 of any shape [n, ...], for a
task of the user's own."""


IGNORED = -100
"""Target of a position without a label, such as the padding of a short sequence."""


@dataclass(frozen=True)
class Metric:
    """Name, direction and format of a metric.

    Attributes:
        key: key of the metric in records and results, such as "balanced_accuracy".
        name: name in tables and figures, such as "balanced accuracy".
        better: whether higher or lower values are better.
        share: whether values are shares from 0 to 1, which are shown in percent.
        digits: number of decimals shown; not used if `share` is True.
        meaning: an explanation for the report, such as "0.5 is chance".
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
    """What a network learns: a loss, metrics, and the form of outputs and targets.

    A task, such as `Regression`, is a frozen dataclass in its own file and an entry in
    `fedpress.tasks.TASKS`.

    Attributes:
        kind: name of the task in a recipe, such as "binary".
        targets: kind of the targets.
        shown_metrics: metrics in tables and reports; the first one is the primary metric.
        other_keys: further keys in the result of `summary`.
        by_part: metrics in `other_keys` with a value for each name, such as each horizon or class;
            a report draws them. Their keys end with what it is: `_by_horizon`.
        primary: key of the primary metric. Early stopping, `target_metric` (a setting that stops
            federated training), sweeps and reports use this metric to compare models.
        higher_is_better: whether a higher primary metric is better.
        keys: all keys in the result of `summary`.
        names: names of the classes, or of the predicted numbers.
        weighs_classes: whether the loss can have class weights.
        several_outputs: whether `loss`, `metrics` and `answers` take what the network's forward
            returns, be it a tensor of any shape or several in a tuple or dictionary. `check` then
            only asks that `loss` takes them.
        class_weights: weight of each class in the loss; empty if all weights are 1.
    """

    kind: ClassVar[str]
    targets: ClassVar[Targets]
    shown_metrics: ClassVar[tuple[Metric, ...]]
    other_keys: ClassVar[tuple[str, ...]] = ()
    by_part: ClassVar[tuple[Metric, ...]] = ()
    names: tuple[str, ...]
    class_weights: tuple[float, ...] = ()

    weighs_classes: ClassVar[bool] = False
    several_outputs: ClassVar[bool] = False
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool]
    keys: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        """Sets `primary`, `higher_is_better` and `keys` of a subclass from its metrics."""
        super().__init_subclass__()
        if not getattr(cls, "shown_metrics", ()):
            raise TypeError(
                f"{cls.__name__}(Task) has no shown_metrics: give it a tuple of Metric, the primary "
                "one first"
            )
        # A task of the user's own is named by its place. Tasks of fedpress have a word.
        if "kind" not in cls.__dict__:
            cls.kind = f"{cls.__module__}:{cls.__qualname__}"
        cls.primary = cls.shown_metrics[0].key
        cls.higher_is_better = cls.shown_metrics[0].better == "higher"
        # Without the loss, which `training.evaluate` measures itself.
        measured = [metric.key for metric in cls.shown_metrics if metric.key != "loss"]
        cls.keys = (*measured, *cls.other_keys)

    @classmethod
    def fit(cls, names: tuple[str, ...], public: Tensor) -> Task:
        """Creates the task of a data set. A subclass may fit values such as mean and std.

        Args:
            names: names of the classes, or of the predicted numbers.
            public: public targets [n, ...]; n may be 0. Fitted values are published with the model,
                so they must not depend on private targets.
        """
        # The base class fits nothing.
        del public
        return cls(names)  # type: ignore[call-arg]

    @classmethod
    def made(cls, names: tuple[str, ...], public: Tensor, options: Mapping[str, Any]) -> Task:
        """Creates the task of a data set with the user's options, which replace fitted values.

        Args:
            names: names of the classes, or of the columns of the targets.
            public: public targets [n, ...]; n may be 0.
            options: fields of the task by name.
        """
        task = cls.fit(names, public)
        return replace(task, **options) if options else task  # type: ignore[type-var]

    @property
    def worst(self) -> float:
        """The worst value of the primary metric. A search for the best value starts with it."""
        return -math.inf if self.higher_is_better else math.inf

    @classmethod
    def formatted(cls, score: float | None) -> str:
        """Formats a value of the primary metric, such as "97.12%" or "12.346"."""
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
        """Number of outputs of the network for one example, or for each of its tokens."""
        return len(self.names)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the loss of a batch.

        Args:
            outputs: outputs of the network [n, ...].
            targets: targets [n, ...].
            reduction: "mean" or "sum" over examples, or "none" for the loss of each example, [n].
                DP-SGD clips gradients of single examples, so the loss of an example must not depend
                on other examples.
        """

    @abstractmethod
    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns sums over the examples of a batch; `summary` computes the metrics from them.

        `merged` adds the sums of several batches.
        """

    @abstractmethod
    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key; None for a metric that is undefined on these examples.

        The value of a key that ends in `_warning` is a sentence if the model is useless or the
        metric says nothing, else None. The key of the primary metric with the ending `_error`, such
        as `accuracy_error`, has the standard error of this metric. A task without a simple formula
        for the standard error leaves this key out.
        """

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums for `score`, which is computed after every epoch.

        Override `score_sums` and `score` if the primary metric alone is much cheaper than all
        metrics.
        """
        return self.metrics(outputs, targets)

    def score(self, sums: Sums) -> float:
        """Returns the primary metric from the `score_sums`; NaN if it is undefined."""
        value = self.summary(sums)[self.primary]
        return float(value) if isinstance(value, int | float) else math.nan

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns the distillation loss: the distance of outputs to a teacher's outputs [n, ...].

        The default is the mean squared difference. For several outputs, which may have different
        units, `divergence` is taken instead.
        """
        # Only tasks with probabilities have a temperature.
        del temperature
        return (outputs - teacher).square().mean()

    @property
    def own_soft_loss(self) -> bool:
        """Whether the task has a `soft_loss` of its own."""
        return type(self).soft_loss is not Task.soft_loss

    def divergence(self, outputs: Tensor, reference: Tensor, spreads: Sequence[float]) -> Tensor:
        """Returns how far outputs are from reference outputs [n, ...]; 0 if they are equal.

        A task with a soft loss of its own says it by this loss at temperature 1: for probabilities
        it is the Kullback-Leibler divergence in nats, the mean over examples and positions. For
        other tasks it is the mean squared difference as a share of the reference's variance; of
        several outputs, the sum of these shares.

        Args:
            outputs: outputs of a changed network.
            reference: outputs of the network before the change.
            spreads: standard deviation of each tensor of the reference over many examples (see
                `fedpress.core.outputs.spreads`), so that outputs in different units count alike.
        """
        if self.own_soft_loss:
            # A cross-entropy is not 0 for equal outputs, but the entropy of the reference.
            least = self.soft_loss(reference, reference, 1.0)
            return self.soft_loss(outputs, reference, 1.0) - least
        triples = zip(output_tensors(outputs), output_tensors(reference), spreads, strict=True)
        each = [
            ((changed - before) / spread).square().mean()
            for changed, before, spread in triples
            if before.is_floating_point()
        ]
        return torch.stack(each).sum()

    def agreement(self, first: Tensor, second: Tensor) -> float | None:
        """Returns the share of examples with equal predictions; None if predictions are numbers."""
        return None

    def smoothed(self, amount: float) -> Task:
        """Returns the task with label smoothing.

        Args:
            amount: share of the target that is spread over all classes; 0: no smoothing.

        Raises:
            RecipeError: if `amount` is not 0 and the task has no label smoothing.
        """
        # 0 is the default of the setting, so every task must accept it.
        if amount:
            raise RecipeError(
                f"the task is {self.kind}, which has no label smoothing",
                place="label_smoothing",
                cure="leave it out",
            )
        return self

    def weighted(self, given: ClassWeights, public: Tensor) -> Task:
        """Returns the task with class weights in its loss. They do not change its metrics.

        Args:
            given: "balanced", or a weight for each class.
            public: public targets [n, ...]; "balanced" weights are computed from the number of
                targets of each class. Such counts of private targets would cost privacy.

        Raises:
            RecipeError: if the task has no class weights, or the weights do not fit the classes.
            DataError: if the public targets cannot be balanced.
        """
        del given, public
        raise no_classes_error(self.kind)

    @property
    def unweighted(self) -> Task:
        """The same task without class weights. Reported losses are losses of this task."""
        return self

    def check(self, outputs: object, targets: Tensor) -> None:
        """Checks outputs and targets.

        Raises:
            ModelError: if outputs have the wrong shape.
            DataError: if targets have the wrong shape, type or range.
        """
        self.check_targets(targets)
        if self.several_outputs:
            self._check_by_loss(outputs, targets)
            return
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != [len(targets), self.outputs]:
            of_one = got[1:] if isinstance(got, list) else got
            raise ModelError(
                f"gives outputs {of_one} for one example, expected {self.expected}",
                place="outputs",
                cure=f"make it return {self.outputs} numbers",
            )

    def _check_by_loss(self, outputs: object, targets: Tensor) -> None:
        """Checks outputs of any form: the loss must take them and give a number per example.

        Raises:
            ModelError: if it does not.
        """
        n, text = len(targets), outputs_text(outputs)
        if not is_plain(outputs):
            raise ModelError(
                f"gives outputs {text} for one example, expected tensors in tuples, lists and "
                "dictionaries",
                place="outputs",
                cure='make forward return a tensor, a tuple or a dict, such as {"boxes": boxes}',
            )
        if any(not t.dim() or len(t) != n for t in output_tensors(outputs)):
            raise ModelError(
                "gives an output whose first dimension does not count the examples",
                place="outputs",
                cure="make the first dimension of each output the batch",
            )
        try:
            each = self.loss(outputs, targets, reduction="none")  # type: ignore[arg-type]
        except Exception as error:  # a user's loss may raise anything
            reason = (str(error).splitlines() or [""])[0]
            raise ModelError(
                f"gives outputs {text} for one example, on which the loss of {self.kind} fails "
                f"with {type(error).__name__}: {reason}",
                place="outputs",
                cure="make forward return what the loss takes",
            ) from error
        if not isinstance(each, Tensor) or each.shape != (n,):
            got = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ModelError(
                f"gets a loss {got} for {n} examples from {self.kind} with reduction='none'",
                place="outputs",
                cure="return one loss per example: fedpress.tasks.base.reduced(each, reduction)",
            )

    @property
    def expected(self) -> str:
        """The expected shape of one example's outputs, for errors."""
        return f"[{self.outputs}] for the task {self.kind}"

    def check_targets(self, targets: Tensor) -> None:
        """Checks targets. Errors must not quote values, since values may be private.

        Raises:
            DataError: if targets have the wrong shape, type or range.
        """
        if self.targets == "classes":
            check_classes(targets, len(self.names))
        elif self.targets != "arrays":
            check_numbers(targets, len(self.names), self.kind)
        elif targets.dtype != torch.float32 or not bool(targets.isfinite().all()):
            raise DataError(
                f"targets of type {targets.dtype}, or some are NaN or infinite",
                place="targets",
                cure=f"the task {self.kind} needs finite float32 [n, ...]",
            )

    def made_up_targets(self, n: int, like: Tensor) -> Tensor:
        """Returns `n` valid targets with the dtype of `like` [m, ...] and shape [n, ...].

        A network is tried with such targets before it gets private data.
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

    def example_targets(self, outputs: Tensor) -> Tensor:
        """Returns valid targets [n, ...] in the shape that belongs to `outputs` [n, ...]: zeros."""
        if self.targets == "classes":
            # A class for each example, or for each of its positions.
            return torch.zeros(len(outputs), *outputs.shape[2:], dtype=torch.int64)
        return torch.zeros(len(outputs), self.outputs)

    def to_json(self) -> dict[str, JsonValue]:
        """Returns what a device needs to interpret outputs, as JSON: kind and names.

        Subclasses add their options.
        """
        return {"kind": self.kind, "names": list(self.names)}

    def to_targets(self, outputs: Tensor) -> Tensor:
        """Converts outputs to the units of the targets; by default outputs have these units."""
        return outputs

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns predictions: class numbers, 0 or 1 per label, or numbers in the targets' unit."""
        return self.to_targets(outputs)

    @property
    def answer_names(self) -> tuple[str, ...]:
        """Names of the columns of answers [n, k]."""
        return self.names

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """Returns the probability of each class or label, [n, k, ...]; None for numbers."""
        del outputs
        return None

    @property
    def probability_names(self) -> tuple[str, ...]:
        """What each of the k probabilities is of: by default the classes or labels."""
        return self.names


def no_classes_error(kind: str) -> RecipeError:
    """Returns the error for class weights of a task that has no classes."""
    return RecipeError(
        f"the task is {kind}, which has no classes to weigh",
        place="class_weights",
        cure="leave it out",
    )


def merged(first: Sums, *others: Sums) -> dict[str, Tensor]:
    """Adds the sums of several parts of the data, such as batches or clients.

    >>> merged({"n": torch.tensor(2)}, {"n": torch.tensor(3)})
    {'n': tensor(5)}
    """
    total = dict(first)
    for sums in others:
        # A name that `first` lacks raises a KeyError, since different sums must not be added.
        for name, value in sums.items():
            total[name] = total[name] + value
    return total


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """Applies the reduction "mean", "sum" or "none" to the losses of examples [n]."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def json_number(value: Tensor | float) -> float | None:
    """Returns a float, or None for NaN and infinity, which JSON cannot represent."""
    value = float(value)
    return value if math.isfinite(value) else None


def standard_error(total: Tensor, squares: Tensor, n: int) -> float | None:
    """Returns the standard error of a mean; None for fewer than two values.

    Args:
        total: sum of `n` independent values.
        squares: sum of the squares of the values.
        n: number of values.

    >>> standard_error(torch.tensor(6.0), torch.tensor(14.0), 3)  # of 1, 2 and 3
    0.5773502691896258
    """
    if n < 2:
        return None
    # The variance from sums needs no second pass over the data. The factor n / (n - 1) makes it
    # unbiased.
    mean = float(total) / n
    variance = (float(squares) / n - mean**2) * n / (n - 1)
    if not math.isfinite(variance):
        return None
    # Rounding may leave a variance of 0 slightly negative.
    return math.sqrt(max(0.0, variance) / n)


def check_classes(targets: Tensor, count: int) -> None:
    """Checks that targets are class numbers below `count`, int64 [n, ...].

    Targets of several positions, such as [n, length], may also be `IGNORED`.

    Raises:
        DataError: if they are not.
    """
    if targets.dtype != torch.int64 or targets.dim() < 1:
        raise DataError(
            f"labels of type {targets.dtype} and {targets.dim()} dimensions",
            place="targets",
            cure="give int64 [n]",
        )
    counted = targets[targets != IGNORED] if targets.dim() > 1 else targets
    if not bool(((counted >= 0) & (counted < count)).all()):
        # The error does not quote the label, which may be private.
        raise DataError(
            "some labels are no class number",
            place="targets",
            cure=f"give class numbers from 0 to {count - 1}",
        )


def check_numbers(targets: Tensor, width: int, kind: str) -> None:
    """Checks that targets are finite and float32 [n, width]; [n] is allowed if `width` is 1.

    Raises:
        DataError: if they are not. The error names the task `kind`.
    """
    # Data with one target column may have either shape.
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
