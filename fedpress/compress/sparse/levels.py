"""Densities from a sensitivity analysis: every weight goes as far as the same growth of the loss allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedpress.compress.prune.sensitivity import Point, extended_to_zero, loss_curves
from fedpress.compress.sparse.masks import share_out
from fedpress.compress.sparse.weights import Weight
from fedpress.errors import RecipeError

HALVINGS = 60
FLOOR = 0.5  # of the density of an Erdos-Renyi kernel


def lowest_densities(weights: Sequence[Weight], density: float) -> dict[str, float]:
    """Returns the least density of each weight, by name, when `density` of all entries stay."""
    whole = {w.name: torch.ones(w.value.shape, dtype=torch.bool) for w in weights}
    wanted = max(len(weights), round(density * sum(w.size for w in weights)))
    even = share_out(weights, whole, wanted, "erk")
    return {w.name: max(FLOOR * count, 1) / w.size for w, count in zip(weights, even, strict=True)}


def level_densities(
    weights: Sequence[Weight], points: Sequence[Point], density: float
) -> dict[str, float]:
    """Returns the density of each weight, by name, so that `density` of all entries stay at one level of the loss.

    The growth of the loss between measured densities is taken as straight; below them see
    `extended_to_zero`. Curves are of one layer cut alone, and where all are cut far they say too
    little: every weight keeps at least half of what an Erdos-Renyi kernel would give it
        (`lowest_densities`).

    Args:
        weights: that share the budget.
        points: what `sensitivity` gave for the weights, by name.
        density: share of all entries.

    Raises:
        RecipeError: if a weight has not been measured.
    """
    known = loss_curves(points)
    most = max((heights[0] for _, heights in known.values()), default=0.0)
    floors = np.array([*lowest_densities(weights, density).values()])
    lines = []
    for w in weights:
        if w.name not in known or len(known[w.name][0]) < 2:
            raise RecipeError(
                f"the sensitivity of '{w.name}' was not measured",
                place="points",
                cure="give the points of all weights",
            )
        lines.append(extended_to_zero(known[w.name], most))
    top = max(float(height[0]) for _, height in lines)
    sizes = np.array([w.size for w in weights], dtype=np.float64)

    def at_level(level: float) -> np.ndarray:
        # where a curve is flat, the tie goes to the lower density, a little of it by its own share
        free = [np.interp(-level, -h - 1e-9 * (1 + top) * (1 - d), d) for d, h in lines]
        densities: np.ndarray = np.maximum(free, floors)
        return densities

    low, high = -1e-6 * (1 + top), top * (1 + 1e-6) + 1e-6
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if float(at_level(middle) @ sizes) > density * sizes.sum()
            else (low, middle)
        )
    return {w.name: float(d) for w, d in zip(weights, at_level(high), strict=True)}
