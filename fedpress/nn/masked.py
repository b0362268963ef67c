"""Replaces masked weights by ordinary weights with zeros.

A masked weight is computed as original * mask, by `torch.nn.utils.prune` or a parametrization.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fedpress.errors import ModelError


@dataclass(frozen=True, eq=False)
class _MaskedWeight:
    """A weight that its module computes as original * mask.

    Attributes:
        path: name of the module.
        module: the module that has the weight.
        key: name of the weight in the module.
        original: the parameter that is masked.
        mask: the mask, in the shape of `original`.
        hooked: True if a hook of `torch.nn.utils.prune` computes the weight; False if a
            parametrization does.
    """

    path: str
    module: nn.Module
    key: str
    original: nn.Parameter
    mask: Tensor
    hooked: bool

    @property
    def name(self) -> str:
        """Dotted name of the weight in the model, such as "block.0.weight"."""
        return f"{self.path}.{self.key}" if self.path else self.key

    def materialize_(self) -> None:
        """Replaces the computed weight by a parameter with the values original * mask."""
        if self.hooked:
            prune.remove(self.module, self.key)
        else:
            parametrize.remove_parametrizations(self.module, self.key, leave_parametrized=True)


def absorb_masks_(model: nn.Module) -> tuple[str, ...]:
    """Replaces every masked weight of `model` by a parameter with the values original * mask.

    Masks are found in hooks of `torch.nn.utils.prune`, and in parametrizations whose steps all have
    a tensor attribute `mask`. Other parametrizations, such as weight norm, are not changed. A
    weight that several modules share stays shared.

    Returns:
        The names of the parameters that had masks, for `ModelSpec.sparse`.

    Raises:
        ModelError: if modules that share a weight do not all have the same mask, or a weight has a
            mask and another parametrization.
    """
    weights = [*_hooked(model), *_parametrized(model)]
    # Checked before anything is changed, so that a refused model stays unchanged.
    _check_shared(model, weights)
    for weight in weights:
        weight.materialize_()
    masked = {id(getattr(weight.module, weight.key)) for weight in weights}
    return tuple(name for name, p in model.named_parameters() if id(p) in masked)


def _hooked(model: nn.Module) -> Iterator[_MaskedWeight]:
    """Yields the weights that hooks of `torch.nn.utils.prune` mask."""
    for path, module in model.named_modules():
        # A copy of the list, because hooks are removed while it is read.
        for hook in [*module._forward_pre_hooks.values()]:
            if isinstance(hook, prune.BasePruningMethod):
                key = str(hook._tensor_name)
                original = module._parameters[f"{key}_orig"]
                mask = module._buffers[f"{key}_mask"]
                assert original is not None
                assert mask is not None
                yield _MaskedWeight(path, module, key, original, mask, hooked=True)


def _parametrized(model: nn.Module) -> Iterator[_MaskedWeight]:
    """Yields the weights that parametrizations mask."""
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for key, steps in module.parametrizations.items():
            assert isinstance(steps, parametrize.ParametrizationList)
            masks = []
            for step in steps:
                mask = getattr(step, "mask", None)
                if isinstance(mask, Tensor):
                    masks.append(mask.to(torch.float32))
            if not masks:
                continue
            # Another step, such as weight norm, may turn zeros into other values.
            if len(masks) < len(steps):
                raise ModelError(
                    f"'{path}.{key}' is masked and has another parametrization too",
                    place="model",
                    cure=(
                        "call torch.nn.utils.parametrize.remove_parametrizations on it, or leave "
                        "the mask out"
                    ),
                )

            original = steps.original
            assert isinstance(original, nn.Parameter)
            # Several masks are multiplied, and each may have a shape that broadcasts.
            expanded = [mask.expand_as(original) for mask in masks]
            product = torch.stack(expanded).prod(0)
            yield _MaskedWeight(path, module, key, original, product, hooked=False)


def _check_shared(model: nn.Module, weights: list[_MaskedWeight]) -> None:
    """Raises an error for a shared weight that does not have the same mask in all its modules."""
    # With different masks, the shared parameter could have only one of the results.
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module.parameters(recurse=False))
    for weight in weights:
        same = []
        for other in weights:
            if other.original is weight.original:
                same.append(other)
        is_masked_everywhere = uses[id(weight.original)] == len(same)
        if not is_masked_everywhere or any(not torch.equal(o.mask, weight.mask) for o in same):
            raise ModelError(
                (
                    f"'{weight.name}' is masked, but a module that shares this weight does not "
                    "have the same mask"
                ),
                place="model",
                cure="prune all of them by one mask (torch.nn.utils.prune.custom_from_mask)",
            )
