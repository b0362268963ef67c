"""How far a grid reaches: ranges taken from a histogram of what was seen on public examples, a table of rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedpress.nn.quant_scheme import InputQuantization, calculate_qparams

BINS = 2048
Observer = Literal["minmax", "percentile", "mse", "entropy"]


@dataclass
class Histogram:
    """Counts [BINS], float64, of the values in low..high, bins of one width."""

    low: float
    high: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add_(self, x: Tensor) -> None:
        """Counts the values of `x`."""
        # torch.histc wants a span; a constant input has none.
        high = self.high if self.high > self.low else self.low + 1
        self.counts += torch.histc(x.detach().float(), BINS, self.low, high).double().cpu()

    @property
    def middles(self) -> Tensor:
        """The middle of each bin [BINS], float64."""
        high = self.high if self.high > self.low else self.low + 1
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * (high - self.low) / BINS


def minmax(seen: Histogram, quantization: InputQuantization) -> tuple[float, float]:
    """Everything that was seen."""
    return seen.low, seen.high


def percentile(
    seen: Histogram, quantization: InputQuantization, *, share: float = 0.9999
) -> tuple[float, float]:
    """The shortest tails cut off: `share` of the values stay, the rest is split evenly between both ends."""
    edge = (1 - share) / 2 * seen.counts.sum()
    below = seen.counts.cumsum(0)
    above = seen.counts.flip(0).cumsum(0).flip(0)
    inside = ((below > edge) & (above > edge)).nonzero().flatten()
    half = (seen.middles[1] - seen.middles[0]) / 2
    low, high = float(seen.middles[inside[0]] - half), float(seen.middles[inside[-1]] + half)
    return min(max(low, seen.low), seen.high), max(min(high, seen.high), seen.low)


def mse(seen: Histogram, quantization: InputQuantization) -> tuple[float, float]:
    """The part of the span, of 100, whose grid has the least mean squared error on what was seen."""
    best = (float("inf"), (seen.low, seen.high))
    for share in torch.linspace(0.01, 1, 100).tolist():
        low, high = seen.low * share, seen.high * share
        error = float(
            (
                seen.counts
                * (_rounded(seen.middles, low, high, quantization) - seen.middles).square()
            ).sum()
        )
        best = min(best, (error, (low, high)))
    return best[1]


def entropy(seen: Histogram, quantization: InputQuantization) -> tuple[float, float]:
    """The clipping whose grid loses the least information, by Kullback-Leibler divergence (TensorRT).

    S. Migacz, 8-bit inference with TensorRT, GTC 2017: P is the distribution with what is outside added to its last
    bin, Q the same, evened out within each of the grid's steps. Both ends are cut at one distance from 0. The bin that
    holds 0 does not count, as there: a grid has 0 exactly, and the zeros of a ReLU would be evened out with what is
    near.
    """
    middles = seen.middles
    counts = seen.counts.where(middles.abs() > (middles[1] - middles[0]) / 2 * (1 + 1e-9), 0.0)
    levels = quantization.highest + 1
    reach = max(-seen.low, seen.high)
    best = (float("inf"), (seen.low, seen.high))
    for share in torch.linspace(0.05, 1, 96).tolist():
        low, high = max(seen.low, -reach * share), min(seen.high, reach * share)
        inside = (middles >= low) & (middles <= high)
        if int(inside.sum()) < 2 or not float(counts[inside].sum()):
            continue
        p = counts[inside].clone()
        step = ((middles[inside] - low) / (high - low) * levels).long().clamp(0, levels - 1)
        there = (p > 0).double()
        total = torch.zeros(levels, dtype=torch.float64).index_add(0, step, p)
        bins = torch.zeros(levels, dtype=torch.float64).index_add(0, step, there)
        q = (total / bins.clamp_min(1))[step] * there
        p[0] += counts[middles < low].sum()
        p[-1] += counts[middles > high].sum()
        p, q = p / p.sum(), q / q.sum()
        known = p > 0
        loss = float((p[known] * (p[known] / q[known].clamp_min(1e-12)).log()).sum())
        best = min(best, (loss, (low, high)))
    return best[1]


OBSERVERS: Mapping[str, Callable[[Histogram, InputQuantization], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def _rounded(x: Tensor, low: float, high: float, quantization: InputQuantization) -> Tensor:
    scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(high), quantization)
    scale, zero = scale.double(), zero.double()
    return ((x / scale).round().clamp(-zero, quantization.highest - zero)) * scale
