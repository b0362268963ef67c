"""Evaluates a model on examples: computes the loss and the metrics of the task."""

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
from fedpress.core.outputs import as_float32, map_outputs, output_tensors, rows_of_outputs
from fedpress.errors import TrainingError
from fedpress.nn.batch_norm import ONE_VALUE
from fedpress.tasks import Sums, Task, merged
from fedpress.training.device import Precision, autocast, device_of, laid_out


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        score: the task's primary metric, such as the accuracy; NaN if it is undefined.
        loss: mean loss of the examples.
        examples: number of examples.
        metrics: all metrics of the task by key; empty unless `all_metrics` was set.
        group_scores: the primary metric of each group, NaN if it is undefined; empty unless
            `groups` was given.
    """

    score: float
    loss: float
    examples: int
    metrics: Mapping[str, JsonValue] = field(default_factory=dict)
    group_scores: tuple[float, ...] = ()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode; restores the mode of each module at the end.

    `model.train()` at the end would put all modules into training mode, also frozen batch norms,
    which are in evaluation mode on purpose.
    """
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
    batch_size: int | None = None,
    all_metrics: bool = False,
    groups: Tensor | None = None,
) -> Evaluation:
    """Evaluates `model` on `arrays` in evaluation mode, then restores the mode of every module.

    Args:
        model: a network whose outputs fit the task.
        arrays: the examples.
        preprocess: the standardisation of the examples.
        task: defines loss and metrics.
        precision: number format of the forward passes.
        batch_size: number of examples in a forward pass; None: 100 on a CPU, else 500.
        all_metrics: whether to compute all metrics. If False, only the primary metric and the loss
            are computed.
        groups: the group of each example, 0 up, int64 [n], such as the client that it is of. The
            primary metric of each group is computed, too.

    Raises:
        TrainingError: if there are no examples.
    """
    if not len(arrays):
        raise TrainingError(
            "there are no examples to evaluate on",
            place="evaluate",
            cure="give the data set a test part",
        )
    # The reported loss ignores class weights, so that runs with different weights can be compared.
    plain = task.unweighted
    loss = 0.0
    sums: list[Sums] = []
    of_groups: dict[int, Sums] = {}
    at = device_of(model)
    if batch_size is None:
        # The activations of small batches stay in a CPU's caches; a GPU needs large ones.
        batch_size = 100 if at.type == "cpu" else 500
    with evaluating(model), torch.inference_mode(), autocast(model, precision):
        for start in range(0, len(arrays), batch_size):
            part = slice(start, start + batch_size)
            x, y = arrays.x[part], arrays.y[part]
            found = as_float32(outputs(model, laid_out(preprocess(x.to(at)), model)))
            # Sums and not means, because the last batch may be smaller than the others.
            loss += float(plain.loss(found, y.to(at), reduction="sum"))
            # Metrics are computed in float64, which Apple GPUs do not have.
            count = task.metrics if all_metrics else task.score_sums
            found, y = map_outputs(found, Tensor.cpu), y.cpu()
            sums.append(count(found, y))
            if groups is not None:
                _add_by_group(of_groups, task, found, y, groups[part])
    total = merged(*sums)
    mean_loss = loss / len(arrays)
    scores = tuple(task.score(of_groups[group]) for group in sorted(of_groups))
    if not all_metrics:
        return Evaluation(task.score(total), mean_loss, len(arrays), group_scores=scores)
    metrics = task.summary(total)
    score = metrics[task.primary]
    return Evaluation(
        float(score) if isinstance(score, int | float) else math.nan,
        mean_loss,
        len(arrays),
        metrics,
        scores,
    )


def _add_by_group(
    found: dict[int, Sums], task: Task, outputs: Tensor, y: Tensor, groups: Tensor
) -> None:
    """Adds the sums for `score` of a batch's examples to those of their groups, [n]."""
    for group in groups.unique().tolist():
        own = groups == group
        sums = task.score_sums(rows_of_outputs(outputs, own), y[own])
        found[group] = merged(found[group], sums) if group in found else sums


def outputs(model: nn.Module, x: Inputs) -> Tensor:
    """Returns the outputs [n, ...] of `model` for the batch `x` [n, ...].

    `squeeze()` in a network's forward drops the batch dimension if there is a single example. So if
    the network fails on a single example, or the output has no batch dimension, two copies of the
    example are run as one batch. This gives the same output if the network treats examples
    independently.

    For a task of several outputs, the result is what forward returns: tuples, lists or dictionaries
    of tensors [n, ...].

    Raises:
        Exception: any error that the network raises.
    """
    if len(x) != 1:
        out: Tensor = call(model, x)
        return out
    try:
        single: Tensor = call(model, x)
    except Exception as problem:
        # A batch norm in training mode: two copies would run, but with a variance of 0.
        if ONE_VALUE in str(problem):
            raise
        # If two copies fail as well, the first error is the cause.
        try:
            return _as_two_copies(model, x)
        except Exception:
            raise problem from None
    # Without a tensor the outputs are wrong anyway, and `Task.check` says so.
    if all(t.dim() and len(t) == 1 for t in output_tensors(single)):
        return single
    return _as_two_copies(model, x)


def _as_two_copies(model: nn.Module, x: Inputs) -> Tensor:
    out: Tensor = call(model, join([x, x]))
    return rows_of_outputs(out, slice(0, 1))
