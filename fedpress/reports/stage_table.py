"""The table of a run's results, for terminal and report: one row for each stage of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from rich.table import Table as RichTable

from fedpress.reports import units
from fedpress.reports.comparable import common_examples, runtime_of, same_test_set
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.reading import Json, name_of, stages_of
from fedpress.reports.table import Table, add_rows_


def stage_table(result: Json, *, before: Json | None = None, errors: bool = True) -> Table:
    """Returns a row for each stage of a `result.json`; columns without any number are left out.

    Cells look like "93.31% ± 1.08 (-0.12)" for the metric and "300 k (30.0%)" for parameters: the
    brackets compare with the first stage. The title of the metric has the number of test examples.

    Args:
        result: the content of `result.json`.
        before: the measured numbers of the model that was given to a command such as
            `fedpress prune`, shown as the first row; None: there is no such row.
        errors: whether to show the standard error and the number of test examples.
    """
    stages = _all(result, before)
    names = ["Stage", *(name_of(stage) for stage in stages)]
    scores = [_score(stage, stages, errors=errors) for stage in stages]
    columns = [names, [_score_title(stages, errors=errors), *scores]]
    for title, cell in COLUMNS:
        columns.append([title, *(cell(stage, stages) for stage in stages)])

    kept = [names]
    for column in columns[1:]:
        # Most runs have no federated stage or no packed file: columns of dashes only take room.
        if set(column[1:]) - {units.DASH}:
            kept.append(column)
    header, *rows = (list(row) for row in zip(*kept, strict=True))
    return Table(header, rows)


def _all(result: Json, before: Json | None) -> list[Json]:
    return [*([before] if before else []), *stages_of(result)]


def _score_title(stages: list[Json], *, errors: bool) -> str:
    n = common_examples(stages)
    title = MetricFormat.of(stages).title
    return f"{title} (n={n:,})" if errors and n is not None else title


def spread_explained(result: Json, *, before: Json | None = None) -> str:
    """Returns a sentence that explains ± in `stage_table`.

    If no standard error is known, the sentence has only the number of test examples; "" if this is
    not known either.

    >>> line = {"kind": "train", "accuracy": 0.9, "accuracy_error": 0.0108, "test_examples": 539}
    >>> spread_explained({"stages": [line]})
    '± is one standard error of the accuracy, on 539 test examples.'
    """
    stages = _all(result, before)
    shown, n = MetricFormat.of(stages), common_examples(stages)
    where = "" if n is None else f"on {n:,} test examples"
    if any(shown.error(stage) for stage in stages):
        said = f"± is one standard error of the {shown.name}"
        return f"{said}, {where}." if where else f"{said}."
    return f"Measured {where}." if where else ""


def runtimes_explained(result: Json, *, before: Json | None = None) -> str:
    """Returns a sentence on the runtimes of the latencies; "" if there are not several runtimes.

    >>> dense = {"name": "dense", "latency_ms": 2.0, "runtime": "torch"}
    >>> export = {"name": "export", "latency_ms": 1.0, "runtime": "onnxruntime"}
    >>> runtimes_explained({"stages": [dense, export]})
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

    If the table is too wide, the text in brackets moves to a second line of each cell. If it is
    still too wide, the standard errors are left out.
    """
    table = stage_table(result)
    if _width(table) > width:
        table = _two_lines(table)
    if _width(table) > width:
        table = _two_lines(stage_table(result, errors=False))

    shown = RichTable(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for at, title in enumerate(table.header):
        justify: Literal["left", "right"] = "left" if title == "Stage" else "right"
        # Only the name and the metric may break: a number in two lines cannot be read.
        shown.add_column(title, justify=justify, no_wrap=at >= 2)
    add_rows_(shown, table)
    return shown


def _two_lines(table: Table) -> Table:
    """Moves the text in brackets to a second line of each cell."""
    rows = []
    for name, *cells in table.rows:
        rows.append([name, *(cell.replace(" (", "\n(") for cell in cells)])
    return Table([title.replace(" (", "\n(") for title in table.header], rows)


def _width(table: Table) -> int:
    """Returns how many characters wide the table is on a terminal."""
    widest = 0
    for column in zip(table.header, *table.rows, strict=True):
        lines = "\n".join(column).split("\n")
        widest += max(map(len, lines))
    return widest + len(table.header) - 1  # one space between two columns


def _score(stage: Json, stages: list[Json], *, errors: bool) -> str:
    shown = MetricFormat.of(stages)
    # Not simply the first stage: it may have no metric, for example without a test set.
    first = next((one for one in stages if shown.value(one) is not None), {})
    value = shown.with_error(stage) if errors else shown.formatted(stage.get(shown.key))
    # A difference between two test sets says nothing about the models.
    if stage is stages[0] or not same_test_set(stage, first):
        return value
    change = shown.change(stage.get(shown.key), first.get(shown.key))
    return f"{value} ({change})" if change else value


def _parameters(stage: Json, stages: list[Json]) -> str:
    own = units.number(stage.get("parameters"))
    first = next(iter(units.numbers(stages, "parameters")), None)
    if not own or not first or own == first:
        return units.count(own)
    return f"{units.count(own)} ({units.percent(own / first, 1)})"


def _epsilon(stage: Json, stages: list[Json]) -> str:
    epsilon = units.epsilon(stage.get("epsilon"))
    # A dash would look like "not measured"; a federated stage without epsilon has no privacy.
    if epsilon == units.DASH and stage.get("kind") == "federate":
        return "none"
    return epsilon


def _failed(stage: Json, stages: list[Json]) -> str:
    """Returns how many answers of clients were refused, such as "2 of 40".

    Under privacy this is a noisy count of the protected units (examples or clients) that failed,
    such as "≈60 of 80".
    """
    failures = stage.get("failures")
    if not isinstance(failures, dict):
        return units.DASH
    if failures.get("refused"):
        return f"{failures['refused']} of {failures.get('asked')}"
    counted = failures.get("counted")
    # "sure": the count is so far above 0 that the noise alone can hardly explain it.
    if isinstance(counted, dict) and counted.get("sure"):
        return noised_count(counted)
    return units.DASH


def noised_count(counted: Json) -> str:
    """Returns the noisy count of protected units whose gradient or update was not usable.

    >>> noised_count({"not_finite": -0.4, "failed": 60.2, "of": 80.0})
    '≈60 of 80'
    """
    of = counted.get("of", 0.0)
    failed = counted.get("not_finite", 0.0) + counted.get("failed", 0.0)
    # Noise may push the count below 0, or above the number of all units.
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
"""Title and cell of each column to the right of the stage's name and its metric."""
