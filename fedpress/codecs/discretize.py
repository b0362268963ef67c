"""Discretize: whole numbers on one grid for all clients, which a secure sum can add."""

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
"""A coordinate of a rotated vector passes so many standard deviations once in 1.7 million."""
TRIES = 1000


class Discretize(BaseModel):
    """Clamps each value, scales it to the grid and rounds it up or down by chance, the expectation unchanged.

    Conditional rounding (Kairouz, Liu & Steinke 2021, arXiv:2102.06387, section 3): a result whose norm is above a
    public bound, which is so for at most a share e^-0.5 of the draws, is drawn again. So the L2 bound holds always.

    `scale` (grid units per unit of the update) and `limit` (of each value, before scaling) follow from `bits`, the
    cohort and the noise; a secure sum plans them. Where examples are protected and not clients, nothing is drawn
    `again`: two sums that differ by one example would use other coins, and come further apart than their difference.
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
        description="steps of the grid for each 1.0 of an update; by default as the planned noise and"
        " bits ask",
    )
    limit: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="values are clamped to this size before they are rounded; by default it follows "
        "from the clip norm",
    )
    again: bool = Field(default=True, description="draw rounding again until the L2 bound holds")

    def bind(self, bound: Bound) -> tuple[BoundDiscretize, Bound]:
        """Promises whole numbers of bounded L2 and maximum norm.

        Raises:
            RecipeError: without a bound on the input, or without a scale.
        """
        if bound.integer:
            raise RecipeError(
                "its input is whole already",
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
                "not planned",
                place="scale",
                cure='use it with aggregator = "secure", or give a scale',
            )
        limit = self.limit or coordinate_limit(bound)
        root = math.sqrt(bound.size)
        length = (
            rounded_sensitivity(bound.l2 * self.scale, bound.size)
            if self.again
            else bound.l2 * self.scale + root
        )
        largest = math.floor(limit * self.scale) + 1.0
        after = replace(
            bound,
            l2=length,
            linf=min(largest, length),
            integer=True,
            spread=math.inf,
            decoded_l2=max(bound.decoded_l2, length / self.scale),  # rounding may lengthen it
        )
        return BoundDiscretize(bound.size, self.scale, limit, length), after


@dataclass(frozen=True)
class BoundDiscretize:
    """Rounds `size` values, clamped to `limit` and times `scale`, to whole numbers of L2 norm `length` at most."""

    size: int
    scale: float
    limit: float
    length: float

    @property
    def additive(self) -> bool:
        """One grid for all."""
        return True

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns int64 [d]."""
        exact = x.double().clamp(-self.limit, self.limit) * self.scale
        down = exact.floor()
        share = exact - down
        for attempt in range(TRIES):
            coins = key.private_stream("discretize", attempt).uniform(self.size)
            rounded = down + (coins < share)
            if float(torch.linalg.vector_norm(rounded)) <= self.length:
                return Encoded(rounded.long())
        raise PrivacyError(
            "rounding never came within its bound",
            place="values",
            cure="give values within the bound that was promised for them",
        )

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [d], also for a sum."""
        return (
            check_values(x, "discretize", self.size, integer=True).double() / self.scale
        ).float()


def coordinate_limit(bound: Bound) -> float:
    """Returns where each value may be clamped: clamping is a projection, so it brings no two vectors further apart."""
    return min(bound.linf, bound.l2, SPREADS * bound.spread)
