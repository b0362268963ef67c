"""Returns a model's tensors by name, also with the weights that weight norm or masks compute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers of `model` by name; a shared tensor under all its names.

    The tensors are detached, but share their memory with the model.
    """
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {name: tensor.detach() for name, tensor in named.items()}


@torch.no_grad()
def effective_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns all tensors by name, with computed weights in place of their originals.

    A weight may be computed from other tensors (its originals) by a parametrization, `weight_norm`
    or `torch.nn.utils.prune`. Scores must see the computed weight, not the original tensor of the
    same shape. For instance, the direction v of a weight norm does not show how large the weight
    is.
    """
    tensors = tensors_of(model)
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        computed = {**_parametrized_weights(module), **_hooked_weights(module)}
        for original, value in computed.items():
            key = prefix + original
            # Originals of another shape, such as the lengths g of a weight norm, stay.
            if key in tensors and tensors[key].shape == value.shape:
                tensors[key] = value.detach()
    return tensors


def _parametrized_weights(module: nn.Module) -> dict[str, Tensor]:
    """Returns the weights that parametrizations compute, by the names of their originals."""
    computed: dict[str, Tensor] = {}
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for weight, parametrization in module.parametrizations.items():
            for original, _ in parametrization.named_parameters():
                computed[f"parametrizations.{weight}.{original}"] = getattr(module, weight)
    return computed


def _hooked_weights(module: nn.Module) -> dict[str, Tensor]:
    """Returns the weights that hooks compute before forward, by the names of their originals."""
    computed: dict[str, Tensor] = {}
    hooks: Iterable[Any] = module._forward_pre_hooks.values()
    for hook in hooks:
        if hasattr(hook, "compute_weight"):  # torch.nn.utils.weight_norm and spectral_norm
            # Spectral norm updates its vectors in training mode; scoring must not change the model.
            options = {"do_power_iteration": False} if hasattr(hook, "eps") else {}
            weight = hook.compute_weight(module, **options)
            computed[f"{hook.name}_v"] = weight
            computed[f"{hook.name}_orig"] = weight
        elif hasattr(hook, "apply_mask"):  # torch.nn.utils.prune
            computed[f"{hook._tensor_name}_orig"] = hook.apply_mask(module)
    return computed
