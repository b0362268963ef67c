"""Chooses a density for each weight, so that the pruning of each weight adds the same loss.

The density is the share of entries that are kept. The losses come from a sensitivity analysis: they
were measured with one weight at a time pruned to several densities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedpress.compress.prune.sensitivity import SensitivityPoint, extended_to_zero, loss_curves
from fedpress.compress.sparse.masks import divide_budget
from fedpress.compress.sparse.weights import Weight
from fedpress.errors import RecipeError

BISECTIONS = 60
"""Bisection steps in the search for the common loss increase; a float64 has 53 binary digits."""
FLOOR = 0.5
"""Minimum density of a weight, as a share of the density that the Erdos-Renyi kernel gives it."""


def lowest_densities(weights: Sequence[Weight], density: float) -> dict[str, float]:
    """Returns a lower bound on the density of each weight, if `density` of all entries are kept.

    The bound is half the density that the Erdos-Renyi kernel gives the weight (a rule that keeps a
    larger share of small weights), and at least one entry.
    """
    everything = {w.name: torch.ones(w.value.shape, dtype=torch.bool) for w in weights}
    wanted = max(len(weights), round(density * sum(w.size for w in weights)))
    counts = divide_budget(weights, everything, wanted, "erk")
    lowest = {}
    for w, count in zip(weights, counts, strict=True):
        lowest[w.name] = max(FLOOR * count, 1) / w.size
    return lowest


def level_densities(
    weights: Sequence[Weight], points: Sequence[SensitivityPoint], density: float
) -> dict[str, float]:
    """Returns densities by weight name, chosen so that every weight increases the loss equally.

    Each weight has a curve: the loss as a function of its density. Curves are linear between
    measured densities; below the lowest one they continue as `extended_to_zero` says. A curve is
    measured with a single weight pruned, so it underestimates the loss if all weights are pruned
    to low densities. Therefore every weight keeps a minimum density (`lowest_densities`).

    Args:
        weights: the weights to choose densities for.
        points: results of `sensitivity` for these weights.
        density: share of all entries to keep.

    Raises:
        RecipeError: if a weight was not measured at density 1 and at another density.
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
        found = []
        for density, height in lines:
            # A small slope makes flat parts of a curve invertible; there the lowest density is
            # chosen.
            rising = height + 1e-9 * (1 + top) * (1 - density)
            # Negated, because `np.interp` needs rising values, and the loss falls with density.
            found.append(np.interp(-level, -rising, density))
        densities: np.ndarray = np.maximum(found, floors)
        return densities

    low = -1e-6 * (1 + top)
    high = top * (1 + 1e-6) + 1e-6
    # The number of kept entries falls as the level rises, so bisection finds the level.
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float(at_level(middle) @ sizes) > density * sizes.sum():
            low = middle
        else:
            high = middle
    found = {}
    for w, chosen in zip(weights, at_level(high), strict=True):
        found[w.name] = float(chosen)
    return found
