"""Formats the metrics of a task for tables and figures: name, unit, digits, standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpress.reports import units
from fedpress.reports.reading import Json
from fedpress.tasks import TASKS, Classification, Metric, task_of


def metrics_of(lines: Sequence[Json]) -> tuple[Metric, ...]:
    """Returns the metrics of the task that results or records belong to, the main metric first.

    Results name their task. Records (one for each epoch or round) do not name it: their task is the
    first task whose main metric they have, or classification if they have no main metric.

    >>> metrics_of([{"kind": "train", "mae": 3.0}])[0].name
    'MAE'
    """
    for line in lines:
        if "task" in line:
            return task_of(line).shown_metrics
    # Two tasks may share a metric: the first in `TASKS` is taken.
    for task in TASKS.values():
        if any(task.primary in line for line in lines):
            return task.shown_metrics
    return Classification.shown_metrics


@dataclass(frozen=True)
class MetricFormat:
    """Formats the values of one metric, such as 0.9331 as "93.31%".

    A metric that is a share, such as accuracy, is drawn in percent: 0.9331 has the *scaled* value
    93.31. For other metrics the scaled value is the value.
    """

    metric: Metric

    @classmethod
    def of(cls, lines: Sequence[Json]) -> MetricFormat:
        """Returns the format of the main metric of some results or records."""
        return cls(metrics_of(lines)[0])

    @property
    def key(self) -> str:
        """The metric's key in results and records, such as "accuracy"."""
        return self.metric.key

    @property
    def name(self) -> str:
        """The metric's name within a sentence, such as "accuracy" or "MAE"."""
        return self.metric.name

    @property
    def title(self) -> str:
        """The metric's name at the beginning of a sentence.

        >>> MetricFormat(Metric("accuracy", "accuracy")).title
        'Accuracy'
        """
        return self.metric.name[:1].upper() + self.metric.name[1:]

    @property
    def scale(self) -> float:
        """The factor from values to scaled values: 100 for shares, else 1."""
        return 100.0 if self.metric.share else 1.0

    @property
    def unit(self) -> str:
        """The unit of scaled values: "%" for shares, else ""."""
        return "%" if self.metric.share else ""

    def axis(self, before: str = "") -> str:
        """Returns the title of an axis, such as `validation accuracy (%)`."""
        unit = " (%)" if self.metric.share else ""
        return f"{before} {self.name}{unit}".strip()

    def value(self, line: Json) -> float | None:
        """Returns the metric in a result or record; None if it is missing."""
        return units.number(line.get(self.key))

    def formatted(self, value: Any) -> str:
        """Returns a value as text, such as "93.31%"; a dash if the value is not a number."""
        found = units.number(value)
        return units.DASH if found is None else self.metric.formatted(found)

    def error(self, line: Json) -> str:
        """Returns the standard error of a line's metric; "" if the line does not have it.

        >>> accuracy = MetricFormat(Metric("accuracy", "accuracy", share=True))
        >>> accuracy.error({"accuracy_error": 0.0108})
        '± 1.08'
        """
        found = units.number(line.get(f"{self.key}_error"))
        if found is None:
            return ""
        # As many digits as the value has, beside which the error is shown.
        digits = 2 if self.metric.share else self.metric.digits
        return f"± {found * self.scale:.{digits}f}"

    def with_error(self, line: Json) -> str:
        """Returns the metric of a line with its standard error, if that is known.

        >>> accuracy = MetricFormat(Metric("accuracy", "accuracy", share=True))
        >>> accuracy.with_error({"accuracy": 0.9331, "accuracy_error": 0.0108})
        '93.31% ± 1.08'
        >>> accuracy.with_error({"accuracy": 0.9331})
        '93.31%'
        """
        value = self.formatted(line.get(self.key))
        return value if value == units.DASH else f"{value} {self.error(line)}".rstrip()

    def format_scaled(self, value: float) -> str:
        """Returns a scaled value as text: 93.31 becomes "93.31%"."""
        return f"{value:.2f}%" if self.metric.share else f"{value:.{self.metric.digits}f}"

    def change(self, value: Any, reference: Any) -> str:
        """Returns the change against a reference, such as "+0.12"; "" if a number is missing.

        The change of a share is in percentage points.
        """
        new, old = units.number(value), units.number(reference)
        if new is None or old is None:
            return ""
        if self.metric.share:
            return units.points(new, old)
        return f"{new - old:+.{self.metric.digits}f}"

    def best(self, values: Sequence[float]) -> float | None:
        """Returns the best value: the highest or the lowest, as the metric says; None if empty."""
        if not values:
            return None
        return max(values) if self.metric.better == "higher" else min(values)

    def from_to(self, scaled: Sequence[float | None]) -> str:
        """Returns the first and the last known scaled value: "from 10.20% to 93.31%".

        "was not measured" if no value is known.
        """
        known = [x for x in scaled if x is not None]
        if not known:
            return "was not measured"
        return f"from {self.format_scaled(known[0])} to {self.format_scaled(known[-1])}"
