"""Sends only some values of an update: the largest ones (`topk`) or random ones (`randomk`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.core.settings import SETTINGS
from fedpress.errors import RecipeError


class TopK(BaseModel):
    """Keeps the values of largest magnitude and sets the others to zero.

    Example: density = 0.01 keeps 1,000 of 100,000 values. Packing (`fedpress.wire`) then sends
    positions and values. The result is biased, so use error feedback: it adds what was lost to the
    client's next update (Stich et al. 2018, arXiv:1809.07599).
    """

    model_config = SETTINGS

    kind: Literal["topk"] = "topk"
    density: float = Field(default=0.01, gt=0, le=1, description="share of the values that is kept")

    def bind(self, bound: Bound) -> tuple[BoundTopK, Bound]:
        """Returns the transform and the same bound: setting values to zero makes no norm larger."""
        return BoundTopK(bound.size, _count(self.density, bound.size)), bound


@dataclass(frozen=True)
class BoundTopK:
    """Keeps `kept` of `size` values."""

    size: int
    kept: int

    @property
    def additive(self) -> bool:
        """False: clients keep different positions, so the sum of their vectors is not sparse."""
        return False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns `x` [d] with all but its `kept` largest values zero."""
        if self.kept >= self.size:
            return Encoded(x)
        # The zeros stay in the vector: packing removes them, so no tensor of positions is needed.
        largest = x.abs().topk(self.kept, sorted=False).indices
        sparse = torch.zeros_like(x)
        sparse[largest] = x[largest]
        return Encoded(sparse)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns the values as they are."""
        return check_values(x, "topk", self.size)


class RandomK(BaseModel):
    """Sends the values at random positions, which are the same for all clients of a round.

    The positions follow from the key, so they are not sent, and a sum of clients' vectors can be
    decoded. All other values decode to zero. With `unbiased`, the sent values are multiplied by
    1 / density: the expected result is the update, but the norm grows. Without `unbiased`, use
    error feedback, which adds what was not sent to the client's next update.
    """

    model_config = SETTINGS

    kind: Literal["randomk"] = "randomk"
    density: float = Field(default=0.1, gt=0, le=1, description="share of the values that is sent")
    unbiased: bool = Field(
        default=False,
        description="multiply the sent values by 1 / density, so that the expectation is right",
    )

    def bind(self, bound: Bound) -> tuple[BoundRandomK, Bound]:
        """Returns the transform, and a bound with fewer values and scaled norms.

        Raises:
            RecipeError: if the input is integers.
        """
        if bound.integer:
            raise RecipeError(
                "its input is integers",
                place="kind",
                cure="put it before 'quantize' or 'discretize'",
            )
        kept = _count(self.density, bound.size)
        # 1 / the share that is really sent. The share may be above the density, because `kept` is
        # rounded up.
        scale = bound.size / kept if self.unbiased else 1.0
        after = replace(
            bound,
            size=kept,
            l2=bound.l2 * scale,
            linf=bound.linf * scale,
            decoded_l2=bound.decoded_l2 * scale,
            spread=math.inf,
            shapes=(),
        )
        return BoundRandomK(bound.size, kept, scale), after


@dataclass(frozen=True)
class BoundRandomK:
    """Sends `kept` of `size` values, multiplied by `scale`."""

    size: int
    kept: int
    scale: float

    @property
    def additive(self) -> bool:
        """True: all clients of a round send the same positions."""
        return True

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the drawn values [kept] of `x` [d]."""
        return Encoded(x[self._drawn(key)] * self.scale)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns the values [d] at their positions, with zeros elsewhere."""
        values = check_values(x, "randomk", self.kept)
        full = torch.zeros(self.size, dtype=values.dtype)
        full[self._drawn(key)] = values
        return full

    def _drawn(self, key: Key) -> Tensor:
        """Returns the positions that are sent, int64 [kept], rising."""
        # From the round's stream, so that all clients of a round draw the same positions.
        return key.round_stream("randomk").subset(self.size, self.kept)


def _count(density: float, size: int) -> int:
    """Returns how many of `size` values are kept, at least one if there are any."""
    return min(size, max(1, math.ceil(density * size)))
