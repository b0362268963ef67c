"""Low rank: each weight matrix of an update as the product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.errors import RecipeError, WireError


class LowRank(BaseModel):
    """One power iteration from a random start finds the `rank` main directions of every weight tensor, as a matrix.

    PowerSGD (Vogels et al. 2019, arXiv:1905.13727) without its warm start, so no state is kept. Tensors that would
    not become smaller, such as biases, travel whole. Biased: use it with error feedback.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lowrank"] = "lowrank"
    rank: int = Field(
        default=4, ge=1, description="columns of the two thin matrices that stand for each weight"
    )

    def bind(self, bound: Bound) -> tuple[BoundLowRank, Bound]:
        """Needs the shapes of the parameters, so it must come before anything that mixes or drops values."""
        if sum(prod(s) for s in bound.shapes) != bound.size:
            raise RecipeError(
                "it needs whole layers",
                place="kind",
                cure="put it first in the list, behind 'clip' at most",
            )
        plan = tuple(_Layer(prod(s), *_sides(s, self.rank)) for s in bound.shapes)
        size = sum(layer.values for layer in plan)
        # The values are factors: their norms promise nothing.
        return BoundLowRank(bound.size, plan), Bound(size, decoded_l2=bound.decoded_l2)


@dataclass(frozen=True)
class _Layer:
    """A parameter of `size` values as a matrix [rows, columns] of rank `rank`; rank 0 means it travels whole."""

    size: int
    rows: int
    columns: int
    rank: int

    @property
    def values(self) -> int:
        return self.rank * (self.rows + self.columns) if self.rank else self.size


@dataclass(frozen=True)
class BoundLowRank:
    """Writes `size` values as the factors of `layers`."""

    size: int
    layers: tuple[_Layer, ...]

    @property
    def additive(self) -> bool:
        """The sum of two products is not the product of the sums."""
        return False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the factors of all layers of `x` [d], one after another."""
        chance, parts = key.client_stream("lowrank"), []
        for layer, part in zip(
            self.layers, x.split([layer.size for layer in self.layers]), strict=True
        ):
            if not layer.rank:
                parts.append(part)
                continue
            matrix = part.view(layer.rows, layer.columns)
            start = chance.normal(layer.columns, layer.rank, dtype=torch.float32)
            # Orthogonal in between: float32 would lose the small directions of the product of three matrices.
            near = torch.linalg.qr(matrix @ start).Q
            left = torch.linalg.qr(matrix @ (matrix.T @ near)).Q
            parts += [left.reshape(-1), (left.T @ matrix).reshape(-1)]
        return Encoded(torch.cat(parts) if parts else x)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Multiplies the factors out."""
        values = check_values(x, "lowrank", sum(layer.values for layer in self.layers))
        if values.dtype != torch.float32:
            raise WireError(
                f"got {values.dtype}, expected torch.float32",
                place="lowrank",
                cure="use the same recipe on both sides",
            )
        parts = []
        for layer, part in zip(
            self.layers, values.split([layer.values for layer in self.layers]), strict=True
        ):
            if layer.rank:
                left, right = part.split([layer.rows * layer.rank, layer.rank * layer.columns])
                part = (
                    left.view(layer.rows, layer.rank) @ right.view(layer.rank, layer.columns)
                ).reshape(-1)
            parts.append(part)
        return torch.cat(parts) if parts else values


def _sides(shape: tuple[int, ...], rank: int) -> tuple[int, int, int]:
    rows = shape[0] if len(shape) > 1 else 1
    columns = prod(shape) // max(1, rows)
    smaller = rank <= min(rows, columns) and rank * (rows + columns) < rows * columns
    return rows, columns, rank if smaller else 0
