"""Masks of sparse quantized weights, in which a zero is pruned, or a kept entry rounded to 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedpress.errors import ModelError
from fedpress.nn.quantized.layer import quantized_weights
from fedpress.nn.quantized.names import kept_zeros_name


def kept_entries(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns masks of the kept entries of the named sparse weights: bool, of their shapes.

    In a float weight exactly the entries that are not 0 are kept. In a quantized weight a kept
    entry may have been rounded to 0; a buffer of the layer marks these entries (see
    `note_kept_zeros_`), so that later training can change them.

    Raises:
        ModelError: if the model has no parameter of that name.
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
    """Records which zeros of sparse quantized weights are kept entries that were rounded to 0.

    Args:
        model: layers with such zeros get a buffer; in others all zeros are pruned entries.
        masks: mask of the kept entries of each sparse weight, by name.

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
        if bool(zeros.any()):
            layer.register_buffer(kept_zeros_name(key), zeros)
            noted.append(name)
    return tuple(noted)


def register_kept_zeros_(model: nn.Module, names: Iterable[str]) -> None:
    """Adds empty buffers of kept zeros to the layers of the named weights, before a file is loaded.

    Raises:
        ModelError: if a name is not that of a quantized weight.
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
