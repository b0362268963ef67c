"""Rounds values to powers of two and sends sign and exponent (logarithmic quantization)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, Transform, check_values
from fedpress.core.settings import SETTINGS
from fedpress.errors import RecipeError, WireError


class Powers(BaseModel):
    """Rounds to plus or minus the largest absolute value times 2^0, 2^-1, ... 2^-k, or to zero.

    Example: with largest value 1.0, the value 0.2 becomes 0.25. Small values keep their relative
    precision; a uniform grid would round them to zero (Miyashita et al. 2016, arXiv:1603.01025).

    >>> Powers().bind(Bound(size=3))[1].integer
    True
    """

    model_config = SETTINGS

    kind: Literal["powers"] = "powers"
    k: int = Field(
        default=7, ge=0, le=60, description="the smallest level is 2^-k times the largest value"
    )

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Returns the transform, and a bound with integers from -(k + 1) to k + 1.

        Zero is sent as 0. The sizes 2^-k, ..., 2^0 are sent as 1, ..., k + 1, with the sign.

        Raises:
            RecipeError: if the input is already integers.
        """
        if bound.integer:
            raise RecipeError(
                "its input is already integers",
                place="kind",
                cure="leave 'powers' or the quantizer before it out",
            )
        top = self.k + 1
        l2 = top * math.sqrt(bound.size)
        # Rounding can make a vector up to sqrt(2) times as long. The server scales such updates
        # down to `decoded_l2`, so this limit still holds.
        after = Bound(bound.size, l2, top, integer=True, decoded_l2=bound.decoded_l2)
        return _Powers(bound.size, top), after


@dataclass(frozen=True)
class _Powers:
    """Sends integers from -top to top, and one scale."""

    size: int
    top: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns int8 [d], and the largest absolute value as `scale` [1]."""
        scale = x.abs().max().reshape(1)
        # If all values are zero, 0 / 0 gives NaN, which becomes 0.
        share = (x.abs() / scale).nan_to_num(0.0)
        # Values that round to less than 2^-k get level 0. So do zeros, whose log2 is -infinity.
        levels = (self.top + share.log2().round()).clamp(min=0)
        # k is at most 60, so all levels fit into int8.
        return Encoded((x.sign() * levels).to(torch.int8), {"scale": scale})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [d]."""
        q = check_values(Encoded(x.values), "powers", self.size, integer=True)
        scale = x.side.get("scale")
        if scale is None or len(x.side) != 1 or scale.dtype != torch.float32 or scale.shape != (1,):
            raise WireError(
                "expected one float32 [1]",
                place="powers.scale",
                cure="use the same recipe on both sides",
            )
        if not bool(torch.isfinite(scale).all()) or float(scale) < 0:
            raise WireError(
                "it is negative, NaN or infinity",
                place="powers.scale",
                cure="lower the learning rate",
            )
        if bool(((q < -self.top) | (q > self.top)).any()):
            raise WireError(
                f"a level is beyond {self.top}",
                place="powers.values",
                cure="use the same recipe on both sides",
            )
        levels = torch.exp2(q.float().abs() - self.top)
        return torch.where(q == 0, 0.0, q.sign() * levels * scale)
