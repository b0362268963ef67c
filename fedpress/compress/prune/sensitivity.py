"""How much each layer can lose: the loss against density, one layer at a time, and widths chosen from these curves.

for point in sensitivity(channel_units(model, graph, scores), evaluate):
    ...  # show, save
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
from fedpress.compress.prune.scores import tensors_of
from fedpress.errors import ModelError, RecipeError
from fedpress.tasks.base import number

DENSITIES = (0.9, 0.7, 0.5, 0.3, 0.1)
FURTHER = (0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001)
"""Below the usual densities: measured only where that little of a layer may be left."""

TIE = 1e-9  # where a curve is flat, the share that is gone decides

Measure = Callable[[], tuple[float, float | None]]
"""Runs the model and returns its loss and its primary metric, which may be None."""


def densities_down_to(lowest: float, usual: Sequence[float] = DENSITIES) -> tuple[float, ...]:
    """Returns the densities to measure where as little as `lowest` of a layer may be left, falling.

    A curve that ends above says nothing of what lies below it: there a layer that seems free may be the one on which
    everything hangs.

    >>> densities_down_to(0.04)
    (0.9, 0.7, 0.5, 0.3, 0.1, 0.05, 0.03)
    """
    found = list(usual)
    for density in FURTHER:
        if min(found) > lowest and density < min(found):
            found.append(density)
    return tuple(found)


@dataclass(frozen=True)
class Unit:
    """Something that can be thinned alone: in the context `thinned(density)` its model runs with that much of it."""

    name: str
    thinned: Callable[[float], AbstractContextManager[None]]


@dataclass(frozen=True)
class Point:
    """What the model did with `density` of the one unit `layer` left; 1 is the whole model."""

    layer: str
    density: float
    loss: float
    score: float | None = None

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Point:
        """Reads what `asdict` gave; version 0.1.0 called the score `accuracy`."""
        score = saved.get("score", saved.get("accuracy"))
        return cls(saved["layer"], saved["density"], saved["loss"], score)

    def line(self, metric: str) -> dict[str, JsonValue]:
        """Returns the point as JSON, its score under the name of the `metric`."""
        return {
            "layer": self.layer,
            "density": self.density,
            "loss": self.loss,
            metric: None if self.score is None else number(self.score),
        }


def sensitivity(
    units: Sequence[Unit],
    measure: Measure,
    densities: Sequence[float] = DENSITIES,
    *,
    known: Sequence[Point] = (),
) -> Iterator[Point]:
    """Yields for every unit what `measure` says at each of `densities`, the others whole; all tensors come back.

    Args:
        units: layers (`channel_units`), weights (`weight_unit`), or anything else that can be thinned in place.
        measure: the loss and primary metric of the model as it is.
        densities: in (0, 1); 1 is measured once and stands first in each curve.
        known: points of an earlier, stopped call, which are yielded again without measuring.

    Raises:
        RecipeError: if a density is out of range.
        ModelError: if the whole model's loss is not finite.
    """
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
                point = Point(unit.name, density, *base)
            else:
                with unit.thinned(density):
                    point = Point(unit.name, density, *measure())
            if density == 1 and not np.isfinite(point.loss):
                raise ModelError(
                    "the loss of the whole model is not finite",
                    place="model",
                    cure="prune a model whose training went well",
                )
            yield point


def channel_units(model: nn.Module, graph: ChannelGraph, scores: Sequence[Tensor]) -> list[Unit]:
    """Returns a unit for every layer of `graph`: the channels with the lowest scores are zeroed, at least one stays."""
    tensors = tensors_of(model)
    return [
        Unit(
            layer.name,
            partial(_thinned, tensors, layer, values.argsort(descending=True, stable=True)),
        )
        for layer, values in zip(graph.groups, scores, strict=True)
    ]


@contextmanager
def _thinned(
    tensors: dict[str, Tensor], layer: ChannelGroup, best_first: Tensor, density: float
) -> Iterator[None]:
    pruned = best_first[max(1, round(density * layer.channels)) :]
    touched = [
        (tensors[s.tensor], s.axis, s.index[pruned].flatten().to(tensors[s.tensor].device))
        for s in layer.slices
    ]
    before = [tensor.index_select(axis, index) for tensor, axis, index in touched]
    try:
        with torch.no_grad():
            for tensor, axis, index in touched:
                tensor.index_fill_(axis, index, 0)
        yield
    finally:
        # A tensor may be touched along two axes, whose crossing was read before either was zeroed.
        with torch.no_grad():
            for (tensor, axis, index), values in zip(touched, before, strict=True):
                tensor.index_copy_(axis, index, values)


def weight_unit(name: str, weight: Tensor, scores: Tensor) -> Unit:
    """Returns a unit whose entries with the lowest `scores` (of the shape of `weight`) are zeroed one by one."""

    @contextmanager
    def thinned(density: float) -> Iterator[None]:
        before = weight.detach().clone()
        pruned = scores.flatten().argsort(descending=True, stable=True)[
            max(1, round(density * scores.numel())) :
        ]
        try:
            with torch.no_grad():
                weight.copy_(
                    before.flatten().index_fill(0, pruned.to(weight.device), 0).view_as(before)
                )
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)

    return Unit(name, thinned)


def curves(points: Sequence[Point]) -> dict[str, tuple[list[float], list[float]]]:
    """Returns for every layer the densities, rising, and how much the loss grows there: never less at fewer.

    What is not finite counts as the largest increase of all.

    >>> curves([Point("a", 1.0, 2.0), Point("a", 0.5, 1.9), Point("a", 0.25, 3.0)])
    {'a': ([0.25, 0.5, 1.0], [1.0, 0.0, 0.0])}
    """
    dense = {p.layer: p.loss for p in points if p.density == 1}
    missing = next((p.layer for p in points if p.layer not in dense), None)
    if missing is not None:
        raise RecipeError(
            f"the sensitivity of '{missing}' has no point at density 1",
            place="points",
            cure="take all that `sensitivity` gave",
        )
    grown = {(p.layer, p.density): p.loss - dense[p.layer] for p in points}
    most = max((g for g in grown.values() if np.isfinite(g)), default=0.0)
    found = {}
    for layer in dense:
        falling = sorted((d for name, d in grown if name == layer), reverse=True)
        height, heights = 0.0, []
        for density in falling:
            value = grown[layer, density]
            height = max(height, value if np.isfinite(value) else most)
            heights.append(height)
        found[layer] = (falling[::-1], heights[::-1])
    return found


def to_nothing(
    curve: tuple[list[float], list[float]], most: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns densities and growth of the loss with a point at density 0, where a layer cuts the network in two.

    Below the lowest measured density a curve goes on as it ended, but at 0 it reaches at least `most`, the largest
    growth of any layer: a curve that was flat so far is no promise.
    """
    density, height = (np.array(line) for line in curve)
    slope = (height[0] - height[1]) / (density[1] - density[0])
    end = max(most, height[0] + slope * density[0])
    return np.insert(density, 0, 0.0), np.insert(height, 0, end)


def levels(graph: ChannelGraph, scores: Sequence[Tensor], points: Sequence[Point]) -> list[Tensor]:
    """Returns for each channel [channels] how much the loss grows when its layer is cut down to and without it.

    A threshold on these numbers is a water level: every layer goes as far as the same growth of the loss allows.
    Between the measured densities the curves are straight; below them see `to_nothing`.

    Raises:
        RecipeError: if a layer has not been measured.
    """
    known = curves(points)
    most = max((heights[0] for _, heights in known.values()), default=0.0)
    out = []
    for layer, values in zip(graph.groups, scores, strict=True):
        if layer.name not in known or len(known[layer.name][0]) < 2:
            raise RecipeError(
                f"the sensitivity of '{layer.name}' was not measured",
                place="points",
                cure="give the points of all layers",
            )
        density, height = to_nothing(known[layer.name], most)
        best_first = values.argsort(descending=True, stable=True)
        left = np.arange(len(values)) / len(
            values
        )  # when the channel in this place goes, those before it are left
        level = torch.from_numpy(
            np.interp(left, density, height) + TIE * (1 + height.max()) * (1 - left)
        )
        out.append(
            torch.empty(len(values), dtype=torch.float64).scatter_(0, best_first.cpu(), level)
        )
    return out
