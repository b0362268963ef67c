"""What a person sees while a run goes on: bars in a terminal, lines in a log file, and the facts of a check."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedpress.report import units

if TYPE_CHECKING:
    from fedpress.state import Event

SPEED_OVER_SECONDS = 300  # a round may take minutes: a shorter look back would see no step at all


def console(*, quiet: bool) -> Console:
    """Returns where to print; with `quiet` on the error stream, since the other belongs to JSON."""
    return Console(stderr=quiet, highlight=False)


def bars(out: Console) -> Progress:
    """Returns bars with time left and a note that fit into 80 columns; nothing where there is no terminal."""
    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description:10.18}", markup=False),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(elapsed_when_finished=True, compact=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=out,
        speed_estimate_period=SPEED_OVER_SECONDS,
        disable=not out.is_terminal,
    )


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


def follow(events: Iterable[Event], out: Console) -> None:
    """Shows the events of a run to their end: a bar for each stage, and without a terminal a line for each news."""
    from fedpress.state import StageFinished, StageStarted, Tick  # loads torch: a waiting person sees a word before it

    with bars(out) as shown:
        task, name, said, moved = shown.add_task("", visible=False, note=""), "", "", False
        news = ""
        for event in events:
            if isinstance(event, StageStarted):
                name, said, moved = event.name, "", False
                news = "already done" if event.reused else "starting"
                task = shown.add_task(name, total=None, note=news)
            elif isinstance(event, Tick):
                news = event.note
                if moved:
                    shown.update(task, completed=event.done, total=max(1, event.total), note=event.note)
                else:  # where a resumed stage goes on is no speed: time left is counted from here
                    shown.reset(task, completed=event.done, total=max(1, event.total), note=event.note)
                moved = True
            elif isinstance(event, StageFinished):
                news = _outcome(event.result)
                shown.update(task, total=1, completed=1, note=news)
            if shown.disable and news not in ("", said):
                said = news
                out.print(f"{name}: {news}", markup=False, soft_wrap=True)


def _outcome(result: Mapping[str, Any]) -> str:
    return f"test accuracy {units.percent(result['accuracy'])}, {units.count(result['parameters'])} parameters"


def show_check(out: Console, title: str, data: Mapping[str, Any], lines: list[dict[str, Any]]) -> None:
    """Prints what `fedpress.run.check` found: the data, and a line with a list of facts for each stage."""
    out.print(f"[bold]{escape(title)}[/]")
    shape = "x".join(str(n) for n in data["shape"])
    parts = ", ".join(f"{data[part]:,} {part}" for part in ("private", "public", "validation", "test"))
    out.print(f"data: {len(data['clients'])} clients; {parts}; {shape}, {len(data['classes'])} classes", markup=False)
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
