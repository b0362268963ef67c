"""Draws what a metric hides: its value by horizon, class or client, and survival over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedpress.reports import units
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.plot import (
    ORANGE,
    Axis,
    Figure,
    Numbers,
    Panel,
    dots,
    horizontal_bars,
    line,
    rows_height,
    score_axis,
    short,
)
from fedpress.reports.reading import Json, name_of
from fedpress.tasks import MOST_PARTS, Metric, task_of

RECALL = Metric("recall_by_class", "recall", share=True)


def by_part(stage: Json) -> list[Figure]:
    """Draws the test metrics of a stage for each part of its targets, such as each horizon."""
    names = stage.get("parts")
    found: list[Figure | None] = []
    for metric in task_of(stage).by_part:
        values = stage.get(metric.key)
        if isinstance(values, list) and any(units.number(v) is not None for v in values):
            found.append(_by_name(stage, metric, values, names))
    recall = _recall(stage)
    if recall:
        found.append(_by_name(stage, RECALL, recall, names))
    return [figure for figure in found if figure]


def by_client(stage: Json) -> Figure | None:
    """Draws the primary metric of each natural client of the test set: whom the model serves."""
    metric = task_of(stage).shown_metrics[0]
    key = f"{metric.key}_by_client"
    values, names = stage.get(key), stage.get("test_clients")
    if not isinstance(values, list) or all(units.number(v) is None for v in values):
        return None
    return _by_name(stage, replace(metric, key=key), values, names)


def _by_name(stage: Json, metric: Metric, given: Sequence[Any], names: Any) -> Figure | None:
    """Draws a row for each part; the names are numbers if the result has none."""
    values = [units.number(value) for value in given]
    if not 1 < len(values) <= MOST_PARTS:
        return None
    known = isinstance(names, list) and len(names) == len(values)
    rows = [str(name) for name in names] if known else [str(at) for at in range(len(values))]
    shown = MetricFormat(metric)
    scaled = [None if value is None else value * shown.scale for value in values]
    labels = [f"{short(value)}{shown.unit}" for value in scaled]
    hover = [f"{row}: {label}" for row, label in zip(rows, labels, strict=True)]
    told = [value for value in scaled if value is not None]
    lowest, highest = shown.format_scaled(min(told)), shown.format_scaled(max(told))
    # The length of a bar is right where 0 is the end of the axis; the skill may be below it.
    from_zero = min(told) >= 0
    draw = horizontal_bars if from_zero else dots
    axis = Axis(shown.axis(), low=0.0) if from_zero else score_axis(shown)
    part = metric.key.rpartition("_by_")[2]  # such as "horizon"
    return Figure(
        f"{shown.title} by {part}: {name_of(stage)}",
        f"Test {shown.name} by {part}: {len(rows)} rows, from {lowest} to {highest}.",
        axis,
        [Panel(Axis("", names=rows), [draw(shown.name, scaled, hover=hover, labels=labels)])],
        height=rows_height(len(rows)),
    )


def _recall(stage: Json) -> list[float | None]:
    """Returns the share of each class that was recognised, from the confusion matrix."""
    found: list[float | None] = []
    confusion = stage.get("confusion")
    for at, row in enumerate(confusion if isinstance(confusion, list) else ()):
        counts = [units.number(count) or 0.0 for count in row] if isinstance(row, list) else []
        if at >= len(counts):
            return []
        total = sum(counts)
        found.append(counts[at] / total if total else None)
    return found if any(share is not None for share in found) else []


def survival_curves(stage: Json) -> Figure | None:
    """Draws the mean predicted survival over time beside the observed one (Kaplan-Meier)."""
    edges = _numbers(stage, "edges")
    predicted, observed = (
        _numbers(stage, "survival_by_edge"),
        _numbers(stage, "kaplan_meier_by_edge"),
    )
    if not edges or len(predicted) != len(edges) or len(observed) != len(edges):
        return None
    x = [0.0, *edges]
    mean, seen = ([100.0, *(_percent(value) for value in each)] for each in (predicted, observed))
    apart = [abs(a - b) for a, b in zip(mean, seen, strict=True) if a is not None and b is not None]
    return Figure(
        f"Survival: {name_of(stage)}",
        f"Mean predicted and observed (Kaplan-Meier) survival of the test examples at {len(edges)} "
        f"times; they differ by at most {max(apart):.1f} percentage points.",
        Axis("time", low=0.0),
        [
            Panel(
                Axis("survival (%)", low=0.0, high=100.0),
                [
                    line("predicted", x, mean, unit="%", across="time"),
                    line("observed", x, seen, color=ORANGE, unit="%", across="time"),
                ],
            )
        ],
        together=True,
        legend=True,
    )


def _numbers(stage: Json, key: str) -> Numbers:
    found = stage.get(key)
    return [units.number(value) for value in found] if isinstance(found, list) else []


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
