"""The coordinate-wise median of the updates: robust if fewer than half of them are arbitrary."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedpress.federation.aggregators.centre import CoordinateWise


class Median(CoordinateWise):
    """Takes the median of each coordinate (Yin et al. 2018, arXiv:1803.01498, option I).

    As long as fewer than half of the clients send arbitrary values, each coordinate lies within the
    range of the honest clients' values. The median of an even number of values is the mean of the
    two in the middle.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 5.0], [2.0, 9.0], [100.0, 6.0], [4.0, 0.0]])
    >>> Median().centre(rows).tolist()
    [3.0, 5.5]
    """

    kind: Literal["median"] = "median"

    def centre(self, rows: Tensor) -> Tensor:
        """Returns the median of each column."""
        # torch.median would return the lower of the two middle values.
        ordered = rows.sort(dim=0).values
        last = len(rows) - 1
        lower = ordered[last // 2].double()
        upper = ordered[last - last // 2].double()
        return (lower + upper) / 2
