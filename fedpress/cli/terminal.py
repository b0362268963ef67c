"""Prints the results of commands on a terminal, as tables with headings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import Progress, TaskID
from rich.table import Table

from fedpress.reports import units
from fedpress.reports.comparison import comparison_table
from fedpress.reports.detail_tables import metrics_table, unchanged_table
from fedpress.reports.headline import score_warning, stays_float
from fedpress.reports.reading import stages_of
from fedpress.reports.table import Table as PlainTable
from fedpress.reports.table import as_rich

if TYPE_CHECKING:
    from fedpress.data import FederatedData
    from fedpress.data.column_facts import ColumnFacts
    from fedpress.data.preparation import InputColumn


def console(*, quiet: bool) -> Console:
    """Returns a console that prints to stdout, or to stderr if `quiet`.

    A command with `--json` is quiet: its stdout must contain JSON alone.
    """
    # Without rich's colours for numbers and paths, which would suggest a meaning.
    return Console(stderr=quiet, highlight=False)


@contextmanager
def waiting(out: Console, what: str) -> Iterator[None]:
    """Shows the text `what` with a spinner while the block runs."""
    with out.status(what):
        yield


class Loading:
    """Shows downloads and decoding as progress bars.

    An instance can be passed as `progress` to `fedpress.data.load`.

    Attributes:
        shown: rich's display of all bars.
        tasks: the bar of each activity, by its text.
    """

    def __init__(self, shown: Progress) -> None:
        self.shown = shown
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Moves a bar; adds the bar at the first call.

        Args:
            what: text of the activity, such as the name of a file.
            done: finished part, in bytes or images.
            total: the whole; None if it is not known.
        """
        if what not in self.tasks:
            self.tasks[what] = self.shown.add_task(what, total=total, note="")
        # The total may become known only later, such as from the answer of a server.
        self.shown.update(self.tasks[what], completed=done, total=total)


def show_metrics(out: Console, result: dict[str, Any]) -> None:
    """Prints the metrics of each stage; warns if the last model is no better than guessing.

    Args:
        out: where to print.
        result: content of `result.json`.
    """
    # More than 4 metrics do not fit beside each other on a terminal of 80 columns.
    stages = stages_of(result)
    table = metrics_table(stages, most=4)
    if table.rows:
        out.print()
        out.print(as_rich(table))
    _warn_of_guesses(out, stages)


def _warn_of_guesses(out: Console, stages: list[dict[str, Any]]) -> None:
    """Warns if the last model is no better than guessing.

    Guessing means, for instance, to always predict the largest class.
    """
    if warning := score_warning(stages):
        out.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def show_result(out: Console, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Prints a model before and after a command, and the layers that the command did not change.

    Args:
        out: where to print.
        before: record of the model before the command.
        after: record of the model after it.
    """
    out.print(as_rich(comparison_table(before, after)))
    _warn_of_guesses(out, [after])
    if floats := stays_float(after):
        out.print(
            f"{floats[0]} of the parameters stay float: {floats[1]}", style="yellow", markup=False
        )
    left = unchanged_table([after])
    if left.rows:
        # The first column names the stage. It is left out, because there is only one stage here.
        rows = [[names, why] for _, names, why in left.rows]
        out.print(as_rich(PlainTable(left.header[1:], rows), text_columns=("Why",)))


# What of the data `fedpress check` shows at most.
WORDS_SHOWN = 5
CLIENTS_SHOWN = 12
CLASSES_SHOWN = 6
# More bars than that are not told apart.
BARS_SHOWN = 12
CLASSES_DRAWN = 20


def show_keys(out: Console, title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Prints the settings of one table of a recipe.

    Args:
        out: where to print.
        title: heading of the table.
        rows: name, default and meaning of each setting.
    """
    out.print(title, style="bold", markup=False)
    if not rows:
        out.print("no keys except kind and name\n", markup=False)
        return
    table = PlainTable(["Key", "Default", "Meaning"], [list(row) for row in rows])
    out.print(as_rich(table, text_columns=("Default", "Meaning")))
    out.print()


def show_columns(out: Console, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Prints name, type, number of missing cells and content of each column of a table."""
    table = PlainTable(["Column", "Type", "Missing", "Content"], [list(row) for row in rows])
    out.print(as_rich(table, text_columns=("Type", "Content")))


def content(column: ColumnFacts) -> str:
    """Returns words with their counts, or the range of numbers or dates, and a histogram."""
    from fedpress.data.column_facts import bars

    # Of a column that does not fit into memory some rows are looked at.
    about = "about " if column.sampled else ""
    if column.numbers:
        low, middle, high = (f"{number:.6g}" for number in column.numbers)
        return f"{low} to {high}, median {about}{middle}  {bars(column.histogram)}"
    if column.dates:
        return f"{' to '.join(column.dates)}  {bars(column.histogram)}"
    if column.words:
        shown = ", ".join(f"{word} {count:,}" for word, count in column.words[:WORDS_SHOWN])
        more = len(column.words) - WORDS_SHOWN
        drawn = bars([count for _, count in column.words[:BARS_SHOWN]])
        return shown + (f", {more} more" if more > 0 else "") + f"  {drawn}"
    return f"{about}{column.distinct:,} different" if column.distinct else ""


def show_inputs(out: Console, data: FederatedData, *, private: bool) -> None:
    """Prints how columns of a table are understood, what they hold, and the classes of each client.

    Args:
        out: where to print.
        data: the loaded data set, with its columns described.
        private: whether a stage has differential privacy. If so, the columns are described by
            public rows alone, and the classes of clients are not counted.
    """
    if data.preparation is not None and data.preparation.columns:
        whose = "the public rows" if private else "all rows"
        out.print(f"columns, by {whose}:", markup=False)
        facts = {one.name: one for one in data.columns}
        rows = []
        for column in data.preparation.columns:
            found = facts.pop(column.name, None)
            about = [_missing(found), content(found)] if found else ["", ""]
            missing = _fill(column, data) if column.fill else "refused"
            # Codes are words whose digits mean nothing.
            kind = "integer id" if found and found.type == "integer id" else column.kind
            rows.append([column.name, kind, str(column.width), about[0], missing, about[1]])
        # What is left is predicted.
        rows += [[one.name, "label", "", _missing(one), "", content(one)] for one in facts.values()]
        header = ["Column", "Understood as", "Inputs", "Missing", "If missing", "Content"]
        out.print(as_rich(PlainTable(header, rows), text_columns=("Understood as", "Content")))
    _show_classes(out, data, private=private)


def _fill(column: InputColumn, data: FederatedData) -> str:
    """Returns what fills a missing cell of a column."""
    if data.awaits_statistics:
        return "noised mean"
    return f"{column.fill[0]:.4g}" if column.kind in ("number", "truth") else "mean"


def _missing(column: ColumnFacts) -> str:
    """Returns how many cells have no value, and their share: "12 (1.5%)", with a bar."""
    from fedpress.data.column_facts import bar

    if not column.missing:
        return "0"
    share = column.missing / column.rows
    # Short enough that the content has room on a terminal of 80 columns.
    return f"{column.missing:,} ({units.percent(share, 1 if share < 0.1 else 0)}) {bar(share)}"


def _show_classes(out: Console, data: FederatedData, *, private: bool) -> None:
    """Prints how many examples of each class a client has; many classes are only drawn."""
    from fedpress.data.column_facts import bars

    clients = data.describe(private=private)["clients"]
    counted = {name: about["labels"] for name, about in clients.items() if "labels" in about}
    # Many clients or classes do not fit on a screen; `--json` has all of them.
    if not counted or data.num_classes > CLASSES_DRAWN:
        return
    names = data.class_names if data.num_classes <= CLASSES_SHOWN else ()
    rows = []
    for name, counts in list(counted.items())[:CLIENTS_SHOWN]:
        numbers = [f"{count:,}" for count in counts] if names else []
        rows.append([name, f"{sum(counts):,}", *numbers, bars(counts)])
    out.print(as_rich(PlainTable(["Client", "Examples", *names, "Classes"], rows)))
    if len(counted) > CLIENTS_SHOWN:
        out.print(f"{len(counted) - CLIENTS_SHOWN:,} more clients")


def show_measures(out: Console, records: Iterable[Mapping[str, Any]]) -> None:
    """Prints the records of `fedpress measure`: costs, latencies, and limits of the machine.

    The limits ("roof") are those of the roofline model: the arithmetic rate and the memory
    bandwidth that one thread reaches on this machine.
    """
    records = list(records)
    out.print(as_rich(_costs(records), text_columns=("Model", "Runtime")))
    out.print()
    out.print(as_rich(_times(records)))
    if records:
        # All records are of the same machine.
        top = records[0]["machine"]
        out.print(
            "Latency: median ± half the interquartile range. The roof is what one thread reaches "
            f"here: {top['float_gmacs']:.1f} GMAC/s in float32, {top['int8_gmacs']:.1f} in int8, "
            f"and {top['gigabytes']:.1f} GB/s copied.",
            style="dim",
        )


def _costs(records: Sequence[Mapping[str, Any]]) -> PlainTable:
    """Returns a table with a row for each record: size, memory and share of the roofline."""
    # Numbered, because the table of `_times` has these numbers in place of names.
    names = _short([record["name"] for record in records])
    rows = []
    for number, (name, record) in enumerate(zip(names, records, strict=True), start=1):
        rows.append(
            [
                str(number),
                name,
                record["runtime"],
                units.count(record["parameters"]),
                # 0 means that the MACs are not known; None is shown as a dash.
                units.count(record["macs"] or None),
                units.size(record["file_bytes"]),
                units.size(record["peak_memory"]),
                _roof(record),
            ]
        )
    header = ["", "Model", "Runtime", "Params", "MACs", "Size", "Memory", "Of the roof"]
    return PlainTable(header, rows)


def _times(records: Sequence[Mapping[str, Any]]) -> PlainTable:
    """Returns a table of times with a row for each record.

    There is a column for each pair of batch size and number of threads.
    """
    places: list[tuple[int, int]] = []
    by_record: list[dict[tuple[int, int], Mapping[str, Any]]] = []
    for record in records:
        timings = {(timing["batch"], timing["threads"]): timing for timing in record["timings"]}
        # Records may have different columns: some runtimes have only one batch size.
        places += [place for place in timings if place not in places]
        by_record.append(timings)
    rows = []
    for number, timings in enumerate(by_record, start=1):
        rows.append([str(number), *(_time(timings.get(place)) for place in places)])
    header = [f"batch {batch}, {threads} thr." for batch, threads in places]
    return PlainTable(["", *header], rows)


def _short(names: Sequence[str], room: int = 13) -> list[str]:
    """Shortens names to fit a table.

    If a row above is the model `net`, its export `net as onnx int8` becomes `as onnx int8`. If a
    name of a model is longer than `room` characters, only its end is shown.
    """
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
    """Returns the reached share of the machine's limit and the limit's name: "40% arithmetic"."""
    if not record["macs"] or not record["timings"]:
        return units.DASH
    roof = record["timings"][0]["roofline"]
    return f"{units.percent(roof['share'], 0)} {roof['bound']}"


def _time(timing: Mapping[str, Any] | None) -> str:
    """Returns the median latency and half the interquartile range: "1.3 ±0.05 ms"."""
    if timing is None:
        return units.DASH
    median, half = timing["median_ms"], (timing["p75_ms"] - timing["p25_ms"]) / 2
    return f"{units.milliseconds(median).removesuffix(' ms')} ±{float(f'{half:.2g}'):g} ms"


def _shape(shape: Any) -> str:
    """Returns the shape of one example as `3x32x32`; for several inputs each with its name."""
    if isinstance(shape, Mapping):
        return ", ".join(f"{name} {_shape(sizes)}".strip() for name, sizes in shape.items())
    return "x".join(str(n) for n in shape)


def show_check(
    out: Console, title: str, data: Mapping[str, Any], lines: list[dict[str, Any]]
) -> None:
    """Prints the result of `fedpress check`: the data, then facts about each stage.

    Args:
        out: where to print.
        title: name and description of the recipe.
        data: numbers of examples and clients, shape and classes.
        lines: a dictionary of facts for each stage, such as parameters and epsilon.
    """
    # `escape` and `markup=False`: rich would read a name in brackets as a style.
    out.print(f"[bold]{escape(title)}[/]")
    counts = [f"{data[part]:,} {part}" for part in ("private", "public", "validation", "test")]
    classes = f", {len(data['classes'])} classes" if data["classes"] else ""
    examples = f"{_shape(data['shape'])}{classes}"
    out.print(
        f"data: {len(data['clients'])} clients; {', '.join(counts)}; {examples}", markup=False
    )
    for at, line in enumerate(lines):
        size = f"{units.count(line['parameters'])} parameters, {units.count(line['macs'], 'MAC')}"
        out.print(f"[bold]{at} {escape(line['name'])}[/] ({line['kind']}): {size}")
        facts = Table(box=None, show_header=False, pad_edge=False)
        facts.add_column(style="dim")
        facts.add_column()
        for key, value in line.items():
            if key not in ("kind", "name", "parameters", "macs"):
                facts.add_row(key, escape(_fact(key, value)))
        out.print(Padding(facts, (0, 0, 0, 2)))


def _fact(key: str, value: Any) -> str:
    """Returns the value of a fact as text, with its unit if the key tells the unit."""
    if key == "epsilon":
        return units.epsilon(value)
    if "bytes" in key:
        return units.size(value)
    # A list is a range: the least and the largest value, such as of examples per client.
    if isinstance(value, list):
        ends = list(dict.fromkeys(_fact("", item) for item in value))
        return " to ".join(ends)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
