"""Splits floats into their bytes, so that packing compresses them without any error: `lossless`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key
from fedpress.core.settings import SETTINGS
from fedpress.errors import RecipeError, WireError

PLANES = 4
"""Bytes of a float32; the first bytes of all values are a plane, all second bytes another."""
NONZERO = "nonzero"
"""Name of the side tensor that marks the values that are sent, if many values are zero."""


class Lossless(BaseModel):
    """Sends a float32 update in fewer bytes, and decodes it to the same bits.

    Without it an update of floats is sent raw, because packing takes long. Values of similar size
    have similar exponents, which take about 2.5 bits instead of 8. So a dense update of 32 bits per
    value takes about 26.6, and zeros take next to nothing. It is the last transform of a list.

    >>> Lossless().bind(Bound(size=3))[1].integer
    True
    """

    model_config = SETTINGS

    kind: Literal["lossless"] = "lossless"

    def bind(self, bound: Bound) -> tuple[BoundLossless, Bound]:
        """Returns the transform, and a bound that says that its output is integers.

        Raises:
            RecipeError: if the input is integers.
        """
        if bound.integer:
            raise RecipeError(
                "its input is integers, which are packed without it",
                place="kind",
                cure="leave 'lossless' out",
            )
        after = Bound(PLANES * bound.size, integer=True, decoded_l2=bound.decoded_l2)
        return BoundLossless(bound.size), after


@dataclass(frozen=True)
class BoundLossless:
    """Splits `size` floats into planes of bytes."""

    size: int

    @property
    def additive(self) -> bool:
        """False: bytes of floats cannot be added."""
        return False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the planes of `x` [d], uint8 [4, kept], and `nonzero`, uint8 [d] of 0 and 1.

        If fewer than 1 of 16 values are zero, all are kept, and there is no `nonzero`.
        """
        words = x.detach().cpu().contiguous().numpy().view(np.uint32)
        # Compared as integers: -0.0 has its sign bit set, and is sent.
        nonzero = words != 0
        kept = int(np.count_nonzero(nonzero))
        if 16 * kept > 15 * self.size:
            return Encoded(_planes(words))
        mask = torch.from_numpy(nonzero.view(np.uint8))
        return Encoded(_planes(words[nonzero]), {NONZERO: mask})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [d], the same bits that were encoded.

        Raises:
            WireError: if the tensors have another type or shape, or do not belong together.
        """
        planes = x.values
        side = dict(x.side)
        mask = side.pop(NONZERO, None)
        if side:
            raise _refused(min(side), "no transform reads this tensor")
        if planes.dtype != torch.uint8 or planes.dim() != 2 or len(planes) != PLANES:
            got = f"{planes.dtype} {list(planes.shape)}"
            raise _refused("values", f"got {got}, expected torch.uint8 [{PLANES}, values]")
        if mask is None:
            if planes.shape[1] != self.size:
                raise _refused("values", f"got {planes.shape[1]} values, expected {self.size}")
            return torch.from_numpy(_words(planes).view(np.float32))
        if mask.dtype != torch.uint8 or mask.shape != (self.size,) or bool((mask > 1).any()):
            raise _refused(NONZERO, f"expected 0 and 1, torch.uint8 [{self.size}]")
        if int(mask.sum()) != planes.shape[1]:
            raise _refused(NONZERO, f"it marks {int(mask.sum())} of {planes.shape[1]} values")
        full = np.zeros(self.size, np.uint32)
        full[mask.numpy().view(np.bool_)] = _words(planes)
        return torch.from_numpy(full.view(np.float32))


def _refused(tensor: str, problem: str) -> WireError:
    cure = "use the same recipe on both sides"
    return WireError(problem, place=f"lossless.{tensor}", cure=cure)


def _planes(words: NDArray[np.uint32]) -> Tensor:
    """Returns the bytes of float32 bits [n] as uint8 [4, n], the plane of the exponents last."""
    # Turned by one bit: the sign, which has no pattern, moves behind the mantissa, so the eight
    # bits of the exponent are a byte of their own.
    turned = (words << np.uint32(1)) | (words >> np.uint32(31))
    lanes = turned.astype("<u4", copy=False).view(np.uint8).reshape(-1, PLANES)
    return torch.from_numpy(np.ascontiguousarray(lanes.T))


def _words(planes: Tensor) -> NDArray[np.uint32]:
    """Returns the float32 bits [n] of `_planes`."""
    lanes = np.ascontiguousarray(planes.numpy().T)
    turned = lanes.reshape(-1).view("<u4").astype(np.uint32, copy=False)
    words: NDArray[np.uint32] = (turned >> np.uint32(1)) | (turned << np.uint32(31))
    return words
