"""Bits for each layer under a size budget: what each choice costs in bytes and in the outputs, then an exact choice."""

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
from fedpress.errors import DataError, RecipeError
from fedpress.nn.quant_scheme import (
    QuantizationScheme,
    WeightQuantization,
    expand_scale,
    fake_quantize,
    in_groups,
)
from fedpress.nn.quantized import quantized_class, weight_keys
from fedpress.nn.resize import tensor

CELLS = 4096
"""Steps that a budget is counted in: a choice is at most one step per layer below the best."""


@dataclass(frozen=True)
class Choice:
    """One way to store a layer: bytes of its codes and scales, and the harm that it does alone."""

    bits: int
    size: int
    harm: float


def stored_bytes(weight: Tensor, quantization: WeightQuantization) -> int:
    """Returns the bytes of codes at `bits` each, without entropy coding, and float32 scales.

    >>> stored_bytes(torch.zeros(8, 16), WeightQuantization(bits=4))
    96
    """
    if quantization.kind == "codebook":
        scales = 2**quantization.bits
    else:
        scales = len(weight) * in_groups(weight, quantization.group).shape[1]
    codes = math.ceil(weight.numel() * quantization.bits / 8)
    return codes + 4 * int(scales)


@torch.no_grad()
def measure_choices(
    model: nn.Module,
    table: Mapping[str, QuantizationScheme],
    bits: Sequence[int],
    batches: Sequence[Inputs],
) -> dict[str, list[Choice]]:
    """Rounds the weights of one layer after the other to each number of bits, and measures what the outputs lose.

    The harm is the mean Kullback-Leibler divergence, in nats, of the model's class probabilities from what they were:
    it needs no labels, and harms of single layers nearly add up while they are small.

    Args:
        model: returns logits [n, classes]; every weight is as before afterwards.
        table: the layers, with whole-number grids whose bits are to be chosen.
        bits: the numbers to choose from, 2 to 8 each.
        batches: public inputs [n, ...].

    Raises:
        DataError: if there are no batches.
        RecipeError: if a grid is not of whole numbers.
    """
    if not batches:
        raise DataError(
            "the bits are chosen by public examples",
            place="batches",
            cure="give at least one batch",
        )
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        wanted = [call(model, x).float().log_softmax(1) for x in batches]
        found: dict[str, list[Choice]] = {}
        for name, scheme in table.items():
            if scheme.weights is None or scheme.weights.kind != "int":
                raise RecipeError(
                    f"'{name}' is not on whole numbers, which mixed bits need",
                    place="table",
                    cure="use int",
                )
            layer = model.get_submodule(name)
            found[name] = []
            for each in sorted(set(bits)):
                quantization = scheme.weights.model_copy(update={"bits": each})
                with _rounded_weights(layer, quantization):
                    harm = _harm(model, batches, wanted)
                found[name].append(Choice(each, layer_bytes(layer, quantization), harm))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found


@contextmanager
def _rounded_weights(layer: nn.Module, quantization: WeightQuantization) -> Iterator[None]:
    """Lets the weights of `layer` be rounded for a while."""
    weights = [tensor(layer, key) for key in weight_keys(layer)]
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
    quantized: Any = quantized_class(type(layer))
    rows = quantized.rows(layer, weight)
    scale = expand_scale(best_scale(rows, quantization), rows, quantization.group)
    return cast(Tensor, quantized.unrows(layer, fake_quantize(rows, scale, quantization)))


def _harm(model: nn.Module, batches: Sequence[Inputs], wanted: Sequence[Tensor]) -> float:
    total, count = 0.0, 0
    for x, log_p in zip(batches, wanted, strict=True):
        log_q = call(model, x).float().log_softmax(1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(x)
    return max(total / count, 0.0)


def choose_bits(choices: Mapping[str, Sequence[Choice]], max_bytes: int) -> dict[str, int]:
    """Returns the bits of each layer with the least sum of harms whose bytes fit into `max_bytes`.

    A knapsack with one choice for each layer, solved exactly by dynamic programming over sizes that are rounded up to
    1/4096 of the budget.

    Raises:
        RecipeError: if even the smallest choices do not fit.

    >>> choose_bits({"a": [Choice(4, 50, 0.2), Choice(8, 100, 0.0)], "b": [Choice(4, 5, 9.0), Choice(8, 10, 0.0)]}, 60)
    {'a': 4, 'b': 8}
    """
    least = sum(min(c.size for c in layer) for layer in choices.values())
    if least > max_bytes:
        raise RecipeError(
            f"the weights do not fit into {max_bytes:,} bytes, the least is {least:,}",
            place="max_bytes",
            cure="allow more, or add fewer bits to choose from",
        )
    spare = max_bytes - least  # only what goes beyond the smallest choices is counted in cells
    cell = max(1, math.ceil(spare / CELLS))
    budget = spare // cell
    harm = torch.zeros(budget + 1, dtype=torch.float64)
    taken: list[tuple[list[Choice], Tensor]] = []
    for layer in choices.values():
        floor = min(c.size for c in layer)
        options = [c for c in layer if math.ceil((c.size - floor) / cell) <= budget]
        rows = []
        for choice in options:
            cells = math.ceil((choice.size - floor) / cell)
            moved = torch.full_like(harm, math.inf)
            moved[cells:] = harm[: len(harm) - cells] + choice.harm
            rows.append(moved)
        harm, picked = torch.stack(rows).min(0)
        taken.append((options, picked))
    bits: dict[str, int] = {}
    left = budget
    for name, (options, picked) in zip(reversed([*choices]), reversed(taken), strict=True):
        choice = options[int(picked[left])]
        bits[name] = choice.bits
        left -= math.ceil((choice.size - min(c.size for c in choices[name])) / cell)
    return {name: bits[name] for name in choices}
