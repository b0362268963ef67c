"""The one evaluation of the house: what a model gives on examples, and how right it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import Inputs, call, join
from fedpress.errors import TrainingError
from fedpress.nn.batch_norm import ONE_VALUE
from fedpress.tasks import Sums, Task, merged
from fedpress.training.device import Precision, autocast, device_of, laid_out


@dataclass(frozen=True)
class Evaluation:
    """What a model is worth on `examples`.

    Attributes:
        score: its primary metric (see `Task.primary`), NaN where that is not defined.
        loss: the mean of the examples' losses.
        examples: how many there were.
        metrics: all that the task measures, by key; empty unless asked for.
    """

    score: float
    loss: float
    examples: int
    metrics: Mapping[str, JsonValue] = field(default_factory=dict)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode, then gives each its own mode back: frozen norms stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: nn.Module,
    arrays: Arrays,
    preprocess: Preprocess,
    task: Task,
    *,
    precision: Precision = "float32",
    batch_size: int = 500,
    all_metrics: bool = False,
) -> Evaluation:
    """Measures `model` on `arrays`; the modes of its modules are left as they were.

    Args:
        model: any network for the task.
        arrays: the examples.
        preprocess: from these to the network's input.
        task: says what is measured.
        precision: of the forward passes.
        batch_size: examples that run together.
        all_metrics: whether to measure all metrics of the task, or the primary one and the loss alone.

    Raises:
        TrainingError: if there are no examples.
    """
    if not len(arrays):
        raise TrainingError(
            "there are no examples to measure on",
            place="evaluate",
            cure="give the data set a test part",
        )
    # Results tell the plain loss, whatever weights the training gives to classes.
    plain = task.unweighted
    loss = 0.0
    sums: list[Sums] = []
    at = device_of(model)
    with evaluating(model), torch.inference_mode(), autocast(model, precision):
        for x, y in zip(arrays.x.split(batch_size), arrays.y.split(batch_size), strict=True):
            found = outputs(model, laid_out(preprocess(x.to(at)), model)).float()
            loss += float(plain.loss(found, y.to(at), reduction="sum"))
            # Metrics are counted in float64, which Apple GPUs do not have.
            count = task.metrics if all_metrics else task.score_sums
            sums.append(count(found.cpu(), y.cpu()))
    total = merged(*sums)
    mean_loss = loss / len(arrays)
    if not all_metrics:
        return Evaluation(task.score(total), mean_loss, len(arrays))
    metrics = task.summary(total)
    score = metrics[task.primary]
    return Evaluation(
        float(score) if isinstance(score, int | float) else math.nan,
        mean_loss,
        len(arrays),
        metrics,
    )


def outputs(model: nn.Module, x: Inputs) -> Tensor:
    """Returns what `model` gives for the batch `x` [n, ...]: [n, ...], also where it cannot take a batch of one.

    Code such as `squeeze()` drops the dimension of a batch of one, or fails: then the example runs beside its copy,
    which changes nothing in a network that handles each example by itself.

    Raises:
        Exception: whatever the network raises; that of a batch norm with nothing to average is left as it is.
    """
    if len(x) != 1:
        out: Tensor = call(model, x)
        return out
    try:
        alone: Tensor = call(model, x)
    except Exception as problem:
        if ONE_VALUE in str(problem):
            raise
        try:
            return _beside_its_copy(model, x)
        except Exception:
            raise problem from None
    if alone.dim() and len(alone) == 1:
        return alone
    return _beside_its_copy(model, x)


def _beside_its_copy(model: nn.Module, x: Inputs) -> Tensor:
    out: Tensor = call(model, join([x, x]))
    return out[:1]
