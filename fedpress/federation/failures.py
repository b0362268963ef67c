"""Counts of protected units that gave nothing; under privacy with noise, at no further cost.

A unit (an example, or a client) that fails adds nothing to the sum of updates, and one that does
not fail adds nothing to the counts. So the vector (sum / clip norm, counts) moves by at most 1 when
one unit is added or removed, the same as the sum alone. Counts with noise of the plan's
`noise_multiplier` are therefore further coordinates of the planned Gaussian mechanism, and the
epsilon stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from fedpress.codecs import Key
from fedpress.core import random
from fedpress.core.canonical import JSON
from fedpress.privacy.noise.mechanism import noise_sum
from fedpress.privacy.plan import PrivacyPlan

SURELY = 12.0
"""Standard deviations that Gaussian noise practically never exceeds: probability 1e-32."""


@dataclass(frozen=True)
class Tally:
    """Numbers of units that gave nothing, by cause.

    Attributes:
        not_finite: units with NaN or infinite numbers.
        failed: units on which the network raised an error.
    """

    not_finite: float = 0.0
    failed: float = 0.0

    @property
    def total(self) -> float:
        """Both causes together."""
        return self.not_finite + self.failed

    @classmethod
    def of(cls, measured: Mapping[str, JSON]) -> Tally:
        """Reads the counts in what a local update measured; 0 where there is none."""
        values = [measured.get(name) or 0 for name in ("not_finite", "failed")]
        return cls(*(float(value) for value in values))  # type: ignore[arg-type]

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """Adds up `tallies`."""
        rows = [astuple(one) for one in tallies]
        if not rows:
            return cls()
        # fsum: the result must not depend on the order in which clients answered.
        return cls(*(math.fsum(column) for column in zip(*rows, strict=True)))

    def fits(self, most: float, noise: float) -> bool:
        """Whether it may be the tally of `most` units with noise of this standard deviation."""
        room = SURELY * noise
        not_negative = min(self.not_finite, self.failed) >= -room
        return not_negative and self.total <= most + 2 * room

    def tensor(self) -> Tensor:
        """Returns float64 [not_finite, failed]."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    def to_json(self) -> list[JSON]:
        """Returns the tally as it travels: [not_finite, failed]."""
        return [*astuple(self)]

    def noised(self, plan: PrivacyPlan, key: Key, *, steps: int, hidden: str) -> Tally:
        """Returns this tally with noise.

        Args:
            plan: gives the noise multiplier.
            key: of the client in this round.
            steps: how many noised counts are added up in this tally, each with its own noise.
            hidden: fingerprint of everything that the noise hides.
        """
        if plan.noise_multiplier == 0:
            return self
        # One unit moves a count by at most 1, so 1 takes the place of the clip norm.
        std = plan.noise_multiplier * math.sqrt(steps)
        count = replace(plan, clip_norm=1.0, noise_multiplier=std)
        values = self.tensor()
        chance = key.private_stream("failures", random.fingerprint(values, count, hidden))
        return Tally(*noise_sum(values, count, chance).double().tolist())
