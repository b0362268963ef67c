"""A clip norm that follows a quantile of the clients' update norms, privately (Andrew et al. 2021, arXiv:1905.03871).

In each round every client adds to its update one bit, whether its norm was at most the clip norm. The noised share of
such clients moves the clip norm: too many below, and it falls; too few, and it rises. The bit has its own noise, and
the noise of the update grows so that both queries together cost what one would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedpress.errors import PrivacyError, RecipeError


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip norm moves.

    Attributes:
        initial: the clip norm of the first round; two factors of ten off cost about 50 rounds.
        quantile: share of clients whose updates shall stay whole.
        lr: learning rate of the logarithm of the clip norm.
        count_noise: standard deviation of the noise on the sum of bits; `count_noise_for` unless given.
    """

    initial: Annotated[float, Field(description="clip norm of the first round")] = 0.1
    quantile: Annotated[
        float, Field(description="share of clients whose updates shall stay whole")
    ] = 0.5
    lr: Annotated[float, Field(description="learning rate of the logarithm of the clip norm")] = 0.2
    count_noise: Annotated[
        float | None,
        Field(description="noise on the number of clients below it; by default as the rounds need"),
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
        """Returns the next clip norm from the noised share `below` of clients whose norm was at most `clip_norm`.

        Geometric descent on the quantile loss (section 2.1). `below` counts who was NOT clipped: with the other sign
        the clip norm runs away from the quantile, without end.

        Raises:
            PrivacyError: if `below` is not finite.

        >>> AdaptiveClip().update(1.0, below=1.0) < 1.0 < AdaptiveClip().update(1.0, below=0.0)
        True
        """
        if not math.isfinite(below):
            raise PrivacyError(
                f"got {below}, expected a finite number",
                place="share below the clip norm",
                cure="check the sum of bits",
            )
        return clip_norm * math.exp(-self.lr * (below - self.quantile))


def centred_bit(norm: float, clip_norm: float) -> float:
    """Returns what a client adds to the sum of bits: 1/2 if its `norm` is at most `clip_norm`, else -1/2.

    Around zero the bit has sensitivity 1/2 when a client joins or leaves, half of that of 0 and 1. NaN is no norm and
    counts as above.
    """
    return 0.5 if norm <= clip_norm else -0.5


def share_below(noised_sum: float, cohort: int) -> float:
    """Returns the share of clients below, from the noised sum of centred bits and the public size of the cohort.

    It may lie outside 0..1: to cut it off there would move the quantile.

    >>> share_below(5.0, cohort=10), share_below(0.0, cohort=10)
    (1.0, 0.5)
    """
    return noised_sum / cohort + 0.5


def count_noise_for(noise_multiplier: float, cohort: int) -> float:
    """Returns a standard deviation for the sum of bits that costs the update at most 2% more noise.

    A twentieth of the cohort, as in the paper; more where the cohort is too small for that.

    >>> count_noise_for(1.0, 1000), count_noise_for(5.0, 10)
    (50.0, 12.5)
    """
    return max(cohort / 20, 2.5 * noise_multiplier)


def split(noise_multiplier: float, count_noise: float) -> float:
    """Returns the noise multiplier of the update with which both queries together cost `noise_multiplier`.

    The bits have sensitivity 1/2, so their noise multiplier is 2 `count_noise`; Gaussian queries add up as
    z^-2 = z_update^-2 + (2 count_noise)^-2 (Theorem 1).

    Raises:
        PrivacyError: if the bits alone would cost as much.

    >>> round(split(1.0, 2.5), 4)
    1.0206
    """
    _check_positive("count_noise", count_noise)
    left = noise_multiplier**-2 - (2 * count_noise) ** -2 if noise_multiplier > 0 else math.inf
    if left <= 0:
        raise PrivacyError(
            (
                f"got {count_noise:g}, so little that the bits alone cost noise_multiplier "
                f"{noise_multiplier:g}"
            ),
            place="count_noise",
            cure=(
                f"take more than {noise_multiplier / 2:g}, for instance {2.5 * noise_multiplier:g}"
            ),
        )
    return float(left**-0.5)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise RecipeError(f"got {value}, expected a finite number above 0", place=name)
