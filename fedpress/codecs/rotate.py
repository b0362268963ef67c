"""Rotate: a random orthogonal map that spreads every value over a block, so that no coordinate sticks out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.errors import RecipeError


class Rotate(BaseModel):
    """Random signs, then Hadamard transforms of blocks of `block` values (Suresh et al. 2017, arXiv:1611.00429).

    Nothing is padded: what is left behind the last whole block is rotated together with values before it, in a second
    turn. So the size stays, which saves up to half of the bytes that padding to a power of two would cost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["rotate"] = "rotate"
    block: int = Field(default=65536, ge=2, description="a power of two")

    def bind(self, bound: Bound) -> tuple[BoundRotate, Bound]:
        """Keeps the L2 norm; each value is spread over a block, as `spread` says."""
        if self.block & (self.block - 1):
            raise RecipeError(
                f"got {self.block}, expected a power of two, for instance 65536",
                place="block",
            )
        if bound.integer:
            raise RecipeError(
                "it comes after whole numbers",
                place="kind",
                cure="put it before 'discretize' or 'quantize'",
            )
        block = min(self.block, 1 << max(0, bound.size.bit_length() - 1))
        after = replace(bound, linf=bound.l2, spread=bound.l2 / block**0.5, shapes=())
        return BoundRotate(bound.size, block), after


@dataclass(frozen=True)
class BoundRotate:
    """Rotates `size` values in blocks of `block`."""

    size: int
    block: int

    @property
    def additive(self) -> bool:
        """Linear, and the same for all clients of a round."""
        return True

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Rotates `x` [d]."""
        x = x * self._signs(key)
        whole = self.size - self.size % self.block
        x[:whole] = hadamard(x[:whole], self.block)
        if whole < self.size:
            x[self.size - self.block :] = hadamard(x[self.size - self.block :], self.block)
        return Encoded(x)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Rotates back."""
        values = check_values(x, "rotate", self.size).clone()
        whole = self.size - self.size % self.block
        if whole < self.size:
            values[self.size - self.block :] = hadamard(
                values[self.size - self.block :], self.block
            )
        values[:whole] = hadamard(values[:whole], self.block)
        return values.mul_(self._signs(key))

    def _signs(self, key: Key) -> Tensor:
        words = key.round_stream("rotate").words(math.ceil(self.size / 64))
        coins = np.unpackbits(words.astype("<u8").view(np.uint8), count=self.size)
        return torch.from_numpy(coins).float().mul_(2).sub_(1)


def hadamard(x: Tensor, block: int) -> Tensor:
    """Returns the orthonormal Walsh-Hadamard transform of each run of `block` values of `x` [k block]; its own inverse.

    H of order 2^(a+b) is the Kronecker product of those of order 2^a and 2^b: two products of small matrices.

    >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    bits = block.bit_length() - 1
    rows, columns = 1 << bits // 2, 1 << bits - bits // 2
    grid = x.reshape(-1, rows, columns)
    left, right = _matrix(rows).to(x.dtype), _matrix(columns).to(x.dtype)
    return (left @ (grid.reshape(-1, columns) @ right).view_as(grid)).reshape(-1)


@lru_cache(maxsize=32)
def _matrix(order: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h.div(order**0.5)
