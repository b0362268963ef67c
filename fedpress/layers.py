"""Smaller tensors in the place of a layer's own, and size attributes that say what its tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def tensor(model: nn.Module, name: str) -> Tensor:
    """Returns the parameter or buffer of this dotted name.

    Raises:
        AttributeError: if `model` has none.
    """
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    value: Tensor | None = {**module._buffers, **module._parameters}.get(key)
    if value is None:
        raise AttributeError(name)
    return value


def replace_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` in the place of the parameters and buffers of these names, and mends the sizes of their layers.

    A tensor that several modules share stays shared: naming it once is enough. Make the optimizer afterwards.

    Raises:
        AttributeError: if `model` lacks one of the names.
    """
    swaps: dict[int, tuple[Tensor, Tensor]] = {}
    for name, new in tensors.items():
        old = tensor(model, name)
        swaps[id(old)] = (old, new)  # holding the old one keeps its id unique
    for module in model.modules():
        before = _shape(module)
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for key, value in table.items():
                if id(value) in swaps:
                    table[key] = swaps[id(value)][1]
        if _shape(module) != before:
            _mend_(module, before or ())


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight, or of the running mean where a norm has no weight."""
    own = (module._parameters.get("weight"), module._buffers.get("running_mean"))
    return next((tuple(t.shape) for t in own if t is not None), None)


def _mend_(module: nn.Module, before: tuple[int, ...]) -> None:
    """Sets the sizes that a module remembers from the shape that its weight has now; it was `before`."""
    now = _shape(module)
    assert now is not None, "only a module whose weight changed is mended"
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = now
    elif isinstance(module, nn.PReLU):
        module.num_parameters = now[0]
    elif isinstance(module, nn.modules.conv._ConvNd):
        if before[1] == 1 and module.groups > 1:  # depthwise: one group per input channel
            module.groups = now[0] * module.groups // before[0]
        sizes = now[0], now[1] * module.groups
        module.out_channels, module.in_channels = reversed(sizes) if module.transposed else sizes
    elif isinstance(module, nn.GroupNorm):  # the channels of a group stay together
        module.num_groups = module.num_groups * now[0] // before[0]
        module.num_channels = now[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = now[0]
