"""Powers: a sign and an exponent for each value, so small values are kept as well as large ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, Transform, check_values
from fedpress.errors import RecipeError, WireError


class Powers(BaseModel):
    """Rounds to plus or minus the largest value times 2^0, 2^-1, ... 2^-k, or zero (Miyashita et al. 2016).

    >>> Powers().bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["powers"] = "powers"
    k: int = Field(
        default=7, ge=0, le=60, description="the least level is 2^-k of the largest value"
    )

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Promises whole numbers up to k + 1: zero, or one more than the exponent counted from 2^-k."""
        if bound.integer:
            raise RecipeError(
                "the values before it are whole numbers already",
                place="kind",
                cure="put 'powers' first",
            )
        top = self.k + 1
        l2 = top * math.sqrt(bound.size)
        # rounding lengthens by at most sqrt(2); the server cuts back to what was promised before
        after = Bound(bound.size, l2, top, integer=True, decoded_l2=bound.decoded_l2)
        return _Powers(bound.size, top), after


@dataclass(frozen=True)
class _Powers:
    """Whole numbers in -top .. top beside one scale."""

    size: int
    top: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        scale = x.abs().max().reshape(1)
        share = (x.abs() / scale).nan_to_num(0.0)  # all are zero where the largest is
        levels = (self.top + share.log2().round()).clamp(min=0)
        return Encoded((x.sign() * levels).to(torch.int8), {"scale": scale})

    def decode(self, x: Encoded, key: Key) -> Tensor:
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
