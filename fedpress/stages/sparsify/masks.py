"""Chooses what a sparsify stage prunes: the weights, and in each weight the entries to keep."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedpress.compress.prune.sensitivity import SensitivityPoint
from fedpress.compress.sparse import (
    Masks,
    Pattern,
    Weight,
    Weights,
    find_weights,
    masks_from_scores,
)
from fedpress.compress.sparse.levels import level_densities
from fedpress.compress.sparse.masks import Scope
from fedpress.errors import RecipeError, renaming, suggestion
from fedpress.stages.sparsify.settings import SparsifySettings
from fedpress.workspace.state import State


def weights_to_prune(settings: SparsifySettings, model: nn.Module, state: State) -> Weights:
    """Returns the weights to prune; weights that do not fit the pattern stay dense.

    Example: with the pattern "2:4" a weight [10, 3] stays dense, because 3 is no multiple of 4.

    Raises:
        RecipeError: if no weight fits, or the model is quantized.
    """
    if state.spec.quantized:
        raise RecipeError(
            "the model is quantized already",
            place="sparsify",
            cure="put this stage before the quantization",
        )
    weights = find_weights(
        model,
        keep_first=settings.keep_first,
        keep_last=settings.keep_last,
        keep=settings.keep,
        ignore=settings.ignore,
    )
    _check_names(settings, weights)
    pattern = Pattern.parse(settings.pattern)
    misfits: dict[str, str] = {}
    for weight in weights.chosen:
        why = pattern.why_not_applicable(weight)
        if why is not None:
            misfits[weight.name] = why
    chosen = tuple(w for w in weights.chosen if w.name not in misfits)
    # Without this error, a stage that prunes nothing would end without a word.
    if not chosen:
        name, why = next(iter(misfits.items()))
        raise RecipeError(
            f"no weight can be '{settings.pattern}' ('{name}': {why})",
            place="pattern",
            cure="use another pattern",
        )
    return Weights(chosen, {**weights.dense, **misfits})


def _check_names(settings: SparsifySettings, weights: Weights) -> None:
    """Refuses `densities` with the name of a weight that is not pruned or does not exist."""
    known = [w.name for w in weights.chosen]
    for name in settings.densities:
        if name in known:
            continue
        # A misspelt name must not silently leave its weight dense.
        why = weights.dense.get(name)
        hint = f" ({why})" if why else ""
        some = f"use names such as {', '.join(known[:3])}"
        raise RecipeError(
            f"no weight '{name}' is pruned here{hint}",
            place="densities",
            cure=some if why else suggestion(name, known, some),
        )


def choose_masks(
    settings: SparsifySettings,
    weights: tuple[Weight, ...],
    scores: dict[str, Tensor],
    density: float,
    within: Masks,
    points: Sequence[SensitivityPoint] = (),
) -> Masks:
    """Returns a mask for each weight: True for entries to keep, False for entries to set to 0.

    Args:
        settings: settings of the stage.
        weights: the weights to prune.
        scores: name of a weight -> scores of its entries; the lowest are pruned.
        density: share of all entries to keep.
        within: masks of earlier stages; only entries that they keep can be kept.
        points: measured sensitivities, for the scope "sensitivity". If there are none, that scope
            ranks all layers together.
    """
    if settings.densities:
        scope: Scope | dict[str, float] = settings.densities
    elif settings.scope == "sensitivity":
        # `check` measures nothing; one ranking of all layers gives the same number of zeros.
        scope = level_densities(weights, points, density) if points else "global"
    else:
        scope = settings.scope
    pattern = Pattern.parse(settings.pattern)
    # The settings `scope` and `densities` are the same argument `scope` of `masks_from_scores`. An
    # error must name the key that the user gave.
    with renaming({"scope": "densities"} if settings.densities else {}):
        return masks_from_scores(
            weights, scores, pattern, density=density, scope=scope, within=within
        )
