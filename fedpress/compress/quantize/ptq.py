"""Quantization after training: which layers, scales, rounding, ranges of the inputs, and biases that make good."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.compress.prune.ignoring import ignored
from fedpress.compress.quantize.cluster import shared_values
from fedpress.compress.quantize.ranges import Batch, calibrate_, run_watched
from fedpress.compress.quantize.rounding import (
    as_batch,
    best_scale,
    patches,
    round_second_order_,
    second_moment,
)
from fedpress.errors import DataError, ModelError, did_you_mean
from fedpress.nn import forwards
from fedpress.nn.observers import Observer
from fedpress.nn.quant_scheme import LayerGrids
from fedpress.nn.quantized import (
    ROUND_INPUTS,
    QuantLayer,
    quantize_layers_,
    settle_,
    weight_keys,
    why_not,
)
from fedpress.nn.resize import tensor

Rounding = Literal["nearest", "second-order"]
PATCHES = 4096  # of each batch, for the second moments


def quantizable(
    model: nn.Module,
    grids: LayerGrids,
    *,
    keep: Collection[str] = (),
    ignore: Sequence[str] = (),
    sparse: Collection[str] = (),
) -> tuple[dict[str, LayerGrids], dict[str, str]]:
    """Lists the layers of `model` that can be put on `grids`, in the model's order, and the others with the reason.

    Args:
        model: nothing is changed.
        grids: of every layer.
        keep: names of layers that stay float; "first" and "last" are those of the model's order.
        ignore: names of modules or patterns ("block.3.*"), all of whose layers stay float.
        sparse: names of parameters whose zeros are pruned weights, which a binary grid cannot keep.

    Raises:
        ModelError: if a name of `keep` is no layer with weights, or nothing is left to quantize.
    """
    table: dict[str, LayerGrids] = {}
    left: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    projections = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if not _has_weights(module):
            continue
        reason = why_not(module)
        keys = weight_keys(module) if reason is None else ()
        for key in keys:
            others = [f"'{n}'" for n in owners.get(id(module._parameters[key]), []) if n != name]
            if others:
                reason = f"its weight is shared with {', '.join(others)}"
            elif f"{name}.{key}" in sparse and grids.weights and not grids.weights.has_zero:
                reason = "its zeros are pruned weights, and a binary grid has no zero; use ternary"
        if reason is not None:
            left[name or type(module).__name__] = reason
            continue
        # The input of attention's output projection is never seen: attention reads its weight without calling it.
        seen = isinstance(module, ROUND_INPUTS) and id(module) not in projections
        table[name] = grids if seen else grids.model_copy(update={"inputs": None})
    if grids.weights is None:
        table = {name: each for name, each in table.items() if each.inputs is not None}
    names = [*table]
    for name in sorted(ignored(model, ignore)):
        if table.pop(name, None) is not None:
            left[name] = "asked for by `ignore`"
    for word in keep:
        name = {"first": names[0], "last": names[-1]}.get(word, word) if names else word
        if name not in table and name not in left:
            raise ModelError(
                f"quantize.keep: no layer '{word}'{did_you_mean(word, names)}; use 'first', 'last', or one of "
                f"{', '.join(names[:5])}"
            )
        if table.pop(name, None) is not None:
            left[name] = "asked for by `keep`"
    if not table:
        told = (
            "; ".join(f"'{n}': {why}" for n, why in left.items()) or "it has no layers with weights"
        )
        raise ModelError(f"quantize: no layer of this model can be quantized ({told})")
    return table, left


def _has_weights(module: nn.Module) -> bool:
    """Whether a module multiplies by weights of its own: what has only one number for each channel does not."""
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return False  # a part of the module whose weight it computes
    matrix = any(p.dim() > 1 for p in module._parameters.values() if p is not None)
    return matrix or hasattr(module, "parametrizations")


@torch.no_grad()
def quantize_(
    model: nn.Module,
    table: Mapping[str, LayerGrids],
    batches: Sequence[Batch] = (),
    *,
    scale: Literal["mse", "minmax"] = "mse",
    rounding: Rounding = "nearest",
    observer: Observer = "minmax",
    correct_bias: bool = True,
) -> dict[str, str]:
    """Puts the layers of `table` on their grids after training and settles them; the model changes in place.

    Args:
        model: in evaluation mode it should compute what is to be kept; fold batch norms before.
        table: layer -> grids, for instance of `quantizable`.
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
    _finite(model, table)
    needs = (
        rounding == "second-order"
        or correct_bias
        or any(_static(grids) for grids in table.values())
    )
    if needs and not batches:
        raise DataError(
            "quantize: this method needs public examples; give batches, or round weights to the nearest"
        )
    layers = {n: model.get_submodule(n) for n, g in table.items() if g.weights is not None}
    looked = {n: m for n, m in layers.items() if forwards.base_of(type(m)) is not None}
    means, moments = (
        _look(model, looked, batches, moments=rounding == "second-order") if needs else ({}, {})
    )
    before = {n: tensor(model, f"{n}.weight").detach().clone() for n in looked}
    quantize_layers_(model, table)
    notes: dict[str, str] = {}
    for name, layer in layers.items():
        assert isinstance(layer, QuantLayer)
        fit_(layer, scale=scale)
        if name in moments:
            round_second_order_(layer, moments[name])
        elif rounding == "second-order":
            why = "forward never calls it" if name in looked else f"it is a {layer.plain.__name__}"
            notes[name] = f"{why}, so its weights are rounded to the nearest"
    settle_(model)
    if correct_bias:
        biases = [module._parameters.get("bias") for module in model.modules()]
        for name, layer in layers.items():
            assert isinstance(layer, QuantLayer)
            if name not in means:
                continue
            own = layer._parameters.get("bias")
            if own is not None and sum(bias is own for bias in biases) > 1:
                notes[name] = "its bias is shared, and does not make good for its rounding"
            elif own is not None:
                own.sub_(_shift(means[name], layer.weight.detach() - before[name]))
            else:
                notes[name] = "it has no bias that could make good for its rounding"
    if any(_static(grids) for grids in table.values()):
        notes |= calibrate_(model, batches, observer=observer)
    return notes


def fit_(layer: QuantLayer, *, scale: Literal["mse", "minmax"] = "mse") -> None:
    """Sets the scales or the codebook of `layer` to suit its weights as they are."""
    grid = layer.grids.weights
    if grid is None:
        return
    with torch.no_grad():
        for key in layer.keys:
            weight = layer.rows(getattr(layer, key).detach())
            if grid.kind == "codebook":
                values = layer.codebook_of(key)
                values.copy_(shared_values(weight, 2**grid.bits))
                if grid.centroid_bits is not None:
                    top = values.detach().abs().amax() / (2 ** (grid.centroid_bits - 1) - 1)
                    layer.scale(key).copy_(torch.where(top > 0, top, 1.0))
            elif scale == "mse":
                layer.scale(key).copy_(best_scale(weight, grid))


def _static(grids: LayerGrids) -> bool:
    return grids.inputs is not None and grids.inputs.calibrated


def _finite(model: nn.Module, table: Mapping[str, LayerGrids]) -> None:
    for name in table:
        module = model.get_submodule(name)
        for key in weight_keys(module):
            weight = getattr(module, key, None)
            if isinstance(weight, Tensor) and not bool(weight.isfinite().all()):
                raise ModelError(
                    f"quantize: '{name}' has NaN or infinite weights; load a checkpoint from before it broke"
                )


def _look(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], *, moments: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the model once: the mean patch [groups, k] of every layer's inputs, and their second moments if wanted."""
    means: dict[str, tuple[Tensor, int]] = {}
    seconds: dict[str, tuple[Tensor, int]] = {}

    def see(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError(
                f"quantize: '{name}' sees NaN or infinite values; check the public examples"
            )
        layer, x = layers[name], x.detach().float()
        if type(layer) not in forwards.OPERATIONS and not isinstance(layer, QuantLayer):
            layer, x = forwards.as_plain(layer, x)
        x = as_batch(layer, x)
        whole = patches(
            layer, x.double().sum(0, keepdim=True)
        )  # patches of a sum are the sum of patches
        total, count = means.get(name, (0.0, 0))
        means[name] = total + whole.sum(1), count + len(x) * whole.shape[1]
        if moments:
            second, rows = second_moment(layer, x, most=PATCHES)
            old, seen = seconds.get(name, (0.0, 0))
            seconds[name] = old + second, seen + rows

    run_watched(model, layers, batches, see)
    return {n: t / c for n, (t, c) in means.items()}, {n: t / c for n, (t, c) in seconds.items()}


def _shift(mean: Tensor, error: Tensor) -> Tensor:
    """The mean change [out] of the outputs when the weights change by `error`: exact, since a layer is linear."""
    return (error.double().reshape(len(mean), -1, mean.shape[1]) @ mean[..., None]).flatten()
