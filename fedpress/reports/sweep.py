"""A sweep becomes one HTML page: accuracy against size and against latency, and the variants that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedpress.reports import units
from fedpress.reports.html import Page, facts_of, write_page
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
from fedpress.workspace.folder import read_json

COSTS = (("file_bytes", "size"), ("latency_ms", "latency"))
AVERAGED = ("accuracy", "parameters", "macs", "file_bytes", "latency_ms")
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
    shown = Page(
        name=f"Sweep over {', '.join(keys)}" if keys else "Sweep",
        kind="fedpress sweep",
        facts=[f"{len(variants)} variants", *facts_of(page.get("environment", {}))],
        command=str(page.get("command", "")),
        table=sweep_table(page),
        note="Test accuracy at the end of each variant, with the change against the best in percentage points; of "
        "several seeds the mean ± the standard deviation. ● beats all others of its size or less, ◆ those of its "
        "latency or less in the same runtime. Latency is for one example on one thread.",
        failed=failed,
        figures=figures,
    )
    return write_page(shown, place / "sweep.html")


def trade_offs(page: Json, cost: str, word: str) -> list[Figure]:
    """Returns the figure of accuracy against one cost; of latency one for each runtime, as only like compares."""
    if cost != "latency_ms":
        figure = trade_off(page, cost, word)
        return [figure] if figure else []
    ends = [v["stages"][-1] for v in page["variants"] if v["stages"] and not v["error"]]
    measured = ends or [stage for v in page["variants"] for stage in v["stages"]]
    runtimes = dict.fromkeys(str(s["runtime"]) for s in measured if s.get("runtime"))
    found = [trade_off(page, cost, f"{word} in {name}", runtime=name) for name in runtimes]
    return (
        [figure for figure in found if figure]
        if runtimes
        else [f for f in [trade_off(page, cost, word)] if f]
    )


def trade_off(page: Json, cost: str, word: str, *, runtime: str | None = None) -> Figure | None:
    """Shows accuracy against one cost: every stage of every variant, the ends bigger, and the front as a line.

    Args:
        page: the sweep.
        cost: the key of the cost.
        word: the cost in words.
        runtime: only what was measured in this one.
    """
    points = [
        (variant["name"], stage, at + 1 == len(variant["stages"]) and not variant["error"])
        for variant in page["variants"]
        for at, stage in enumerate(variant["stages"])
        if units.number(stage.get(cost)) is not None
        and units.number(stage.get("accuracy")) is not None
        if runtime is None or str(stage.get("runtime")) == runtime
    ]
    if not points:
        return None
    front = [
        name
        for name in page.get(f"front_{cost}", [])
        if any(n == name and end for n, _, end in points)
    ]
    latency = cost == "latency_ms"
    prefix, size = (
        ("ms", 1.0) if latency else units.scale(max(stage[cost] for _, stage, _ in points))
    )
    unit = "ms" if latency else f"{prefix}B"
    ends = {name: stage for name, stage, end in points if end}
    lowest = _lowest(
        [100 * stage["accuracy"] for stage in ends.values()]
        or [100 * s["accuracy"] for _, s, _ in points]
    )
    within = _distinct([(name, stage) for name, stage, end in points if not end])
    beaten = [(name, stage) for name, stage in ends.items() if name not in front]
    best = [(name, ends[name]) for name in front]
    shown = []
    if within:
        begins = [_first_label(stage, name, page) for name, stage in within]
        shown.append(
            _points("stages on the way", within, cost, size, unit, color=FAINT, beside=begins)
        )
    if beaten:
        shown.append(
            _points("beaten by another", beaten, cost, size, unit, color=BLUE, hollow=True)
        )
    if best:
        names = [name for name, _ in best] if len(best) <= NAMED else [""] * len(best)
        shown.append(
            _points(
                "Pareto front", best, cost, size, unit, color=ORANGE, kind="steps", beside=names
            )
        )
    way = "; in grey the stages on its way" if within else ""
    named = ", ".join(front) or "none"
    below = sum(100 * stage["accuracy"] < lowest for _, stage in within)
    hidden = f" {below} stages on the way lie below the picture." if below else ""
    return Figure(
        f"Accuracy against {word}",
        f"Each variant's end{way}. On the Pareto front, by rising {word}: {named}.{hidden}",
        Axis(f"{'latency, batch 1, one thread' if latency else 'file'} ({unit})", low=0.0),
        [Panel(Axis("test accuracy (%)", low=lowest, high=_highest(points)), shown)],
        height=460,
        wide=True,
        legend=True,
    )


def _first_label(stage: Json, variant: str, page: Json) -> str:
    """Returns the name of a stage that begins its variant: what all later ones are to be held against."""
    stages = next(v["stages"] for v in page["variants"] if v["name"] == variant)
    return f"first: {stage.get('name') or '?'}" if stage is stages[0] else ""


def _lowest(ends: Sequence[float]) -> float:
    """Where the picture ends below: a network that was just cut may be so bad that all others would seem equal."""
    return max(0.0, min(ends) - max(2.0, max(ends) - min(ends)))


def _highest(points: Sequence[tuple[str, Json, bool]]) -> float:
    best = max(100 * stage["accuracy"] for _, stage, _ in points)
    return best + max(
        0.5,
        0.1
        * (best - _lowest([100 * stage["accuracy"] for _, stage, end in points if end] or [best])),
    )


def _distinct(points: Sequence[tuple[str, Json]]) -> list[tuple[str, Json]]:
    """Leaves out stages that several variants share."""
    seen: dict[tuple[Any, ...], tuple[str, Json]] = {}
    for name, stage in points:
        seen.setdefault(
            (stage.get("name"), stage.get("accuracy"), stage.get("seconds")), (name, stage)
        )
    return list(seen.values())


def _points(
    name: str,
    points: Sequence[tuple[str, Json]],
    cost: str,
    size: float,
    unit: str,
    *,
    color: Color,
    kind: Kind = "points",
    beside: Sequence[str] = (),
    hollow: bool = False,
) -> Series:
    x = [stage[cost] / size for _, stage in points]
    y = [100 * stage["accuracy"] for _, stage in points]
    hover = [
        f"{variant}, after {stage.get('name')}"
        + (f", in {stage['runtime']}" if cost == "latency_ms" and stage.get("runtime") else "")
        + f": {short(a)} {unit}, {b:.2f}%"
        for (variant, stage), a, b in zip(points, x, y, strict=True)
    ]
    return Series(kind, name, x, y, color, hover, beside, hollow=hollow)


def averages(page: Json) -> list[Json]:
    """Returns the last stage of the variants, those that differ by their seed alone as one: mean, spread and number."""
    groups: dict[str, list[Json]] = {}
    for variant in page["variants"]:
        words = [word for word in variant["name"].split(" ") if not word.startswith("seed=")]
        groups.setdefault(" ".join(words) or "all seeds", []).append(variant)
    rows = []
    for name, members in groups.items():
        ends = [
            member["stages"][-1] for member in members if not member["error"] and member["stages"]
        ]
        error = next((member["error"] for member in members if member["error"]), None)
        row: Json = {
            "name": name,
            "seeds": len(ends),
            "error": error,
            "members": [m["name"] for m in members],
        }
        row["runtime"] = ", ".join(
            sorted({str(end["runtime"]) for end in ends if end.get("runtime")})
        )
        for key in AVERAGED:
            known = [x for end in ends if (x := units.number(end.get(key))) is not None]
            row[key] = mean(known) if known else None
            row[f"{key}_spread"] = stdev(known) if len(known) > 1 else None
        rows.append(row)
    return rows


def sweep_table(page: Json) -> Table:
    """Returns a row for each variant, of several seeds the mean and spread; marks those on a front."""
    rows = averages(page)
    best = max((row["accuracy"] for row in rows if row["accuracy"] is not None), default=None)
    marks = (("●", page.get("front_file_bytes", [])), ("◆", page.get("front_latency_ms", [])))
    several = any(row["seeds"] > 1 for row in rows)
    mixed = len({row["runtime"] for row in rows} - {""}) > 1
    cells = []
    for row in rows:
        on = "".join(mark for mark, names in marks if set(row["members"]) & set(names))
        spread = row["accuracy_spread"]
        latency = units.milliseconds(row["latency_ms"]) + (
            f" in {row['runtime']}" if mixed and row["runtime"] else ""
        )
        accuracy = units.percent(row["accuracy"]) + (
            f" ± {100 * spread:.2f}" if spread is not None else ""
        )
        behind = units.points(row["accuracy"], best)
        cells.append(
            [row["name"], on, "failed" if row["seeds"] == 0 else accuracy, behind, units.count(row["parameters"]),
             units.count(row["macs"]), units.count(row["file_bytes"], "B"), latency,
             *([str(row["seeds"])] if several else [])]
        )  # fmt: skip
    header = ["Variant", "Front", "Accuracy", "To best", "Params", "MACs", "Size", "Latency"]
    return Table(header=[*header, *(["Seeds"] if several else [])], rows=cells)
