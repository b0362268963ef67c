"""What a person sees while a run goes on: bars in a terminal, lines in a log file, and the facts of a check."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table

from fedpress.reports import units
from fedpress.reports.headline import score_warning, stays_float
from fedpress.reports.reading import stages_of
from fedpress.reports.table import Table as PlainTable
from fedpress.reports.table import as_rich, comparison_table, left_table, metrics_table


def console(*, quiet: bool) -> Console:
    """Returns where to print; with `quiet` on the error stream, since the other belongs to JSON."""
    return Console(stderr=quiet, highlight=False)


@contextmanager
def waiting(out: Console, what: str) -> Iterator[None]:
    """Says what is being done while there is nothing to count."""
    with out.status(what):
        yield


class Loading:
    """Shows the progress of downloads and decoding; to be given to `fedpress.data.load`."""

    def __init__(self, shown: Progress) -> None:
        self.shown, self.tasks = shown, dict[str, Any]()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Moves the bar of `what`."""
        if what not in self.tasks:
            self.tasks[what] = self.shown.add_task(what, total=total, note="")
        self.shown.update(self.tasks[what], completed=done, total=total)


def show_metrics(out: Console, result: dict[str, Any]) -> None:
    """Prints all metrics of each stage of a `result.json`; warns if the last one only guesses."""
    stages = stages_of(result)
    table = metrics_table(stages, most=4)
    if table.rows:
        out.print()
        out.print(as_rich(table))
    _warn_of_guesses(out, stages)


def _warn_of_guesses(out: Console, stages: list[dict[str, Any]]) -> None:
    if warning := score_warning(stages):
        out.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def show_result(out: Console, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Prints what a command changed, and what it left as it was."""
    out.print(as_rich(comparison_table(before, after)))
    _warn_of_guesses(out, [after])
    if floats := stays_float(after):
        out.print(
            f"{floats[0]} of the parameters stay float: {floats[1]}", style="yellow", markup=False
        )
    left = left_table([after])
    if left.rows:
        rows = [[names, why] for _, names, why in left.rows]
        out.print(as_rich(PlainTable(left.header[1:], rows), words=("Why",)))


def show_keys(out: Console, title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Prints the settings of one table with their defaults and meanings."""
    out.print(title, style="bold", markup=False)
    if not rows:
        out.print("it has no keys but kind and name\n", markup=False)
        return
    table = PlainTable(["Key", "Default", "Meaning"], [list(row) for row in rows])
    out.print(as_rich(table, words=("Default", "Meaning")))
    out.print()


def show_measures(out: Console, records: Iterable[Mapping[str, Any]]) -> None:
    """Prints records of the command `measure`: a table of costs, one of times, and the machine's peak."""
    records = list(records)
    costs = [
        [str(n), name, r["runtime"], units.count(r["parameters"]), units.count(r["macs"] or None),
         units.count(r["file_bytes"], "B"), units.count(r["peak_memory"], "B"), _roof(r)]
        for n, (name, r) in enumerate(zip(_short([r["name"] for r in records]), records, strict=True), 1)
    ]  # fmt: skip
    out.print(
        as_rich(
            PlainTable(
                ["", "Model", "Runtime", "Params", "MACs", "Size", "Memory", "Of the roof"], costs
            ),
            words=("Model", "Runtime"),
        )
    )
    places = list(dict.fromkeys((t["batch"], t["threads"]) for r in records for t in r["timings"]))
    times = []
    for n, r in enumerate(records, 1):
        found = {(t["batch"], t["threads"]): t for t in r["timings"]}
        times.append([str(n), *(_time(found.get(place)) for place in places)])
    header = [f"batch {batch}, {threads} thr." for batch, threads in places]
    out.print()
    out.print(as_rich(PlainTable(["", *header], times)))
    if records:
        top = records[0]["machine"]
        out.print(
            "Latency is the median ± half of what the middle half of the runs spans. One thread here reaches "
            f"{top['float_gmacs']:.1f} GMAC/s in float32, {top['int8_gmacs']:.1f} in int8, and copies "
            f"{top['gigabytes']:.1f} GB/s: the roof.", style="dim",
        )  # fmt: skip


def _short(names: Sequence[str], room: int = 13) -> list[str]:
    """Shows a file made from the model above as "as onnx int8", and of a long path the end."""
    shown: list[str] = []
    above = ""
    for name in names:
        if above and name.startswith(f"{above} as "):
            shown.append(name.removeprefix(f"{above} "))
        else:
            above = name
            shown.append(name if len(name) <= room else "…" + name[1 - room :])
    return shown


def _roof(record: Mapping[str, Any]) -> str:
    if not record["macs"] or not record["timings"]:
        return units.DASH
    roof = record["timings"][0]["roofline"]
    return f"{units.percent(roof['share'], 0)} {roof['bound']}"


def _time(timing: Mapping[str, Any] | None) -> str:
    if timing is None:
        return units.DASH
    median, half = timing["median_ms"], (timing["p75_ms"] - timing["p25_ms"]) / 2
    return f"{units.milliseconds(median).removesuffix(' ms')} ±{float(f'{half:.2g}'):g} ms"


def _shape(shape: Any) -> str:
    """Says the shape of one example: `3x32x32`; of several inputs each with its name."""
    if isinstance(shape, Mapping):
        return ", ".join(f"{name} {_shape(sizes)}".strip() for name, sizes in shape.items())
    return "x".join(str(n) for n in shape)


def show_check(
    out: Console, title: str, data: Mapping[str, Any], lines: list[dict[str, Any]]
) -> None:
    """Prints what `fedpress.pipeline.run.check` found: the data, and a line with a list of facts for each stage."""
    out.print(f"[bold]{escape(title)}[/]")
    shape = _shape(data["shape"])
    parts = ", ".join(
        f"{data[part]:,} {part}" for part in ("private", "public", "validation", "test")
    )
    out.print(
        f"data: {len(data['clients'])} clients; {parts}; {shape}, {len(data['classes'])} classes",
        markup=False,
    )
    for at, line in enumerate(lines):
        out.print(
            f"[bold]{at} {escape(line['name'])}[/] ({line['kind']}): {units.count(line['parameters'])} parameters, "
            f"{units.count(line['macs'], 'MAC')}"
        )
        facts = Table(box=None, show_header=False, pad_edge=False)
        facts.add_column(style="dim")
        facts.add_column()
        for key, value in line.items():
            if key not in ("kind", "name", "parameters", "macs"):
                facts.add_row(key, escape(_fact(key, value)))
        out.print(Padding(facts, (0, 0, 0, 2)))


def _fact(key: str, value: Any) -> str:
    if key == "epsilon":
        return units.epsilon(value)
    if "bytes" in key:
        return units.count(value, "B")
    if isinstance(value, list):
        return " to ".join(_fact("", item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
