"""A sweep becomes one HTML page: the metric against size and against latency, and the variants that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedpress.reports import units
from fedpress.reports.html import Page, facts_of, write_page
from fedpress.reports.metrics import Shown
from fedpress.reports.plot import (
    BLUE,
    FAINT,
    ORANGE,
    Axis,
    Color,
    Figure,
    Kind,
    Panel,
    Series,
    short,
)
from fedpress.reports.reading import Json
from fedpress.reports.table import Table
from fedpress.workspace.atomic import read_json

COSTS = (("file_bytes", "size"), ("latency_ms", "latency"))
AVERAGED = ("parameters", "macs", "file_bytes", "latency_ms")
NAMED = (
    12  # so many points of the front are named in the picture; the pointer and the table tell all
)


def write_sweep(place: Path) -> Path:
    """Draws `sweep.json` of the folder `place` as `sweep.html` there, and returns its path.

    Raises:
        RunError: if there is no sweep, it is damaged, or the page cannot be written.
    """
    page = read_json(place / "sweep.json")
    variants = page["variants"]
    failed = [f"{v['name']}: {v['error']}" for v in variants if v["error"]]
    figures = [figure for cost, word in COSTS for figure in trade_offs(page, cost, word)]
    keys = sorted({override.partition("=")[0] for v in variants for override in v["overrides"]})
    metric = _shown(page)
    shown = Page(
        name=f"Sweep over {', '.join(keys)}" if keys else "Sweep",
        kind="fedpress sweep",
        facts=[f"{len(variants)} variants", *facts_of(page.get("environment", {}))],
        command=str(page.get("command", "")),
        table=sweep_table(page),
        note=f"Test {metric.name} at the end of each variant, with the change against the best"
        f"{' in percentage points' if metric.metric.share else ''}; of "
        "several seeds the mean ± the standard deviation. ● beats all others of its size or less, ◆ those of its "
        "latency or less in the same runtime. Latency is for one example on one thread.",
        failed=failed,
        figures=figures,
    )
    return write_page(shown, place / "sweep.html")


def trade_offs(page: Json, cost: str, word: str) -> list[Figure]:
    """Returns the figure of the metric against one cost; of latency one for each runtime, as only like compares."""
    runtimes = _runtimes(page) if cost == "latency_ms" else []
    if runtimes:
        found = [trade_off(page, cost, f"{word} in {name}", runtime=name) for name in runtimes]
    else:
        found = [trade_off(page, cost, word)]
    return [figure for figure in found if figure]


def _runtimes(page: Json) -> list[str]:
    """Returns the runtimes in which the ends of variants were measured; where none has ended, all."""
    ends = [v["stages"][-1] for v in page["variants"] if v["stages"] and not v["error"]]
    measured = ends or [stage for v in page["variants"] for stage in v["stages"]]
    return list(dict.fromkeys(str(s["runtime"]) for s in measured if s.get("runtime")))


@dataclass(frozen=True)
class Point:
    """A stage in the picture: the `variant` that it belongs to, and whether it is the end of that."""

    variant: str
    stage: Json
    end: bool

    @property
    def shown(self) -> Shown:
        """How its metric is told."""
        return Shown.of([self.stage])

    @property
    def height(self) -> float:
        """Where it is drawn: its metric, in percent if that is a share."""
        return float(self.shown.scale * self.stage[self.shown.key])


@dataclass(frozen=True)
class Cost:
    """A cost on the lower axis: its key in a stage, and the unit that it is told in, of `size` of the stage's own."""

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
        """What stands at the axis."""
        what = "latency, batch 1, one thread" if self.key == "latency_ms" else "file"
        return f"{what} ({self.unit})"


def trade_off(page: Json, cost: str, word: str, *, runtime: str | None = None) -> Figure | None:
    """Shows the metric against one cost: every stage of every variant, the ends bigger, and the front as a line.

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
    within = _distinct([point for point in points if not point.end])
    metric = _shown(page)
    higher = metric.metric.better == "higher"
    worst = _worst([point.height for point in ends.values() or points], metric)

    shown = _series(page, Cost.of(cost, points), within, beaten, front)
    hidden = _hidden(within, worst, higher=higher)
    low, high = (worst, _highest(points, metric)) if higher else (0.0, worst)
    return Figure(
        f"{metric.title} against {word}",
        f"{_in_words(within, front, word)}{hidden}",
        Axis(Cost.of(cost, points).axis, low=0.0),
        [Panel(Axis(metric.axis("test"), low=low, high=high), shown)],
        height=460,
        wide=True,
        legend=True,
    )


def _hidden(within: Sequence[Point], worst: float, *, higher: bool) -> str:
    """Says how many stages lie beyond the end of the picture; empty if none does."""
    beyond = sum(p.height < worst if higher else p.height > worst for p in within)
    side = "below" if higher else "above"
    return f" {beyond} stages on the way lie {side} the picture." if beyond else ""


def _in_words(within: Sequence[Point], front: Sequence[Point], word: str) -> str:
    way = "; in grey the stages on its way" if within else ""
    named = ", ".join(point.variant for point in front) or "none"
    return f"Each variant's end{way}. On the Pareto front, by rising {word}: {named}."


def _points(page: Json, cost: str, runtime: str | None) -> list[Point]:
    """Returns the stages that have both numbers, in the order of the sweep."""
    points = []
    for variant in page["variants"]:
        for stage in variant["stages"]:
            if runtime is not None and str(stage.get("runtime")) != runtime:
                continue
            if None in (units.number(stage.get(cost)), Shown.of([stage]).value(stage)):
                continue
            end = stage is variant["stages"][-1] and not variant["error"]
            points.append(Point(variant["name"], stage, end))
    return points


def _series(
    page: Json,
    cost: Cost,
    within: Sequence[Point],
    beaten: Sequence[Point],
    front: Sequence[Point],
) -> list[Series]:
    shown = []
    if within:
        begins = [_first_label(point, page) for point in within]
        shown.append(_marks("stages on the way", within, cost, color=FAINT, beside=begins))
    if beaten:
        shown.append(_marks("beaten by another", beaten, cost, color=BLUE, hollow=True))
    if front:
        names = [point.variant if len(front) <= NAMED else "" for point in front]
        shown.append(_marks("Pareto front", front, cost, color=ORANGE, kind="steps", beside=names))
    return shown


def _first_label(point: Point, page: Json) -> str:
    """Returns the name of a stage that begins its variant: what all later ones are to be held against."""
    stages = next(v["stages"] for v in page["variants"] if v["name"] == point.variant)
    return f"first: {point.stage.get('name') or '?'}" if point.stage is stages[0] else ""


def _shown(page: Json) -> Shown:
    """How the metric of the sweep's task is told."""
    return Shown.of([stage for variant in page["variants"] for stage in variant["stages"]])


def _worst(ends: Sequence[float], metric: Shown) -> float:
    """Where the picture ends: a network that was just cut may be so bad that all others would seem equal."""
    room = max(ends) - min(ends)
    if metric.metric.better == "lower":
        return max(ends) + (room or 0.1 * abs(max(ends)) or 1.0)
    if metric.metric.share:
        return max(0.0, min(ends) - max(2.0, room))
    return min(ends) - (room or 0.1)


def _highest(points: Sequence[Point], metric: Shown) -> float:
    best = max(point.height for point in points)
    worst = _worst([point.height for point in points if point.end] or [best], metric)
    return best + max(0.5 if metric.metric.share else 0.005, 0.1 * (best - worst))


def _distinct(points: Sequence[Point]) -> list[Point]:
    """Leaves out stages that several variants share."""
    seen: dict[tuple[Any, ...], Point] = {}
    for point in points:
        key = (
            point.stage.get("name"),
            point.stage.get(point.shown.key),
            point.stage.get("seconds"),
        )
        seen.setdefault(key, point)
    return list(seen.values())


def _marks(
    name: str,
    points: Sequence[Point],
    cost: Cost,
    *,
    color: Color,
    kind: Kind = "points",
    beside: Sequence[str] = (),
    hollow: bool = False,
) -> Series:
    x = [point.stage[cost.key] / cost.size for point in points]
    y = [point.height for point in points]
    hover = []
    for point, across in zip(points, x, strict=True):
        runtime = point.stage.get("runtime") if cost.key == "latency_ms" else None
        where = f", in {runtime}" if runtime else ""
        told = f"{short(across)} {cost.unit}, {point.shown.drawn(point.height)}"
        hover.append(f"{point.variant}, after {point.stage.get('name')}{where}: {told}")
    return Series(kind, name, x, y, color, hover, beside, hollow=hollow)


def averages(page: Json) -> list[Json]:
    """Returns the last stage of the variants, those that differ by their seed alone as one: mean, spread and number."""
    groups: dict[str, list[Json]] = {}
    for variant in page["variants"]:
        words = [word for word in variant["name"].split(" ") if not word.startswith("seed=")]
        groups.setdefault(" ".join(words) or "all seeds", []).append(variant)
    return [_average(name, members) for name, members in groups.items()]


def _average(name: str, members: Sequence[Json]) -> Json:
    """Returns the row of variants that differ by their seed alone."""
    ends = [m["stages"][-1] for m in members if m["stages"] and not m["error"]]
    row: Json = {
        "name": name,
        "seeds": len(ends),
        "error": next((m["error"] for m in members if m["error"]), None),
        "members": [m["name"] for m in members],
        "runtime": ", ".join(sorted({str(e["runtime"]) for e in ends if e.get("runtime")})),
    }
    for key in (Shown.of(ends).key, *AVERAGED):
        known = [x for end in ends if (x := units.number(end.get(key))) is not None]
        row[key] = mean(known) if known else None
        row[f"{key}_spread"] = stdev(known) if len(known) > 1 else None
    return row


def sweep_table(page: Json) -> Table:
    """Returns a row for each variant, of several seeds the mean and spread; marks those on a front."""
    rows = averages(page)
    metric = _shown(page)
    key = metric.key
    best = metric.best([row[key] for row in rows if row.get(key) is not None])
    marks = (("●", page.get("front_file_bytes", [])), ("◆", page.get("front_latency_ms", [])))
    several = any(row["seeds"] > 1 for row in rows)
    mixed = len({row["runtime"] for row in rows} - {""}) > 1
    cells = []
    for row in rows:
        on = "".join(mark for mark, names in marks if set(row["members"]) & set(names))
        spread = row.get(f"{key}_spread")
        latency = units.milliseconds(row["latency_ms"]) + (
            f" in {row['runtime']}" if mixed and row["runtime"] else ""
        )
        digits = 2 if metric.metric.share else metric.metric.digits
        score = metric.formatted(row.get(key)) + (
            f" ± {metric.scale * spread:.{digits}f}" if spread is not None else ""
        )
        behind = metric.change(row.get(key), best)
        cells.append(
            [row["name"], on, "failed" if row["seeds"] == 0 else score, behind, units.count(row["parameters"]),
             units.count(row["macs"]), units.count(row["file_bytes"], "B"), latency,
             *([str(row["seeds"])] if several else [])]
        )  # fmt: skip
    header = ["Variant", "Front", metric.title, "To best", "Params", "MACs", "Size", "Latency"]
    return Table(header=[*header, *(["Seeds"] if several else [])], rows=cells)
