"""Carrying out a plan: channels are physically removed, or zeroed, and the two networks must agree."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.compress.graph import Example, inputs
from fedpress.compress.planning import PruningPlan
from fedpress.errors import ModelError


@torch.no_grad()
def remove_(model: nn.Module, plan: PruningPlan) -> None:
    """Removes the channels of `plan` from `model`: smaller parameters and buffers, and module sizes to match.

    A tensor that several modules share stays shared. Gradients are dropped; make the optimizer afterwards.

    Raises:
        ModelError: if the model does not have the tensors of the plan, with room for its indices.
    """
    _check(model, plan.keep)
    small: dict[int, Tensor] = {}  # one new tensor for each old one, however many names it has
    old: list[Tensor] = []  # keeps the old ones alive, so that their ids stay unique
    for name, axes in plan.keep.items():
        tensor = _get(model, name)
        old.append(tensor)
        small[id(tensor)] = _shrink(tensor, axes)
    for module in model.modules():
        sizes = _sizes(module)
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for key, value in table.items():
                if value is not None and id(value) in small:
                    table[key] = small[id(value)]
        _resize_(module, sizes)


@torch.no_grad()
def mask_(model: nn.Module, plan: PruningPlan) -> None:
    """Zeroes the channels of `plan` in all tensors of `model`, which keeps its size.

    Raises:
        ModelError: if the model does not have the tensors of the plan, with room for its indices.
    """
    _check(model, plan.keep)
    for name, axes in plan.keep.items():
        tensor = _get(model, name)
        for axis, kept in axes.items():
            gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
            gone[list(kept)] = False
            tensor.index_fill_(axis, gone.nonzero().flatten().to(tensor.device), 0)


@torch.no_grad()
def check_parity(
    dense: nn.Module, pruned: nn.Module, plan: PruningPlan, example: Example, *, tolerance: float = 1e-5
) -> float:
    """Checks that the pruned network computes what the dense one does with the same channels zeroed.

    Both run in evaluation mode on a random batch shaped like `example` (floats are drawn, integers taken as given).

    Returns:
        The largest difference of an output, relative to the largest output or to 1.

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
        worst = max(((a - b).abs().max() / a.abs().max().clamp_min(1)).item() for a, b in pairs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(f"the pruned network does not run ({str(error).splitlines()[0]}); {cure}") from error
    if not worst <= tolerance:
        raise ModelError(
            f"the pruned network differs from the masked one by {worst:.2g}, more than {tolerance:g}; {cure}"
        )
    return worst


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    value: Tensor | None = {**module._buffers, **module._parameters}.get(key)
    if value is None:
        raise AttributeError(name)
    return value


def _check(model: nn.Module, keep: Mapping[str, Mapping[int, tuple[int, ...]]]) -> None:
    for name, axes in keep.items():
        try:
            shape = _get(model, name).shape
        except AttributeError:
            raise ModelError(f"the plan prunes '{name}', which this model lacks; use the plan's own model") from None
        for axis, kept in axes.items():
            if axis >= len(shape) or not kept or not 0 <= min(kept) <= max(kept) < shape[axis]:
                raise ModelError(f"the plan does not fit '{name}' of shape {tuple(shape)}; use the plan's own model")


def _shrink(tensor: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    new = tensor.detach()
    for axis, kept in axes.items():
        new = new.index_select(axis, torch.tensor(kept, device=tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _sizes(module: nn.Module) -> tuple[int, ...] | None:
    weight = module._parameters.get("weight")
    return None if weight is None else tuple(weight.shape)


def _resize_(module: nn.Module, before: tuple[int, ...] | None) -> None:
    """Sets the sizes that a module remembers from the shapes that its tensors have now."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.modules.conv._ConvNd) and before is not None:
        if before[1] == 1 and module.groups > 1:  # depthwise: one group per input channel
            module.groups = module.weight.shape[0] * module.groups // before[0]
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.GroupNorm) and before is not None:
        module.num_groups = module.num_groups * module.weight.shape[0] // before[0]
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensors = [t for t in (module.weight, module.running_mean) if t is not None]
        module.num_features = len(tensors[0]) if tensors else module.num_features


def _flat(output: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf.float() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
