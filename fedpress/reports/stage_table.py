"""The table of the end: a line for each stage, the same for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from rich.table import Table as RichTable

from fedpress.reports import units
from fedpress.reports.alike import common_examples, runtime_of, same_test_set
from fedpress.reports.metrics import Shown
from fedpress.reports.reading import Json, name_of, stages_of
from fedpress.reports.table import Table, add_rows_


def stage_table(result: Json, *, before: Json | None = None, errors: bool = True) -> Table:
    """Returns a row per stage of a `result.json`, after one of the model `before`.

    An empty column is left out.

    The metric stands with its standard error and its change in percentage points, and parameters
    with their share, against the first stage. Its title says on how many test examples it was
    measured.

    Args:
        result: what the run folder holds.
        before: the line of the model that a command was given.
        errors: whether the metric has its standard error and the number of examples beside it.
    """
    stages = _all(result, before)
    names = ["Stage", *(name_of(stage) for stage in stages)]
    scores = [_score(stage, stages, errors=errors) for stage in stages]
    columns = [names, [_score_title(stages, errors=errors), *scores]]
    for title, cell in COLUMNS:
        columns.append([title, *(cell(stage, stages) for stage in stages)])

    kept = [names]
    for column in columns[1:]:
        if set(column[1:]) - {units.DASH}:
            kept.append(column)
    header, *rows = (list(row) for row in zip(*kept, strict=True))
    return Table(header, rows)


def _all(result: Json, before: Json | None) -> list[Json]:
    return [*([before] if before else []), *stages_of(result)]


def _score_title(stages: list[Json], *, errors: bool) -> str:
    n = common_examples(stages)
    title = Shown.of(stages).title
    return f"{title} (n={n:,})" if errors and n is not None else title


def spread_explained(result: Json, *, before: Json | None = None) -> str:
    """Returns what stands behind ± in the table of the stages, and on how many examples.

    Nothing where none is known.

    >>> line = {"kind": "train", "accuracy": 0.9, "accuracy_error": 0.0108, "test_examples": 539}
    >>> spread_explained({"stages": [line]})
    '± is one standard error of the accuracy, on 539 test examples.'
    """
    stages = _all(result, before)
    shown, n = Shown.of(stages), common_examples(stages)
    where = "" if n is None else f"on {n:,} test examples"
    if any(shown.error(stage) for stage in stages):
        said = f"± is one standard error of the {shown.name}"
        return f"{said}, {where}." if where else f"{said}."
    return f"Measured {where}." if where else ""


def runtimes_told(result: Json, *, before: Json | None = None) -> str:
    """Returns which stage's latency is of which runtime, if there are several; else nothing.

    >>> dense = {"name": "dense", "latency_ms": 2.0, "runtime": "torch"}
    >>> export = {"name": "export", "latency_ms": 1.0, "runtime": "onnxruntime"}
    >>> runtimes_told({"stages": [dense, export]})
    'Latencies compare within one runtime only: dense in torch; export in onnxruntime.'
    """
    names: dict[str, list[str]] = {}
    for stage in _all(result, before):
        if units.number(stage.get("latency_ms")) is not None:
            names.setdefault(runtime_of(stage), []).append(name_of(stage))
    if len(names) < 2:
        return ""
    groups = [f"{', '.join(stages)} in {runtime}" for runtime, stages in names.items()]
    return f"Latencies compare within one runtime only: {'; '.join(groups)}."


def rich_table(result: Json, *, width: int = 80) -> RichTable:
    """Returns `stage_table` for a terminal of `width` columns.

    Where there is no room, brackets stand in a line of their own, and then standard errors are left
    out.
    """
    whole = stage_table(result)
    broken = _broken(whole)
    fitting = [table for table in (whole, broken) if _width(table) <= width]
    table = fitting[0] if fitting else _broken(stage_table(result, errors=False))

    shown = RichTable(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for at, title in enumerate(table.header):
        justify: Literal["left", "right"] = "left" if title == "Stage" else "right"
        shown.add_column(title, justify=justify, no_wrap=at >= 2)
    add_rows_(shown, table)
    return shown


def _broken(table: Table) -> Table:
    """Puts what stands in brackets into a line of its own."""
    rows = []
    for name, *cells in table.rows:
        rows.append([name, *(cell.replace(" (", "\n(") for cell in cells)])
    return Table([title.replace(" (", "\n(") for title in table.header], rows)


def _width(table: Table) -> int:
    """Returns how many columns of a terminal the table takes."""
    widest = 0
    for column in zip(table.header, *table.rows, strict=True):
        lines = "\n".join(column).split("\n")
        widest += max(map(len, lines))
    return widest + len(table.header) - 1  # one space between two columns


def _score(stage: Json, stages: list[Json], *, errors: bool) -> str:
    shown = Shown.of(stages)
    first = next((one for one in stages if shown.value(one) is not None), {})
    told = shown.with_error(stage) if errors else shown.formatted(stage.get(shown.key))
    if stage is stages[0] or not same_test_set(stage, first):
        return told
    change = shown.change(stage.get(shown.key), first.get(shown.key))
    return f"{told} ({change})" if change else told


def _parameters(stage: Json, stages: list[Json]) -> str:
    own = units.number(stage.get("parameters"))
    first = next(iter(units.numbers(stages, "parameters")), None)
    if not own or not first or own == first:
        return units.count(own)
    return f"{units.count(own)} ({units.percent(own / first, 1)})"


def _epsilon(stage: Json, stages: list[Json]) -> str:
    private = units.epsilon(stage.get("epsilon"))
    return "none" if private == units.DASH and stage.get("kind") == "federate" else private


def _failed(stage: Json, stages: list[Json]) -> str:
    """How many answers of clients did not count, or about how many protected units gave nothing."""
    failures = stage.get("failures")
    if not isinstance(failures, dict):
        return units.DASH
    if failures.get("refused"):
        return f"{failures['refused']} of {failures.get('asked')}"
    counted = failures.get("counted")
    # A count with noise is shown where it is surely above its noise.
    if isinstance(counted, dict) and counted.get("sure"):
        return noised_count(counted)
    return units.DASH


def noised_count(counted: Json) -> str:
    """Returns how many protected units gave nothing, by a count with noise.

    >>> noised_count({"not_finite": -0.4, "failed": 60.2, "of": 80.0})
    '≈60 of 80'
    """
    of = counted.get("of", 0.0)
    failed = counted.get("not_finite", 0.0) + counted.get("failed", 0.0)
    # Noise may push the count below 0 or above all.
    return f"≈{min(max(failed, 0.0), of):,.0f} of {of:,.0f}"


Cell = Callable[[Json, list[Json]], str]
"""Makes one cell from its stage and all stages."""


def _plain(key: str, form: Callable[[Any], str]) -> Cell:
    return lambda stage, stages: form(stage.get(key))


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("Params", _parameters),
    ("Non-zeros", _plain("nonzero_parameters", units.count)),
    ("MACs", _plain("macs", units.count)),
    ("Size", _plain("file_bytes", units.size)),
    ("Packed", _plain("packed_file_bytes", units.size)),
    ("Latency", _plain("latency_ms", units.milliseconds)),
    ("Up", _plain("bytes_up", units.size)),
    ("Down", _plain("bytes_down", units.size)),
    ("ε", _epsilon),
    ("Failed", _failed),
    ("Time", _plain("seconds", units.seconds)),
)
"""The columns behind the stage's name and its metric."""
