"""Draws the figures of a sweep (many variants of one recipe): the metric against a cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpress.reports import units
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.plot import (
    BLUE,
    FAINT,
    ORANGE,
    Axis,
    Figure,
    Panel,
    Series,
    short,
)
from fedpress.reports.reading import Json

MOST_NAMED = 12
"""Largest number of points on the Pareto front whose names are drawn. With more points the names
would overlap, so only the tooltips and the table show them."""


def trade_offs(page: Json, cost: str, word: str) -> list[Figure]:
    """Returns the figures of the metric against one cost.

    Latencies in two runtimes cannot be compared, so latency has a figure for each runtime.

    Args:
        page: the content of `sweep.json`.
        cost: the key of the cost, such as "file_bytes".
        word: the name of the cost in sentences, such as "size".
    """
    runtimes: list[str | None] = []
    if cost == "latency_ms":
        runtimes += _runtimes(page)
    figures = []
    for runtime in runtimes or [None]:
        what = word if runtime is None else f"{word} in {runtime}"
        figure = trade_off(page, cost, what, runtime=runtime)
        if figure is not None:
            figures.append(figure)
    return figures


def _runtimes(page: Json) -> list[str]:
    """Returns the runtimes in which the last stages of variants without an error were measured.

    If there is no such variant, returns the runtimes of all stages.
    """
    ends: list[Json] = []
    stages: list[Json] = []
    for variant in page["variants"]:
        stages += variant["stages"]
        if variant["stages"] and not variant["error"]:
            ends.append(variant["stages"][-1])
    names = []
    for stage in ends or stages:
        name = stage.get("runtime")
        if name and str(name) not in names:
            names.append(str(name))
    return names


@dataclass(frozen=True)
class Point:
    """A stage of a variant, as a point in the picture.

    Attributes:
        variant: the name of the variant.
        stage: the measured numbers of the stage.
        end: whether this is the last stage of the variant.
    """

    variant: str
    stage: Json
    end: bool

    @property
    def metric(self) -> MetricFormat:
        """The format of the stage's main metric."""
        return MetricFormat.of([self.stage])

    @property
    def height(self) -> float:
        """The vertical value: the main metric, in percent if the metric is a share."""
        return float(self.metric.scale * self.stage[self.metric.key])


@dataclass(frozen=True)
class Cost:
    """The cost on the lower axis.

    Attributes:
        key: key of the cost in a stage's result, such as "file_bytes".
        unit: the unit of the axis, such as "MB".
        size: how many bytes (or ms) one unit has: 1e6 for MB.
    """

    key: str
    unit: str
    size: float

    @classmethod
    def of(cls, key: str, points: Sequence[Point]) -> Cost:
        """Chooses the unit by the largest cost of the `points`."""
        if key == "latency_ms":
            return cls(key, "ms", 1.0)
        prefix, size = units.scale(max(point.stage[key] for point in points))
        return cls(key, f"{prefix}B", size)

    @property
    def axis(self) -> str:
        """The title of the axis, such as "file (MB)"."""
        what = "latency, batch 1, one thread" if self.key == "latency_ms" else "file"
        return f"{what} ({self.unit})"


def trade_off(page: Json, cost: str, word: str, *, runtime: str | None = None) -> Figure | None:
    """Draws the metric against one cost: all stages of all variants, and the Pareto front.

    Args:
        page: the content of `sweep.json`.
        cost: the key of the cost, such as "file_bytes".
        word: the name of the cost in sentences, such as "size".
        runtime: draw only stages that were measured in this runtime; None: all.

    Returns:
        The figure; None if no stage has both this cost and a metric.
    """
    points = _points(page, cost, runtime)
    if not points:
        return None
    ends = {point.variant: point for point in points if point.end}
    # The sweep computed its Pareto front over final stages alone.
    front = [ends[name] for name in page.get(f"front_{cost}", []) if name in ends]
    beaten = [point for point in ends.values() if point not in front]
    earlier = _distinct([point for point in points if not point.end])

    metric = MetricFormat.of([point.stage for point in points])
    # For an error metric, such as MAE, good points are at the bottom.
    higher = metric.metric.better == "higher"
    worst = _worst([point.height for point in ends.values() or points], metric)
    # An error is never below 0, so its axis begins at 0.
    if higher:
        low, high = worst, _highest(points, metric)
    else:
        low, high = 0.0, worst
    axis = Axis(metric.axis("test"), low=low, high=high)
    unit = Cost.of(cost, points)
    return Figure(
        f"{metric.title} against {word}",
        f"{_in_words(earlier, front, word)}{_hidden(earlier, worst, higher=higher)}",
        Axis(unit.axis, low=0.0),
        [Panel(axis, _series(page, unit, earlier, beaten, front))],
        height=460,
        wide=True,
        legend=True,
    )


def _points(page: Json, cost: str, runtime: str | None) -> list[Point]:
    """Returns the stages that have both the cost and a metric, in the order of the sweep."""
    points = []
    for variant in page["variants"]:
        for stage in variant["stages"]:
            # Leave out stages measured elsewhere, for example in torch before the export.
            if runtime is not None and str(stage.get("runtime")) != runtime:
                continue
            if (
                units.number(stage.get(cost)) is None
                or MetricFormat.of([stage]).value(stage) is None
            ):
                continue
            # A failed variant stopped early: its last stage is not the last one of its recipe.
            end = stage is variant["stages"][-1] and not variant["error"]
            points.append(Point(variant["name"], stage, end))
    return points


def _distinct(points: Sequence[Point]) -> list[Point]:
    """Returns each stage once, even if several variants share it."""
    # Variants that begin with the same settings share the results of their first stages, so even
    # the measured seconds are equal.
    seen: dict[tuple[Any, ...], Point] = {}
    for point in points:
        stage = point.stage
        seen.setdefault((stage.get("name"), point.height, stage.get("seconds")), point)
    return list(seen.values())


def _worst(ends: Sequence[float], metric: MetricFormat) -> float:
    """Returns the worst metric on the axis: somewhat worse than the worst of `ends`.

    Stages with a worse metric are not drawn. Example: a network that was just pruned may be no
    better than guessing. If the axis reached down to its accuracy, all other points would look
    equal.

    Args:
        ends: metrics of the variants' last stages.
        metric: format of the metric.
    """
    span = max(ends) - min(ends)
    if metric.metric.better == "lower":
        # If all variants are equally good, `span` is 0, and the axis still needs some height.
        return max(ends) + (span or 0.1 * abs(max(ends)) or 1.0)
    if metric.metric.share:
        return max(0.0, min(ends) - max(2.0, span))
    return min(ends) - (span or 0.1)


def _highest(points: Sequence[Point], metric: MetricFormat) -> float:
    """Returns the upper end of the axis: slightly above the best point."""
    best = max(point.height for point in points)
    worst = _worst([point.height for point in points if point.end] or [best], metric)
    space = max(0.5 if metric.metric.share else 0.005, 0.1 * (best - worst))
    # A share cannot be above 100%, but the circle at 100% needs room for its upper half.
    most = 100.2 if metric.metric.share else best + space
    return min(best + space, most)


def _in_words(earlier: Sequence[Point], front: Sequence[Point], word: str) -> str:
    grey = "; in grey its earlier stages" if earlier else ""
    named = ", ".join(point.variant for point in front) or "none"
    return f"The last stage of each variant{grey}. On the Pareto front, by rising {word}: {named}."


def _hidden(earlier: Sequence[Point], worst: float, *, higher: bool) -> str:
    """Returns a sentence with the number of stages outside the picture; "" if there are none."""
    beyond = 0
    for point in earlier:
        outside = point.height < worst if higher else point.height > worst
        beyond += outside
    side = "below" if higher else "above"
    return f" {beyond} earlier stages lie {side} the picture." if beyond else ""


def _series(
    page: Json,
    cost: Cost,
    earlier: Sequence[Point],
    beaten: Sequence[Point],
    front: Sequence[Point],
) -> list[Series]:
    # The last series is drawn on top, so the Pareto front comes last.
    drawn = []
    if earlier:
        x, y, hover = _drawn(earlier, cost)
        begins = [_first_label(point, page) for point in earlier]
        drawn.append(Series("points", "earlier stages", x, y, FAINT, hover, begins))
    if beaten:
        x, y, hover = _drawn(beaten, cost)
        drawn.append(Series("points", "not on the front", x, y, BLUE, hover, hollow=True))
    if front:
        x, y, hover = _drawn(front, cost)
        names = [point.variant for point in front]
        if len(front) > MOST_NAMED:
            names = [""] * len(front)
        drawn.append(Series("steps", "Pareto front", x, y, ORANGE, hover, names))
    return drawn


def _first_label(point: Point, page: Json) -> str:
    """Returns the label of a variant's first stage, such as "first: dense"; for other stages ""."""
    stages = next(v["stages"] for v in page["variants"] if v["name"] == point.variant)
    return f"first: {point.stage.get('name') or '?'}" if point.stage is stages[0] else ""


def _drawn(points: Sequence[Point], cost: Cost) -> tuple[list[float], list[float], list[str]]:
    """Returns the costs, the metrics and the tooltips of some points."""
    x, y, hover = [], [], []
    for point in points:
        cost_in_unit = point.stage[cost.key] / cost.size
        runtime = point.stage.get("runtime") if cost.key == "latency_ms" else None
        where = f", in {runtime}" if runtime else ""
        text = f"{short(cost_in_unit)} {cost.unit}, {point.metric.with_error(point.stage)}"
        x.append(cost_in_unit)
        y.append(point.height)
        hover.append(f"{point.variant}, after {point.stage.get('name')}{where}: {text}")
    return x, y, hover
