"""Calibration: quantized inputs get their ranges from what the layers see on public examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Example, call
from fedpress.errors import DataError, ModelError
from fedpress.nn.observers import OBSERVERS, Histogram, Observer
from fedpress.nn.quant_scheme import InputQuantization, calculate_qparams
from fedpress.nn.quantized import QuantLayer, quantized_layers

ROUNDING = 1e-6  # of the largest value: what the mean of equal numbers may be off


@torch.no_grad()
def calibrate_(
    model: nn.Module, batches: Sequence[Example], *, observer: Observer = "minmax"
) -> dict[str, str]:
    """Sets scale and zero point of all quantized inputs from what the layers see when `model` runs on `batches`.

    While it runs, inputs stay float. A range always holds 0. One-bit inputs get the mean of each channel as their
    middle, and the mean distance from it as their scale: of all pairs of values the nearest in squares (XNOR-Net,
    section 3.1, for values less their mean).

    Returns:
        The names of layers with quantized inputs that forward never calls -> the reason.

    Raises:
        DataError: if there are no batches, or a layer sees NaN or infinite values, or values of which one bit would
            tell nothing, naming it.
    """
    if not batches:
        raise DataError(
            "there are no batches",
            place="batches",
            cure="give at least one batch of public examples",
        )
    layers, schemes = _calibrated_inputs(model)
    histograms = _spans(model, layers, batches)
    _set_middles_(model, {n: layers[n] for n in layers if schemes[n].middle}, batches)
    one_bit = {n: layers[n] for n in layers if schemes[n].bits == 1}
    distances = _mean_distances(model, one_bit, batches)
    if observer != "minmax":
        run_watched(model, layers, batches, lambda name, x: histograms[name].add_(x))
    for name, seen in histograms.items():
        if name in one_bit:
            _check_informative(name, schemes[name], seen, distances[name])
            if not schemes[name].dynamic:
                layers[name].input_scale.fill_(distances[name])
        else:
            _set_range_(layers[name], schemes[name], seen, observer)
    return {name: "forward never calls it" for name in layers if name not in histograms}


def _calibrated_inputs(
    model: nn.Module,
) -> tuple[dict[str, QuantLayer], dict[str, InputQuantization]]:
    """Returns the layers whose inputs get their ranges here, and how those inputs are quantized."""
    layers: dict[str, QuantLayer] = {}
    schemes: dict[str, InputQuantization] = {}
    for name, layer in quantized_layers(model):
        inputs = layer.scheme.inputs
        if inputs is not None and inputs.calibrated:
            layers[name] = layer
            schemes[name] = inputs
    return layers, schemes


def _set_range_(
    layer: QuantLayer, quantization: InputQuantization, seen: Histogram, observer: Observer
) -> None:
    """Sets scale and zero point of a layer's inputs from what they were seen to be."""
    low, high = seen.low, seen.high
    if high > low:
        low, high = OBSERVERS[observer](seen, quantization)
    scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(high), quantization)
    layer.input_scale.copy_(scale)
    layer.input_zero_point.copy_(zero)


def _spans(
    model: nn.Module, layers: Mapping[str, QuantLayer], batches: Sequence[Example]
) -> dict[str, Histogram]:
    """Returns an empty histogram from the least to the largest value that each layer sees."""
    found: dict[str, Histogram] = {}

    def widen(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError(
                f"'{name}' sees NaN or infinite values",
                place="batches",
                cure="check the public examples and the model's weights",
            )
        old = found.get(name, Histogram(float("inf"), float("-inf")))
        found[name] = Histogram(min(old.low, float(x.amin())), max(old.high, float(x.amax())))

    run_watched(model, layers, batches, widen)
    return found


def _set_middles_(
    model: nn.Module, layers: Mapping[str, QuantLayer], batches: Sequence[Example]
) -> None:
    """Sets the middle of each channel of one-bit inputs to its mean."""
    totals: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, x: Tensor) -> None:
        channels = x.detach().double().movedim(layers[name].channel_axis, 0).flatten(1)
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + channels.sum(1), count + channels.shape[1]

    if layers:
        run_watched(model, layers, batches, add)
    for name, (total, count) in totals.items():
        layers[name].input_middle.copy_(total / count)


def _mean_distances(
    model: nn.Module, layers: Mapping[str, QuantLayer], batches: Sequence[Example]
) -> dict[str, float]:
    """Returns how far the inputs of each layer lie from their middle, or from 0 without one, in the mean."""
    totals: dict[str, tuple[float, int]] = {}
    # Looked up before the run: while it lasts, inputs stay float and no scheme names them.
    middles = {
        n: m.middle() for n, m in layers.items() if m.scheme.inputs and m.scheme.inputs.middle
    }

    def add(name: str, x: Tensor) -> None:
        distance = x - middles[name] if name in middles else x
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + float(distance.double().abs().sum()), count + x.numel()

    if layers:
        run_watched(model, layers, batches, add)
    return {name: total / count for name, (total, count) in totals.items()}


def _check_informative(
    name: str, quantization: InputQuantization, seen: Histogram, distance: float
) -> None:
    """Refuses one-bit inputs that would be the same whatever the example is."""
    if quantization.middle and distance <= ROUNDING * max(abs(seen.low), abs(seen.high)):
        raise DataError(
            (
                f"every channel that '{name}' reads is constant ({seen.low:g} to {seen.high:g}) "
                "on the public examples, so one bit of it tells nothing"
            ),
            place="inputs.bits",
            cure="leave the layer float by `keep`, or take 8 bits",
        )
    if not quantization.middle and (seen.low >= 0 or seen.high <= 0):
        raise DataError(
            (
                f"'{name}' reads values of one sign only ({seen.low:g} to {seen.high:g}), as "
                "behind a ReLU, so their sign tells nothing"
            ),
            place="inputs.bits",
            cure="take a grid with a middle (InputQuantization(bits=1)), or more bits",
        )


@torch.no_grad()
def run_watched(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Example],
    observe: Callable[[str, Tensor], None],
) -> None:
    """Runs `model` in evaluation mode, inputs not rounded, and shows `observe` what comes into each of `layers`."""
    modes = {m: m.training for m in model.modules()}
    schemes = {layer: layer.scheme for _, layer in quantized_layers(model)}
    hooks = []
    for name, layer in layers.items():

        def show(_: nn.Module, args: Any, named: Any, name: str = name) -> None:
            observe(name, args[0] if args else named["input"])

        hooks.append(layer.register_forward_pre_hook(show, with_kwargs=True))
    try:
        model.eval()
        for layer, own in schemes.items():
            layer.scheme = own.model_copy(update={"inputs": None})
        for batch in batches:
            call(model, batch)
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot run on these examples ({str(error).splitlines()[0]})",
            place="batches",
            cure="give inputs [n, ...] as the model takes them",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for layer, own in schemes.items():
            layer.scheme = own
        for module, mode in modes.items():
            module.training = mode
