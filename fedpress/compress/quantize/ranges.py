"""Sets scale and zero point of quantized inputs from their values on examples (calibration)."""

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

ROUNDING = 1e-6
"""One-bit inputs count as constant if their mean distance from the middle is at most this.

The number is a share of the layer's largest absolute input.
"""


@torch.no_grad()
def calibrate_(
    model: nn.Module, batches: Sequence[Example], *, observer: Observer = "minmax"
) -> dict[str, str]:
    """Sets scale and zero point of the quantized inputs that need it, from inputs on `batches`.

    During calibration the inputs are not quantized. A range always includes 0. A one-bit input is
    middle - scale or middle + scale. Each channel has a middle, its mean; if the scheme has no
    middle, it is 0. The scale is the mean distance from the middle, which gives the least squared
    error (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279, section 3.1, applied to values minus
    their mean).

    Args:
        model: a model with quantized layers.
        batches: public inputs; the ranges reveal something about them, since no noise is added.
        observer: how a range is chosen from the observed values, such as "minmax".

    Returns:
        Name of each layer with quantized inputs that could not be calibrated, because forward never
        calls it -> the reason.

    Raises:
        DataError: if there are no batches, a layer receives NaN or infinite values, or all one-bit
            inputs of a layer would be equal; the message names the layer.
        ModelError: if the model cannot run on the batches.
    """
    if not batches:
        raise DataError(
            "there are no batches",
            place="batches",
            cure="give at least one batch of public examples",
        )

    layers, schemes = _calibrated_inputs(model)
    # The first pass finds the ranges, since a histogram needs its range before it counts values.
    histograms = _empty_histograms(model, layers, batches)
    with_middle = {}
    one_bit = {}
    for name, layer in layers.items():
        if schemes[name].middle:
            with_middle[name] = layer
        if schemes[name].bits == 1:
            one_bit[name] = layer
    # The middles come first, because the mean distances are measured from them.
    _set_middles_(model, with_middle, batches)
    distances = _mean_distances(model, one_bit, batches)

    # "minmax" needs no histogram, only the range, which is known already.
    if observer != "minmax":
        run_with_observer(model, layers, batches, lambda name, x: histograms[name].add_(x))

    for name, seen in histograms.items():
        # One-bit inputs have no zero point and no range.
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
    """Returns by name the layers whose inputs need calibration, and the schemes of these inputs."""
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
    """Sets scale and zero point of a layer's inputs from their histogram."""
    low, high = seen.low, seen.high
    # `calculate_qparams` extends the range to 0, so a constant needs no special case after this.
    if high > low:  # for a constant there is nothing to choose
        low, high = OBSERVERS[observer](seen, quantization)
    scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(high), quantization)
    layer.input_scale.copy_(scale)
    layer.input_zero_point.copy_(zero)


def _empty_histograms(
    model: nn.Module, layers: Mapping[str, QuantLayer], batches: Sequence[Example]
) -> dict[str, Histogram]:
    """Returns an empty histogram for each layer, over the range of its inputs on all batches."""
    found: dict[str, Histogram] = {}

    def widen(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError(
                f"'{name}' receives NaN or infinite values",
                place="batches",
                cure="check the public examples and the model's weights",
            )
        old = found.get(name, Histogram(float("inf"), float("-inf")))
        found[name] = Histogram(min(old.low, float(x.amin())), max(old.high, float(x.amax())))

    run_with_observer(model, layers, batches, widen)
    return found


def _set_middles_(
    model: nn.Module, layers: Mapping[str, QuantLayer], batches: Sequence[Example]
) -> None:
    """Sets the middle of each channel of one-bit inputs to the channel's mean over all batches."""
    totals: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, x: Tensor) -> None:
        # float64, because the sum runs over all examples.
        channels = x.detach().double().movedim(layers[name].channel_axis, 0).flatten(1)
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + channels.sum(1), count + channels.shape[1]

    if layers:
        run_with_observer(model, layers, batches, add)
    for name, (total, count) in totals.items():
        layers[name].input_middle.copy_(total / count)


def _mean_distances(
    model: nn.Module, layers: Mapping[str, QuantLayer], batches: Sequence[Example]
) -> dict[str, float]:
    """Returns for each layer the mean distance of its inputs from their middle.

    Inputs without a middle are measured from 0.
    """
    totals: dict[str, tuple[float, int]] = {}
    # Read before the run, during which `run_with_observer` removes the inputs from the schemes.
    middles: dict[str, Tensor] = {}
    for name, layer in layers.items():
        inputs = layer.scheme.inputs
        if inputs is not None and inputs.middle:
            middles[name] = layer.middle()

    def add(name: str, x: Tensor) -> None:
        distance = x - middles[name] if name in middles else x
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + float(distance.double().abs().sum()), count + x.numel()

    if layers:
        run_with_observer(model, layers, batches, add)
    return {name: total / count for name, (total, count) in totals.items()}


def _check_informative(
    name: str, quantization: InputQuantization, seen: Histogram, distance: float
) -> None:
    """Raises an error for one-bit inputs that would be the same for every example."""
    # With a middle: no channel varies. Without a middle: all values have the same sign.
    if quantization.middle and distance <= ROUNDING * max(abs(seen.low), abs(seen.high)):
        raise DataError(
            (
                f"every channel that '{name}' reads is constant ({seen.low:g} to {seen.high:g}) "
                "on the public examples, so one bit cannot tell examples apart"
            ),
            place="inputs.bits",
            cure="name the layer in `keep`, so that it stays float, or take 8 bits",
        )
    if not quantization.middle and (seen.low >= 0 or seen.high <= 0):
        raise DataError(
            (
                f"'{name}' reads values of one sign only ({seen.low:g} to {seen.high:g}), as "
                "after a ReLU, so their sign cannot tell examples apart"
            ),
            place="inputs.bits",
            cure="use a scheme with a middle (InputQuantization(bits=1)), or more bits",
        )


@torch.no_grad()
def run_with_observer(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Example],
    observe: Callable[[str, Tensor], None],
) -> None:
    """Runs `model` in evaluation mode and calls `observe` with the name and input of each layer.

    Inputs are not quantized during the run, because the ranges of some layers are not set yet.

    Raises:
        ModelError: if the model cannot run on the batches.
    """
    modes = {m: m.training for m in model.modules()}
    schemes = {layer: layer.scheme for _, layer in quantized_layers(model)}
    hooks = []
    for name, layer in layers.items():
        # Defaults are evaluated now: a closure would see the last `name` of the loop.
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
