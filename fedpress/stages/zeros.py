"""Masks of weights: which entries earlier stages have set to zero. These must stay zero."""

from __future__ import annotations

import torch
from torch import nn

from fedpress.compress.sparse import Masks, Weights, masks_of
from fedpress.models import ModelSpec
from fedpress.workspace.state import State


def allowed_masks(model: nn.Module, state: State, weights: Weights) -> Masks:
    """Returns a mask for each weight of `weights.chosen`, the weights that a stage makes sparse.

    A mask is False where an earlier stage has pruned the entry, else True.
    """
    old = masks_of(model, state.spec.sparse)
    full = {w.name: torch.ones_like(w.value, dtype=torch.bool) for w in weights.chosen}
    return {name: old.get(name, mask) for name, mask in full.items()}


def with_sparse_weights(spec: ModelSpec, masks: Masks) -> ModelSpec:
    """Returns the spec with the pruned weights added to its list `sparse`.

    Args:
        spec: the spec of the model. `sparse` has the names of all weights with pruned entries.
        masks: name of a weight -> mask of its kept entries.
    """
    # A mask that is True everywhere prunes nothing, so its weight is not added.
    new = [name for name, mask in masks.items() if not mask.all() and name not in spec.sparse]
    return spec.model_copy(update={"sparse": (*spec.sparse, *new)})
