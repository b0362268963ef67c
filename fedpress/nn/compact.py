"""Represents a sparse weight by its kept values: only they are trained, sent and noised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedpress.errors import ModelError
from fedpress.nn.quantized import kept_entries


class Scatter(nn.Module):
    """A parametrization: values [k] at fixed, public places of a weight, zeros elsewhere."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.shape = mask.shape
        self.register_buffer("places", mask.flatten().nonzero().flatten(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Maps values [k] to a weight."""
        assert isinstance(self.places, Tensor)
        zeros = values.new_zeros(self.shape.numel())
        return zeros.index_put((self.places,), values).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Maps a weight to its values [k]."""
        assert isinstance(self.places, Tensor)
        if weight.shape == self.places.shape:
            return weight  # a shared weight that is represented by its values already
        return weight.flatten()[self.places]


def compact_(model: nn.Module, sparse: Iterable[str]) -> nn.Module:
    """Makes only the kept values of the named weights parameters (see `kept_entries`).

    Everything that works on parameters (flat vectors, clipping, noise, secure sums) then has no
    zeros in it, and the zeros cannot change. Frozen weights are not changed. `expand_` undoes it.

    Args:
        model: changed in place.
        sparse: names of sparse weights.

    Raises:
        ModelError: if `model` lacks one of the names, or a weight is all zeros.
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
                cure="keep a larger share",
            )
        for module, key in _owners(model, weight):
            parametrize.register_parametrization(module, key, Scatter(mask), unsafe=True)
    return model


@torch.no_grad()
def expand_(model: nn.Module) -> nn.Module:
    """Makes the compact weights of `model` plain parameters again, zeros included."""
    full: dict[nn.Parameter, Tensor] = {}
    # A copy of the list, because parametrizations are removed while it is read.
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
    """Returns the modules that hold a weight, with its name in each; several if it is shared."""
    owners = []
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter is weight:
                owners.append((module, key))
    return owners


def _to_front_(module: nn.Module, key: str) -> None:
    """Makes a parameter the first of its module, as layers register their weight.

    The order of parameters is that of the flat vector that clients and server exchange.
    """
    table = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({key: table.pop(key), **table})
