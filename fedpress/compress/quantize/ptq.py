"""Quantization after training: which layers, scales, rounding, ranges of the inputs, and biases that make good."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.compress.prune.ignoring import ignored
from fedpress.compress.quantize.cluster import shared_values
from fedpress.compress.quantize.ranges import calibrate_, run_watched
from fedpress.compress.quantize.rounding import (
    as_batch,
    best_scale,
    patches,
    round_second_order_,
    second_moment,
)
from fedpress.core.inputs import Example
from fedpress.errors import DataError, ModelError, suggestion
from fedpress.nn.forward_probe import OPERATIONS, base_layer, plain_equivalent
from fedpress.nn.observers import Observer
from fedpress.nn.quant_scheme import QuantizationScheme
from fedpress.nn.quantized import (
    INPUT_QUANTIZED,
    QuantLayer,
    materialize_,
    quantize_layers_,
    weight_keys,
    why_not_quantizable,
)
from fedpress.nn.resize import tensor

Rounding = Literal["nearest", "second-order"]
PATCHES = 4096  # of each batch, for the second moments


def quantizable(
    model: nn.Module,
    scheme: QuantizationScheme,
    *,
    keep: Collection[str] = (),
    ignore: Sequence[str] = (),
    sparse: Collection[str] = (),
) -> tuple[dict[str, QuantizationScheme], dict[str, str]]:
    """Lists the layers of `model` that can be quantized by `scheme`, in the model's order, and the others.

    Args:
        model: nothing is changed.
        scheme: of every layer.
        keep: names of layers that stay float; "first" and "last" are those of the model's order.
        ignore: names of modules or patterns ("block.3.*"), all of whose layers stay float.
        sparse: names of parameters whose zeros are pruned weights, which a binary grid cannot keep.

    Returns:
        Layer -> its scheme; and each layer that stays float -> the reason.

    Raises:
        ModelError: if a name of `keep` is no layer with weights, or nothing is left to quantize.
    """
    table, left = _possible(model, scheme, sparse)
    if scheme.weights is None:
        table = {name: own for name, own in table.items() if own.inputs is not None}
    names = [*table]
    for name in sorted(ignored(model, ignore)):
        if table.pop(name, None) is not None:
            left[name] = "asked for by `ignore`"
    for word in keep:
        name = {"first": names[0], "last": names[-1]}.get(word, word) if names else word
        if name not in table and name not in left:
            raise ModelError(
                f"no layer '{word}'",
                place="keep",
                cure=suggestion(
                    word, names, f"use 'first', 'last', or one of {', '.join(names[:5])}"
                ),
            )
        if table.pop(name, None) is not None:
            left[name] = "asked for by `keep`"
    if not table:
        raise _nothing_left(left)
    return table, left


def _nothing_left(left: Mapping[str, str]) -> ModelError:
    reasons = "; ".join(f"'{name}': {reason}" for name, reason in left.items())
    asked = any("asked for by" in reason for reason in left.values())
    return ModelError(
        f"no layer of this model can be quantized ({reasons or 'it has no layers with weights'})",
        place="model",
        cure="name fewer layers in keep and ignore" if asked else "leave its weights float",
    )


def _possible(
    model: nn.Module, scheme: QuantizationScheme, sparse: Collection[str]
) -> tuple[dict[str, QuantizationScheme], dict[str, str]]:
    """Returns the layers that can be quantized, whatever the user wants, and the others with the reason."""
    table: dict[str, QuantizationScheme] = {}
    left: dict[str, str] = {}
    owners = _owners(model)
    has_zero = scheme.weights is None or scheme.weights.has_zero
    # The input of attention's output projection is never seen: attention reads its weight without calling it.
    projections = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if not _has_weights(module):
            continue
        reason = why_not_quantizable(module) or _why_shared(name, module, owners)
        if reason is None and not has_zero and _has_zeros(name, module, sparse):
            reason = "its zeros are pruned weights, and a binary grid has no zero; use ternary"
        if reason is not None:
            left[name or type(module).__name__] = reason
        elif isinstance(module, INPUT_QUANTIZED) and id(module) not in projections:
            table[name] = scheme
        else:
            table[name] = scheme.model_copy(update={"inputs": None})
    return table, left


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Returns the modules that hold each parameter, by its identity."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _why_shared(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    """Says which modules hold a weight of this one too: their scales would contradict each other."""
    for key in weight_keys(module):
        others = [f"'{n}'" for n in owners.get(id(module._parameters[key]), []) if n != name]
        if others:
            return f"its weight is shared with {', '.join(others)}"
    return None


def _has_zeros(name: str, module: nn.Module, sparse: Collection[str]) -> bool:
    """Whether zeros in a weight of the module are pruned weights."""
    return any(f"{name}.{key}" in sparse for key in weight_keys(module))


def _has_weights(module: nn.Module) -> bool:
    """Whether a module multiplies by weights of its own: what has only one number for each channel does not."""
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return False  # a part of the module whose weight it computes
    matrix = any(p.dim() > 1 for p in module._parameters.values() if p is not None)
    return matrix or hasattr(module, "parametrizations")


@torch.no_grad()
def quantize_(
    model: nn.Module,
    table: Mapping[str, QuantizationScheme],
    batches: Sequence[Example] = (),
    *,
    scale: Literal["mse", "minmax"] = "mse",
    rounding: Rounding = "nearest",
    observer: Observer = "minmax",
    correct_bias: bool = True,
) -> dict[str, str]:
    """Quantizes the layers of `table` after training and materializes their weights; the model changes in place.

    Args:
        model: in evaluation mode it should compute what is to be kept; fold batch norms before.
        table: layer -> scheme, for instance of `quantizable`.
        batches: public inputs [n, ...]; needed for input ranges, for second-order rounding and for the biases.
        scale: of whole-number weights: the span, or the least squared error.
        rounding: to the nearest grid point, or GPTQ's.
        observer: how input ranges are taken from what is seen.
        correct_bias: take the mean error that rounding makes in each output channel off the bias
            (Nagel et al. 2019, arXiv:1906.04721, section 4.2), where a layer has one.

    Returns:
        Layers for which something of this could not be done -> the reason.

    Raises:
        ModelError: if a weight is not finite, or a layer cannot be quantized.
        DataError: if there are no batches but they are needed, or they hold NaN.
    """
    _check_finite(model, table)
    second_order = rounding == "second-order"
    calibrated = _needs_calibration(table)
    needs_examples = second_order or correct_bias or calibrated
    if needs_examples and not batches:
        raise DataError(
            "this method needs public examples",
            place="batches",
            cure="give batches, or round weights to the nearest",
        )
    layers = {n: model.get_submodule(n) for n, s in table.items() if s.weights is not None}
    linear = {n: m for n, m in layers.items() if base_layer(type(m)) is not None}
    means: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    if needs_examples:
        means, moments = _input_moments(model, linear, batches, second=second_order)
    before = {n: tensor(model, f"{n}.weight").detach().clone() for n in linear}
    quantize_layers_(model, table)
    notes = _fit_weights_(layers, moments if second_order else None, scale=scale)
    materialize_(model)
    if correct_bias:
        notes |= _correct_biases_(model, means, before)
    if calibrated:
        notes |= calibrate_(model, batches, observer=observer)
    return notes


def _fit_weights_(
    layers: Mapping[str, nn.Module],
    moments: Mapping[str, Tensor] | None,
    *,
    scale: Literal["mse", "minmax"],
) -> dict[str, str]:
    """Sets the scales of all layers; with second moments of their inputs it rounds the weights by them.

    Returns:
        The layers that have no moments though others do -> the reason.
    """
    notes = {}
    for name, layer in layers.items():
        assert isinstance(layer, QuantLayer)
        fit_(layer, scale=scale)
        if moments is None:
            continue
        if name in moments:
            round_second_order_(layer, moments[name])
            continue
        linear = base_layer(layer.plain) is not None
        reason = "forward never calls it" if linear else f"it is a {layer.plain.__name__}"
        notes[name] = f"{reason}, so its weights are rounded to the nearest"
    return notes


def _correct_biases_(
    model: nn.Module, means: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, str]:
    """Takes the mean error of rounding off the biases; returns the layers where that cannot be done, and why.

    Args:
        model: its layers named in `means` have been rounded.
        means: layer -> the mean patch [groups, k] of its inputs.
        before: layer -> its weight before rounding.
    """
    notes = {}
    biases = [module._parameters.get("bias") for module in model.modules()]
    for name, mean in means.items():
        layer = model.get_submodule(name)
        own = layer._parameters.get("bias")
        if own is None:
            notes[name] = "it has no bias that could make good for its rounding"
        elif sum(bias is own for bias in biases) > 1:
            notes[name] = "its bias is shared, and does not make good for its rounding"
        else:
            assert isinstance(layer.weight, Tensor)
            own.sub_(_output_shift(mean, layer.weight.detach() - before[name]))
    return notes


def fit_(layer: QuantLayer, *, scale: Literal["mse", "minmax"] = "mse") -> None:
    """Sets the scales or the codebook of `layer` to suit its weights as they are."""
    quantization = layer.scheme.weights
    if quantization is None:
        return
    with torch.no_grad():
        for key in layer.keys:
            weight = layer.rows(getattr(layer, key).detach())
            if quantization.kind == "codebook":
                values = layer.codebook_of(key)
                values.copy_(shared_values(weight, 2**quantization.bits))
                if quantization.centroid_bits is not None:
                    top = values.detach().abs().amax() / (2 ** (quantization.centroid_bits - 1) - 1)
                    layer.scale(key).copy_(torch.where(top > 0, top, 1.0))
            elif scale == "mse":
                layer.scale(key).copy_(best_scale(weight, quantization))


def _needs_calibration(table: Mapping[str, QuantizationScheme]) -> bool:
    return any(s.inputs is not None and s.inputs.calibrated for s in table.values())


def _check_finite(model: nn.Module, table: Mapping[str, QuantizationScheme]) -> None:
    for name in table:
        module = model.get_submodule(name)
        for key in weight_keys(module):
            weight = getattr(module, key, None)
            if isinstance(weight, Tensor) and not bool(weight.isfinite().all()):
                raise ModelError(
                    f"'{name}' has NaN or infinite weights",
                    place="model",
                    cure="load a checkpoint from before it broke",
                )


def _input_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Example], *, second: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the model once: the mean patch [groups, k] of every layer's inputs, and their second moments if wanted."""
    means: dict[str, tuple[Tensor, int]] = {}
    seconds: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError(
                f"'{name}' sees NaN or infinite values",
                place="batches",
                cure="check the public examples",
            )
        layer, x = layers[name], x.detach().float()
        if type(layer) not in OPERATIONS and not isinstance(layer, QuantLayer):
            layer, x = plain_equivalent(layer, x)
        x = as_batch(layer, x)
        # Patches of a sum are the sum of patches, and one image has far fewer of them than a batch.
        summed = patches(layer, x.double().sum(0, keepdim=True))
        total, count = means.get(name, (0.0, 0))
        means[name] = total + summed.sum(1), count + len(x) * summed.shape[1]
        if second:
            moment, rows = second_moment(layer, x, most=PATCHES)
            total, count = seconds.get(name, (0.0, 0))
            seconds[name] = total + moment, count + rows

    run_watched(model, layers, batches, add)
    return (
        {name: total / count for name, (total, count) in means.items()},
        {name: total / count for name, (total, count) in seconds.items()},
    )


def _output_shift(mean: Tensor, error: Tensor) -> Tensor:
    """The mean change [out] of the outputs when the weights change by `error`: exact, since a layer is linear."""
    return (error.double().reshape(len(mean), -1, mean.shape[1]) @ mean[..., None]).flatten()
