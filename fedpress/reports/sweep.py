"""Writes one HTML page about a sweep, that is, about many variants of one recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from fedpress.reports import units
from fedpress.reports.comparable import common_examples
from fedpress.reports.html import Page, facts_of, write_page
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.reading import Json
from fedpress.reports.table import Table
from fedpress.reports.trade_off import trade_offs
from fedpress.workspace.atomic import read_json

COSTS = (("file_bytes", "size"), ("latency_ms", "latency"))
"""Key and name of each cost that has a figure with a Pareto front."""
AVERAGED = ("parameters", "macs", "file_bytes", "latency_ms")
"""Keys whose mean over seeds is shown."""
FRONTS = (("●", "file_bytes"), ("◆", "latency_ms"))
"""Mark of a variant that is on a Pareto front, and the cost of this front."""


def write_sweep(place: Path) -> Path:
    """Writes `sweep.html` in the folder `place` from its `sweep.json`, and returns the path.

    Raises:
        RunError: if there is no sweep, it is damaged, or the page cannot be written.
    """
    page = read_json(place / "sweep.json")
    variants = page["variants"]
    failed, keys, figures = [], set(), []
    for variant in variants:
        if variant["error"]:
            failed.append(f"{variant['name']}: {variant['error']}")
        for override in variant["overrides"]:
            # The keys that the sweep sets are the title of the page.
            keys.add(override.partition("=")[0])
    for cost, word in COSTS:
        figures += trade_offs(page, cost, word)
    shown = Page(
        name=f"Sweep over {', '.join(sorted(keys))}" if keys else "Sweep",
        kind="fedpress sweep",
        outcome=sweep_outcome(page),
        facts=[f"{len(variants)} variants", *facts_of(page.get("environment", {}))],
        command=str(page.get("command", "")),
        table=sweep_table(page),
        note=_note(page),
        failed=failed,
        figures=figures,
    )
    return write_page(shown, place / "sweep.html")


def _note(page: Json) -> str:
    """Returns the meaning of the table's columns."""
    metric = _format(page)
    points = " in percentage points" if metric.metric.share else ""
    ends = [variant["stages"][-1] for variant in page["variants"] if variant["stages"]]
    n = common_examples(ends)
    where = "" if n is None else f" on {n:,} test examples"
    return (
        f"Test {metric.name}{where} at the end of each variant, with the change against the "
        f"best{points}. For one seed ± is the standard error on the test set, if the metric has "
        "one; for several seeds it is the standard deviation between them. ● is on the Pareto "
        "front of size: no variant of its size or less has a better metric. ◆ is on the front of "
        "latency, among variants in the same runtime. Latency is for one example on one thread."
    )


def sweep_outcome(page: Json) -> str:
    """Returns one sentence: the best variant, and the smallest variant that is about as good.

    "About as good": the metric is within one standard error of the best metric.
    """
    variants, metric = page["variants"], _format(page)
    failed = sum(bool(variant["error"]) for variant in variants)
    rows = [row for row in averages(page) if row.get(metric.key) is not None]
    count = f"{len(variants)} variant{'' if len(variants) == 1 else 's'}"
    if not rows and variants and failed == len(variants):
        return "The only variant failed." if failed == 1 else f"All {count} failed."
    if not rows:
        return f"None of {count} has ended with a test {metric.name}."

    if failed:
        count += f" ({failed} failed)"
    # The highest or the lowest value, as the metric says.
    best_value = metric.best([row[metric.key] for row in rows])
    best = next(row for row in rows if row[metric.key] == best_value)
    best_text = _metric_and_size(best, metric)
    sentence = f"Of {count}, {best['name']} has the best test {metric.name}, {best_text}"
    smallest = _smallest_near(best, rows, metric)
    if smallest is best:
        return f"{sentence}."
    near = f"{smallest['name']} is the smallest within one standard error of it"
    return f"{sentence}; {near}: {_metric_and_size(smallest, metric)}."


def _smallest_near(best: Json, rows: Sequence[Json], metric: MetricFormat) -> Json:
    """Returns the row with the smallest file whose metric is within one standard error of `best`.

    Returns `best` itself if no row so close has a smaller file, or if the standard error of `best`
    is not known.
    """
    # Differences within one standard error may be chance; then the smaller file is the better
    # choice.
    error, smallest = best.get(f"{metric.key}_error"), best
    if not error or best["file_bytes"] is None:
        return best
    for row in rows:
        near = abs(row[metric.key] - best[metric.key]) <= error
        if near and row["file_bytes"] is not None and row["file_bytes"] < smallest["file_bytes"]:
            smallest = row
    return smallest


def _metric_and_size(row: Json, metric: MetricFormat) -> str:
    """Returns the metric and the size of a row of `averages`: "93.31% ± 1.08 with 1.2 MB"."""
    seeds = f" (mean of {row['seeds']} seeds)" if row["seeds"] > 1 else ""
    size = "" if row["file_bytes"] is None else f" with {units.size(row['file_bytes'])}"
    return f"{_score(row, metric)}{seeds}{size}"


def _score(row: Json, metric: MetricFormat) -> str:
    """Returns the metric of a row of `averages` with ±.

    ± is the standard deviation between several seeds, or the standard error of a single run.
    """
    spread = row.get(f"{metric.key}_spread")
    if spread is None:
        return metric.with_error(row)
    digits = 2 if metric.metric.share else metric.metric.digits
    return f"{metric.formatted(row[metric.key])} ± {metric.scale * spread:.{digits}f}"


def averages(page: Json) -> list[Json]:
    """Returns a row of numbers for each variant; variants that differ only by seed share a row.

    With several seeds, the row has the mean of each number, such as "accuracy", and its standard
    deviation, such as "accuracy_spread".
    """
    groups: dict[str, list[Json]] = {}
    for variant in page["variants"]:
        # A variant's name lists the overrides that differ: "keep_params=0.3 seed=2".
        words = [word for word in variant["name"].split(" ") if not word.startswith("seed=")]
        groups.setdefault(" ".join(words) or "all seeds", []).append(variant)
    return [_average(name, members) for name, members in groups.items()]


def _average(name: str, members: Sequence[Json]) -> Json:
    """Returns the row of variants that differ only by seed."""
    ends, runtimes, errors = [], set(), []
    for member in members:
        if member["error"]:
            errors.append(member["error"])
        # Only the last stage counts: it is the result of the variant.
        elif member["stages"]:
            end = member["stages"][-1]
            ends.append(end)
            runtimes |= {str(end["runtime"])} if end.get("runtime") else set()
    row: Json = {
        "name": name,
        "seeds": len(ends),
        "error": errors[0] if errors else None,
        "members": [member["name"] for member in members],
        "runtime": ", ".join(sorted(runtimes)),
    }
    metric = MetricFormat.of(ends).key
    for key in (metric, f"{metric}_error", *AVERAGED):
        known = units.numbers(ends, key)
        # A single run has no deviation between seeds: its standard error is shown instead.
        row[key] = mean(known) if known else None
        row[f"{key}_spread"] = stdev(known) if len(known) > 1 else None
    return row


def sweep_table(page: Json) -> Table:
    """Returns a row for each variant, with the mean over its seeds and its marks (`FRONTS`)."""
    rows, metric = averages(page), _format(page)
    measured = [row[metric.key] for row in rows if row.get(metric.key) is not None]
    best = metric.best(measured)
    # A column of ones would only take room.
    several_seeds = any(row["seeds"] > 1 for row in rows)
    # With one runtime its name would only repeat in every cell.
    several_runtimes = len({row["runtime"] for row in rows} - {""}) > 1
    header = ["Variant", "Front", metric.title, "To best", "Params", "MACs", "Size", "Latency"]
    cells = []
    for row in rows:
        latency = units.milliseconds(row["latency_ms"])
        if several_runtimes and row["runtime"]:
            latency += f" in {row['runtime']}"
        line = [
            row["name"],
            _front(row, page),
            "failed" if row["seeds"] == 0 else _score(row, metric),
            metric.change(row.get(metric.key), best),
            units.count(row["parameters"]),
            units.count(row["macs"]),
            units.size(row["file_bytes"]),
            latency,
        ]
        cells.append([*line, str(row["seeds"])] if several_seeds else line)
    return Table(header=[*header, "Seeds"] if several_seeds else header, rows=cells)


def _front(row: Json, page: Json) -> str:
    """Returns the marks of the Pareto fronts that a row is on, such as "●◆"."""
    marks = ""
    for mark, cost in FRONTS:
        if set(row["members"]) & set(page.get(f"front_{cost}", [])):
            marks += mark
    return marks


def _format(page: Json) -> MetricFormat:
    """Returns the format of the primary metric of the sweep's task."""
    stages: list[Json] = []
    for variant in page["variants"]:
        stages += variant["stages"]
    return MetricFormat.of(stages)
