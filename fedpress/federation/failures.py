"""How many units gave nothing, and why: counted under privacy with noise that costs no more privacy.

A unit (an example, or a client) that fails adds nothing to the sum of updates, and one that does not fail adds nothing
to the counts. So the vector (sum / clip norm, counts) moves by at most 1 when one unit is added or removed, the same as
the sum alone. Counts with noise of the plan's `noise_multiplier` are coordinates of the planned Gaussian mechanism: the
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
"""Standard deviations that noise is never away from zero: once in 1e32 times."""


@dataclass(frozen=True)
class Tally:
    """Units that gave nothing: their numbers were `not_finite`, or the network `failed` on them."""

    not_finite: float = 0.0
    failed: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.not_finite + self.failed

    @classmethod
    def of(cls, measured: Mapping[str, JSON]) -> Tally:
        """Reads what a local update measured."""
        return cls(*(float(measured.get(name) or 0) for name in ("not_finite", "failed")))  # type: ignore[arg-type]

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """Adds up `tallies`."""
        rows = [astuple(one) for one in tallies]
        return cls(*(math.fsum(column) for column in zip(*rows, strict=True))) if rows else cls()

    def fits(self, most: float, noise: float) -> bool:
        """Whether it may be the tally of `most` units, with noise of this standard deviation in each count."""
        room = SURELY * noise
        return min(self.not_finite, self.failed) >= -room and self.total <= most + 2 * room

    def tensor(self) -> Tensor:
        """Returns float64 [not_finite, failed]."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    def to_json(self) -> list[JSON]:
        """Returns the tally as it travels: [not_finite, failed]."""
        return [*astuple(self)]

    def noised(self, plan: PrivacyPlan, key: Key, *, steps: int, hidden: str) -> Tally:
        """Returns the sum of `steps` counts, each with noise of `plan`; `hidden` names all that the noise hides."""
        if plan.noise_multiplier == 0:
            return self
        count = replace(
            plan, clip_norm=1.0, noise_multiplier=plan.noise_multiplier * math.sqrt(steps)
        )
        values = self.tensor()
        chance = key.private_stream("failures", random.fingerprint(values, count, hidden))
        return Tally(*noise_sum(values, count, chance).double().tolist())
