"""Weight sharing: the few values that stand best for all weights of a layer, by k-means in one dimension."""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = 1024


def shared_values(weight: Tensor, count: int) -> Tensor:
    """Returns `count` ascending float32 values, 0 among them, of least squared distance to the weights.

    In one dimension k-means has an exact solution by dynamic programming (Wang & Song 2011, Ckmeans.1d.dp): it is found
    for up to 1024 distinct values. More are first gathered into 1024 means of equally many weights, and Lloyd's steps
    on all weights follow. 0 stays a value of its own, so that pruned weights stay pruned (Han et al. 2016,
    arXiv:1510.00149, section 3). Fewer distinct values than `count` are repeated.

    Raises:
        ValueError: if a weight is not finite, or `count` is below 1.

    >>> shared_values(torch.tensor([-1.0, -1.0, 0.0, 2.0, 2.2]), 3)
    tensor([-1.0000,  0.0000,  2.1000])
    """
    flat = weight.detach().double().cpu().reshape(-1).sort().values
    if count < 1 or not bool(flat.isfinite().all()):
        raise ValueError(
            f"cannot share {count} values among weights that must be finite; check the weights"
        )
    points, mass = torch.unique(flat, return_counts=True)
    few = len(points) <= POINTS
    if not few:
        parts = flat.tensor_split(POINTS)
        points, mass = torch.stack([p.mean() for p in parts]), torch.tensor([len(p) for p in parts])
    values = _best(points, mass.double(), count)
    if not few:
        values = _lloyd(flat, values)
    values = torch.cat([values, values[-1:].expand(count - len(values))])
    return values.float()


def _best(points: Tensor, mass: Tensor, count: int) -> Tensor:
    """The exact optimum for `points` of `mass`, ascending, at most `count` values with 0 among them."""
    n = len(points)
    zero = points.new_zeros(1)
    m0, m1, m2 = (torch.cat([zero, (mass * points**k).cumsum(0)]) for k in range(3))
    weight, first, second = (
        m[None, :] - m[:, None] for m in (m0, m1, m2)
    )  # [i, j]: of points i..j-1
    spread = (second - first.square() / weight.clamp_min(1e-300)).clamp_min(0)
    valid = weight >= 0
    spread, around_zero = (
        spread.where(valid & (weight > 0), torch.inf),
        second.where(valid, torch.inf),
    )
    cost_plain = torch.full((n + 1,), torch.inf, dtype=torch.float64)
    cost_plain[0] = 0.0
    cost_zero, cuts = torch.full_like(cost_plain, torch.inf), []
    # plain: no cell stands for 0 yet; zero: one does. The cell of 0 may be empty.
    for _ in range(count):
        plain, from_plain = (cost_plain[:, None] + spread).min(0)
        keep, from_keep = (cost_zero[:, None] + spread).min(0)
        take, from_take = (cost_plain[:, None] + around_zero).min(0)
        took = take <= keep
        cuts.append((from_plain, torch.where(took, from_take, from_keep), took))
        cost_plain, cost_zero = plain, torch.where(took, take, keep)
        if float(cost_zero[n]) == 0.0:
            break
    values, j, with_zero = [], n, True
    for from_plain, from_zero, took in reversed(cuts):
        i = int((from_zero if with_zero else from_plain)[j])
        if with_zero and bool(took[j]):
            values.append(0.0)
            with_zero = False
        else:
            values.append(float(first[i, j] / weight[i, j]))
        j = i
    return torch.tensor(sorted(values), dtype=torch.float64)


def _lloyd(flat: Tensor, values: Tensor, *, steps: int = 50) -> Tensor:
    """Moves each value to the mean of its weights until nothing moves; 0 stays. `flat` is sorted."""
    sums = torch.cat([flat.new_zeros(1), flat.cumsum(0)])
    for _ in range(steps):
        ends = torch.searchsorted(flat, (values[1:] + values[:-1]) / 2)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(flat))])
        size = edges.diff()
        moved = torch.where(size > 0, sums[edges].diff() / size.clamp_min(1), values)
        moved = torch.where(values == 0, 0.0, moved)
        if torch.equal(moved, values):
            break
        values = moved
    return values
