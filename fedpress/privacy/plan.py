"""One private mechanism as a value: sampler, clip, noise and accountant cannot drift apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedpress.errors import RecipeError
from fedpress.privacy.accounting import accountant
from fedpress.privacy.accounting.accountant import GaussianEvent


@dataclass(frozen=True)
class PrivacyPlan:
    """What is protected, how much one unit may change a sum, and how much noise hides that change.

    Attributes:
        unit: "sample" protects one example of a client, "client" protects all that a client holds.
        clip_norm: L2 bound of what one unit adds to a sum: the sensitivity under add-or-remove-one neighbours.
        sampling_prob: probability with which each unit, independently of the others, takes part in a step.
        noise_multiplier: standard deviation of the noise on the sum / `clip_norm`; 0 is no privacy (epsilon inf).
        steps_per_round: noised sums in one round: local steps for unit "sample", 1 for unit "client".
        delta: chance with which the promise may fail; well below one over the number of units.

    >>> plan = PrivacyPlan("client", clip_norm=0.5, sampling_prob=1.0, delta=1e-3).calibrate(epsilon=8, num_rounds=50)
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
        self.phase(num_rounds=1)  # checks the rest

    @property
    def sensitivity(self) -> float:
        """L2 distance by which one unit can move the sum."""
        return self.clip_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each value of the sum, before any division."""
        return self.noise_multiplier * self.clip_norm

    def phase(self, *, num_rounds: int) -> GaussianEvent:
        """Returns what `num_rounds` rounds are to the accountant."""
        return GaussianEvent(
            self.sampling_prob, self.noise_multiplier, self.steps_per_round * num_rounds
        )

    def epsilon(self, *, num_rounds: int, delta: float | None = None) -> float:
        """Returns the epsilon that `num_rounds` rounds spend at `delta` (the plan's own unless given)."""
        return accountant.epsilon(
            [self.phase(num_rounds=num_rounds)], delta=self.delta if delta is None else delta
        )

    def calibrate(
        self, *, epsilon: float, num_rounds: int, delta: float | None = None
    ) -> PrivacyPlan:
        """Returns the plan with the smallest noise that keeps `num_rounds` rounds within `epsilon`.

        Raises:
            RecipeError: if `epsilon`, `delta` or `num_rounds` is out of range.
            PrivacyError: if no noise meets the budget.
        """
        delta = self.delta if delta is None else delta
        noise = accountant.noise_multiplier(
            epsilon=epsilon,
            delta=delta,
            sampling_prob=self.sampling_prob,
            steps=self.steps_per_round * num_rounds,
        )
        return replace(self, noise_multiplier=noise, delta=delta)
