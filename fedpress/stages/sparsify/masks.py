"""Which weights a sparsify stage gives zeros, and the masks that its settings make of their scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedpress.compress.prune.sensitivity import Point
from fedpress.compress.sparse import Masks, Pattern, Weight, Weights, choose, find_weights
from fedpress.compress.sparse.levels import level_densities
from fedpress.compress.sparse.masks import Scope
from fedpress.errors import RecipeError, renaming, suggestion
from fedpress.stages.sparsify.settings import SparsifySettings
from fedpress.workspace.state import State


def weights_to_prune(how: SparsifySettings, model: nn.Module, state: State) -> Weights:
    """Returns the weights that get zeros; those that the pattern does not fit are among the dense ones.

    Raises:
        RecipeError: if none fits.
    """
    if state.spec.quantized:
        raise RecipeError(
            "the model is quantized already",
            place="sparsify",
            cure="put this stage before the quantization",
        )
    weights = find_weights(
        model,
        keep_first=how.keep_first,
        keep_last=how.keep_last,
        keep=how.keep,
        ignore=how.ignore,
    )
    _check_names(how, weights)
    pattern = Pattern.parse(how.pattern)
    misfits = {w.name: why for w in weights.chosen if (why := pattern.misfit(w)) is not None}
    chosen = tuple(w for w in weights.chosen if w.name not in misfits)
    if not chosen:
        name, why = next(iter(misfits.items()))
        raise RecipeError(
            f"no weight can be '{how.pattern}' ('{name}': {why})",
            place="pattern",
            cure="use another pattern",
        )
    return Weights(chosen, {**weights.dense, **misfits})


def _check_names(how: SparsifySettings, weights: Weights) -> None:
    """Refuses a density for a weight that gets no zeros."""
    known = [w.name for w in weights.chosen]
    for name in how.densities:
        if name in known:
            continue
        why = weights.dense.get(name)
        hint = f" ({why})" if why else ""
        some = f"use such as {', '.join(known[:3])}"
        raise RecipeError(
            f"no weight '{name}' gets zeros here{hint}",
            place="densities",
            cure=some if why else suggestion(name, known, some),
        )


def choose_masks(
    how: SparsifySettings,
    weights: tuple[Weight, ...],
    scores: dict[str, Tensor],
    density: float,
    within: Masks,
    points: Sequence[Point] = (),
) -> Masks:
    """Returns the masks of `density` by these settings; `points` of the sensitivity, or one ranking without."""
    if how.densities:
        scope: Scope | dict[str, float] = how.densities
    elif how.scope == "sensitivity":
        scope = level_densities(weights, points, density) if points else "global"
    else:
        scope = how.scope
    pattern = Pattern.parse(how.pattern)
    with renaming({"scope": "densities"} if how.densities else {}):
        return choose(weights, scores, pattern, density=density, scope=scope, within=within)
