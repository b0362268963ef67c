"""Distinguishes the two kinds of zeros in sparse quantized weights: pruned or rounded to 0.

A pruned entry must stay 0. An entry that pruning kept, but that quantization rounded to 0, may
change in later training. A buffer of the layer marks such kept zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedpress.errors import ModelError
from fedpress.nn.quantized.layer import quantized_weights
from fedpress.nn.quantized.names import kept_zeros_name


def kept_entries(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns for each named weight a mask of the entries that were not pruned (bool, same shape).

    In a float weight all entries that are not 0 are kept entries. In a quantized weight the entries
    that the layer's buffer marks are kept too (see `note_kept_zeros_`).

    Raises:
        ModelError: if the model has no parameter with one of the names.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name in names:
        if name not in parameters:
            raise ModelError(
                f"the model has no parameter '{name}'",
                place="spec.sparse",
                cure="load the spec that was saved with this model",
            )
        kept = parameters[name].detach() != 0
        # The buffer of "conv.weight" is "conv.weight_kept_zeros".
        owner, dot, key = name.rpartition(".")
        zeros = buffers.get(f"{owner}{dot}{kept_zeros_name(key)}")
        found[name] = kept if zeros is None else kept | zeros
    return found


def note_kept_zeros_(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Records in buffers which zeros of sparse quantized weights are kept zeros.

    Args:
        model: layers with kept zeros get a buffer. In other layers every zero counts as pruned.
        masks: name of each sparse weight -> mask of its kept entries.

    Returns:
        The names of the weights with a buffer, for `ModelSpec.kept_zeros`.
    """
    weights = quantized_weights(model)
    noted = []
    for name, mask in masks.items():
        if name not in weights:
            continue
        layer, key = weights[name]
        weight = getattr(layer, key).detach()
        zeros = mask.to(weight.device) & (weight == 0)
        # A buffer of an earlier stage may be out of date.
        layer._buffers.pop(kept_zeros_name(key), None)
        # An empty buffer would only enlarge the saved file.
        if bool(zeros.any()):
            layer.register_buffer(kept_zeros_name(key), zeros)
            noted.append(name)
    return tuple(noted)


def register_kept_zeros_(model: nn.Module, names: Iterable[str]) -> None:
    """Adds buffers of kept zeros, filled with False, to the layers of the named weights.

    Call this before a state dict with these buffers is loaded.

    Raises:
        ModelError: if a name is not the name of a quantized weight.
    """
    weights = quantized_weights(model)
    for name in names:
        if name not in weights:
            raise ModelError(
                f"'{name}' is not a quantized weight",
                place="spec.kept_zeros",
                cure="load the spec that was saved with this model",
            )
        layer, key = weights[name]
        zeros = torch.zeros_like(getattr(layer, key), dtype=torch.bool)
        layer.register_buffer(kept_zeros_name(key), zeros)
