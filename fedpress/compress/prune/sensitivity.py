"""Measures the loss while one layer at a time is pruned to several densities.

The density is the share of channels or weights that are kept. Example of this sensitivity analysis:

points = list(sensitivity(channel_units(model, graph, scores), evaluate))
plan(model, graph, scores, scope="sensitivity", points=points)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup
from fedpress.compress.prune.tensors import tensors_of
from fedpress.errors import ModelError, RecipeError
from fedpress.tasks.base import json_number

DENSITIES = (0.9, 0.7, 0.5, 0.3, 0.1)
"""The densities that are measured by default."""
LOWER_DENSITIES = (0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001)
"""Measured besides the usual densities if a layer may be pruned below 0.1."""

TIE_BREAK = 1e-9
"""Small slope added to the curves, so that channels have an order where a curve is flat."""

Measure = Callable[[], tuple[float, float | None]]
"""Evaluates the model; returns its loss and its primary metric (None if it has no metric)."""


def densities_down_to(lowest: float, usual: Sequence[float] = DENSITIES) -> tuple[float, ...]:
    """Returns the densities to measure, falling, so that the last one is at or below `lowest`.

    Densities below 0.001 are not measured. The curve of losses must not be extrapolated far: a
    layer that can be pruned to 0.1 without loss may be needed at 0.01.

    Args:
        lowest: lowest density that a layer may be pruned to.
        usual: densities that are measured in any case.

    >>> densities_down_to(0.04)
    (0.9, 0.7, 0.5, 0.3, 0.1, 0.05, 0.03)
    """
    found = list(usual)
    for density in LOWER_DENSITIES:
        if min(found) > lowest and density < min(found):
            found.append(density)
    return tuple(found)


@dataclass(frozen=True)
class SensitivityUnit:
    """A part of the model that is pruned alone in the analysis, such as the channels of a layer.

    Attributes:
        name: name of the layer or weight.
        at_density: function from a density to a context manager. Within its block only this share
            of the unit is kept, and the rest is zero.
    """

    name: str
    at_density: Callable[[float], AbstractContextManager[None]]


@dataclass(frozen=True)
class SensitivityPoint:
    """Loss and metric of the model with one unit pruned to `density`; density 1 is unpruned.

    Attributes:
        layer: name of the unit.
        density: share of the unit that is kept.
        loss: loss of the model.
        score: primary metric of the model, such as accuracy; None without a metric.
    """

    layer: str
    density: float
    loss: float
    score: float | None = None

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SensitivityPoint:
        """Returns the point from its dictionary; version 0.1.0 called the score `accuracy`."""
        score = saved.get("score", saved.get("accuracy"))
        return cls(saved["layer"], saved["density"], saved["loss"], score)

    def to_json(self, metric: str) -> dict[str, JsonValue]:
        """Returns the point as a JSON dictionary; `metric` is the key of its score."""
        score = None if self.score is None else json_number(self.score)
        return {"layer": self.layer, "density": self.density, "loss": self.loss, metric: score}


def sensitivity(
    units: Sequence[SensitivityUnit],
    measure: Measure,
    densities: Sequence[float] = DENSITIES,
    *,
    known: Sequence[SensitivityPoint] = (),
) -> Iterator[SensitivityPoint]:
    """Yields the loss at each of `densities` for one unit after the other.

    Each unit is restored after it is measured. The first point of each unit has density 1; its loss
    is measured once for all units.

    Args:
        units: layers (`channel_units`) or weight tensors (`weight_unit`).
        measure: returns the loss and the primary metric of the model in its present state.
        densities: densities to measure besides 1, each in (0, 1).
        known: points of an earlier call that was stopped; they are yielded without a measurement.

    Raises:
        RecipeError: if a density is not between 0 and 1, or no density is given.
        ModelError: if the loss of the unpruned model is not finite.
    """
    # At 0 the layer would be gone, and 1 is measured anyway.
    wrong = next((d for d in densities if not 0 < d < 1), None)
    if wrong is not None or not densities:
        raise RecipeError(
            f"got {wrong}, expected numbers between 0 and 1",
            place="densities",
            cure=f"try {list(DENSITIES)}",
        )

    found = {(p.layer, p.density): p for p in known}
    base: tuple[float, float | None] | None = None
    for unit in units:
        for density in (1.0, *sorted(densities, reverse=True)):
            if (unit.name, density) in found:
                point = found[unit.name, density]
                base = (point.loss, point.score) if density == 1 else base
            elif density == 1:
                base = base or measure()
                point = SensitivityPoint(unit.name, density, *base)
            else:
                with unit.at_density(density):
                    point = SensitivityPoint(unit.name, density, *measure())

            # Every curve is relative to this loss.
            if density == 1 and not np.isfinite(point.loss):
                raise ModelError(
                    "the loss of the whole model is not finite",
                    place="model",
                    cure="prune a model whose training went well",
                )
            yield point


def channel_units(
    model: nn.Module, graph: ChannelGraph, scores: Sequence[Tensor]
) -> list[SensitivityUnit]:
    """Returns a unit for each layer of `graph`: its channels with the lowest scores are zeroed.

    At least one channel of a layer is kept, as in a pruning plan.
    """
    tensors = tensors_of(model)
    units = []
    for layer, values in zip(graph.groups, scores, strict=True):
        best_first = values.argsort(descending=True, stable=True)
        units.append(SensitivityUnit(layer.name, partial(_masked, tensors, layer, best_first)))
    return units


@contextmanager
def _masked(
    tensors: dict[str, Tensor], layer: ChannelGroup, best_first: Tensor, density: float
) -> Iterator[None]:
    """Within the block, keeps the best channels, a share of `density`; the others are zero."""
    pruned = best_first[max(1, round(density * layer.channels)) :]
    # Only the zeroed entries are saved, not whole tensors.
    touched = []
    for s in layer.slices:
        tensor = tensors[s.tensor]
        touched.append((tensor, s.axis, s.index[pruned].flatten().to(tensor.device)))
    before = [tensor.index_select(axis, index) for tensor, axis, index in touched]
    try:
        with torch.no_grad():
            for tensor, axis, index in touched:
                tensor.index_fill_(axis, index, 0)
        yield
    finally:
        # A tensor may be zeroed along two axes. All values were saved before any was zeroed, so
        # the order of restoring does not matter.
        with torch.no_grad():
            for (tensor, axis, index), values in zip(touched, before, strict=True):
                tensor.index_copy_(axis, index, values)


def weight_unit(name: str, weight: Tensor, scores: Tensor) -> SensitivityUnit:
    """Returns a unit for one weight tensor: its entries with the lowest scores are zeroed.

    Args:
        name: name of the weight.
        weight: the tensor; it is zeroed in place and restored.
        scores: a score of each entry, in the shape of `weight`.
    """

    @contextmanager
    def at_density(density: float) -> Iterator[None]:
        before = weight.detach().clone()
        best_first = scores.flatten().argsort(descending=True, stable=True)
        pruned = best_first[max(1, round(density * scores.numel())) :].to(weight.device)
        try:
            with torch.no_grad():
                weight.copy_(before.flatten().index_fill(0, pruned, 0).view_as(before))
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)

    return SensitivityUnit(name, at_density)


def loss_curves(points: Sequence[SensitivityPoint]) -> dict[str, tuple[list[float], list[float]]]:
    """Returns for every layer the densities, rising, and the growth of the loss at each density.

    The growth is the loss minus the loss at density 1. It is made monotonic: if the loss falls at a
    lower density, this is noise, and the growth at the higher density is used. A loss that is not
    finite counts as the largest finite growth of all layers.

    Raises:
        RecipeError: if a layer has no point at density 1.

    >>> measured = [("a", 1.0, 2.0), ("a", 0.5, 1.9), ("a", 0.25, 3.0)]  # layer, density, loss
    >>> loss_curves([SensitivityPoint(*point) for point in measured])
    {'a': ([0.25, 0.5, 1.0], [1.0, 0.0, 0.0])}
    """
    dense = {p.layer: p.loss for p in points if p.density == 1}
    missing = next((p.layer for p in points if p.layer not in dense), None)
    if missing is not None:
        raise RecipeError(
            f"the sensitivity of '{missing}' has no point at density 1",
            place="points",
            cure="give all points that `sensitivity` yields",
        )

    grown: dict[str, dict[float, float]] = {layer: {} for layer in dense}
    for point in points:
        grown[point.layer][point.density] = point.loss - dense[point.layer]
    # Not infinity, which would make all other differences between layers negligible.
    most = 0.0
    finite = []
    for growth_at in grown.values():
        finite += [growth for growth in growth_at.values() if np.isfinite(growth)]
    if finite:
        most = max(finite)

    found = {}
    for layer, growth_at in grown.items():
        falling = sorted(growth_at, reverse=True)
        height = 0.0
        heights = []
        for density in falling:
            value = growth_at[density]
            height = max(height, value if np.isfinite(value) else most)
            heights.append(height)
        found[layer] = (falling[::-1], heights[::-1])
    return found


def extended_to_zero(
    curve: tuple[list[float], list[float]], most: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a curve with an additional point at density 0, where the layer is all zeros.

    The curve continues with its last slope, but has at least the growth `most` at density 0,
    because a flat curve may rise steeply near 0.

    Args:
        curve: densities, rising, and the growth of the loss at each density.
        most: the largest growth of any layer.
    """
    density = np.array(curve[0])
    height = np.array(curve[1])
    # The slope between the two lowest densities.
    slope = (height[0] - height[1]) / (density[1] - density[0])
    end = max(most, height[0] + slope * density[0])
    return np.insert(density, 0, 0.0), np.insert(height, 0, end)


def growth_by_channel(
    graph: ChannelGraph, scores: Sequence[Tensor], points: Sequence[SensitivityPoint]
) -> list[Tensor]:
    """Returns for each channel the growth of the loss if its layer is pruned up to this channel.

    That is, if the channel and all channels of its layer with lower scores are pruned. One
    threshold on these numbers prunes every layer up to the same growth of the loss. Curves are
    interpolated linearly between the measured densities; below the lowest density they continue as
    in `extended_to_zero`.

    Raises:
        RecipeError: if a layer was not measured at density 1 and at another density.
    """
    known = loss_curves(points)
    most = max((heights[0] for _, heights in known.values()), default=0.0)
    out = []
    for layer, values in zip(graph.groups, scores, strict=True):
        if layer.name not in known or len(known[layer.name][0]) < 2:
            raise RecipeError(
                f"the sensitivity of '{layer.name}' was not measured",
                place="points",
                cure="give the points of all layers",
            )

        density, height = extended_to_zero(known[layer.name], most)
        best_first = values.argsort(descending=True, stable=True)
        # If the channel at position i is pruned, the i channels before it are kept.
        kept_share = np.arange(len(values)) / len(values)
        growth = np.interp(kept_share, density, height)
        # Where a curve is flat, channels with lower scores are still pruned first.
        growth += TIE_BREAK * (1 + height.max()) * (1 - kept_share)

        by_channel = torch.empty(len(values), dtype=torch.float64)
        out.append(by_channel.scatter_(0, best_first.cpu(), torch.from_numpy(growth)))
    return out
