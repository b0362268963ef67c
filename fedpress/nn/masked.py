"""Models that come with masks on their weights, from `torch.nn.utils.prune` or a parametrization, become plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fedpress.errors import ModelError


@dataclass(frozen=True, eq=False)
class _Site:
    """A weight that is computed as original * mask whenever its module runs."""

    path: str
    module: nn.Module
    key: str
    original: nn.Parameter
    mask: Tensor
    hooked: bool

    @property
    def name(self) -> str:
        return f"{self.path}.{self.key}" if self.path else self.key

    def materialize_(self) -> None:
        if self.hooked:
            prune.remove(self.module, self.key)
        else:
            parametrize.remove_parametrizations(self.module, self.key, leave_parametrized=True)


def absorb_masks_(model: nn.Module) -> tuple[str, ...]:
    """Makes every masked weight of `model` a plain parameter, original * mask, without hooks or parametrizations.

    Known are the hooks of `torch.nn.utils.prune`, under whatever parameter name, and parametrizations whose steps all
    have a tensor `mask`. Others, such as weight norm, stay. A weight that several modules share stays shared.

    Returns:
        The names of the parameters with masks: what `ModelSpec.sparse` notes.

    Raises:
        ModelError: if modules that share a weight do not share its mask, or a mask is mixed with another computation.
    """
    sites = [*_hooked(model), *_parametrized(model)]
    _check_shared(model, sites)
    for site in sites:
        site.materialize_()
    masked = {id(getattr(site.module, site.key)) for site in sites}
    return tuple(name for name, p in model.named_parameters() if id(p) in masked)


def _hooked(model: nn.Module) -> Iterator[_Site]:
    for path, module in model.named_modules():
        for hook in [*module._forward_pre_hooks.values()]:
            if isinstance(hook, prune.BasePruningMethod):
                key = str(hook._tensor_name)
                original, mask = module._parameters[f"{key}_orig"], module._buffers[f"{key}_mask"]
                assert original is not None
                assert mask is not None
                yield _Site(path, module, key, original, mask, hooked=True)


def _parametrized(model: nn.Module) -> Iterator[_Site]:
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for key, steps in module.parametrizations.items():
            assert isinstance(steps, parametrize.ParametrizationList)
            masks = [m for step in steps if isinstance(m := getattr(step, "mask", None), Tensor)]
            if not masks:
                continue
            if len(masks) < len(steps):
                raise ModelError(
                    f"'{path}.{key}' is masked and computed otherwise besides",
                    place="model",
                    cure=(
                        "call torch.nn.utils.parametrize.remove_parametrizations on it, or leave the "
                        "mask out"
                    ),
                )
            mask = torch.stack([m.to(torch.float32).expand_as(steps.original) for m in masks]).prod(
                0
            )
            assert isinstance(steps.original, nn.Parameter)
            yield _Site(path, module, key, steps.original, mask, hooked=False)


def _check_shared(model: nn.Module, sites: list[_Site]) -> None:
    for site in sites:
        twins = [other for other in sites if other.original is site.original]
        uses = sum(p is site.original for m in model.modules() for p in m.parameters(recurse=False))
        if uses != len(twins) or any(not torch.equal(other.mask, site.mask) for other in twins):
            raise ModelError(
                (
                    f"'{site.name}' is masked, but a module that shares this weight has not the "
                    "same mask"
                ),
                place="model",
                cure="prune all of them by one mask (torch.nn.utils.prune.custom_from_mask)",
            )
