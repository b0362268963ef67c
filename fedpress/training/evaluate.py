"""The one evaluation of the house: what a model gives on examples, and how right it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.errors import TrainingError
from fedpress.nn.batch_norm import ONE_VALUE
from fedpress.training.device import Precision, autocast, memory_format


@dataclass(frozen=True)
class Evaluation:
    """Share of right answers (0..1) and mean cross-entropy in nats over `examples`.

    `logits` [examples, classes] are what the model gave, on the CPU; None unless they were asked for.
    """

    accuracy: float
    loss: float
    examples: int
    logits: Tensor | None = None


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
    *,
    precision: Precision = "float32",
    batch_size: int = 500,
    keep_logits: bool = False,
) -> Evaluation:
    """Measures accuracy and loss of `model` on `arrays`; the modes of its modules are left as they were.

    With `keep_logits` what the model gave comes with them.

    Raises:
        TrainingError: if there are no examples.
    """
    if not len(arrays):
        raise TrainingError(
            "evaluate: there are no examples to measure on; give the data set a test part"
        )
    right, loss = 0, 0.0
    kept: list[Tensor] = []
    at = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.inference_mode(), autocast(model, precision):
        for x, y in zip(arrays.x.split(batch_size), arrays.y.split(batch_size), strict=True):
            inputs = preprocess(x.to(at)).contiguous(memory_format=memory_format(x, model))
            logits = outputs(model, inputs).float()
            right += int((logits.argmax(1) == y.to(at)).sum())
            loss += float(F.cross_entropy(logits, y.to(at), reduction="sum"))
            if keep_logits:
                kept.append(logits.cpu())
    return Evaluation(
        right / len(arrays), loss / len(arrays), len(arrays), torch.cat(kept) if kept else None
    )


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Returns what `model` gives for the batch `x` [n, ...]: [n, ...], also where it cannot take a batch of one.

    Code such as `squeeze()` drops the dimension of a batch of one, or fails: then the example runs beside its copy,
    which changes nothing in a network that handles each example by itself.

    Raises:
        Exception: whatever the network raises; that of a batch norm with nothing to average is left as it is.
    """
    if len(x) != 1:
        return model(x)
    try:
        alone = model(x)
    except Exception as problem:
        if ONE_VALUE in str(problem):
            raise
        try:
            return model(torch.cat([x, x]))[:1]
        except Exception:
            raise problem from None
    if alone.dim() and len(alone) == 1:
        return alone
    return model(torch.cat([x, x]))[:1]
