"""Observers: functions that choose the range of quantized inputs from a histogram of the inputs.

The range is the lowest and the highest value that can be represented; other values are clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedpress.nn.quant_scheme import InputQuantization, calculate_qparams

BINS = 2048
"""Number of bins of a histogram, as in TensorRT."""
Observer = Literal["minmax", "percentile", "mse", "entropy"]
"""Names of the observers."""


@dataclass
class Histogram:
    """Counts [BINS] (float64) of values from `low` to `high`, in bins of equal width."""

    low: float
    high: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add_(self, x: Tensor) -> None:
        """Counts the values of `x`."""
        high = self._upper_edge()
        self.counts += torch.histc(x.detach().float(), BINS, self.low, high).double().cpu()

    @property
    def centers(self) -> Tensor:
        """The center of each bin [BINS], float64."""
        span = self._upper_edge() - self.low
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * span / BINS

    def _upper_edge(self) -> float:
        """The upper edge of the last bin; `low` + 1 if `high` equals `low`."""
        return self.high if self.high > self.low else self.low + 1


def minmax(seen: Histogram, quantization: InputQuantization) -> tuple[float, float]:
    """Returns the smallest and the largest observed value as the range."""
    return seen.low, seen.high


def percentile(
    seen: Histogram, quantization: InputQuantization, *, share: float = 0.9999
) -> tuple[float, float]:
    """Returns the range that contains `share` of the values.

    Half of the other values are below the range, half are above it.
    """
    # A bin is inside if more than `edge` values lie at or below it, and at or above it.
    edge = (1 - share) / 2 * seen.counts.sum()
    below = seen.counts.cumsum(0)
    above = seen.counts.flip(0).cumsum(0).flip(0)
    inside = ((below > edge) & (above > edge)).nonzero().flatten()
    centers = seen.centers
    half_bin = (centers[1] - centers[0]) / 2
    low = float(centers[inside[0]] - half_bin)
    high = float(centers[inside[-1]] + half_bin)
    return min(max(low, seen.low), seen.high), max(min(high, seen.high), seen.low)


def mse(seen: Histogram, quantization: InputQuantization) -> tuple[float, float]:
    """Returns the range with the least squared rounding error.

    Both ends of the observed range are multiplied by 1%, 2%, ..., 100%; these ranges are tried.
    """
    best = (float("inf"), (seen.low, seen.high))
    # Errors are computed at the centers of the bins, so the data need not be read for each range.
    for share in torch.linspace(0.01, 1, 100).tolist():
        low, high = seen.low * share, seen.high * share
        squares = (_rounded(seen.centers, low, high, quantization) - seen.centers).square()
        error = float((seen.counts * squares).sum())
        best = min(best, (error, (low, high)))
    return best[1]


def entropy(seen: Histogram, quantization: InputQuantization) -> tuple[float, float]:
    """Returns the range with the least KL divergence between values and quantized values.

    The method of TensorRT (S. Migacz, 8-bit Inference with TensorRT, GTC 2017): P is the histogram
    inside the range, with all values outside of it added to the end bins. Q is the histogram inside
    the range without these values, averaged within each step of the grid. Both ends are clipped at
    the same distance from 0. As in TensorRT, the bin that
    contains 0 is not counted: 0 is exact in every grid, but averaging would spread the many zeros
    of a ReLU over the neighbouring bins.
    """
    centers = seen.centers
    bin_width = centers[1] - centers[0]
    counts = seen.counts.where(centers.abs() > bin_width / 2 * (1 + 1e-9), 0.0)
    # The distance of the farther end from 0.
    reach = max(-seen.low, seen.high)
    best = (float("inf"), (seen.low, seen.high))
    for share in torch.linspace(0.05, 1, 96).tolist():
        low = max(seen.low, -reach * share)
        high = min(seen.high, reach * share)
        inside = (centers >= low) & (centers <= high)
        # A range without values has no distribution.
        if int(inside.sum()) < 2 or not float(counts[inside].sum()):
            continue

        p = counts[inside].clone()
        q = _averaged_within_steps(p, centers[inside], low, high, quantization.highest + 1)
        # Clipped values are rounded to the ends of the grid.
        p[0] += counts[centers < low].sum()
        p[-1] += counts[centers > high].sum()
        p = p / p.sum()
        q = q / q.sum()
        observed = p > 0
        ratio = p[observed] / q[observed].clamp_min(1e-12)
        divergence = float((p[observed] * ratio.log()).sum())
        best = min(best, (divergence, (low, high)))
    return best[1]


def _averaged_within_steps(
    counts: Tensor, centers: Tensor, low: float, high: float, levels: int
) -> Tensor:
    """Returns the counts averaged over the non-empty bins of each of `levels` equal steps."""
    step = ((centers - low) / (high - low) * levels).long().clamp(0, levels - 1)
    is_filled = (counts > 0).double()
    totals = torch.zeros(levels, dtype=torch.float64).index_add(0, step, counts)
    bins = torch.zeros(levels, dtype=torch.float64).index_add(0, step, is_filled)
    return (totals / bins.clamp_min(1))[step] * is_filled


OBSERVERS: Mapping[str, Callable[[Histogram, InputQuantization], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
"""Name -> observer. It gets a histogram and the settings, and returns the range (low, high)."""


def _rounded(x: Tensor, low: float, high: float, quantization: InputQuantization) -> Tensor:
    """Returns `x` rounded to the grid from `low` to `high`."""
    scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(high), quantization)
    scale, zero = scale.double(), zero.double()
    return ((x / scale).round().clamp(-zero, quantization.highest - zero)) * scale
