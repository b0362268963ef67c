"""Adaptive clipping: the clip norm tracks a quantile of the update norms (Andrew et al. 2021).

arXiv:1905.03871, Algorithm 1. In each round every client sends one bit with its update: whether the
norm of the update was at most the clip norm. The server adds noise to the sum of bits, and
estimates the share of clients whose norm was at most the clip norm. If the share is above the
target quantile, the clip norm is lowered, otherwise raised. The bits are a second query. Therefore
the updates get more noise: both queries together cost the planned epsilon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedpress.errors import PrivacyError, RecipeError


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip norm changes from round to round.

    Attributes:
        initial: the clip norm of the first round. If it is 100 times too low or too high, the clip
            norm takes about 50 rounds to adapt, with the default `quantile` and `lr`.
        quantile: target share of clients whose updates are not clipped.
        lr: learning rate of the logarithm of the clip norm.
        count_noise: standard deviation of the noise on the sum of bits; None: the value that
            `count_noise_for` returns.

    Raises:
        RecipeError: if a value is out of range.
    """

    initial: Annotated[float, Field(description="clip norm of the first round")] = 0.1
    quantile: Annotated[
        float, Field(description="target share of clients whose updates are not clipped")
    ] = 0.5
    lr: Annotated[float, Field(description="learning rate of the logarithm of the clip norm")] = 0.2
    count_noise: Annotated[
        float | None,
        Field(description="standard deviation of the noise on the sum of bits; default: computed"),
    ] = None

    def __post_init__(self) -> None:
        for name in ("initial", "lr"):
            _check_positive(name, getattr(self, name))
        if not 0 < self.quantile < 1:
            raise RecipeError(
                f"got {self.quantile}, expected a number inside (0, 1)", place="quantile"
            )
        if self.count_noise is not None:
            _check_positive("count_noise", self.count_noise)

    def update(self, clip_norm: float, below: float) -> float:
        """Returns the next clip norm, by geometric descent on the quantile loss (section 2.1).

        Args:
            clip_norm: the clip norm of this round.
            below: noised share of clients whose norm was at most `clip_norm`.

        Raises:
            PrivacyError: if `below` is not finite.

        >>> clip = AdaptiveClip()
        >>> clip.update(1.0, below=1.0) < 1.0 < clip.update(1.0, below=0.0)
        True
        """
        if not math.isfinite(below):
            raise PrivacyError(
                f"got {below}, expected a finite number",
                place="share below the clip norm",
                cure="check the sum of bits",
            )
        # `below` is the share that was NOT clipped. With the clipped share the sign would be wrong,
        # and the clip norm would move away from the quantile.
        return clip_norm * math.exp(-self.lr * (below - self.quantile))


def centred_bit(norm: float, clip_norm: float) -> float:
    """Returns a client's bit: 1/2 if `norm` <= `clip_norm`, else -1/2.

    Adding or removing a client changes the sum of these bits by 1/2. With bits 0 and 1 it would
    change by up to 1, which would need twice the noise.
    """
    # A comparison with NaN is False, so NaN counts as above the clip norm.
    return 0.5 if norm <= clip_norm else -0.5


def share_below(noised_sum: float, cohort: int) -> float:
    """Estimates the share of clients whose norm is at most the clip norm.

    Args:
        noised_sum: the sum of the clients' bits (1/2 or -1/2) plus noise.
        cohort: the planned number of clients in the round, which is public.

    >>> share_below(5.0, cohort=10), share_below(0.0, cohort=10)
    (1.0, 0.5)
    """
    # Noise may move the result outside 0..1. Clamping would bias the estimate of the quantile.
    return noised_sum / cohort + 0.5


def count_noise_for(noise_multiplier: float, cohort: int) -> float:
    """Returns the default standard deviation of the noise on the sum of bits.

    This is cohort / 20, as in the paper, but at least 2.5 times `noise_multiplier`, so that the
    updates need at most 2% more noise.

    Args:
        noise_multiplier: noise multiplier of a single query with the whole budget.
        cohort: the planned number of clients in a round.

    >>> count_noise_for(1.0, 1000), count_noise_for(5.0, 10)
    (50.0, 12.5)
    """
    # With factor 2.5 the bits take 4% of the budget (in 1 / noise^2), so the updates need 2% more
    # noise.
    return max(cohort / 20, 2.5 * noise_multiplier)


def update_noise_multiplier(noise_multiplier: float, count_noise: float) -> float:
    """Returns the noise multiplier of the updates, so that bits and updates together fit a budget.

    Args:
        noise_multiplier: noise multiplier of a single query with the whole budget; if it is 0, so
            is the result.
        count_noise: standard deviation of the noise on the sum of bits.

    Raises:
        RecipeError: if `count_noise` is not a finite number above 0.
        PrivacyError: if the bits alone would use up the budget.

    >>> round(update_noise_multiplier(1.0, 2.5), 4)
    1.0206
    """
    _check_positive("count_noise", count_noise)
    if noise_multiplier <= 0:
        return 0.0
    # Gaussian queries add up as z^-2 = z_update^-2 + z_bits^-2 (Theorem 1 of the paper). The bits
    # have sensitivity 1/2, so their noise multiplier is 2 count_noise.
    remaining = noise_multiplier**-2 - (2 * count_noise) ** -2
    if remaining <= 0:
        raise PrivacyError(
            f"got {count_noise:g}: the bits alone would use up the budget, which allows one query "
            f"with noise_multiplier {noise_multiplier:g}",
            place="count_noise",
            cure=(
                f"take more than {noise_multiplier / 2:g}, for instance {2.5 * noise_multiplier:g}"
            ),
        )
    return float(remaining**-0.5)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise RecipeError(f"got {value}, expected a finite number above 0", place=name)
