"""Clips the L2 norm of an update, which limits how far one client can move the sum of updates."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key
from fedpress.core.settings import SETTINGS
from fedpress.privacy.noise.mechanism import clip


class Clip(BaseModel):
    """Scales an update down to the L2 norm `clip_norm` if it is longer.

    >>> Clip(clip_norm=1.0).bind(Bound(size=3, l2=2.0))[1]
    Bound(size=3, l2=1.0, linf=1.0, integer=False, spread=inf, shapes=(), decoded_l2=1.0)
    """

    model_config = SETTINGS

    kind: Literal["clip"] = "clip"
    clip_norm: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="largest L2 norm of an update; a longer one is scaled down to it",
    )

    @property
    def additive(self) -> bool:
        """True: decoding is the identity, so a sum of encoded updates decodes to their sum."""
        return True

    def bind(self, bound: Bound) -> tuple[Clip, Bound]:
        """Returns this object as the transform, and a bound with norms of at most `clip_norm`."""
        # Clipping needs nothing but its settings, so this object is also the transform.
        # No single value is larger than the L2 norm, hence the bound on `linf`.
        return self, replace(
            bound,
            l2=min(bound.l2, self.clip_norm),
            linf=min(bound.linf, self.clip_norm),
            decoded_l2=min(bound.decoded_l2, self.clip_norm),
        )

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Scales `x` [d] down to the clip norm; PrivacyError if a value is not finite."""
        return Encoded(clip(x, self.clip_norm))

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns `x.values`: clipping is not undone."""
        return x.values
