"""Calibration: input grids get their ranges from what the layers see on public examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpress.errors import DataError, ModelError
from fedpress.nn.observers import OBSERVERS, Histogram, Observer
from fedpress.nn.quant_scheme import InputGrid, affine
from fedpress.nn.quantized import quantized_layers

ROUNDING = 1e-6  # of the largest value: what the mean of equal numbers may be off
Batch = Tensor | tuple[Tensor, ...]  # a tuple: of a model with several inputs


@torch.no_grad()
def calibrate_(
    model: nn.Module, batches: Sequence[Batch], *, observer: Observer = "minmax"
) -> dict[str, str]:
    """Sets scale and zero point of every input grid from what the layers see when `model` runs on `batches`.

    While it looks, inputs stay float. A range always holds 0. One-bit inputs get the mean of each channel as their
    middle, and the mean distance from it as their scale: of all pairs of values the nearest in squares (XNOR-Net,
    section 3.1, for values less their mean).

    Returns:
        The names of layers with an input grid that forward never calls -> the reason.

    Raises:
        DataError: if there are no batches, or a layer sees NaN or infinite values, or values of which one bit would
            tell nothing, naming it.
    """
    if not batches:
        raise DataError(
            "calibrate: there are no batches; give at least one batch of public examples"
        )
    layers = {
        n: m
        for n, m in quantized_layers(model)
        if m.grids.inputs is not None and m.grids.inputs.calibrated
    }
    grids = {n: m.grids.inputs for n, m in layers.items()}  # while it looks, inputs have none
    spans: dict[str, Histogram] = {}
    sizes: dict[str, tuple[float, int]] = {}
    totals: dict[str, tuple[Tensor, int]] = {}

    def span(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError(
                f"calibrate: '{name}' sees NaN or infinite values; check the public examples and the model's weights"
            )
        old = spans.get(name, Histogram(float("inf"), float("-inf")))
        spans[name] = Histogram(min(old.low, float(x.amin())), max(old.high, float(x.amax())))
        grid = grids[name]
        if grid is not None and grid.middle:
            each = x.detach().double().movedim(layers[name].channel_axis, 0).flatten(1)
            total, count = totals.get(name, (0.0, 0))
            totals[name] = total + each.sum(1), count + each.shape[1]

    def size(name: str, x: Tensor) -> None:
        grid = grids[name]
        away = x - layers[name].middle() if grid is not None and grid.middle else x
        total, count = sizes.get(name, (0.0, 0))
        sizes[name] = total + float(away.double().abs().sum()), count + x.numel()

    run_watched(model, layers, batches, span)
    for name, (total, count) in totals.items():
        layers[name].input_middle.copy_(total / count)
    one_bit = {n: layers[n] for n, grid in grids.items() if grid is not None and grid.bits == 1}
    if one_bit:
        run_watched(model, one_bit, batches, size)
    if observer != "minmax":
        run_watched(model, layers, batches, lambda name, x: spans[name].add_(x))
    for name in spans:
        grid = grids[name]
        assert grid is not None
        seen = spans[name]
        if grid.bits == 1:
            _tells_something(name, grid, seen, sizes[name][0] / sizes[name][1])
            if not grid.dynamic:
                layers[name].input_scale.fill_(sizes[name][0] / sizes[name][1])
            continue
        low, high = (
            OBSERVERS[observer](seen, grid) if seen.high > seen.low else (seen.low, seen.high)
        )
        scale, zero = affine(torch.tensor(low), torch.tensor(high), grid)
        layers[name].input_scale.copy_(scale)
        layers[name].input_zero_point.copy_(zero)
    return {name: "forward never calls it" for name in layers if name not in spans}


def _tells_something(name: str, grid: InputGrid, seen: Histogram, size: float) -> None:
    """Refuses one-bit inputs that would be the same whatever the example is."""
    if grid.middle and size <= ROUNDING * max(abs(seen.low), abs(seen.high)):
        raise DataError(
            f"quantize.input_bits: every channel that '{name}' reads is constant ({seen.low:g} to {seen.high:g}) on "
            "the public examples, so one bit of it tells nothing; leave the layer float by `keep`, or take "
            "input_bits = 8"
        )
    if not grid.middle and (seen.low >= 0 or seen.high <= 0):
        raise DataError(
            f"quantize.input_bits: '{name}' reads values of one sign only ({seen.low:g} to {seen.high:g}), as behind a "
            "ReLU, so their sign tells nothing; take a grid with a middle (InputGrid(bits=1)), or more bits"
        )


@torch.no_grad()
def run_watched(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    see: Callable[[str, Tensor], None],
) -> None:
    """Runs `model` in evaluation mode, inputs not rounded, and shows `see` what comes into each of `layers`."""
    modes = {m: m.training for m in model.modules()}
    grids = {m: m.grids for _, m in quantized_layers(model)}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, named, name=name: see(name, args[0] if args else named["input"]),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        for layer, own in grids.items():
            layer.grids = own.model_copy(update={"inputs": None})
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    except RuntimeError as error:
        raise ModelError(
            f"calibrate: the model cannot run on these examples ({str(error).splitlines()[0]})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for layer, own in grids.items():
            layer.grids = own
        for module, mode in modes.items():
            module.training = mode
