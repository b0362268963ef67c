"""The table that a command such as `fedpress prune` shows: each number before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedpress.reports import units
from fedpress.reports.comparable import common_examples, exported_format, runtime_of, same_test_set
from fedpress.reports.metrics import MetricFormat, metrics_of
from fedpress.reports.protection import budget
from fedpress.reports.reading import Json
from fedpress.reports.table import Table

COSTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("Parameters", "parameters", units.count),
    ("Non-zeros", "nonzero_parameters", units.count),
    ("MACs", "macs", units.count),
    ("File", "file_bytes", units.size),
    ("Packed", "packed_file_bytes", units.size),
    ("Latency", "latency_ms", units.milliseconds),
)
"""Title of a row, key in a stage's result, and the function that formats the number."""


def comparison_table(before: Json, after: Json) -> Table:
    """Returns a row for each number: before, after, and the change or the share that is left.

    Example: `["Parameters", "1.00 M", "300 k", "30.0%"]`. The last cell is empty where the two
    numbers were measured in different ways, such as latencies in two runtimes.

    Args:
        before: the measured numbers of the model that was given to the command.
        after: the result of the command's stage.
    """
    rows = [
        *_metric_rows(before, after),
        *_cost_rows(before, after),
        *_federation_rows(after),
    ]
    return Table(header=["", "Before", "After", ""], rows=rows)


def _metric_rows(before: Json, after: Json) -> list[list[str]]:
    rows = []
    for at, word in enumerate(metrics_of([after, before])):
        shown = MetricFormat(word)
        if word.key == "loss" or (shown.value(before) is None and shown.value(after) is None):
            continue
        title, change = shown.title, ""
        # All metrics are measured on the same examples, so their number is shown once.
        if at == 0:
            title += _sample_size(before, after)
            change = _change(shown, before, after)
        rows.append([title, shown.with_error(before), shown.with_error(after), change])
    return rows


def _cost_rows(before: Json, after: Json) -> list[list[str]]:
    rows = []
    for title, key, form in COSTS:
        old, new = units.number(before.get(key)), units.number(after.get(key))
        if key == "nonzero_parameters" and old is None and new is not None:
            # A dense network records no count of non-zeros: all its parameters count.
            old = units.number(before.get("parameters"))
        if old is None and new is None:
            continue
        difference = _measured_differently(key, before, after)
        share = ""
        if not difference and old and new is not None:
            share = units.percent(new / old, 1)
        rows.append([title + difference, form(old), form(new), share])
    return rows


def _federation_rows(after: Json) -> list[list[str]]:
    """Returns the bytes that were sent in all rounds of a federated stage, and its epsilon."""
    rows = []
    for title, key in (("Sent by clients", "bytes_up"), ("Sent to clients", "bytes_down")):
        if units.number(after.get(key)) is not None:
            rows.append([title, "", units.size(after[key]), ""])
    if "bytes_up" in after:
        # A federation without privacy says so: an absent row would look like an omission.
        private = units.number(after.get("epsilon")) is not None
        rows.append(["Privacy spent", "", budget(after) if private else "no guarantee", ""])
    return rows


def _sample_size(before: Json, after: Json) -> str:
    n = common_examples([before, after])
    return "" if n is None else f" (n={n:,})"


def _change(shown: MetricFormat, before: Json, after: Json) -> str:
    """Returns the change of a metric, such as "-0.12 points"; "" if the test sets differ."""
    change = shown.change(after.get(shown.key), before.get(shown.key))
    if not change or not same_test_set(before, after):
        return ""
    return f"{change} points" if shown.metric.share else change


def _measured_differently(key: str, before: Json, after: Json) -> str:
    """Returns how the way of measuring has changed, such as " (torch → onnxruntime)"; else ""."""
    if key == "latency_ms":
        old, new = runtime_of(before), runtime_of(after)
    elif key == "file_bytes":
        # An exported file also has the network's operations, so it is larger for that reason alone.
        old = exported_format(before) or "numbers alone"
        new = exported_format(after) or "numbers alone"
    else:
        return ""
    return "" if old == new else f" ({old} → {new})"
