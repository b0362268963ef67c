"""Chooses the few values that a layer's weights may have (a codebook), by k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpress.errors import ModelError, RecipeError

MOST_EXACT_VALUES = 1024
"""The exact solution is used up to this many distinct weights; its cost grows quadratically."""


def shared_values(weight: Tensor, count: int) -> Tensor:
    """Returns the k-means centroids of a weight's entries: `count` ascending float32 values.

    In one dimension dynamic programming solves k-means exactly (Wang & Song 2011, Ckmeans.1d.dp).
    It is used for up to 1024 distinct entries. If there are more, the sorted entries are first
    averaged in 1024 parts of equal size. Then the exact solution for these averages is improved by
    Lloyd's iterations on all entries. One of the values is always 0, so that pruned weights stay
    pruned (Han et al. 2016, arXiv:1510.00149, section 3). If fewer than `count` values are needed,
    the largest value is repeated.

    Args:
        weight: a tensor of any shape.
        count: number of values, for instance 16 for codes of 4 bits.

    Raises:
        ModelError: if a weight is not finite.
        RecipeError: if `count` is below 1.

    >>> shared_values(torch.tensor([-1.0, -1.0, 0.0, 2.0, 2.2]), 3)
    tensor([-1.0000,  0.0000,  2.1000])
    """
    flat = weight.detach().double().cpu().reshape(-1).sort().values
    if count < 1:
        raise RecipeError(f"got {count}", place="count", cure="give a whole number of 1 or more")
    if not bool(flat.isfinite().all()):
        raise ModelError(
            "it holds a value that is not finite",
            place="weight",
            cure="train the model again with a lower learning rate",
        )
    points, mass = torch.unique(flat, return_counts=True)
    is_exact = len(points) <= MOST_EXACT_VALUES
    if not is_exact:
        parts = flat.tensor_split(MOST_EXACT_VALUES)
        points = torch.stack([part.mean() for part in parts])
        mass = torch.tensor([len(part) for part in parts])
    values = _optimal_values(points, mass.double(), count)
    if not is_exact:
        values = _lloyd(flat, values)
    values = torch.cat([values, values[-1:].expand(count - len(values))])
    return values.float()


def _optimal_values(points: Tensor, mass: Tensor, count: int) -> Tensor:
    """Returns the exact solution of k-means: at most `count` values, one of them 0.

    Dynamic programming divides the sorted points into consecutive cells. One cell has the value 0,
    the others the mean of their points.

    Args:
        points: [n], ascending.
        mass: [n], how often each point occurs.
        count: largest number of values.
    """
    n = len(points)
    means, cost_of_cell, cost_of_zero_cell = _cell_costs(points, mass)

    # Least cost of the first j points: cost_plain[j] if none of their cells has the value 0,
    # cost_zero[j] if one of their cells has the value 0.
    cost_plain = torch.full((n + 1,), torch.inf, dtype=torch.float64)
    cost_plain[0] = 0.0
    cost_zero = torch.full_like(cost_plain, torch.inf)
    steps = []
    for _ in range(count):
        plain, from_plain = (cost_plain[:, None] + cost_of_cell).min(0)
        earlier, from_earlier = (cost_zero[:, None] + cost_of_cell).min(0)
        now, from_now = (cost_plain[:, None] + cost_of_zero_cell).min(0)
        is_now = now <= earlier  # whether the cell of 0 is the last one
        steps.append((from_plain, torch.where(is_now, from_now, from_earlier), is_now))
        cost_plain = plain
        cost_zero = torch.where(is_now, now, earlier)
        # Already exact: more cells cannot lower the cost.
        if float(cost_zero[n]) == 0.0:
            break

    # The cells are read off backwards. Each holds the points i to j - 1.
    values = []
    j = n
    needs_zero = True
    for from_plain, from_zero, is_now in reversed(steps):
        i = int((from_zero if needs_zero else from_plain)[j])
        if needs_zero and bool(is_now[j]):
            values.append(0.0)
            needs_zero = False
        else:
            values.append(float(means[i, j]))
        j = i
    return torch.tensor(sorted(values), dtype=torch.float64)


def _cell_costs(points: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for each cell (the points i to j - 1) its mean and two costs, at [i, j].

    The first cost is the squared error if the cell's value is its mean, the second if it is 0.
    """
    zero = points.new_zeros(1)
    differences = []
    for power in range(3):
        # A sum over points i to j - 1 is a difference of two prefix sums.
        prefix = torch.cat([zero, (mass * points**power).cumsum(0)])
        differences.append(prefix[None, :] - prefix[:, None])
    weight, first, second = differences
    around_mean = (second - first.square() / weight.clamp_min(1e-300)).clamp_min(0)
    # A cell of points has a positive weight; only the cell of 0 may be empty.
    cost_of_cell = around_mean.where(weight > 0, torch.inf)
    cost_of_zero_cell = second.where(weight >= 0, torch.inf)
    return first / weight, cost_of_cell, cost_of_zero_cell


def _lloyd(flat: Tensor, values: Tensor, *, steps: int = 50) -> Tensor:
    """Improves centroids by Lloyd's iterations.

    In each iteration a centroid moves to the mean of the weights that are nearest to it.

    Args:
        flat: all weights, ascending.
        values: the centroids, ascending; the centroid 0 stays 0.
        steps: largest number of iterations.
    """
    sums = torch.cat([flat.new_zeros(1), flat.cumsum(0)])
    for _ in range(steps):
        # The nearest weights lie between the midpoints to the neighbouring centroids.
        ends = torch.searchsorted(flat, (values[1:] + values[:-1]) / 2)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(flat))])
        size = edges.diff()
        moved = torch.where(size > 0, sums[edges].diff() / size.clamp_min(1), values)
        moved = torch.where(values == 0, 0.0, moved)
        if torch.equal(moved, values):
            break
        values = moved
    return values
