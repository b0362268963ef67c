"""How far an input grid reaches: ranges taken from histograms of what a layer sees on public examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.errors import DataError, ModelError
from fedpress.quantized import InputGrid, affine, quantized_layers

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


def minmax(seen: Histogram, grid: InputGrid) -> tuple[float, float]:
    """Everything that was seen."""
    return seen.low, seen.high


def percentile(seen: Histogram, grid: InputGrid, *, share: float = 0.9999) -> tuple[float, float]:
    """The shortest tails cut off: `share` of the values stay, the rest is split evenly between both ends."""
    edge = (1 - share) / 2 * seen.counts.sum()
    below = seen.counts.cumsum(0)
    above = seen.counts.flip(0).cumsum(0).flip(0)
    inside = ((below > edge) & (above > edge)).nonzero().flatten()
    half = (seen.middles[1] - seen.middles[0]) / 2
    return float(seen.middles[inside[0]] - half), float(seen.middles[inside[-1]] + half)


def mse(seen: Histogram, grid: InputGrid) -> tuple[float, float]:
    """The part of the span, of 100, whose grid has the least mean squared error on what was seen."""
    best = (float("inf"), (seen.low, seen.high))
    for share in torch.linspace(0.01, 1, 100).tolist():
        low, high = seen.low * share, seen.high * share
        error = float((seen.counts * (_rounded(seen.middles, low, high, grid) - seen.middles).square()).sum())
        best = min(best, (error, (low, high)))
    return best[1]


def entropy(seen: Histogram, grid: InputGrid) -> tuple[float, float]:
    """The clipping whose grid loses the least information, by Kullback-Leibler divergence (TensorRT).

    S. Migacz, 8-bit inference with TensorRT, GTC 2017: P is the distribution with what is outside added to its last
    bin, Q the same, evened out within each of the grid's steps. Both ends are cut at one distance from 0.
    """
    middles, counts = seen.middles, seen.counts
    levels = grid.highest + 1
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


OBSERVERS: Mapping[str, Callable[[Histogram, InputGrid], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def _rounded(x: Tensor, low: float, high: float, grid: InputGrid) -> Tensor:
    scale, zero = affine(torch.tensor(low), torch.tensor(high), grid)
    scale, zero = scale.double(), zero.double()
    return ((x / scale).round().clamp(-zero, grid.highest - zero)) * scale


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Sequence[Tensor], *, observer: Observer = "minmax") -> dict[str, str]:
    """Sets scale and zero point of every input grid from what the layers see when `model` runs on `batches`.

    While it looks, inputs stay float. A range always holds 0; one-bit inputs get the scale mean |x| (XNOR-Net).

    Returns:
        The names of layers with an input grid that forward never calls -> the reason.

    Raises:
        DataError: if there are no batches, or a layer sees NaN or infinite values, naming it.
    """
    if not batches:
        raise DataError("calibrate: there are no batches; give at least one batch of public examples")
    layers = {n: m for n, m in quantized_layers(model) if m.grids.inputs is not None and not m.grids.inputs.dynamic}
    spans: dict[str, Histogram] = {}
    sizes: dict[str, tuple[float, int]] = {}

    def span(name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError(
                f"calibrate: '{name}' sees NaN or infinite values; check the public examples and the model's weights"
            )
        old = spans.get(name, Histogram(float("inf"), float("-inf")))
        spans[name] = Histogram(min(old.low, float(x.amin())), max(old.high, float(x.amax())))
        total, count = sizes.get(name, (0.0, 0))
        sizes[name] = total + float(x.double().abs().sum()), count + x.numel()

    run_watched(model, layers, batches, span)
    if observer != "minmax":
        run_watched(model, layers, batches, lambda name, x: spans[name].add_(x))
    for name in spans:
        grid = layers[name].grids.inputs
        assert grid is not None
        if grid.bits == 1:
            total, count = sizes[name]
            layers[name].input_scale.fill_(total / count if total else 1.0)
            continue
        seen = spans[name]
        low, high = OBSERVERS[observer](seen, grid) if seen.high > seen.low else (seen.low, seen.high)
        scale, zero = affine(torch.tensor(low), torch.tensor(high), grid)
        layers[name].input_scale.copy_(scale)
        layers[name].input_zero_point.copy_(zero)
    return {name: "forward never calls it" for name in layers if name not in spans}


@torch.no_grad()
def run_watched(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor], see: Callable[[str, Tensor], None]
) -> None:
    """Runs `model` in evaluation mode, inputs not rounded, and shows `see` what comes into each of `layers`."""
    modes = {m: m.training for m in model.modules()}
    grids = {m: m.grids for _, m in quantized_layers(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, layer in layers.items()
    ]
    try:
        model.eval()
        for layer, own in grids.items():
            layer.grids = own.model_copy(update={"inputs": None})
        for batch in batches:
            model(batch)
    except RuntimeError as error:
        raise ModelError(f"calibrate: the model cannot run on these examples ({str(error).splitlines()[0]})") from error
    finally:
        for hook in hooks:
            hook.remove()
        for layer, own in grids.items():
            layer.grids = own
        for module, mode in modes.items():
            module.training = mode
