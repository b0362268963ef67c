"""Chooses the bits of each layer so that the weights fit into a given size (mixed precision)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpress.compress.quantize.rounding import best_scale
from fedpress.core.inputs import Inputs, call
from fedpress.core.outputs import as_float32, output_tensors, outputs_text, spreads
from fedpress.errors import DataError, ModelError, RecipeError, first_line
from fedpress.nn.quant_scheme import (
    QuantizationScheme,
    WeightQuantization,
    expand_scale,
    fake_quantize,
    in_groups,
)
from fedpress.nn.quantized import quantized_class, weight_keys
from fedpress.nn.resize import get_tensor
from fedpress.tasks import Classification, Regression, Task

CELLS = 4096
"""Largest number of steps that divide the budget; steps of one byte would make the search slow."""


@dataclass(frozen=True)
class BitChoice:
    """A number of bits for one layer, with the layer's size and the effect on the outputs.

    Attributes:
        bits: bits of each weight.
        size: bytes of the layer's codes and scales.
        divergence: how far the model's outputs move if only this layer is quantized (see
            `Task.divergence`); for a classifier the mean KL divergence, in nats.
    """

    bits: int
    size: int
    divergence: float


def stored_bytes(weight: Tensor, quantization: WeightQuantization) -> int:
    """Returns the bytes of a quantized weight: codes without entropy coding, and float32 scales.

    >>> stored_bytes(torch.zeros(8, 16), WeightQuantization(bits=4))
    96
    """
    if quantization.kind == "codebook":
        scales = 2**quantization.bits
    else:
        scales = len(weight) * in_groups(weight, quantization.group).shape[1]
    # Codes are packed without gaps.
    codes = math.ceil(weight.numel() * quantization.bits / 8)
    return codes + 4 * int(scales)


@torch.no_grad()
def measure_choices(
    model: nn.Module,
    table: Mapping[str, QuantizationScheme],
    bits: Sequence[int],
    batches: Sequence[Inputs],
    task: Task | None = None,
) -> dict[str, list[BitChoice]]:
    """Quantizes one layer at a time to each number of bits, and measures how the outputs change.

    The change is `task.divergence` from the outputs of the float model to those of the quantized
    model: for a classifier the mean Kullback-Leibler divergence of the class probabilities, in
    nats; for numbers the squared difference as a share of their variance. It needs no labels.
    `choose_bits` adds the divergences of single layers: as long as they are small, their sum is
    nearly that of all layers together.

    Args:
        model: any network; its weights are restored.
        table: name of each layer -> its scheme, of the kind "int"; the bits in it are ignored.
        bits: the numbers of bits to choose from, 2 to 8 each.
        batches: public inputs [n, ...].
        task: what the outputs mean. None: one tensor [n, classes, ...] of two or more classes is of
            a classifier, and all else are numbers.

    Raises:
        DataError: if there are no batches.
        ModelError: if the outputs of the float model cannot be compared: NaN, infinity, integers.
        RecipeError: if a scheme is not of the kind "int".
    """
    if not batches:
        raise DataError(
            "got no public examples, but bits are chosen from the model's outputs on them",
            place="batches",
            cure="give at least one batch",
        )

    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        reference = _Reference(model, batches, task)
        found: dict[str, list[BitChoice]] = {}
        for name, scheme in table.items():
            if scheme.weights is None or scheme.weights.kind != "int":
                raise RecipeError(
                    f"'{name}' is not quantized to integers, so it has no choice of bits",
                    place="table",
                    cure="use weights of kind 'int', or leave this layer out",
                )
            layer = model.get_submodule(name)
            found[name] = []
            # Rounding to the scales of least squared error, as `quantize_` does by default.
            for each in sorted(set(bits)):
                quantization = scheme.weights.model_copy(update={"bits": each})
                with _rounded_weights(layer, quantization):
                    divergence = reference.divergence(model)
                found[name].append(BitChoice(each, layer_bytes(layer, quantization), divergence))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found


@contextmanager
def _rounded_weights(layer: nn.Module, quantization: WeightQuantization) -> Iterator[None]:
    """Rounds the weights of `layer` within the block, and restores them."""
    weights = [get_tensor(layer, key) for key in weight_keys(layer)]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.copy_(_rounded(layer, weight, quantization))
    try:
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)


def layer_bytes(layer: nn.Module, quantization: WeightQuantization) -> int:
    """Returns the bytes of all weights of a layer (see `stored_bytes`)."""
    quantized: Any = quantized_class(type(layer))
    total = 0
    for key in weight_keys(layer):
        total += stored_bytes(quantized.rows(layer, getattr(layer, key)), quantization)
    return total


def _rounded(layer: nn.Module, weight: Tensor, quantization: WeightQuantization) -> Tensor:
    """Returns `weight` rounded with scales of least squared error, in its own shape."""
    quantized: Any = quantized_class(type(layer))
    rows = quantized.rows(layer, weight)
    scale = expand_scale(best_scale(rows, quantization), rows, quantization.group)
    return cast(Tensor, quantized.unrows(layer, fake_quantize(rows, scale, quantization)))


class _Reference:
    """The outputs of the float model on some batches, with which those of others are compared."""

    def __init__(self, model: nn.Module, batches: Sequence[Inputs], task: Task | None) -> None:
        self.batches = batches
        self.outputs = [as_float32(call(model, x)) for x in batches]
        self.task = task if task is not None else _task_of(self.outputs[0])
        self.spreads = spreads(self.outputs)
        if not any(each.is_floating_point() for each in output_tensors(self.outputs[0])):
            raise _not_comparable(f"{outputs_text(self.outputs[0])}, which are integers alone")
        try:
            comparable = math.isfinite(self.divergence(model))
        except Exception as error:  # a soft loss of the user's own may raise anything
            raise _not_comparable(
                f"on which {self.task.kind} fails: {first_line(error)}"
            ) from error
        if not comparable:
            raise _not_comparable("which are NaN or infinite")

    def divergence(self, model: nn.Module) -> float:
        """Returns the mean divergence of the model's present outputs; infinite if they are NaN."""
        total = 0.0
        count = 0
        for x, wanted in zip(self.batches, self.outputs, strict=True):
            outputs = as_float32(call(model, x))
            total += float(self.task.divergence(outputs, wanted, self.spreads)) * len(x)
            count += len(x)
        if math.isnan(total):
            return math.inf
        return max(total / count, 0.0)  # rounding may make it slightly negative


def _not_comparable(why: str) -> ModelError:
    return ModelError(
        f"gives outputs {why}; so they cannot be compared to choose the bits of each layer",
        place="model",
        cure="give all layers the same number of bits: leave mixed and max_bytes out",
    )


def _task_of(outputs: object) -> Task:
    """Returns a task for outputs of which nothing is known."""
    if isinstance(outputs, Tensor) and outputs.dim() > 1 and outputs.shape[1] > 1:
        return Classification(())
    return Regression(())


def choose_bits(choices: Mapping[str, Sequence[BitChoice]], max_bytes: int) -> dict[str, int]:
    """Returns the bits of each layer with the smallest sum of divergences within `max_bytes`.

    This is a multiple-choice knapsack problem. It is solved by dynamic programming over the bytes
    that a choice needs beyond the layer's smallest choice, rounded up to steps. A step is 1/4096 of
    the bytes that all smallest choices together leave free, and at least one byte.

    Args:
        choices: name of each layer -> its choices, for instance from `measure_choices`.
        max_bytes: largest sum of the sizes of the choices.

    Raises:
        RecipeError: if even the smallest choice of each layer does not fit.

    >>> a = [BitChoice(4, 50, 0.2), BitChoice(8, 100, 0.0)]
    >>> choose_bits({"a": a, "b": [BitChoice(4, 5, 9.0), BitChoice(8, 10, 0.0)]}, 60)
    {'a': 4, 'b': 8}
    """
    least = sum(_smallest(layer) for layer in choices.values())
    if least > max_bytes:
        raise RecipeError(
            f"the weights do not fit into {max_bytes:,} bytes, the least is {least:,}",
            place="max_bytes",
            cure="allow more bytes, or offer a smaller number of bits",
        )
    # Only bytes beyond the smallest choices are counted, so that a step of the budget is as few
    # bytes as possible.
    spare = max_bytes - least
    cell = max(1, math.ceil(spare / CELLS))
    budget = spare // cell

    # least_sum[b]: least sum of divergences of the layers so far that takes at most b steps.
    least_sum = torch.zeros(budget + 1, dtype=torch.float64)
    steps: list[tuple[str, list[tuple[BitChoice, int]], Tensor]] = []
    for name, layer in choices.items():
        options = _affordable(layer, cell, budget)
        rows = []
        for choice, cells in options:
            row = torch.full_like(least_sum, math.inf)
            row[cells:] = least_sum[: len(least_sum) - cells] + choice.divergence
            rows.append(row)
        least_sum, best = torch.stack(rows).min(0)
        steps.append((name, options, best))

    # Read off backwards: the last layer's table is for the whole budget.
    bits: dict[str, int] = {}
    left = budget
    for name, options, best in reversed(steps):
        choice, cells = options[int(best[left])]
        bits[name] = choice.bits
        left -= cells
    return {name: bits[name] for name in choices}


def _smallest(layer: Sequence[BitChoice]) -> int:
    return min(choice.size for choice in layer)


def _affordable(layer: Sequence[BitChoice], cell: int, budget: int) -> list[tuple[BitChoice, int]]:
    """Returns a layer's choices within the budget, each with its steps beyond the smallest one."""
    smallest = _smallest(layer)
    options = []
    for choice in layer:
        # Rounded up, so that the sum of the real sizes never exceeds the limit.
        cells = math.ceil((choice.size - smallest) / cell)
        if cells <= budget:
            options.append((choice, cells))
    return options
