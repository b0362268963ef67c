"""The trimmed mean: the mean of each coordinate without its largest and smallest values."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fedpress.federation.aggregators.centre import CoordinateWise


class Trimmed(CoordinateWise):
    """`aggregator = { kind = "trimmed", beta = 0.1 }`.

    Yin et al. 2018 (arXiv:1803.01498), option II. Of n values of a coordinate the floor(beta n)
    smallest and as many largest are dropped, and the rest is averaged. Example: of 10 clients with
    beta = 0.1, 8 values are averaged. As long as at most beta n clients send arbitrary values, each
    coordinate lies within the range of the honest clients' values.
    """

    kind: Literal["trimmed"] = "trimmed"
    beta: float = Field(
        default=0.1, ge=0, lt=0.5, description="share of values dropped at each end"
    )

    def centre(self, rows: Tensor) -> Tensor:
        """Returns the mean of each column without its dropped values."""
        drop = int(self.beta * len(rows))
        return rows.sort(dim=0).values[drop : len(rows) - drop].double().mean(0)
