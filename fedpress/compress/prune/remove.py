"""Carrying out a plan: channels are physically removed, or zeroed."""

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
from fedpress.nn.resize import replace_, tensor

NEARLY = 1e-12  # its square, in a variance, is still a number of float32


@torch.no_grad()
def remove_(model: nn.Module, plan: PruningPlan) -> None:
    """Removes the channels of `plan` from `model`: smaller parameters and buffers, and module sizes to match.

    A tensor that several modules share stays shared. Gradients are dropped; make the optimizer afterwards.

    Raises:
        ModelError: if the model does not have the tensors of the plan, with room for its indices.
    """
    _check_fits(model, plan.keep)
    keep_indices_(model, plan.keep, plan.numbers)


@torch.no_grad()
def keep_indices_(
    model: nn.Module, keep: Mapping[str, Mapping[int, tuple[int, ...]]], numbers: Numbers
) -> None:
    """Keeps these indices of these tensors, and lets the forward code of modules pass these numbers."""
    replace_(model, {name: _shrink(tensor(model, name), axes) for name, axes in keep.items()})
    set_numbers_(model, numbers)


@torch.no_grad()
def mask_(model: nn.Module, plan: PruningPlan, *, nearly: bool = False) -> None:
    """Zeroes the channels of `plan` in all tensors of `model`, which keeps its size.

    Args:
        model: the model before the cut.
        plan: what is cut.
        nearly: leaves 1e-12 of the values. Code that divides weights by their own spread makes 0 / 0 of zeros; of
            these it makes ordinary numbers, which are as good as zero to those that read them.

    Raises:
        ModelError: if the model does not have the tensors of the plan, with room for its indices.
    """
    _check_fits(model, plan.keep)
    directions = _directions(model)
    for name, axes in plan.keep.items():
        whole = tensor(model, name)
        for axis, kept in axes.items():
            if directions.get(name) == axis:
                continue
            pruned = torch.ones(whole.shape[axis], dtype=torch.bool)
            pruned[list(kept)] = False
            index = pruned.nonzero().flatten().to(whole.device)
            if nearly and whole.is_floating_point():
                whole.index_copy_(axis, index, whole.index_select(axis, index) * NEARLY)
            else:
                whole.index_fill_(axis, index, 0)


def _directions(model: nn.Module) -> dict[str, int]:
    """Returns the directions of normed weights and the axis of their lengths, which are zeroed: 0 / 0 is no number."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            norm: Any = module[0]
            if type(norm).__name__ == "_WeightNorm":
                found[f"{name}.original1"] = norm.dim
        for hook in module._forward_pre_hooks.values():
            if isinstance(
                hook, WeightNorm
            ):  # of torch.nn.utils.weight_norm, which keeps it as `weight_v`
                found[f"{name}.{hook.name}_v" if name else f"{hook.name}_v"] = hook.dim
    return found


def _check_fits(model: nn.Module, keep: Mapping[str, Mapping[int, tuple[int, ...]]]) -> None:
    for name, axes in keep.items():
        try:
            shape = tensor(model, name).shape
        except AttributeError:
            raise ModelError(
                f"the plan prunes '{name}', which this model lacks",
                place="plan",
                cure="use the plan's own model",
            ) from None
        for axis, kept in axes.items():
            if axis >= len(shape) or not kept or not 0 <= min(kept) <= max(kept) < shape[axis]:
                raise ModelError(
                    f"the plan does not fit '{name}' of shape {tuple(shape)}",
                    place="plan",
                    cure="use the plan's own model",
                )


def _shrink(old: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    new = old.detach()
    for axis, kept in axes.items():
        new = new.index_select(axis, torch.tensor(kept, device=old.device))
    if (
        old.dim() == 4
        and old.is_contiguous(memory_format=torch.channels_last)
        and not old.is_contiguous()
    ):
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
