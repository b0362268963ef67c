"""The Gaussian mechanism in parts: sample independently, clip to the sensitivity, add noise, divide by a constant."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedpress.core.random_source import Source, chance_of
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.plan import PrivacyPlan

GRID_BITS = 30
"""Exact noise lies on a grid of 2^-30 to 2^-29 of its standard deviation."""


def poisson_batches(
    n: int, sampling_prob: float, steps: int, generator: Source
) -> Iterator[Tensor]:
    """Yields `steps` int64 index tensors [k]: each of `n` examples joins each batch by its own coin.

    The accountant's amplification holds for this sampler and not for shuffled batches (Chua et al. 2024, "How private
    are DP-SGD implementations?"). Batches vary in size; an empty batch is a step like any other.
    """
    chance = chance_of(generator)
    for _ in range(steps):
        yield (chance.uniform(n) < sampling_prob).nonzero().flatten()


def clip(update: Tensor, clip_norm: float) -> Tensor:
    """Scales `update` (any shape) down to L2 norm `clip_norm`; a shorter update is unchanged.

    The norm of the float32 result, rounding included, never exceeds `clip_norm`.

    Raises:
        PrivacyError: if a value is NaN or infinite; the caller drops the contribution and counts it.

    >>> clip(torch.tensor([3.0, 4.0]), 1.0)
    tensor([0.6000, 0.8000])
    """
    if not 0 < clip_norm < math.inf:
        raise RecipeError(f"got {clip_norm}, expected a finite number above 0", place="clip_norm")
    exact = update.detach().double()
    if not torch.isfinite(exact).all():
        raise PrivacyError(
            "holds NaN or infinite values, expected finite ones",
            place="update",
            cure="drop this contribution",
        )
    norm = float(torch.linalg.vector_norm(exact))
    if norm <= clip_norm:
        return update.detach().float()
    shrink = 1.0
    while True:
        clipped = (exact * (shrink * clip_norm / norm)).float()
        if float(torch.linalg.vector_norm(clipped.double())) <= clip_norm:
            return clipped
        shrink = max(
            0.0, 2 * shrink - 1 - 2.0**-24
        )  # float32 rounding went up: step down, twice as far each time


def noise_sum(total: Tensor, plan: PrivacyPlan, generator: Source) -> Tensor:
    """Returns `total` (any shape), a sum of clipped contributions, plus noise of `plan.noise_std` on each value.

    The result is float32. From an exact source (`RandomSource.exact`) it lies on a public grid, whatever `total` is:
    the bits of a plain floating-point sum would say which totals can have led to it (Mironov 2012; Jin et al. 2022,
    arXiv:2112.05307). With the grid g = 2^(floor(log2 noise_std) - 30), `total` is rounded to g and a Gaussian rounded
    to g is added, in whole numbers. To round the noise costs nothing, since it is the Gaussian mechanism, rounded
    afterwards. To round a total [d] moves two neighbours apart by at most g sqrt(d) more than `clip_norm`; the noise is
    larger by the factor 1 + g sqrt(d) / clip_norm, a few millionths, to make up for that.

    Raises:
        PrivacyError: if the source is exact and a value is not finite, or more than 2^32 times the noise.
    """
    if plan.noise_std == 0:
        return total
    chance = chance_of(generator)
    return add_noise(
        total, plan, chance.normal(total.numel()).view(total.shape), exact=chance.exact
    )


def add_noise(total: Tensor, plan: PrivacyPlan, normal: Tensor, *, exact: bool) -> Tensor:
    """Returns `total` plus `normal` (float64, of its shape, changed in place) times `plan.noise_std`, in float32.

    For `noise_sum`, and for noise that is correlated over rounds: there `normal` is a mixture of draws. If `exact`, the
    result is on the grid of `noise_sum`; the sum is rounded by itself and the noise by itself, so that all rounds
    together are a rounding of the mechanism without a grid.

    Raises:
        PrivacyError: if `exact` and a value is not finite, or more than 2^32 times the noise.
    """
    if not exact:
        return normal.mul_(plan.noise_std).to(total.device).add_(total).float()
    grid = noise_grid(plan)
    steps = total.detach().double().cpu().div(grid).round_()  # exact: the grid is a power of two
    if not bool((steps.abs() < 2.0**62).all()):
        raise PrivacyError(
            "a value is not finite or beyond 2^32 times the noise",
            place="sum",
            cure="clip every contribution first",
        )
    std = plan.noise_std * (1 + grid * math.sqrt(total.numel()) / plan.clip_norm) / grid
    noise = normal.mul_(std).round_()
    return (steps.long() + noise.long().cpu()).double().mul_(grid).float().to(total.device)


def noise_grid(plan: PrivacyPlan) -> float:
    """Returns the public grid of exact noise, a power of two."""
    return 2.0 ** (math.frexp(plan.noise_std)[1] - 1 - GRID_BITS)


def noised_mean(total: Tensor, plan: PrivacyPlan, *, expected: float, generator: Source) -> Tensor:
    """Returns the noised `total` [d] divided by `expected`, the public expected number of contributions.

    The number that really came would itself tell whether somebody took part.

    Raises:
        PrivacyError: if `expected` is not above 0.
    """
    if not expected > 0:
        raise PrivacyError(
            f"got {expected}, expected a number of contributions above 0",
            place="expected",
            cure="leave this client out",
        )
    return noise_sum(total, plan, generator) / expected
