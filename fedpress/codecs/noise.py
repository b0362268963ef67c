"""Adds noise to a client's update: Gaussian noise to floats, Skellam noise to integers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.core import random
from fedpress.core.settings import SETTINGS
from fedpress.privacy.noise import skellam
from fedpress.privacy.noise.mechanism import noise_sum
from fedpress.privacy.plan import PrivacyPlan


class Noise(BaseModel):
    """Adds noise of standard deviation `std` to each value.

    In a recipe, this transform gives no privacy guarantee, because the size of the noise does not
    follow from a privacy budget. For a guarantee, use the key `privacy = {...}` instead.
    """

    model_config = SETTINGS

    kind: Literal["noise"] = "noise"
    std: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="standard deviation of the noise on each value; after discretize in grid steps",
    )

    def bind(self, bound: Bound) -> tuple[BoundNoise, Bound]:
        """Returns the transform, and a bound with infinite norms: noise has no largest value."""
        after = replace(bound, l2=math.inf, linf=math.inf, spread=math.inf, decoded_l2=math.inf)
        # `noise_sum` rounds to a grid and compensates this with a few millionths more noise. It
        # uses the clip norm only for that, so any finite value works for unbounded vectors.
        clip_norm = bound.l2 if bound.l2 < math.inf else 1.0
        return BoundNoise(bound.size, self.std, clip_norm, bound.integer), after


@dataclass(frozen=True)
class BoundNoise:
    """Adds noise to vectors.

    Attributes:
        size: number of values.
        std: standard deviation of the noise on each value.
        clip_norm: largest L2 norm of the vectors; 1.0 if they have no bound.
        integer: whether the values are integers. True: Skellam noise. False: Gaussian noise.
    """

    size: int
    std: float
    clip_norm: float
    integer: bool

    @property
    def additive(self) -> bool:
        """True: noise adds up like the values."""
        return True

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns `x` [d] plus noise."""
        # The same noise must never be added to two different vectors: their difference would reveal
        # both. So the digest of the values is part of the stream's name.
        source = key.private_stream("noise", random.fingerprint(x, self))
        if self.integer:
            return Encoded(x + skellam.sample(self.size, self.std**2, source))
        plan = PrivacyPlan("client", self.clip_norm, 1.0, self.std / self.clip_norm)
        return Encoded(noise_sum(x, plan, source))

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns the values as they are, with their noise."""
        return check_values(x, "noise", self.size, integer=self.integer)
