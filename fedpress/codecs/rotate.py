"""Rotates an update at random (Hadamard), so that no value is much larger than the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.core.finite import CHUNK
from fedpress.core.settings import SETTINGS
from fedpress.errors import RecipeError

FACTOR = 4
"""Logarithm to base 2 of the largest order of a matrix that is multiplied with at once."""


class Rotate(BaseModel):
    """Multiplies values by random signs, then applies a Hadamard transform to blocks of values.

    The method is that of Suresh et al. 2017 (arXiv:1611.00429), section 4. Afterwards no value is
    much larger than the others, so quantization or secure aggregation can use a finer grid.

    Vectors are not padded, because padding to a power of two could double the bytes. Instead the
    last block overlaps with the block before it. Example: 10 values with block = 4 are rotated at
    positions 0 to 3 and 4 to 7, and then at 6 to 9.
    """

    model_config = SETTINGS

    kind: Literal["rotate"] = "rotate"
    block: int = Field(
        default=65536, ge=2, description="number of values rotated together; a power of two"
    )

    def bind(self, bound: Bound) -> tuple[BoundRotate, Bound]:
        """Returns the transform, and a bound with the same L2 norm.

        After the rotation the standard deviation of each value is at most L2 norm / sqrt(block).

        Raises:
            RecipeError: if `block` is no power of two, or the input is integers.
        """
        if self.block & (self.block - 1):
            raise RecipeError(
                f"got {self.block}, expected a power of two, for instance 65536",
                place="block",
            )
        if bound.integer:
            raise RecipeError(
                "its input is integers, which it would turn into floats",
                place="kind",
                cure="put it before 'discretize' or 'quantize'",
            )
        # A block longer than the vector would need padding.
        block = min(self.block, 1 << max(0, bound.size.bit_length() - 1))
        # In the worst case a single value is as large as the whole norm.
        after = replace(bound, linf=bound.l2, spread=bound.l2 / block**0.5, shapes=())
        return BoundRotate(bound.size, block), after


@dataclass(frozen=True)
class BoundRotate:
    """Rotates `size` values in blocks of `block`."""

    size: int
    block: int

    @property
    def additive(self) -> bool:
        """True: the rotation is linear, and the same for all clients of a round."""
        return True

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Rotates `x` [d]."""
        # A new tensor, because blocks are overwritten below.
        x = x * self._signs(key)
        whole = self.size - self.size % self.block
        x[:whole] = hadamard(x[:whole], self.block)
        if whole < self.size:
            last = slice(self.size - self.block, None)
            x[last] = hadamard(x[last], self.block)
        return Encoded(x)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Undoes the rotation."""
        values = check_values(x, "rotate", self.size).clone()
        whole = self.size - self.size % self.block
        # The steps of `encode` in reverse order; each is its own inverse.
        if whole < self.size:
            last = slice(self.size - self.block, None)
            values[last] = hadamard(values[last], self.block)
        values[:whole] = hadamard(values[:whole], self.block)
        return values.mul_(self._signs(key))

    def _signs(self, key: Key) -> Tensor:
        """Returns a random -1 or 1 for each value, float32 [size]."""
        # From the round's stream: all clients use the same signs, so their sum can be decoded.
        words = key.round_stream("rotate").words(math.ceil(self.size / 64))
        coins = np.unpackbits(words.astype("<u8").view(np.uint8), count=self.size)
        return torch.from_numpy(coins).float().mul_(2).sub_(1)


def hadamard(x: Tensor, block: int) -> Tensor:
    """Returns the orthonormal Walsh-Hadamard transform of every `block` values; its own inverse.

    The Hadamard matrix of order 2^(a+b) is the Kronecker product of the matrices of order 2^a and
    2^b. So products with small matrices replace a product with a matrix [block, block].

    Args:
        x: values [k * block].
        block: a power of two.

    >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    out = torch.empty_like(x)
    # A chunk stays in the processor's cache from one product to the next.
    size = max(block, CHUNK)
    for part, done in zip(x.split(size), out.split(size), strict=True):
        done.copy_(_rotated(part, block))
    return out


def _rotated(x: Tensor, block: int) -> Tensor:
    """Returns `hadamard` of one chunk."""
    bits = block.bit_length() - 1
    below = 0
    while below < bits:
        # Small matrices, since a product with order 2^n does n/2 times as much arithmetic as n
        # products with order 2; but each product reads and writes all values once.
        step = min(FACTOR, bits - below)
        matrix = _matrix(1 << step).to(x.dtype)
        if below:
            x = matrix @ x.reshape(-1, 1 << step, 1 << below)
        else:
            x = x.reshape(-1, 1 << step) @ matrix
        below += step
    return x.reshape(-1)


@lru_cache(maxsize=32)
def _matrix(order: int) -> Tensor:
    """Returns the orthonormal Hadamard matrix [order, order]."""
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h.div(order**0.5)
