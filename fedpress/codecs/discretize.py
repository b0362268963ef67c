"""Rounds an update to integers on a grid that all clients share, for secure aggregation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.core.finite import CHUNK
from fedpress.core.random_source import RandomSource
from fedpress.core.settings import SETTINGS
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.noise.skellam import rounded_sensitivity

SPREADS = 5.0
"""Values of a rotated vector are clamped at 5 standard deviations. About one in 1.7 million is
larger."""

TRIES = 1000
"""Largest number of attempts to round within the L2 bound. One attempt fails with probability 0.61
at most; all 1000 fail with probability 10^-217."""


class Discretize(BaseModel):
    """Clamps each value, scales it to the grid and rounds it up or down at random.

    Example: with scale = 100, the value 0.0137 becomes 1 (probability 0.63) or 2 (0.37).

    A single rounding has the clamped and scaled value as its expectation. If the rounded vector is
    longer than a public bound (probability e^-0.5 at most), the rounding is drawn again, up to
    `TRIES` times in all. So the L2 bound always holds (conditional rounding: Kairouz, Liu & Steinke
    2021, arXiv:2102.06387, section 3).

    Secure aggregation plans `scale` (grid steps for 1.0 of the update) and `limit` (largest value
    before scaling) from `bits`, the number of clients in a round and the noise. If the unit of
    privacy is one example (unit = "sample"), secure aggregation sets `again = false`. Reason: two
    updates that differ in one example could need different numbers of draws. Their random numbers
    would then differ too, and the rounded updates could be further apart than one example can move
    them.
    """

    model_config = SETTINGS

    kind: Literal["discretize"] = "discretize"
    bits: int | None = Field(
        default=None,
        ge=2,
        le=31,
        description="bits of each value in the sum of all clients; by default planned from the "
        "noise",
    )
    scale: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="grid steps for 1.0 of an update (100: steps of 0.01); by default planned from "
        "noise and bits",
    )
    limit: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="largest absolute value before rounding, others are clamped to it; by default "
        "from the clip norm",
    )
    again: bool = Field(
        default=True, description="repeat the random rounding until the L2 bound holds"
    )

    def bind(self, bound: Bound) -> tuple[BoundDiscretize, Bound]:
        """Returns the transform, and the bound of the integers that it returns.

        Raises:
            RecipeError: if the input is already integers or has no L2 bound, or there is no scale.
        """
        if bound.integer:
            raise RecipeError(
                "its input is already integers",
                place="kind",
                cure="take 'quantize' out of the list",
            )
        if not bound.l2 < math.inf:
            raise RecipeError(
                "the update has no bound, so its grid could overflow",
                place="kind",
                cure="put 'clip' before it, for instance { kind = \"clip\", clip_norm = 1.0 }",
            )
        if self.scale is None:
            raise RecipeError(
                "no scale is given, and only a secure sum plans one",
                place="scale",
                cure='set aggregator = "secure", or give a scale',
            )
        limit = self.limit or coordinate_limit(bound)
        if self.again:
            length = rounded_sensitivity(bound.l2 * self.scale, bound.size)
        else:
            # Rounding moves each value by less than one grid step, so every draw is within this
            # larger bound.
            length = bound.l2 * self.scale + math.sqrt(bound.size)
        # Rounding up exceeds the clamped value by less than one grid step.
        largest = math.floor(limit * self.scale) + 1.0
        after = replace(
            bound,
            l2=length,
            linf=min(largest, length),
            integer=True,
            spread=math.inf,
            # Rounding may make the vector longer than the clip norm.
            decoded_l2=max(bound.decoded_l2, length / self.scale),
        )
        return BoundDiscretize(bound.size, self.scale, limit, length), after


@dataclass(frozen=True)
class BoundDiscretize:
    """Rounds vectors to integers.

    Attributes:
        size: number of values.
        scale: grid steps for 1.0 of the update.
        limit: each value is clamped to this before it is scaled.
        length: largest L2 norm of the result, in grid steps.
    """

    size: int
    scale: float
    limit: float
    length: float

    @property
    def additive(self) -> bool:
        """True: all clients use the same grid."""
        return True

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns int64 [d].

        Raises:
            PrivacyError: if no draw is within the L2 bound. Then `x` itself is longer than the
                bound that `bind` got.
        """
        for attempt in range(TRIES):
            # The private stream, because whoever knows the random numbers learns more about each
            # value.
            rounded, length = self._rounded(x, key.private_stream("discretize", attempt))
            if length <= self.length:
                return Encoded(rounded)
        raise PrivacyError(
            f"none of {TRIES} roundings is within the L2 bound",
            place="values",
            cure="encode a vector within the L2 bound of the transform before, such as 'clip'",
        )

    def _rounded(self, x: Tensor, chance: RandomSource) -> tuple[Tensor, float]:
        """Returns `x` rounded to the grid, int64 [d], and its L2 norm in grid steps."""
        rounded = torch.empty(self.size, dtype=torch.int64)
        square = 0.0
        # A chunk stays in the processor's cache from one step to the next.
        for part, out in zip(x.split(CHUNK), rounded.split(CHUNK), strict=True):
            # In float64: at large scales float32 has too few bits for the fraction.
            exact = part.double().clamp_(-self.limit, self.limit).mul_(self.scale)
            down = exact.floor()
            goes_up = chance.uniform(len(part)) < exact.sub_(down)
            whole = down.add_(goes_up)
            square += float(whole.dot(whole))
            out.copy_(whole)
        return rounded, math.sqrt(square)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [d], also for a sum of several clients' vectors."""
        values = check_values(x, "discretize", self.size, integer=True)
        return (values.double() / self.scale).float()


def coordinate_limit(bound: Bound) -> float:
    """Returns the default of `limit`: the smallest bound on a single value that `bound` gives."""
    # Clamping is a projection: it never moves two vectors further apart, so privacy holds.
    return min(bound.linf, bound.l2, SPREADS * bound.spread)
