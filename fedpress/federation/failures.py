"""Counts of failed examples or clients; under privacy with noise, which costs no extra epsilon.

A failed unit (an example, or a client) adds nothing to the sum of updates, and any other unit adds
nothing to the counts. So if one unit is added or removed, the vector (sum / clip norm, counts)
moves by at most 1, as the sum alone does. Counts with noise of the plan's `noise_multiplier` are
therefore extra coordinates of the same Gaussian mechanism: epsilon does not change.
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

MAX_NOISE_STDS = 12.0
"""Gaussian noise exceeds this many standard deviations with probability 1e-32."""


@dataclass(frozen=True)
class Tally:
    """Numbers of failed units (examples or clients), by cause.

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
        """Reads the counts in the measures of a local update; 0 for a missing one."""
        values = [measured.get(name) or 0 for name in ("not_finite", "failed")]
        return cls(*(float(value) for value in values))  # type: ignore[arg-type]

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """Adds up `tallies`."""
        rows = [astuple(one) for one in tallies]
        if not rows:
            return cls()
        # fsum rounds once, so the result does not depend on the order in which clients answered.
        return cls(*(math.fsum(column) for column in zip(*rows, strict=True)))

    def fits(self, most: float, noise: float) -> bool:
        """Whether at most `most` failures with noise of this standard deviation can give it."""
        room = MAX_NOISE_STDS * noise
        not_negative = min(self.not_finite, self.failed) >= -room
        return not_negative and self.total <= most + 2 * room

    def tensor(self) -> Tensor:
        """Returns float64 [not_finite, failed]."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    def to_json(self) -> list[JSON]:
        """Returns [not_finite, failed], as in the header of an update."""
        return [*astuple(self)]

    def noised(self, plan: PrivacyPlan, key: Key, *, steps: int, hidden: str) -> Tally:
        """Returns this tally with noise.

        Args:
            plan: gives the noise multiplier.
            key: key of the client in this round.
            steps: how many noised counts this tally is the sum of.
            hidden: fingerprint of the data that the noise hides. It is part of the noise's name, so
                that two different answers never get the same noise.
        """
        if plan.noise_multiplier == 0:
            return self
        # One unit moves a count by at most 1, so its clip norm is 1.
        std = plan.noise_multiplier * math.sqrt(steps)
        count = replace(plan, clip_norm=1.0, noise_multiplier=std)
        values = self.tensor()
        chance = key.private_stream("failures", random.fingerprint(values, count, hidden))
        return Tally(*noise_sum(values, count, chance).double().tolist())
