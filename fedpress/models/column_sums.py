"""A network whose gradient is a query: bounded sums of the columns of a table.

The stage `statistics` asks it. The output is w . phi(x), where phi(x) holds what a row adds to each
sum. With the loss -output (`fedpress.tasks.column_sums`), the gradient with respect to w is -phi(x),
whatever w is. So one step of federated SGD adds up phi over the rows of all clients, and clipping,
noise, secure sums and accounting of federated training are those of the query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpress.core.examples import MISSING

MOMENTS = 2
"""Sums of a column of numbers: of the values, and of their squares."""


@dataclass(frozen=True)
class Number:
    """An input of numbers, of which moments or counts are asked.

    Attributes:
        at: position of the input.
        low: lower bound; smaller numbers count as this one.
        high: upper bound.
        bins: number of equal bins between the bounds, a power of 2; 0: moments in the place of
            counts. Counts are asked of a binary tree: of 2 halves, 4 quarters, ..., all bins.
    """

    at: int
    low: float
    high: float
    bins: int = 0

    @property
    def levels(self) -> int:
        """Levels of the tree of bins."""
        return self.bins.bit_length() - 1

    @property
    def width(self) -> int:
        """Number of sums."""
        return 2 * self.bins - 2 if self.bins else MOMENTS

    @property
    def square(self) -> float:
        """The largest squared L2 norm of what a row adds to the sums."""
        # A row counts in one bin of each level. Moments: u^2 + (2 u^2 - 1)^2 is largest at u = 1.
        return float(self.levels) if self.bins else 2.0

    @property
    def center(self) -> float:
        """The middle of the bounds."""
        return (self.low + self.high) / 2

    @property
    def half(self) -> float:
        """Half the distance of the bounds."""
        return (self.high - self.low) / 2

    def terms(self, x: Tensor, there: Tensor) -> Tensor:
        """Returns what each row adds, float32 [n, width].

        Args:
            x: all inputs [n, d].
            there: whether a row has a value, float32 [n, 1].
        """
        u = ((x[:, self.at : self.at + 1] - self.center) / self.half).clamp(-1, 1)
        if not self.bins:
            # Squares as 2 u^2 - 1, which uses the range from -1 to 1 as u does: a variance needs the
            # more precise of both sums.
            return torch.cat([u, 2 * u.square() - 1], dim=1) * there
        leaf = ((u[:, 0] + 1) * (self.bins / 2)).long().clamp(0, self.bins - 1)
        parts = []
        for level in range(1, self.levels + 1):
            node = leaf >> (self.levels - level)
            parts.append(node[:, None] == torch.arange(2**level, device=x.device))
        return torch.cat(parts, dim=1) * there


@dataclass(frozen=True)
class Flags:
    """Inputs of 0 or 1, of which at most one is 1 in a row: the words of a column.

    Attributes:
        at: position of the first input.
        width: number of inputs.
    """

    at: int
    width: int
    square = 1.0

    def terms(self, x: Tensor, there: Tensor) -> Tensor:
        """See `Number.terms`."""
        return x[:, self.at : self.at + self.width].clamp(0, 1) * there


@dataclass(frozen=True)
class Tokens:
    """Sequences of token numbers, each of which votes for the k different numbers that it has.

    Each of them gets 1 / sqrt(k), as the weights of Gopi et al. 2020 (arXiv:2002.09745, section 4):
    so a vote has the L2 norm 1, and a rare token that occurs once counts as much as a frequent one
    of the same sequence. Number 0 (padding and unknown tokens) gets no vote.

    Attributes:
        count: number of token numbers, 0 included.
        at: position of the first input.
    """

    count: int
    at: int = 0
    square = 1.0

    @property
    def width(self) -> int:
        """Number of sums."""
        return self.count - 1

    def terms(self, x: Tensor, there: Tensor) -> Tensor:
        """See `Number.terms`; `x` are token numbers [n, length]."""
        ones = torch.ones_like(x, dtype=torch.float32)
        has = ones.new_zeros(len(x), self.count).scatter(1, x.long(), ones)[:, 1:]
        return has / has.sum(1, keepdim=True).clamp(min=1).sqrt()


class ColumnSums(nn.Module):
    """See the top of this file.

    Args:
        numbers: (at, low, high, bins) of each input of numbers, see `Number`.
        flags: (at, width) of each column of words, see `Flags`.
        tokens: number of token numbers, if the inputs are sequences of these, see `Tokens`; 0: they
            are columns.
        gaps: whether cells may be missing. If so, the rows with a value are counted for each column.
        counted: whether all rows are counted, in the first sum. The divisor of the sums may be that
            of all clients; the count then says what share of them answered. With `gaps` the counts
            of the columns say so.

    >>> sums = ColumnSums(numbers=((0, 0.0, 100.0, 0),))
    >>> sums.phi(torch.tensor([[75.0], [200.0]])).tolist()
    [[0.5, -0.5], [1.0, 1.0]]
    """

    def __init__(
        self,
        *,
        numbers: tuple[tuple[int, float, float, int], ...] = ((0, -1.0, 1.0, 0),),
        flags: tuple[tuple[int, int], ...] = (),
        tokens: int = 0,
        gaps: bool = False,
        counted: bool = False,
    ) -> None:
        super().__init__()
        self.gaps = gaps
        self.counted = counted and not gaps
        self.columns: tuple[Number | Flags | Tokens, ...] = (
            *(Number(*one) for one in numbers),
            *(Flags(*one) for one in flags),
            *((Tokens(tokens),) if tokens else ()),
        )
        width = int(self.counted) + sum(self.width_of(column) for column in self.columns)
        self.sums = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.sums.weight)

    def width_of(self, column: Number | Flags | Tokens) -> int:
        """Returns the number of sums of a column, with the count of its values."""
        return column.width + int(self.gaps)

    @property
    def norm(self) -> float:
        """The largest L2 norm of what a row adds to all sums: the sensitivity of the query."""
        columns = sum(column.square + int(self.gaps) for column in self.columns)
        return math.sqrt(int(self.counted) + columns)

    def phi(self, x: Tensor) -> Tensor:
        """Returns what each row [n, d] adds to each sum, float32 [n, width]."""
        ones = torch.ones_like(x[:, :1], dtype=self.sums.weight.dtype)
        parts = [ones] if self.counted else []
        for column in self.columns:
            # Token numbers are integers, which have no `MISSING`.
            first = x[:, column.at : column.at + 1].to(ones.dtype)
            there = (first != MISSING).to(ones.dtype)
            if self.gaps:
                parts.append(there)
            parts.append(column.terms(x, there))
        return torch.cat(parts, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps inputs [n, d] to w . phi(x), [n, 1]."""
        product: Tensor = self.sums(self.phi(x))
        return product
