"""Removes from a model the channels that a pruning plan prunes, or only sets them to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from fedpress.compress.prune.plan import PruningPlan
from fedpress.errors import ModelError
from fedpress.nn.forward_sizes import Numbers, set_numbers_
from fedpress.nn.resize import get_tensor, replace_tensors_

NEARLY_ZERO = 1e-12
"""Factor for a nearly zeroed channel; the square of 1e-12 is still above 0 in float32."""


@torch.no_grad()
def remove_(model: nn.Module, plan: PruningPlan) -> None:
    """Removes the pruned channels of `plan` from all tensors of `model`.

    Sizes written into forward code, such as `view(n, 4, 8)`, are corrected while the model runs.

    A tensor that several modules share stays shared. Parameters are replaced by new ones without
    gradients, so create the optimizer afterwards.

    Raises:
        ModelError: if a tensor of the plan is missing in the model or lacks an index of the plan.
    """
    _check_fits(model, plan.keep)
    keep_indices_(model, plan.keep, plan.numbers)


@torch.no_grad()
def keep_indices_(
    model: nn.Module, keep: Mapping[str, Mapping[int, tuple[int, ...]]], numbers: Numbers
) -> None:
    """Keeps only the given indices of tensors, and corrects the given numbers in forward code.

    Args:
        model: changed in place.
        keep: tensor name -> axis -> indices to keep.
        numbers: corrections of sizes that are written into forward code.
    """
    smaller = {}
    for name, axes in keep.items():
        smaller[name] = _shrink(get_tensor(model, name), axes)
    replace_tensors_(model, smaller)
    set_numbers_(model, numbers)


@torch.no_grad()
def mask_(model: nn.Module, plan: PruningPlan, *, nearly: bool = False) -> None:
    """Sets the pruned channels of `plan` to zero in all tensors of `model`; no size changes.

    Args:
        model: the model before pruning.
        plan: the channels to zero.
        nearly: whether to multiply by 1e-12 instead of 0. Code that divides weights by their own
            standard deviation computes 0 / 0 for zeros, but finite numbers for nearly zero ones.

    Raises:
        ModelError: if a tensor of the plan is missing in the model or lacks an index of the plan.
    """
    _check_fits(model, plan.keep)
    # `weight_norm` computes g * v / |v|: a zeroed v would give 0 / 0, so only g is zeroed, which
    # zeroes the weight.
    directions = _directions(model)
    for name, axes in plan.keep.items():
        whole = get_tensor(model, name)
        for axis, kept in axes.items():
            if directions.get(name) == axis:
                continue
            pruned = torch.ones(whole.shape[axis], dtype=torch.bool)
            pruned[torch.tensor(kept)] = False
            index = pruned.nonzero().flatten().to(whole.device)
            if len(index) and int(index[-1]) - int(index[0]) == len(index) - 1 and not nearly:
                # Neighbours, as in every trial: much faster than by indices.
                whole.narrow(axis, int(index[0]), len(index)).zero_()
                continue
            # Integers, such as counters, have no value near 0 but 0.
            if nearly and whole.is_floating_point():
                whole.index_copy_(axis, index, whole.index_select(axis, index) * NEARLY_ZERO)
            else:
                whole.index_fill_(axis, index, 0)


def _directions(model: nn.Module) -> dict[str, int]:
    """Returns for each weight norm: name of its direction v -> axis along which g has lengths."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            norm: Any = module[0]
            if type(norm).__name__ == "_WeightNorm":
                found[f"{name}.original1"] = norm.dim
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):  # of the older torch.nn.utils.weight_norm
                prefix = f"{name}." if name else ""
                found[f"{prefix}{hook.name}_v"] = hook.dim
    return found


def _check_fits(model: nn.Module, keep: Mapping[str, Mapping[int, tuple[int, ...]]]) -> None:
    """Raises an error if a tensor of the plan is missing, or lacks an index of the plan."""
    for name, axes in keep.items():
        try:
            shape = get_tensor(model, name).shape
        except AttributeError:
            raise ModelError(
                f"the plan prunes '{name}', which this model lacks",
                place="plan",
                cure="use the plan's own model",
            ) from None
        for axis, kept in axes.items():
            fits = axis < len(shape) and kept and 0 <= min(kept) <= max(kept) < shape[axis]
            if not fits:
                raise ModelError(
                    f"the plan does not fit '{name}' of shape {tuple(shape)}",
                    place="plan",
                    cure="use the plan's own model",
                )


def _shrink(old: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    """Returns `old` with only the given indices of each axis; a parameter stays a parameter."""
    new = old.detach()
    scattered = {}
    for axis, kept in axes.items():
        # Neighbours are a view, as in every trial, which prunes the first channels of a group.
        if kept == tuple(range(kept[0], kept[0] + len(kept))):
            new = new.narrow(axis, kept[0], len(kept))
        else:
            scattered[axis] = kept
    for axis, kept in scattered.items():
        new = new.index_select(axis, torch.tensor(kept, device=old.device))
    if not scattered:
        new = new.clone(memory_format=torch.contiguous_format)
    # `index_select` gives the usual layout; a model in channels_last must stay in it to stay fast.
    is_channels_last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, old.requires_grad)
    return new
