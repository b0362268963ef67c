"""Calibration: input grids get their ranges from what the layers see on public examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpress.errors import DataError, ModelError
from fedpress.grids import affine
from fedpress.quantized import quantized_layers
from fedpress.ranges import OBSERVERS, Histogram, Observer

Batch = Tensor | tuple[Tensor, ...]  # a tuple: of a model with several inputs


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Sequence[Batch], *, observer: Observer = "minmax") -> dict[str, str]:
    """Sets scale and zero point of every input grid from what the layers see when `model` runs on `batches`.

    While it looks, inputs stay float. A range always holds 0; one-bit inputs get the scale mean |x| (XNOR-Net).

    Returns:
        The names of layers with an input grid that forward never calls -> the reason.

    Raises:
        DataError: if there are no batches, or a layer sees NaN or infinite values, naming it.
    """
    if not batches:
        raise DataError("calibrate: there are no batches; give at least one batch of public examples")
    layers = {n: m for n, m in quantized_layers(model) if m.grids.inputs is not None and not m.grids.inputs.dynamic}
    spans: dict[str, Histogram] = {}
    sizes: dict[str, tuple[float, int]] = {}

    def span(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError(
                f"calibrate: '{name}' sees NaN or infinite values; check the public examples and the model's weights"
            )
        old = spans.get(name, Histogram(float("inf"), float("-inf")))
        spans[name] = Histogram(min(old.low, float(x.amin())), max(old.high, float(x.amax())))
        total, count = sizes.get(name, (0.0, 0))
        sizes[name] = total + float(x.double().abs().sum()), count + x.numel()

    run_watched(model, layers, batches, span)
    if observer != "minmax":
        run_watched(model, layers, batches, lambda name, x: spans[name].add_(x))
    for name in spans:
        grid = layers[name].grids.inputs
        assert grid is not None
        if grid.bits == 1:
            total, count = sizes[name]
            layers[name].input_scale.fill_(total / count if total else 1.0)
            continue
        seen = spans[name]
        low, high = OBSERVERS[observer](seen, grid) if seen.high > seen.low else (seen.low, seen.high)
        scale, zero = affine(torch.tensor(low), torch.tensor(high), grid)
        layers[name].input_scale.copy_(scale)
        layers[name].input_zero_point.copy_(zero)
    return {name: "forward never calls it" for name in layers if name not in spans}


@torch.no_grad()
def run_watched(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], see: Callable[[str, Tensor], None]
) -> None:
    """Runs `model` in evaluation mode, inputs not rounded, and shows `see` what comes into each of `layers`."""
    modes = {m: m.training for m in model.modules()}
    grids = {m: m.grids for _, m in quantized_layers(model)}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, named, name=name: see(name, args[0] if args else named["input"]), with_kwargs=True
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
        raise ModelError(f"calibrate: the model cannot run on these examples ({str(error).splitlines()[0]})") from error
    finally:
        for hook in hooks:
            hook.remove()
        for layer, own in grids.items():
            layer.grids = own
        for module, mode in modes.items():
            module.training = mode
