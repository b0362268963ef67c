"""What one command changed: each number before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedpress.reports import units
from fedpress.reports.alike import common_examples, exported_format, runtime_of, same_test_set
from fedpress.reports.metrics import Shown, words_of
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


def comparison_table(before: Json, after: Json) -> Table:
    """Returns a row for each number of one stage: before, after, and the change or the share.

    Numbers that were measured in different ways stand there without a change.
    """
    rows = [*_metric_rows(before, after), *_cost_rows(before, after)]
    return Table(header=["", "Before", "After", ""], rows=rows)


def _metric_rows(before: Json, after: Json) -> list[list[str]]:
    rows = []
    for at, word in enumerate(words_of([after, before])):
        shown = Shown(word)
        if word.key == "loss" or (shown.value(before) is None and shown.value(after) is None):
            continue
        title, change = shown.title, ""
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
            # All parameters of a network that nobody has made sparse count as non-zero.
            old = units.number(before.get("parameters"))
        if old is None and new is None:
            continue
        ways = _ways(key, before, after)
        share = units.percent(new / old, 1) if not ways and old and new is not None else ""
        rows.append([title + ways, form(old), form(new), share])
    return rows


def _sample_size(before: Json, after: Json) -> str:
    n = common_examples([before, after])
    return "" if n is None else f" (n={n:,})"


def _change(shown: Shown, before: Json, after: Json) -> str:
    """Returns the change of a metric; empty if it was measured on other examples."""
    change = shown.change(after.get(shown.key), before.get(shown.key))
    if not change or not same_test_set(before, after):
        return ""
    return f"{change} points" if shown.metric.share else change


def _ways(key: str, before: Json, after: Json) -> str:
    """Says how a cost was measured before and after, if not in the same way; else nothing."""
    if key == "latency_ms":
        old, new = runtime_of(before), runtime_of(after)
    elif key == "file_bytes":
        # A file for a device holds the network's operations beside its numbers.
        old, new = (exported_format(line) or "numbers alone" for line in (before, after))
    else:
        return ""
    return "" if old == new else f" ({old} → {new})"
