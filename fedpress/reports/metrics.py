"""The task's own words in tables and figures: name and unit of its metric, which way is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpress.reports import units
from fedpress.reports.reading import Json
from fedpress.tasks import TASKS, Classification, Metric, task_of


def words_of(lines: Sequence[Json]) -> tuple[Metric, ...]:
    """Returns the metrics of the task that result lines or records are of, the primary one first.

    Records do not name the task: they are known by the metric that stands in them.

    >>> words_of([{"kind": "train", "mae": 3.0}])[0].name
    'MAE'
    """
    for line in lines:
        if "task" in line:
            return task_of(line).shown_metrics
    for task in TASKS.values():
        if any(task.primary in line for line in lines):
            return task.shown_metrics
    return Classification.shown_metrics


@dataclass(frozen=True)
class Shown:
    """How the values of one metric are drawn and told."""

    metric: Metric

    @classmethod
    def of(cls, lines: Sequence[Json]) -> Shown:
        """Returns that of the primary metric."""
        return cls(words_of(lines)[0])

    @property
    def key(self) -> str:
        """Under which lines and records hold it."""
        return self.metric.key

    @property
    def name(self) -> str:
        """As it stands within a sentence."""
        return self.metric.name

    @property
    def title(self) -> str:
        """As it stands at the beginning of a sentence.

        >>> Shown(Metric("accuracy", "accuracy")).title
        'Accuracy'
        """
        return self.metric.name[:1].upper() + self.metric.name[1:]

    @property
    def scale(self) -> float:
        """By which values are multiplied where they are drawn: shares are drawn in percent."""
        return 100.0 if self.metric.share else 1.0

    @property
    def unit(self) -> str:
        """Of the drawn values."""
        return "%" if self.metric.share else ""

    def axis(self, before: str = "") -> str:
        """Returns the name of an axis, such as `validation accuracy (%)`."""
        return f"{before} {self.name}{' (%)' if self.metric.share else ''}".strip()

    def value(self, line: Json) -> float | None:
        """Returns the value in a line, if it is a number."""
        return units.number(line.get(self.key))

    def formatted(self, value: Any) -> str:
        """Returns a value as people read it."""
        found = units.number(value)
        return units.DASH if found is None else self.metric.formatted(found)

    def error(self, line: Json) -> str:
        """Returns the standard error of the value in a line.

        Empty where the task has no formula for it.

        >>> Shown(Metric("accuracy", "accuracy", share=True)).error({"accuracy_error": 0.0108})
        '± 1.08'
        """
        found = units.number(line.get(f"{self.key}_error"))
        if found is None:
            return ""
        digits = 2 if self.metric.share else self.metric.digits
        return f"± {found * self.scale:.{digits}f}"

    def with_error(self, line: Json) -> str:
        """Returns the value in a line with its standard error, if that is known.

        >>> accuracy = Shown(Metric("accuracy", "accuracy", share=True))
        >>> accuracy.with_error({"accuracy": 0.9331, "accuracy_error": 0.0108})
        '93.31% ± 1.08'
        >>> accuracy.with_error({"accuracy": 0.9331})
        '93.31%'
        """
        value = self.formatted(line.get(self.key))
        return value if value == units.DASH else f"{value} {self.error(line)}".rstrip()

    def drawn(self, value: float) -> str:
        """Returns a drawn value as people read it: already in percent, if it is a share."""
        return f"{value:.2f}%" if self.metric.share else f"{value:.{self.metric.digits}f}"

    def change(self, value: Any, reference: Any) -> str:
        """Returns the change against a reference with its sign; of shares in percentage points."""
        new, old = units.number(value), units.number(reference)
        if new is None or old is None:
            return ""
        if self.metric.share:
            return units.points(new, old)
        return f"{new - old:+.{self.metric.digits}f}"

    def best(self, values: Sequence[float]) -> float | None:
        """Returns the best of some values; None of none."""
        if not values:
            return None
        return max(values) if self.metric.better == "higher" else min(values)

    def from_to(self, drawn: Sequence[float | None]) -> str:
        """Returns the first and the last known of some drawn values in words."""
        known = [x for x in drawn if x is not None]
        if not known:
            return "was not measured"
        return f"from {self.drawn(known[0])} to {self.drawn(known[-1])}"
