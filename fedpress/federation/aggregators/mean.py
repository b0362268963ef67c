"""The weighted mean of the updates: a running sum, so updates need not be kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from fedpress.codecs import Bound, Key
from fedpress.core.canonical import JSON
from fedpress.core.finite import CHUNK
from fedpress.core.names import ClientId
from fedpress.core.settings import SETTINGS
from fedpress.federation.aggregators.base import Contribution, Total, Weights
from fedpress.federation.exchange import Transport
from fedpress.federation.vector_codec import VectorCodec

BLOCKS = 32
"""Largest number of blocks of a cohort. More would let more processes work at a time, and each block
costs one further addition."""


class Mean(BaseModel):
    """Adds weight x update over all clients; the server later divides the sum."""

    model_config = SETTINGS

    kind: Literal["mean"] = "mean"

    @property
    def sees_updates(self) -> bool:
        """Yes: the server decodes and clips every update itself."""
        return True

    @property
    def weights(self) -> Weights:
        """Any weights: clients may be weighed by their numbers of examples."""
        return "examples"

    @property
    def sums(self) -> bool:
        """Yes: the sum is divided later."""
        return True

    def sensitivity(self, moved: Bound, cohort: int) -> float | None:
        """Returns the L2 bound of one vector: with weight 1, the sum moves as far as the vector."""
        return moved.l2

    def check(self, vector_codecs: Sequence[VectorCodec]) -> None:
        """Accepts any codecs: vectors are decoded before they are added."""

    def open(self, transport: Transport | None = None, run: str = "") -> Mean:
        """Returns itself: a mean needs no exchange before the first round."""
        return self

    def invite(self, cohort: Sequence[ClientId]) -> dict[str, JSON]:
        """Returns no header fields: clients need not know the cohort."""
        return {}

    def begin(
        self, vector_codecs: Sequence[VectorCodec], cohort: Sequence[ClientId], key: Key
    ) -> RunningSum:
        """Returns sums that are zero."""
        return RunningSum.of(vector_codecs, block_size(len(cohort)))

    def part(self, vector_codecs: Sequence[VectorCodec]) -> RunningSum:
        """Returns sums that are zero, for clients of one block."""
        return RunningSum.of(vector_codecs, None)


def block_size(cohort: int) -> int:
    """Returns how many clients' updates are added up before their sum is added to the total.

    Several processes can sum one block each, and the bits do not depend on their number. A cohort
    has up to `BLOCKS` blocks.

    >>> block_size(10), block_size(1000)
    (1, 32)
    """
    return max(1, -(-cohort // BLOCKS))


def _add_scaled_(total: Tensor, vector: Tensor, weight: float) -> None:
    """Adds weight x vector to `total`, float64 [d]. torch's mixed `add_` takes 1.5 times as long."""
    wide = torch.empty(min(CHUNK, len(total)), dtype=torch.float64)
    for part, values in zip(total.split(CHUNK), vector.split(CHUNK), strict=True):
        part.add_(wide[: len(part)].copy_(values), alpha=weight)


@dataclass(eq=False)
class RunningSum:
    """The weighted sum of each named vector.

    Sums are float64, because float32 rounding errors would add up over a large cohort. Answers in
    blocks of `per_block` positions are added up first, and then the blocks.

    Attributes:
        sums: name of a vector -> sum of weight x vector over the finished blocks.
        per_block: number of positions in a block; None: answers are added to `sums` at once.
        weight: sum of the clients' weights so far.
        block: the sums of the present block; empty before the first one.
        number: number of the present block.
        is_open: whether the present block has answers that are not in `sums`.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    per_block: int | None = None
    weight: float = 0.0
    block: dict[str, Tensor] = field(default_factory=dict)
    number: int = 0
    is_open: bool = False

    @classmethod
    def of(cls, vector_codecs: Sequence[VectorCodec], per_block: int | None) -> RunningSum:
        """Returns sums that are zero."""
        sums = {}
        for codec in vector_codecs:
            sums[codec.name] = torch.zeros(codec.size, dtype=torch.float64)
        # The sum of a block of one answer is that answer.
        return cls(sums, None if per_block == 1 else per_block)

    def add(self, contribution: Contribution) -> None:
        """Adds each vector of a client, multiplied by the client's weight."""
        for name, total in self._block_at(contribution.position).items():
            _add_scaled_(total, contribution.vectors[name], contribution.weight)
        self.weight += contribution.weight

    def merge(self, part: Total, position: int, clients: int) -> None:
        """Adds the sums over several clients of one block; see `PartialSum`."""
        target = self.sums if self._is_whole_block(position, clients) else self._block_at(position)
        for name, total in target.items():
            total.add_(part.vectors[name])
        self.weight += part.weight

    def close(self) -> Total:
        """Returns the sums and the total weight."""
        self._finish_block()
        return Total(self.sums, self.weight)

    def _block_at(self, position: int) -> dict[str, Tensor]:
        """Returns the sums of the block of this position, after finishing an earlier one."""
        if self.per_block is None:
            return self.sums
        if position // self.per_block != self.number:
            self._finish_block()
            self.number = position // self.per_block
        if not self.block:
            self.block = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        self.is_open = True
        return self.block

    def _is_whole_block(self, position: int, clients: int) -> bool:
        """Whether these clients are a block, whose sum then needs no copy in between."""
        if self.per_block is None or position % self.per_block or clients != self.per_block:
            return False
        self._finish_block()
        self.number = position // self.per_block
        return True

    def _finish_block(self) -> None:
        """Adds the present block to the total, and empties it."""
        if not self.is_open:
            return
        for name, values in self.block.items():
            self.sums[name].add_(values)
            values.zero_()
        self.is_open = False
