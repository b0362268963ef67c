"""The Gaussian mechanism: Poisson sampling, clipping, noise, division by a public number."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedpress.core.random_source import Source, as_random_source
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.plan import PrivacyPlan

GRID_BITS = 30
"""Exact noise lies on a grid of 2^-30 to 2^-29 of its standard deviation."""


def poisson_batches(
    n: int, sampling_prob: float, steps: int, generator: Source
) -> Iterator[Tensor]:
    """Yields the indices of `steps` Poisson batches, int64 [k] each; k varies and may be 0.

    Each of the `n` examples joins each batch independently with probability `sampling_prob`. The
    accountant's amplification holds for this sampler and not for shuffled batches (Chua et al.
    2024, "How private are DP-SGD implementations?", arXiv:2403.17673).
    """
    # The default float64 draws: float32 ones have 24 bits, which would bias small probabilities.
    source = as_random_source(generator)
    for _ in range(steps):
        # An empty batch is yielded too: a skipped step would show that nobody was drawn.
        yield (source.uniform(n) < sampling_prob).nonzero().flatten()


def clip(update: Tensor, clip_norm: float) -> Tensor:
    """Scales `update` (any shape) down to L2 norm `clip_norm`; a shorter update is unchanged.

    Returns:
        float32 of the same shape, whose norm never exceeds `clip_norm`, rounding included.

    Raises:
        RecipeError: if `clip_norm` is not a finite number above 0.
        PrivacyError: if a value is NaN or infinite; the caller drops the contribution and counts
            it.

    >>> clip(torch.tensor([3.0, 4.0]), 1.0)
    tensor([0.6000, 0.8000])
    """
    if not 0 < clip_norm < math.inf:
        raise RecipeError(f"got {clip_norm}, expected a finite number above 0", place="clip_norm")
    # In float32 the squares overflow above 1e19, and sums of millions of them fall short.
    exact = update.detach().double()
    if not torch.isfinite(exact).all():
        raise PrivacyError(
            "holds NaN or infinite values, expected finite ones",
            place="update",
            cure="drop this contribution",
        )
    norm = float(torch.linalg.vector_norm(exact))
    # No division here, so an update of zeros needs no case of its own.
    if norm <= clip_norm:
        return update.detach().float()

    shrink = 1.0
    while True:
        clipped = (exact * (shrink * clip_norm / norm)).float()
        if float(torch.linalg.vector_norm(clipped.double())) <= clip_norm:
            return clipped
        # Rounding to float32 went up, above the bound: shrink by 2^-24, then 3, 7, ... times that.
        shrink = max(0.0, 2 * shrink - 1 - 2.0**-24)


def noise_sum(total: Tensor, plan: PrivacyPlan, generator: Source) -> Tensor:
    """Returns a sum of clipped contributions plus Gaussian noise of `plan.noise_std` on each value.

    From an exact source (`RandomSource.exact`) the result lies on a public grid, whatever `total`
    is. The bits of a plain floating-point sum would show which totals can have led to it (Mironov
    2012; Jin et al. 2022, arXiv:2112.05307).

    The grid is g = 2^(floor(log2 noise_std) - 30). `total` is rounded to g, a Gaussian is rounded
    to g, and both are added as whole numbers. Rounding the noise costs no privacy: it is
    post-processing of the Gaussian mechanism. Rounding a total [d] moves two neighbours apart by at
    most g sqrt(d) more than `clip_norm`, so the noise is larger by the factor
    1 + g sqrt(d) / clip_norm, a few millionths.

    Args:
        total: sum of the contributions, any shape.
        plan: clip norm and noise multiplier.
        generator: where the noise is drawn from.

    Returns:
        float32 of the shape of `total`; `total` itself if the plan has no noise.

    Raises:
        PrivacyError: if the source is exact and a value is not finite, or more than 2^32 times the
            noise.
    """
    if plan.noise_std == 0:
        return total
    source = as_random_source(generator)
    normal = source.normal(total.numel()).view(total.shape)
    return add_noise(total, plan, normal, exact=source.exact)


def add_noise(total: Tensor, plan: PrivacyPlan, normal: Tensor, *, exact: bool) -> Tensor:
    """Returns `total` + `normal` * `plan.noise_std`, float32.

    `noise_sum` calls it with fresh draws; noise that is correlated over rounds calls it with a
    mixture of the draws of several rounds.

    Args:
        total: sum of the contributions, any shape.
        plan: clip norm and noise multiplier.
        normal: noise of standard deviation 1, float64 of the same shape; changed in place.
        exact: whether the result must lie on the grid of `noise_sum`.

    Raises:
        PrivacyError: if `exact` and a value is not finite, or more than 2^32 times the noise.
    """
    if not exact:
        return normal.mul_(plan.noise_std).to(total.device).add_(total).float()

    grid = noise_grid(plan)
    # The grid is a power of two, so this division is exact.
    steps = total.detach().double().cpu().div(grid).round_()
    # 2^62 leaves room for the noise within 64 bits; NaN fails the comparison as well.
    if not bool((steps.abs() < 2.0**62).all()):
        raise PrivacyError(
            "a value is not finite or beyond 2^32 times the noise",
            place="sum",
            cure="clip every contribution first",
        )
    # Total and noise are rounded separately. So the outputs of all rounds together are a rounded
    # version of the mechanism without a grid, also where rounds share draws.
    rounding = grid * math.sqrt(total.numel()) / plan.clip_norm
    noise = normal.mul_(plan.noise_std * (1 + rounding) / grid).round_()
    return (steps.long() + noise.long().cpu()).double().mul_(grid).float().to(total.device)


def noise_grid(plan: PrivacyPlan) -> float:
    """Returns the public grid of exact noise, a power of two."""
    # frexp gives std = m 2^e with m in [0.5, 1), so the logarithm rounded down is e - 1.
    return 2.0 ** (math.frexp(plan.noise_std)[1] - 1 - GRID_BITS)


def noised_mean(total: Tensor, plan: PrivacyPlan, *, expected: float, generator: Source) -> Tensor:
    """Returns (`total` + noise) / `expected`, float32 [d].

    Args:
        total: sum of clipped contributions [d].
        plan: clip norm and noise multiplier.
        expected: public expected number of contributions.
        generator: where the noise is drawn from.

    Raises:
        PrivacyError: if `expected` is not above 0.
    """
    if not expected > 0:
        raise PrivacyError(
            f"got {expected}, expected a number of contributions above 0",
            place="expected",
            cure="leave this client out",
        )
    # Not the number that came: it changes by one when somebody takes part, and is not noised.
    return noise_sum(total, plan, generator) / expected
