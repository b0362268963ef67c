"""Noise that a client adds to its own update: Gaussian on floating-point values, Skellam on whole numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.core import random
from fedpress.privacy.noise import skellam
from fedpress.privacy.noise.mechanism import noise_sum
from fedpress.privacy.plan import PrivacyPlan


class Noise(BaseModel):
    """Adds noise of standard deviation `std`, in units of its input: grid units behind `discretize`.

    A recipe asks for privacy with `privacy = {...}`, which plans this noise; written into the list by hand it is noise
    without a promise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["noise"] = "noise"
    std: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="standard deviation of the noise on each value, in steps of the grid behind discretize",
    )

    def bind(self, bound: Bound) -> tuple[BoundNoise, Bound]:
        """Gives up the bounds: noise has no largest value."""
        after = replace(bound, l2=math.inf, linf=math.inf, spread=math.inf, decoded_l2=math.inf)
        clip_norm = bound.l2 if bound.l2 < math.inf else 1.0
        return BoundNoise(bound.size, self.std, clip_norm, bound.integer), after


@dataclass(frozen=True)
class BoundNoise:
    """Adds noise to `size` values of L2 norm `clip_norm`, on whole numbers if `integer`."""

    size: int
    std: float
    clip_norm: float
    integer: bool

    @property
    def additive(self) -> bool:
        """Noise adds up like the rest."""
        return True

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns `x` [d] plus noise that depends on the client's secret and on all that it hides."""
        chance = key.private_stream("noise", random.fingerprint(x, self))
        if self.integer:
            return Encoded(x + skellam.sample(self.size, self.std**2, chance))
        return Encoded(
            noise_sum(
                x, PrivacyPlan("client", self.clip_norm, 1.0, self.std / self.clip_norm), chance
            )
        )

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns the values as they are: noise stays."""
        return check_values(x, "noise", self.size, integer=self.integer)
