"""The parameters of one Gaussian mechanism (sampling, clip norm, noise, delta) as a frozen object.

Sampler, clipping, noise and accountant read the same object, so their numbers cannot differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedpress.errors import RecipeError
from fedpress.privacy.accounting import accountant
from fedpress.privacy.accounting.accountant import GaussianEvent


@dataclass(frozen=True)
class PrivacyPlan:
    """Protected unit, sensitivity, sampling and noise of a repeated Gaussian mechanism.

    Attributes:
        unit: "sample" protects each example by itself, "client" all examples of a client together.
        clip_norm: L2 bound of one unit's contribution to a sum. Neighbouring data sets differ by
            adding or removing one unit, so this is the sensitivity of the sum.
        sampling_prob: probability with which each unit takes part in a step (Poisson sampling).
        noise_multiplier: standard deviation of the noise on the sum / `clip_norm`. If it is 0,
            epsilon is infinite.
        steps_per_round: number of noised sums in a round. Unit "sample": the number of local steps
            of a client. Unit "client": 1.
        delta: probability with which the guarantee may fail; choose delta far below
            1 / number of units.

    Raises:
        RecipeError: if a value is out of range.

    >>> plan = PrivacyPlan("client", clip_norm=0.5, sampling_prob=1.0, delta=1e-3)
    >>> plan = plan.calibrate(epsilon=8, num_rounds=50)
    >>> round(plan.noise_std, 2), round(plan.epsilon(num_rounds=50), 2)
    (1.7, 8.0)
    """

    unit: Literal["sample", "client"]
    clip_norm: float
    sampling_prob: float
    noise_multiplier: float = 0.0
    steps_per_round: int = 1
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if self.unit not in ("sample", "client"):
            raise RecipeError(f"got {self.unit!r}, expected 'sample' or 'client'", place="unit")
        # Written as `0 < x < inf` and not as `x <= 0`, so that NaN is refused too.
        if not 0 < self.clip_norm < math.inf:
            raise RecipeError(
                f"got {self.clip_norm}, expected a finite number above 0", place="clip_norm"
            )
        if not self.noise_multiplier < math.inf:
            raise RecipeError(
                f"got {self.noise_multiplier}, expected a finite number >= 0",
                place="noise_multiplier",
            )
        if self.steps_per_round < 1:
            raise RecipeError(
                f"got {self.steps_per_round}, expected a whole number >= 1",
                place="steps_per_round",
            )
        accountant.check_delta(self.delta)
        # The event checks `sampling_prob` and the sign of `noise_multiplier`.
        self.event(num_rounds=1)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the sum."""
        return self.clip_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each value of the sum, before any division."""
        return self.noise_multiplier * self.clip_norm

    def event(self, *, num_rounds: int) -> GaussianEvent:
        """Returns the accountant's event of `num_rounds` rounds."""
        # Under unit "sample" every local step is a separate query.
        steps = self.steps_per_round * num_rounds
        return GaussianEvent(self.sampling_prob, self.noise_multiplier, steps)

    def epsilon(self, *, num_rounds: int, delta: float | None = None) -> float:
        """Returns the epsilon of `num_rounds` rounds at `delta`; None: at the plan's own delta."""
        if delta is None:
            delta = self.delta
        return accountant.epsilon([self.event(num_rounds=num_rounds)], delta=delta)

    def calibrate(
        self, *, epsilon: float, num_rounds: int, delta: float | None = None
    ) -> PrivacyPlan:
        """Returns a copy with the least noise for which `num_rounds` rounds cost at most `epsilon`.

        Args:
            epsilon: the budget of all rounds.
            num_rounds: number of rounds.
            delta: new delta of the plan; None: the plan's own delta.

        Raises:
            RecipeError: if `epsilon`, `delta` or `num_rounds` is out of range.
            PrivacyError: if no noise meets the budget.
        """
        if delta is None:
            delta = self.delta
        # `clip_norm` is not needed: epsilon depends on the ratio of noise and sensitivity only.
        noise = accountant.noise_multiplier(
            epsilon=epsilon,
            delta=delta,
            sampling_prob=self.sampling_prob,
            steps=self.steps_per_round * num_rounds,
        )
        return replace(self, noise_multiplier=noise, delta=delta)
