"""Sends each weight matrix of an update as a product of two thin matrices (low rank)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.codecs.base import Bound, Encoded, Key, check_values
from fedpress.core.settings import SETTINGS
from fedpress.errors import RecipeError, WireError


class LowRank(BaseModel):
    """Approximates each weight tensor, reshaped to a matrix, by a matrix of rank `rank`.

    Example: with rank 4, a weight [64, 128] becomes factors [64, 4] and [4, 128]: 768 values
    instead of 8,192.

    The method is one power iteration from a random start: PowerSGD (Vogels et al. 2019,
    arXiv:1905.13727, Algorithm 1) without its warm start, which would need state. Tensors that
    would not become smaller, such as biases, are sent unchanged. The result is biased, so use error
    feedback: it adds what was lost to the client's next update.
    """

    model_config = SETTINGS

    kind: Literal["lowrank"] = "lowrank"
    rank: int = Field(
        default=4, ge=1, description="rank of the approximation of each weight matrix"
    )

    def bind(self, bound: Bound) -> tuple[BoundLowRank, Bound]:
        """Returns the transform, and a bound whose size is the number of values of all factors.

        Raises:
            RecipeError: if a transform before this one mixes or drops values, so that the vector no
                longer consists of matrices.
        """
        # Such transforms leave `shapes` empty.
        if sum(prod(s) for s in bound.shapes) != bound.size:
            raise RecipeError(
                "it needs weight matrices, and a transform before it mixes or drops their values",
                place="kind",
                cure="put it first in the list, or directly after 'clip'",
            )
        layers = []
        for shape in bound.shapes:
            rows, columns, rank = _rows_columns_rank(shape, self.rank)
            layers.append(_Layer(prod(shape), rows, columns, rank))
        size = sum(layer.values for layer in layers)
        # The norms of the two factors are not bounded: only their product is.
        after = Bound(size, decoded_l2=bound.decoded_l2)
        return BoundLowRank(bound.size, tuple(layers)), after


@dataclass(frozen=True)
class _Layer:
    """A parameter of the model, reshaped to a matrix.

    Attributes:
        size: number of values.
        rows: rows of the matrix.
        columns: columns of the matrix.
        rank: columns of its left factor; 0 if the parameter is sent unchanged.
    """

    size: int
    rows: int
    columns: int
    rank: int

    @property
    def values(self) -> int:
        """Number of values that are sent."""
        return self.rank * (self.rows + self.columns) if self.rank else self.size


@dataclass(frozen=True)
class BoundLowRank:
    """Replaces `size` values by the factors of `layers`."""

    size: int
    layers: tuple[_Layer, ...]

    @property
    def additive(self) -> bool:
        """False: the sum of two products is not the product of the sums."""
        return False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the factors of all layers of `x` [d], one after another."""
        # The server draws nothing: it gets both factors.
        source = key.client_stream("lowrank")
        parts = []
        sizes = [layer.size for layer in self.layers]
        for layer, part in zip(self.layers, x.split(sizes), strict=True):
            if not layer.rank:
                parts.append(part)
                continue
            matrix = part.view(layer.rows, layer.columns)
            start = source.normal(layer.columns, layer.rank, dtype=torch.float32)
            # Orthogonalized after each product: in the product of three matrices, directions of
            # small singular values would be lost to float32 rounding.
            basis = torch.linalg.qr(matrix @ start).Q
            left = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
            parts += [left.reshape(-1), (left.T @ matrix).reshape(-1)]
        return Encoded(torch.cat(parts) if parts else x)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns the products of the factors, float32 [d].

        Raises:
            WireError: if the values have another number or type.
        """
        values = check_values(x, "lowrank", sum(layer.values for layer in self.layers))
        if values.dtype != torch.float32:
            raise WireError(
                f"got {values.dtype}, expected torch.float32",
                place="lowrank",
                cure="use the same recipe on both sides",
            )
        parts = []
        sizes = [layer.values for layer in self.layers]
        for layer, part in zip(self.layers, values.split(sizes), strict=True):
            if not layer.rank:
                parts.append(part)
                continue
            left, right = part.split([layer.rows * layer.rank, layer.rank * layer.columns])
            left = left.view(layer.rows, layer.rank)
            right = right.view(layer.rank, layer.columns)
            parts.append((left @ right).reshape(-1))
        return torch.cat(parts) if parts else values


def _rows_columns_rank(shape: tuple[int, ...], rank: int) -> tuple[int, int, int]:
    """Returns rows, columns and rank; rank 0 if the factors would not be smaller."""
    # One row for each output channel; a vector such as a bias is a single row.
    rows = shape[0] if len(shape) > 1 else 1
    columns = prod(shape) // max(1, rows)
    smaller = rank <= min(rows, columns) and rank * (rows + columns) < rows * columns
    return rows, columns, rank if smaller else 0
