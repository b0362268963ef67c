"""Discretize: whole numbers on one grid for all clients, so that a secure sum can add them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.noise.skellam import rounded_sensitivity

SPREADS = 5.0
"""Values of a rotated vector are clamped at so many standard deviations, which about one value in
1.7 million exceeds."""

TRIES = 1000
"""How often rounding is tried. One try fails with probability 0.61 at most, all of them with
10^-217."""


class Discretize(BaseModel):
    """Clamps each value, scales it to the grid and rounds it up or down at random.

    The expectation of one draw is the clamped and scaled value. A result whose norm is above a
    public bound, which happens with probability e^-0.5 at most, is drawn again, so the L2 bound
    always holds (conditional rounding: Kairouz, Liu & Steinke 2021, arXiv:2102.06387, section 3).

    Secure aggregation chooses `scale` (grid units per unit of the update) and `limit` (of each
    value, before scaling) from `bits`, the cohort and the noise. `again` is off where single
    examples are protected and not whole clients. Two sums that differ by one example could stop
    after different numbers of draws; with other random numbers they would be further apart than
    the example moves them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["discretize"] = "discretize"
    bits: int | None = Field(
        default=None, ge=2, le=31, description="of the sum of all clients; planned if left out"
    )
    scale: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="steps of the grid for each 1.0 of an update; by default they follow from the "
        "planned noise and bits",
    )
    limit: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="values are clamped to this size before they are rounded; by default it "
        "follows from the clip norm",
    )
    again: bool = Field(default=True, description="draw rounding again until the L2 bound holds")

    def bind(self, bound: Bound) -> tuple[BoundDiscretize, Bound]:
        """Returns the transform, and a bound with whole numbers.

        Raises:
            RecipeError: without a bound on the input, or without a scale.
        """
        if bound.integer:
            raise RecipeError(
                "its input is whole numbers already",
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
                "is missing, and nothing plans it here",
                place="scale",
                cure='use it with aggregator = "secure", or give a scale',
            )
        limit = self.limit or coordinate_limit(bound)
        if self.again:
            length = rounded_sensitivity(bound.l2 * self.scale, bound.size)
        else:
            # Rounding moves a value by less than one grid unit: all draws keep this larger bound.
            length = bound.l2 * self.scale + math.sqrt(bound.size)
        # Rounding up exceeds the clamped value by less than one grid unit.
        largest = math.floor(limit * self.scale) + 1.0
        after = replace(
            bound,
            l2=length,
            linf=min(largest, length),
            integer=True,
            spread=math.inf,
            # Rounding may lengthen the vector.
            decoded_l2=max(bound.decoded_l2, length / self.scale),
        )
        return BoundDiscretize(bound.size, self.scale, limit, length), after


@dataclass(frozen=True)
class BoundDiscretize:
    """Rounds vectors to whole numbers.

    Attributes:
        size: number of values.
        scale: grid units per unit of the update.
        limit: each value is clamped to this before it is scaled.
        length: largest L2 norm of the result, in grid units.
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
            PrivacyError: if no draw is within the L2 bound, which means that `x` itself is longer
                than the transform was told.
        """
        # In float64: at large scales float32 has too few bits for the fraction.
        exact = x.double().clamp(-self.limit, self.limit) * self.scale
        down = exact.floor()
        fraction = exact - down
        # From the private stream: who knows the random numbers learns more about each value.
        for attempt in range(TRIES):
            coins = key.private_stream("discretize", attempt).uniform(self.size)
            rounded = down + (coins < fraction)
            if float(torch.linalg.vector_norm(rounded)) <= self.length:
                return Encoded(rounded.long())
        raise PrivacyError(
            f"none of {TRIES} roundings is within the L2 bound",
            place="values",
            cure="encode a vector no longer than the L2 bound that the transforms before promise",
        )

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [d], also for a sum of several clients' vectors."""
        values = check_values(x, "discretize", self.size, integer=True)
        return (values.double() / self.scale).float()


def coordinate_limit(bound: Bound) -> float:
    """Returns the limit to which each value is clamped unless the recipe sets one."""
    # Clamping is a projection, so two vectors are never further apart afterwards.
    return min(bound.linf, bound.l2, SPREADS * bound.spread)
