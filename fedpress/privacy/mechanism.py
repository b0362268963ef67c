"""The Gaussian mechanism in parts: sample independently, clip to the sensitivity, add noise, divide by a constant."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.plan import PrivacyPlan


def poisson_batches(n: int, sampling_prob: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields `steps` int64 index tensors [k]: each of `n` examples joins each batch by its own coin.

    The accountant's amplification holds for this sampler and not for shuffled batches (Chua et al. 2024, "How private
    are DP-SGD implementations?"). Batches vary in size; an empty batch is a step like any other.
    """
    for _ in range(steps):
        # float64: the 24 bits of a float32 draw would bias small probabilities
        coins = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        yield (coins < sampling_prob).nonzero().flatten()


def clip(update: Tensor, clip_norm: float) -> Tensor:
    """Scales `update` (any shape) down to L2 norm `clip_norm`; a shorter update is unchanged.

    The norm of the float32 result, rounding included, never exceeds `clip_norm`.

    Raises:
        PrivacyError: if a value is NaN or infinite; the caller drops the contribution and counts it.

    >>> clip(torch.tensor([3.0, 4.0]), 1.0)
    tensor([0.6000, 0.8000])
    """
    if not 0 < clip_norm < math.inf:
        raise RecipeError(f"clip_norm: got {clip_norm}, expected a finite number above 0")
    exact = update.detach().double()
    if not torch.isfinite(exact).all():
        raise PrivacyError("update: holds NaN or infinite values, expected finite ones; drop this contribution")
    norm = float(torch.linalg.vector_norm(exact))
    if norm <= clip_norm:
        return update.detach().float()
    shrink = 1.0
    while True:
        clipped = (exact * (shrink * clip_norm / norm)).float()
        if float(torch.linalg.vector_norm(clipped.double())) <= clip_norm:
            return clipped
        shrink = max(0.0, 2 * shrink - 1 - 2.0**-24)  # float32 rounding went up: step down, twice as far each time


def noise_sum(total: Tensor, plan: PrivacyPlan, generator: torch.Generator) -> Tensor:
    """Returns `total` [d], a sum of clipped contributions, plus noise of `plan.noise_std` on each value, in float32.

    The noise is drawn in float64: a float32 normal comes from 24 bits and ends at 5.8 standard deviations.
    """
    if plan.noise_std == 0:
        return total
    noise = torch.randn(total.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return noise.mul_(plan.noise_std).to(total.device).add_(total).float()


def noised_mean(total: Tensor, plan: PrivacyPlan, *, expected: float, generator: torch.Generator) -> Tensor:
    """Returns the noised `total` [d] divided by `expected`, the public expected number of contributions.

    The number that really came would itself tell whether somebody took part.

    Raises:
        PrivacyError: if `expected` is not above 0.
    """
    if not expected > 0:
        raise PrivacyError(f"expected contributions: got {expected}, expected a number above 0; leave this client out")
    return noise_sum(total, plan, generator) / expected
