"""The trimmed mean: the mean of each coordinate without its largest and smallest values."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fedpress.federation.aggregators.centre import CoordinateWise


class Trimmed(CoordinateWise):
    """The trimmed mean; in a recipe `aggregator = { kind = "trimmed", beta = 0.1 }`.

    Yin et al. 2018 (arXiv:1803.01498), option II. Of the n values of a coordinate, the floor(beta
    n) smallest and the floor(beta n) largest values are dropped; the others are averaged. Example:
    with 10 clients and beta = 0.1, 8 values are averaged. As long as at most beta n clients send
    arbitrary values, each coordinate lies within the range of the honest clients' values.
    """

    kind: Literal["trimmed"] = "trimmed"
    beta: float = Field(
        default=0.1, ge=0, lt=0.5, description="share of values dropped at each end"
    )

    def centre(self, rows: Tensor) -> Tensor:
        """Returns the mean of each column without its dropped values."""
        # Rounded down: at least one value is left, because beta is below 0.5.
        drop = int(self.beta * len(rows))
        return rows.sort(dim=0).values[drop : len(rows) - drop].double().mean(0)
