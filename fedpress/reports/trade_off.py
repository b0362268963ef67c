"""The figures of a sweep: the metric against a cost, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpress.reports import units
from fedpress.reports.metrics import Shown
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

NAMED = 12
"""Most points of the front that are named in the picture; where there are more, only the pointer
and the table name them."""


def trade_offs(page: Json, cost: str, word: str) -> list[Figure]:
    """Returns the figure of the metric against one cost.

    For latency one figure for each runtime: latencies in two runtimes cannot be compared.
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
    """Returns the runtimes in which the last stages of variants were measured.

    If no variant has ended, those of all stages.
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
    """A stage in the picture.

    Attributes:
        variant: the name of the variant that it belongs to.
        stage: what the result says of it.
        end: whether it is the last one of its variant.
    """

    variant: str
    stage: Json
    end: bool

    @property
    def shown(self) -> Shown:
        """Says how its metric is named and written."""
        return Shown.of([self.stage])

    @property
    def height(self) -> float:
        """Returns where it is drawn: its metric, in percent if that is a share."""
        return float(self.shown.scale * self.stage[self.shown.key])


@dataclass(frozen=True)
class Cost:
    """A cost on the lower axis.

    Attributes:
        key: of the cost in a stage's result.
        unit: that it is drawn in, such as "MB".
        size: what a stage's number is divided by to have this unit: 1e6 for MB.
    """

    key: str
    unit: str
    size: float

    @classmethod
    def of(cls, key: str, points: Sequence[Point]) -> Cost:
        """Chooses the unit by the largest of the `points`."""
        if key == "latency_ms":
            return cls(key, "ms", 1.0)
        prefix, size = units.scale(max(point.stage[key] for point in points))
        return cls(key, f"{prefix}B", size)

    @property
    def axis(self) -> str:
        """Returns what stands at the axis."""
        what = "latency, batch 1, one thread" if self.key == "latency_ms" else "file"
        return f"{what} ({self.unit})"


def trade_off(page: Json, cost: str, word: str, *, runtime: str | None = None) -> Figure | None:
    """Shows the metric against one cost: all stages, the ends of variants, and the Pareto front.

    Args:
        page: the sweep.
        cost: the key of the cost.
        word: the cost in words.
        runtime: only what was measured in this one.
    """
    points = _points(page, cost, runtime)
    if not points:
        return None
    ends = {point.variant: point for point in points if point.end}
    front = [ends[name] for name in page.get(f"front_{cost}", []) if name in ends]
    beaten = [point for point in ends.values() if point not in front]
    earlier = _distinct([point for point in points if not point.end])

    metric = Shown.of([point.stage for point in points])
    higher = metric.metric.better == "higher"
    worst = _worst([point.height for point in ends.values() or points], metric)
    low, high = (worst, _highest(points, metric)) if higher else (0.0, worst)
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
    """Returns the stages with both a cost and a metric, in the order of the sweep."""
    points = []
    for variant in page["variants"]:
        for stage in variant["stages"]:
            if runtime is not None and str(stage.get("runtime")) != runtime:
                continue
            if units.number(stage.get(cost)) is None or Shown.of([stage]).value(stage) is None:
                continue
            end = stage is variant["stages"][-1] and not variant["error"]
            points.append(Point(variant["name"], stage, end))
    return points


def _distinct(points: Sequence[Point]) -> list[Point]:
    """Leaves out stages that several variants share."""
    seen: dict[tuple[Any, ...], Point] = {}
    for point in points:
        stage = point.stage
        seen.setdefault((stage.get("name"), point.height, stage.get("seconds")), point)
    return list(seen.values())


def _worst(ends: Sequence[float], metric: Shown) -> float:
    """Returns the worst metric that the picture shows, somewhat worse than that of any end.

    A network that was just cut may be so bad that beside it all others would look equal.
    """
    span = max(ends) - min(ends)
    if metric.metric.better == "lower":
        return max(ends) + (span or 0.1 * abs(max(ends)) or 1.0)
    if metric.metric.share:
        return max(0.0, min(ends) - max(2.0, span))
    return min(ends) - (span or 0.1)


def _highest(points: Sequence[Point], metric: Shown) -> float:
    """Returns the upper end of the axis: a bit above the best point, for a share at most 100.2%."""
    best = max(point.height for point in points)
    worst = _worst([point.height for point in points if point.end] or [best], metric)
    space = max(0.5 if metric.metric.share else 0.005, 0.1 * (best - worst))
    # Above 100% there is nothing, but a point at 100% still needs room for its upper half.
    most = 100.2 if metric.metric.share else best + space
    return min(best + space, most)


def _in_words(earlier: Sequence[Point], front: Sequence[Point], word: str) -> str:
    way = "; in grey the stages on its way" if earlier else ""
    named = ", ".join(point.variant for point in front) or "none"
    return f"Each variant's end{way}. On the Pareto front, by rising {word}: {named}."


def _hidden(earlier: Sequence[Point], worst: float, *, higher: bool) -> str:
    """Says how many stages lie beyond the end of the picture; empty if none does."""
    beyond = 0
    for point in earlier:
        beyond += point.height < worst if higher else point.height > worst
    side = "below" if higher else "above"
    return f" {beyond} stages on the way lie {side} the picture." if beyond else ""


def _series(
    page: Json,
    cost: Cost,
    earlier: Sequence[Point],
    beaten: Sequence[Point],
    front: Sequence[Point],
) -> list[Series]:
    drawn = []
    if earlier:
        x, y, hover = _drawn(earlier, cost)
        begins = [_first_label(point, page) for point in earlier]
        drawn.append(Series("points", "stages on the way", x, y, FAINT, hover, begins))
    if beaten:
        x, y, hover = _drawn(beaten, cost)
        drawn.append(Series("points", "beaten by another", x, y, BLUE, hover, hollow=True))
    if front:
        x, y, hover = _drawn(front, cost)
        names = [point.variant if len(front) <= NAMED else "" for point in front]
        drawn.append(Series("steps", "Pareto front", x, y, ORANGE, hover, names))
    return drawn


def _first_label(point: Point, page: Json) -> str:
    """Returns the name of a stage that begins its variant: all later ones are compared with it."""
    stages = next(v["stages"] for v in page["variants"] if v["name"] == point.variant)
    return f"first: {point.stage.get('name') or '?'}" if point.stage is stages[0] else ""


def _drawn(points: Sequence[Point], cost: Cost) -> tuple[list[float], list[float], list[str]]:
    """Returns costs and metrics of some points, and the text that the pointer shows at each."""
    x, y, hover = [], [], []
    for point in points:
        cost_in_unit = point.stage[cost.key] / cost.size
        runtime = point.stage.get("runtime") if cost.key == "latency_ms" else None
        where = f", in {runtime}" if runtime else ""
        told = f"{short(cost_in_unit)} {cost.unit}, {point.shown.with_error(point.stage)}"
        x.append(cost_in_unit)
        y.append(point.height)
        hover.append(f"{point.variant}, after {point.stage.get('name')}{where}: {told}")
    return x, y, hover
