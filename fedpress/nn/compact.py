"""Compact sparse weights: the parameter is the vector of kept values, without the zeros.

Then only the kept values are trained, sent to the server, and get privacy noise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedpress.errors import ModelError
from fedpress.nn.quantized import kept_entries


class ScatterValues(nn.Module):
    """A parametrization that computes a weight from values [k]: all other entries are zeros."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.shape = mask.shape
        self.register_buffer("places", mask.flatten().nonzero().flatten(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Returns the weight with `values` [k] where the mask is true."""
        assert isinstance(self.places, Tensor)
        zeros = values.new_zeros(self.shape.numel())
        return zeros.index_put((self.places,), values).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Returns the values [k] of a weight where the mask is true."""
        assert isinstance(self.places, Tensor)
        # If two modules share a weight, it became a vector when the first one was parametrized.
        if weight.shape == self.places.shape:
            return weight
        return weight.flatten()[self.places]


def compact_(model: nn.Module, sparse: Iterable[str]) -> nn.Module:
    """Replaces each named weight by a parameter with its kept values (see `kept_entries`).

    Example: a weight [64, 64] with 410 kept entries becomes a parameter [410]. Flat vectors,
    clipping, noise and secure sums then work on the kept values only, and the zeros cannot change.
    Frozen weights stay as they are. `expand_` undoes the replacement.

    Args:
        model: changed in place.
        sparse: names of sparse weights.

    Raises:
        ModelError: if `model` has no weight with one of the names, or a trainable weight has no
            kept value.
    """
    masks = kept_entries(model, sparse)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        weight = parameters[name]
        # A frozen weight is not sent, so its zeros cost nothing.
        if not weight.requires_grad:
            continue
        # An empty vector could not be trained or sent.
        if not mask.any():
            raise ModelError(
                f"'{name}' has no value left to train",
                place="spec.sparse",
                cure="prune less: keep a larger share of this weight's entries",
            )
        # `unsafe`, because torch otherwise requires that the values have the weight's shape.
        for module, key in _modules_with(model, weight):
            parametrize.register_parametrization(module, key, ScatterValues(mask), unsafe=True)
    return model


@torch.no_grad()
def expand_(model: nn.Module) -> nn.Module:
    """Undoes `compact_`: compact weights become ordinary parameters with their zeros."""
    full: dict[nn.Parameter, Tensor] = {}
    # A copy of the list, because parametrizations are removed while it is read.
    for module in [*model.modules()]:
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for key, steps in [*module.parametrizations.items()]:
            if isinstance(steps, parametrize.ParametrizationList) and isinstance(
                steps[0], ScatterValues
            ):
                assert isinstance(steps.original, nn.Parameter)
                full.setdefault(steps.original, getattr(module, key))
                parametrize.remove_parametrizations(module, key, leave_parametrized=False)
                _to_front_(module, key)
    for parameter, weight in full.items():
        parameter.data = weight
    return model


def _modules_with(model: nn.Module, weight: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Returns (module, name of the weight in it) for each module that has this weight."""
    holders = []
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter is weight:
                holders.append((module, key))
    return holders


def _to_front_(module: nn.Module, key: str) -> None:
    """Moves a parameter to the first place in its module, where layers have their weight.

    Clients and server exchange a flat vector of all parameters, so their order must not change.
    """
    table = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({key: table.pop(key), **table})
