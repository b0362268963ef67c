"""Densities from a sensitivity analysis: every weight goes as far as the same growth of the loss allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpress.compress.sensitivity import Point, curves
from fedpress.compress.sparse.weights import Weight
from fedpress.errors import RecipeError

HALVINGS = 60


def level_densities(weights: Sequence[Weight], points: Sequence[Point], density: float) -> dict[str, float]:
    """Returns the density of each weight, by name, so that `density` of all entries stay at one level of the loss.

    The growth of the loss between measured densities is taken as straight; below the lowest it goes on as it ended.

    Args:
        weights: that share the budget.
        points: what `sensitivity` gave for the weights, by name.
        density: share of all entries.

    Raises:
        RecipeError: if a weight has not been measured.
    """
    known = curves(points)
    lines = []
    for w in weights:
        if w.name not in known or len(known[w.name][0]) < 2:
            raise RecipeError(f"the sensitivity of '{w.name}' was not measured; give the points of all weights")
        at, height = (np.array(line) for line in known[w.name])
        slope = (height[0] - height[1]) / (at[1] - at[0])
        lines.append((np.insert(at, 0, 0.0), np.insert(height, 0, height[0] + slope * at[0])))
    top = max(float(height[0]) for _, height in lines)
    sizes = np.array([w.size for w in weights], dtype=np.float64)

    def at_level(level: float) -> np.ndarray:
        # where a curve is flat, the tie goes to the lower density, a little of it by its own share
        return np.array([np.interp(-level, -h - 1e-9 * (1 + top) * (1 - d), d) for d, h in lines])

    low, high = -1e-6 * (1 + top), top * (1 + 1e-6) + 1e-6
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(at_level(middle) @ sizes) > density * sizes.sum() else (low, middle)
    return {w.name: max(float(d), 1 / w.size) for w, d in zip(weights, at_level(high), strict=True)}
