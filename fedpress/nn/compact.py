"""A sparse weight as the vector of its kept values: what trains, travels and gets noise is only what is not zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedpress.errors import ModelError
from fedpress.nn.quantized import kept_entries


class Scatter(nn.Module):
    """Puts values [k] back to their places in a weight, zeros elsewhere; the places are public and stay."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.shape = mask.shape
        self.register_buffer("places", mask.flatten().nonzero().flatten(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Maps values [k] to a weight."""
        assert isinstance(self.places, Tensor)
        return (
            values.new_zeros(self.shape.numel()).index_put((self.places,), values).view(self.shape)
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Maps a weight to its values [k]; those of a shared weight may have been taken already."""
        assert isinstance(self.places, Tensor)
        return weight if weight.shape == self.places.shape else weight.flatten()[self.places]


def compact_(model: nn.Module, sparse: Iterable[str]) -> nn.Module:
    """Lets only the kept values of the named weights be parameters (see `kept_entries`); frozen weights are left alone.

    Everything that works on parameters (flat vectors, clipping, noise, secure sums) then never sees the zeros, and the
    zeros cannot change. `expand_` takes it back.

    Raises:
        ModelError: if `model` lacks one of the names, or a weight is all zeros.
    """
    masks = kept_entries(model, sparse)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        weight = parameters[name]
        if not weight.requires_grad:
            continue
        if not mask.any():
            raise ModelError(
                f"'{name}' has no value left that could train",
                place="spec.sparse",
                cure="keep a larger share",
            )
        for module, key in _owners(model, weight):
            parametrize.register_parametrization(module, key, Scatter(mask), unsafe=True)
    return model


@torch.no_grad()
def expand_(model: nn.Module) -> nn.Module:
    """Makes the compact weights of `model` plain parameters again, each with its zeros."""
    full: dict[nn.Parameter, Tensor] = {}
    for module in [*model.modules()]:
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for key, steps in [*module.parametrizations.items()]:
            if isinstance(steps, parametrize.ParametrizationList) and isinstance(steps[0], Scatter):
                assert isinstance(steps.original, nn.Parameter)
                full.setdefault(steps.original, getattr(module, key))
                parametrize.remove_parametrizations(module, key, leave_parametrized=False)
                _to_front_(module, key)
    for parameter, weight in full.items():
        parameter.data = weight
    return model


def _owners(model: nn.Module, weight: nn.Parameter) -> list[tuple[nn.Module, str]]:
    return [
        (m, key)
        for m in model.modules()
        for key, p in m.named_parameters(recurse=False)
        if p is weight
    ]


def _to_front_(module: nn.Module, key: str) -> None:
    """Gives a parameter the place that layers give their weight: the first."""
    table = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({key: table.pop(key), **table})
