"""Carrying out a plan: channels are physically removed, or zeroed, and the two networks must agree."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fedpress.calls import Numbers, set_numbers_
from fedpress.compress.graph import Example, inputs
from fedpress.compress.planning import PruningPlan
from fedpress.errors import ModelError
from fedpress.layers import replace_, tensor


@torch.no_grad()
def remove_(model: nn.Module, plan: PruningPlan) -> None:
    """Removes the channels of `plan` from `model`: smaller parameters and buffers, and module sizes to match.

    A tensor that several modules share stays shared. Gradients are dropped; make the optimizer afterwards.

    Raises:
        ModelError: if the model does not have the tensors of the plan, with room for its indices.
    """
    _check(model, plan.keep)
    cut_(model, plan.keep, plan.numbers)


@torch.no_grad()
def cut_(model: nn.Module, keep: Mapping[str, Mapping[int, tuple[int, ...]]], numbers: Numbers) -> None:
    """Keeps these indices of these tensors, and lets the forward code of modules pass these numbers."""
    replace_(model, {name: _shrink(tensor(model, name), axes) for name, axes in keep.items()})
    set_numbers_(model, numbers)


@torch.no_grad()
def mask_(model: nn.Module, plan: PruningPlan) -> None:
    """Zeroes the channels of `plan` in all tensors of `model`, which keeps its size.

    Raises:
        ModelError: if the model does not have the tensors of the plan, with room for its indices.
    """
    _check(model, plan.keep)
    directions = _directions(model)
    for name, axes in plan.keep.items():
        whole = tensor(model, name)
        for axis, kept in axes.items():
            if directions.get(name) == axis:
                continue
            gone = torch.ones(whole.shape[axis], dtype=torch.bool)
            gone[list(kept)] = False
            whole.index_fill_(axis, gone.nonzero().flatten().to(whole.device), 0)


@torch.no_grad()
def check_parity(
    dense: nn.Module, pruned: nn.Module, plan: PruningPlan, example: Example, *, tolerance: float = 1e-5
) -> float:
    """Checks that the pruned network computes what the dense one does with the same channels zeroed.

    Both run in evaluation mode on a random batch shaped like `example` (floats are drawn, integers taken as given).

    Returns:
        The largest difference of an output, relative to the largest number in it, or to 1e-6.

    Raises:
        ModelError: if the pruned network does not run, or the difference is above `tolerance` or not a number.
    """
    masked, small = deepcopy(dense).eval(), deepcopy(pruned).eval()
    mask_(masked, plan)
    draw = torch.Generator().manual_seed(0)
    batch = [
        torch.randn(x.shape, generator=draw).to(x.device, x.dtype) if x.is_floating_point() else x
        for x in inputs(example)
    ]
    cure = "a size written into its forward may be at fault: name that module in `whole`, or prune another way"
    try:
        pairs = list(zip(_flat(masked(*batch)), _flat(small(*batch)), strict=True))
        # Of tensors, since the largest of Python's numbers is not always NaN where one of them is.
        worst = (
            torch.stack([((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).double() for a, b in pairs]).max().item()
        )
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(f"the pruned network does not run ({str(error).splitlines()[0]}); {cure}") from error
    if not worst <= tolerance:
        raise ModelError(
            f"the pruned network differs from the masked one by {worst:.2g}, more than {tolerance:g}; {cure}"
        )
    return worst


def _directions(model: nn.Module) -> dict[str, int]:
    """Returns the directions of normed weights and the axis of their lengths, which are zeroed: 0 / 0 is no number."""
    norms: list[tuple[str, Any]] = [(n, m[0]) for n, m in model.named_modules() if isinstance(m, ParametrizationList)]
    return {f"{name}.original1": norm.dim for name, norm in norms if type(norm).__name__ == "_WeightNorm"}


def _check(model: nn.Module, keep: Mapping[str, Mapping[int, tuple[int, ...]]]) -> None:
    for name, axes in keep.items():
        try:
            shape = tensor(model, name).shape
        except AttributeError:
            raise ModelError(f"the plan prunes '{name}', which this model lacks; use the plan's own model") from None
        for axis, kept in axes.items():
            if axis >= len(shape) or not kept or not 0 <= min(kept) <= max(kept) < shape[axis]:
                raise ModelError(f"the plan does not fit '{name}' of shape {tuple(shape)}; use the plan's own model")


def _shrink(old: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    new = old.detach()
    for axis, kept in axes.items():
        new = new.index_select(axis, torch.tensor(kept, device=old.device))
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _flat(output: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf.float() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
