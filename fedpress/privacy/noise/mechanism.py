"""The Gaussian mechanism: Poisson sampling, clipping, noise, and a mean with a public divisor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedpress.core.finite import CHUNK, exact_norm, is_finite
from fedpress.core.random_source import Source, as_random_source
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.plan import PrivacyPlan

GRID_BITS = 30
"""The grid of exact noise is 2^-31 to 2^-30 times the standard deviation of the noise."""


def poisson_batches(
    n: int, sampling_prob: float, steps: int, generator: Source
) -> Iterator[Tensor]:
    """Yields the indices of `steps` Poisson batches, int64 [k] each; k varies and may be 0.

    Each of the `n` examples is in each batch independently with probability `sampling_prob`. The
    accountant assumes this sampler. For shuffled batches, the accountant's epsilon would be too
    small (Chua et al. 2024, "How private are DP-SGD implementations?", arXiv:2403.17673).
    """
    # Drawn in float64 (the default): float32 draws have 24 bits, which biases small probabilities.
    source = as_random_source(generator)
    for _ in range(steps):
        # Empty batches are yielded too: a skipped step would reveal that nobody was drawn.
        yield (source.uniform(n) < sampling_prob).nonzero().flatten()


def clip(update: Tensor, clip_norm: float) -> Tensor:
    """Scales `update` (any shape) down to L2 norm `clip_norm`; a shorter update is unchanged.

    Returns:
        float32 of the same shape. Its norm is at most `clip_norm`, including rounding errors.

    Raises:
        RecipeError: if `clip_norm` is not a finite number above 0.
        PrivacyError: if a value is NaN or infinite. The caller should then drop the update.

    >>> clip(torch.tensor([3.0, 4.0]), 1.0)
    tensor([0.6000, 0.8000])
    """
    if not 0 < clip_norm < math.inf:
        raise RecipeError(f"got {clip_norm}, expected a finite number above 0", place="clip_norm")
    exact = update.detach().reshape(-1)
    norm = exact_norm(exact)
    # A finite norm needs no second pass. The norm of float64 values may overflow, though all of
    # them are finite.
    if not norm < math.inf and not is_finite(exact):
        raise PrivacyError(
            "holds NaN or infinite values, expected finite ones",
            place="update",
            cure="drop this contribution",
        )
    # Returned before the division by the norm, which may be 0.
    if norm <= clip_norm:
        return update.detach().float()

    shrink = 1.0
    while True:
        clipped = _scaled(exact, shrink * clip_norm / norm)
        if exact_norm(clipped) <= clip_norm:
            return clipped.reshape(update.shape)
        # Rounding to float32 has exceeded the bound: shrink by 2^-24, then by 3, 7, ... times that.
        shrink = max(0.0, 2 * shrink - 1 - 2.0**-24)


def _scaled(flat: Tensor, factor: float) -> Tensor:
    """Returns factor x flat [n] as float32, multiplied in float64.

    Some values at a time are converted, so that those in float64 stay in the processor's cache.
    """
    scaled = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
    for out, values in zip(scaled.split(CHUNK), flat.split(CHUNK), strict=True):
        out.copy_(values.double().mul_(factor))
    return scaled


def noise_sum(total: Tensor, plan: PrivacyPlan, generator: Source) -> Tensor:
    """Returns a sum of clipped contributions plus Gaussian noise of `plan.noise_std` on each value.

    If the source is exact (`RandomSource.exact`), the result lies on a public grid. Without a grid,
    the low bits of a floating-point sum reveal which totals are possible (Mironov 2012; Jin et al.
    2022, arXiv:2112.05307).

    The grid is g = 2^(floor(log2 noise_std) - 30). `total` and the Gaussian noise are both rounded
    to g, and added as integers. Rounding the noise costs no privacy, because it is post-processing
    of the Gaussian mechanism. Rounding a total [d] increases the sensitivity by at most g sqrt(d),
    so the noise is scaled by 1 + g sqrt(d) / clip_norm, a few millionths above 1.

    Args:
        total: sum of the contributions, any shape.
        plan: clip norm and noise multiplier.
        generator: source of the noise.

    Returns:
        float32 of the shape of `total`; `total` itself if the plan has no noise.

    Raises:
        PrivacyError: if the source is exact, and a value is not finite or has 2^62 or more steps of
            the grid, which is 2^31 to 2^32 times the standard deviation of the noise.
    """
    if plan.noise_std == 0:
        return total
    source = as_random_source(generator)
    normal = source.normal(total.numel()).view(total.shape)
    return add_noise(total, plan, normal, exact=source.exact)


def add_noise(total: Tensor, plan: PrivacyPlan, normal: Tensor, *, exact: bool) -> Tensor:
    """Returns `total` + `normal` * `plan.noise_std`, float32.

    `noise_sum` passes new random numbers as `normal`. For noise that is correlated over rounds, the
    caller passes a weighted sum of the random numbers of several rounds.

    Args:
        total: sum of the contributions, any shape.
        plan: clip norm and noise multiplier.
        normal: noise of standard deviation 1, float64 of the same shape; changed in place.
        exact: whether the result must lie on the grid of `noise_sum`.

    Raises:
        PrivacyError: if `exact`, and a value is not finite or has 2^62 or more steps of the grid,
            which is 2^31 to 2^32 times the standard deviation of the noise.
    """
    if not exact:
        return normal.mul_(plan.noise_std).to(total.device).add_(total).float()

    grid = noise_grid(plan)
    # The grid is a power of two, so this division is exact.
    steps = total.detach().double().cpu().div(grid).round_()
    # 2^62 leaves room for the noise within 64 bits. NaN fails the comparison too.
    if not bool((steps.abs() < 2.0**62).all()):
        raise PrivacyError(
            "a value is not finite, or above 2^31 times the standard deviation of the noise",
            place="sum",
            cure="clip every contribution first",
        )
    # Total and noise are rounded separately. So the argument in `noise_sum` also holds for all
    # rounds together, if rounds share random numbers.
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
        generator: source of the noise.

    Raises:
        PrivacyError: if `expected` is not above 0, or a value is refused by `noise_sum`.
    """
    if not expected > 0:
        raise PrivacyError(
            f"got {expected}, expected a number of contributions above 0",
            place="expected",
            cure="leave this client out",
        )
    # Not divided by the actual number of contributions: this number has no noise, and would reveal
    # who took part.
    return noise_sum(total, plan, generator) / expected
