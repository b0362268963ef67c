"""The trimmed mean: the largest and smallest values of every coordinate do not count."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fedpress.federation.aggregators.centre import CoordinateWise


class Trimmed(CoordinateWise):
    """`aggregator = { kind = "trimmed", beta = 0.1 }`.

    Yin et al. 2018 (arXiv:1803.01498), option II. Of n values of a coordinate the floor(beta n)
    smallest and as many largest are dropped; the rest is averaged. While no more than beta n
    clients send arbitrary values, each coordinate lies within the range of what the honest clients
    sent.
    """

    kind: Literal["trimmed"] = "trimmed"
    beta: float = Field(default=0.1, ge=0, lt=0.5, description="share of clients on each side")

    def centre(self, rows: Tensor) -> Tensor:
        """Returns the mean of what is left of each column."""
        drop = int(self.beta * len(rows))
        return rows.sort(dim=0).values[drop : len(rows) - drop].double().mean(0)
