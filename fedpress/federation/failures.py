"""Counts failed examples or clients; under privacy the counts get noise, at no extra epsilon.

A unit is what privacy protects: an example or a client. A failed unit adds nothing to the sum of
updates, and a unit that did not fail adds nothing to the counts. So if one unit is added or
removed, the vector (sum / clip norm, counts) moves by at most 1, just as (sum / clip norm) alone
does. Counts with noise of the plan's `noise_multiplier` are therefore extra coordinates of the same
Gaussian mechanism, and epsilon does not change.
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
"""Gaussian noise exceeds this many standard deviations with a probability below 1e-32."""


@dataclass(frozen=True)
class Tally:
    """Numbers of failed units (examples or clients), by cause.

    Attributes:
        not_finite: number of units whose gradient or update has NaN or infinite values.
        failed: number of units on which the network raised an error.
    """

    not_finite: float = 0.0
    failed: float = 0.0

    @property
    def total(self) -> float:
        """Number of failed units, of both causes together."""
        return self.not_finite + self.failed

    @classmethod
    def of(cls, measured: Mapping[str, JSON]) -> Tally:
        """Reads the counts from the measures of a local update; a missing count is 0."""
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
        """Returns whether these counts are possible.

        Args:
            most: largest possible number of failures.
            noise: standard deviation of the noise on each count.
        """
        # Noise may make a count negative by up to `room`, and raise both counts together above
        # `most` by up to 2 x `room`.
        room = MAX_NOISE_STDS * noise
        not_negative = min(self.not_finite, self.failed) >= -room
        return not_negative and self.total <= most + 2 * room

    def tensor(self) -> Tensor:
        """Returns float64 [not_finite, failed]."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    def to_json(self) -> list[JSON]:
        """Returns [not_finite, failed], as the header of an update contains them."""
        return [*astuple(self)]

    def noised(self, plan: PrivacyPlan, key: Key, *, steps: int, hidden: str) -> Tally:
        """Returns this tally with noise.

        Args:
            plan: gives the noise multiplier.
            key: seeds the client's random streams of this round, from which the noise is drawn.
            steps: number of steps whose counts this tally adds up; each step gets its own noise.
            hidden: fingerprint of the data that the noise hides. The random stream is named by it,
                so that two different answers never get the same noise.
        """
        if plan.noise_multiplier == 0:
            return self
        # One unit moves a count by at most 1, so its clip norm is 1. Variances of steps add up.
        std = plan.noise_multiplier * math.sqrt(steps)
        count = replace(plan, clip_norm=1.0, noise_multiplier=std)
        values = self.tensor()
        chance = key.private_stream("failures", random.fingerprint(values, count, hidden))
        return Tally(*noise_sum(values, count, chance).double().tolist())
