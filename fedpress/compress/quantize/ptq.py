"""Quantizes the layers of a trained model without training (post-training quantization)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.compress.prune.ignoring import ignored_names
from fedpress.compress.quantize.cluster import shared_values
from fedpress.compress.quantize.ranges import calibrate_, run_with_observer
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
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import (
    INPUT_QUANTIZED,
    QuantLayer,
    materialize_,
    quantize_layers_,
    weight_keys,
    weight_name,
    why_not_quantizable,
)
from fedpress.nn.resize import get_tensor

Rounding = Literal["nearest", "second-order"]
PATCHES = 4096
"""Number of patches of a batch, up to a factor of 2, that second moments are computed from.

Neighbouring patches of images are similar, so more patches would cost time and add little.
"""


def quantizable(
    model: nn.Module,
    scheme: QuantizationScheme,
    *,
    keep: Collection[str] = (),
    ignore: Sequence[str] = (),
    sparse: Collection[str] = (),
) -> tuple[dict[str, QuantizationScheme], dict[str, str]]:
    """Finds the layers that can be quantized by `scheme`, in the model's order.

    Args:
        model: the model, which is not changed.
        scheme: the values that weights and inputs may have, the same for every layer.
        keep: names of layers that stay float; "first" and "last" mean the first and the last layer
            that can be quantized.
        ignore: names of modules, or patterns ("block.3.*"); all layers in these modules stay float.
        sparse: names of parameters whose zeros are pruned weights. Such a weight cannot be binary,
            because binary values have no zero.

    Returns:
        Two dictionaries: name of each layer to quantize -> its scheme, and name of each layer that
        stays float -> the reason.

    Raises:
        ModelError: if a name of `keep` is not a layer with weights, or no layer can be quantized.
        RecipeError: if a pattern of `ignore` matches nothing.
    """
    table, left = _possible_layers(model, scheme, sparse)
    # If weights stay float, only layers whose inputs are quantized change.
    if scheme.weights is None:
        table = {name: own for name, own in table.items() if own.inputs is not None}
    names = [*table]
    # The ignored names include parameters, which are not in the table.
    for name in sorted(ignored_names(model, ignore)):
        if table.pop(name, None) is not None:
            left[name] = "asked for by `ignore`"

    aliases = {"first": names[0], "last": names[-1]} if names else {}
    for word in keep:
        name = aliases.get(word, word)
        if name not in table and name not in left:
            otherwise = f"use 'first', 'last', or one of {', '.join(names[:5])}"
            raise ModelError(
                f"no layer '{word}'", place="keep", cure=suggestion(word, names, otherwise)
            )
        if table.pop(name, None) is not None:
            left[name] = "asked for by `keep`"

    if not table:
        raise _nothing_left(left)
    return table, left


def _nothing_left(left: Mapping[str, str]) -> ModelError:
    """Returns the error for a model without a layer to quantize, with the reason for each layer."""
    reasons = "; ".join(f"'{name}': {reason}" for name, reason in left.items())
    asked = any("asked for by" in reason for reason in left.values())
    return ModelError(
        f"no layer of this model can be quantized ({reasons or 'it has no layers with weights'})",
        place="model",
        cure="name fewer layers in keep and ignore" if asked else "leave its weights float",
    )


def _possible_layers(
    model: nn.Module, scheme: QuantizationScheme, sparse: Collection[str]
) -> tuple[dict[str, QuantizationScheme], dict[str, str]]:
    """Returns the layers that can be quantized -> scheme, and the other layers -> reason."""
    table: dict[str, QuantizationScheme] = {}
    left: dict[str, str] = {}
    owners = _owners(model)
    has_zero = scheme.weights is None or scheme.weights.has_zero
    # Attention uses the weight of its output projection without calling the module. So hooks cannot
    # calibrate its input, and only its weight is quantized.
    projections = set()
    for m in model.modules():
        if isinstance(m, nn.MultiheadAttention):
            projections.add(id(m.out_proj))

    for name, module in model.named_modules():
        if not _has_weights(module):
            continue
        reason = why_not_quantizable(module) or _why_shared(name, module, owners)
        if reason is None and not has_zero and _has_zeros(name, module, sparse):
            reason = "its zeros are pruned weights, and binary values have no zero; use ternary"
        if reason is not None:
            left[name or type(module).__name__] = reason
        elif isinstance(module, INPUT_QUANTIZED) and id(module) not in projections:
            table[name] = scheme
        else:
            # Embeddings, recurrent layers and attention have float inputs.
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
    """Returns a reason if a weight is shared with another module, whose scales would differ."""
    for key in weight_keys(module):
        others = []
        for n in owners.get(id(module._parameters[key]), []):
            if n != name:
                others.append(f"'{n}'")
        if others:
            return f"its weight is shared with {', '.join(others)}"
    return None


def _has_zeros(name: str, module: nn.Module, sparse: Collection[str]) -> bool:
    """Returns whether zeros in a weight of the module are pruned weights."""
    return any(weight_name(name, key) in sparse for key in weight_keys(module))


def _has_weights(module: nn.Module) -> bool:
    """Returns whether a module has a weight of two or more axes; vectors in norms do not count."""
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return False  # it belongs to the module whose weight it computes
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dim() > 1:
            return True
    return hasattr(module, "parametrizations")


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
    """Quantizes the layers of `table` without training; the model is changed in place.

    Args:
        model: a trained model; fold its batch norms first (`fold_`).
        table: name of each layer -> its scheme, for instance from `quantizable`.
        batches: public inputs [n, ...]; needed for input ranges, second-order rounding and bias
            correction.
        scale: how scales of integer weights are chosen: "minmax" for the full range, "mse" for the
            least squared error.
        rounding: "nearest" rounds each weight to the nearest grid point, "second-order" is GPTQ.
        observer: how input ranges are chosen from the observed values.
        correct_bias: whether the mean error of each output channel is subtracted from the layer's
            bias (Nagel et al. 2019, arXiv:1906.04721, section 4.2).

    Returns:
        Name of each layer that was not rounded, corrected or calibrated as the settings say -> the
        reason.

    Raises:
        ModelError: if a weight is not finite, or a layer cannot be quantized.
        DataError: if batches are needed and there are none, or a layer receives NaN or infinite
            values.
    """
    _check_finite(model, table)
    second_order = rounding == "second-order"
    calibrated = _needs_calibration(table)
    needs_examples = second_order or correct_bias or calibrated
    # Checked before the model is changed.
    if needs_examples and not batches:
        raise DataError(
            "this method needs public examples",
            place="batches",
            cure=(
                "give batches, or set rounding='nearest' and correct_bias=False and leave all "
                "inputs float"
            ),
        )

    layers: dict[str, nn.Module] = {}
    linear: dict[str, nn.Module] = {}  # layers whose outputs are one product with one weight
    for name, scheme in table.items():
        if scheme.weights is not None:
            layers[name] = model.get_submodule(name)
            if base_layer(type(layers[name])) is not None:
                linear[name] = layers[name]

    means: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    if needs_examples:
        means, moments = _input_moments(model, linear, batches, second=second_order)

    # Copies, because the weights are rounded in place; the bias correction needs the difference.
    before = {}
    for name in linear:
        before[name] = get_tensor(model, f"{name}.weight").detach().clone()
    quantize_layers_(model, table)
    notes = _fit_weights_(layers, moments if second_order else None, scale=scale)
    materialize_(model)

    if correct_bias:
        notes |= _correct_biases_(model, means, before)
    # Calibrated after the biases are corrected, since the inputs of later layers depend on them.
    if calibrated:
        notes |= calibrate_(model, batches, observer=observer)
    return notes


def _fit_weights_(
    layers: Mapping[str, nn.Module],
    moments: Mapping[str, Tensor] | None,
    *,
    scale: Literal["mse", "minmax"],
) -> dict[str, str]:
    """Sets the scales of all layers; if second moments are given, rounds the weights by GPTQ.

    Returns:
        Name of each layer without second moments -> the reason; it is rounded to nearest.
    """
    notes = {}
    for name, layer in layers.items():
        assert isinstance(layer, QuantLayer)
        fit_scales_(layer, scale=scale)
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
    """Subtracts the mean output error of rounding from the biases.

    Args:
        model: the model with rounded weights.
        means: name of each layer -> mean patch [groups, k] of its inputs.
        before: name of each layer -> its weight before rounding.

    Returns:
        Name of each layer that was not corrected -> the reason.
    """
    notes = {}
    # A shared bias would be corrected several times, so it is left unchanged.
    biases = [module._parameters.get("bias") for module in model.modules()]
    for name, mean in means.items():
        layer = model.get_submodule(name)
        own = layer._parameters.get("bias")
        if own is None:
            notes[name] = "it has no bias that could compensate its rounding"
        elif sum(bias is own for bias in biases) > 1:
            notes[name] = "its bias is shared, so it does not compensate its rounding"
        else:
            assert isinstance(layer.weight, Tensor)
            own.sub_(_output_shift(mean, layer.weight.detach() - before[name]))
    return notes


def fit_scales_(layer: QuantLayer, *, scale: Literal["mse", "minmax"] = "mse") -> None:
    """Sets the scales or the codebook of `layer` from its present weights.

    Args:
        layer: a quantized layer whose scales cover the full range of the weights.
        scale: "mse" for scales of least squared error; "minmax" leaves the scales unchanged.
    """
    quantization = layer.scheme.weights
    if quantization is None:
        return
    with torch.no_grad():
        for key in layer.keys:
            weight = layer.rows(getattr(layer, key).detach())
            if quantization.kind == "codebook":
                _fit_codebook_(layer, key, weight, quantization)
            elif scale == "mse":
                layer.scale(key).copy_(best_scale(weight, quantization))


def _fit_codebook_(
    layer: QuantLayer, key: str, weight: Tensor, quantization: WeightQuantization
) -> None:
    """Sets the shared values of a weight, and their scale if they are quantized themselves."""
    values = layer.codebook_of(key)
    values.copy_(shared_values(weight, 2**quantization.bits))
    if quantization.centroid_bits is not None:
        largest_code = 2 ** (quantization.centroid_bits - 1) - 1
        scale = values.detach().abs().amax() / largest_code
        layer.scale(key).copy_(torch.where(scale > 0, scale, 1.0))


def _needs_calibration(table: Mapping[str, QuantizationScheme]) -> bool:
    return any(s.inputs is not None and s.inputs.calibrated for s in table.values())


def _check_finite(model: nn.Module, table: Mapping[str, QuantizationScheme]) -> None:
    """Raises an error for layers with NaN or infinite weights, for which there is no scale."""
    for name in table:
        module = model.get_submodule(name)
        for key in weight_keys(module):
            weight = getattr(module, key, None)
            if isinstance(weight, Tensor) and not bool(weight.isfinite().all()):
                raise ModelError(
                    f"'{name}' has NaN or infinite weights",
                    place="model",
                    cure="load a checkpoint from before training broke",
                )


def _input_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Example], *, second: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the model and returns first and second moments of each layer's input patches.

    A patch is what one output is computed from: a row of inputs of a linear layer, or the pixels
    under the kernel of a convolution.

    Args:
        model: the float model.
        layers: the layers by name.
        batches: public inputs.
        second: whether second moments are needed too.

    Returns:
        Mean patches [groups, k], and second moments [groups, k, k], by layer.
    """
    means: dict[str, tuple[Tensor, int]] = {}  # sum and count
    seconds: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError(
                f"'{name}' receives NaN or infinite values",
                place="batches",
                cure="check the public examples",
            )
        layer = layers[name]
        x = x.detach().float()
        # A subclass may change its input first, for instance pad it. Then `x` becomes what its
        # convolution or matrix product gets.
        if type(layer) not in OPERATIONS and not isinstance(layer, QuantLayer):
            layer, x = plain_equivalent(layer, x)
        x = as_batch(layer, x)

        # Taking patches is linear, so one im2col of the summed images gives the sum over examples.
        summed = patches(layer, x.double().sum(0, keepdim=True))
        total, count = means.get(name, (0.0, 0))
        means[name] = total + summed.sum(1), count + len(x) * summed.shape[1]
        if second:
            moment, rows = second_moment(layer, x, most=PATCHES)
            total, count = seconds.get(name, (0.0, 0))
            seconds[name] = total + moment, count + rows

    run_with_observer(model, layers, batches, add)
    return _averages(means), _averages(seconds)


def _averages(totals: Mapping[str, tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Returns sum / count of each entry."""
    return {name: total / count for name, (total, count) in totals.items()}


def _output_shift(mean: Tensor, error: Tensor) -> Tensor:
    """Returns the mean change [out] of the outputs if the weights change by `error`.

    The result is exact, because the outputs are linear in the inputs.

    Args:
        mean: mean patch [groups, k] of the inputs.
        error: change of the weight, in the weight's shape [out, ...].
    """
    by_group = error.double().reshape(len(mean), -1, mean.shape[1])
    return (by_group @ mean[..., None]).flatten()
