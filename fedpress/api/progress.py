"""Shows the progress of a run: bars in a terminal or a notebook, lines in a log file.

A run is a generator of events: `StageStarted`, `Tick` (a step is done) and `StageFinished`. The
functions here iterate over the events, which makes the run work, and pass them to a `View`.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fedpress.reports import units
from fedpress.reports.headline import stays_float
from fedpress.reports.metrics import MetricFormat

if TYPE_CHECKING:
    from fedpress.workspace.state import Event

# Window for the estimate of the remaining time. A round may take minutes, so a shorter window might
# contain no step.
SPEED_OVER_SECONDS = 300


class View(Protocol):
    """A display of the progress of a run, with one bar or line for each stage."""

    def begin(self, name: str, note: str) -> None:
        """Adds a stage that begins; `note` is a short text such as "starting"."""

    def move(self, done: int, total: int, note: str) -> None:
        """Shows that the stage has done `done` of `total` steps; `note` is for example the loss."""

    def end(self, note: str) -> None:
        """Shows that the stage has ended; `note` is its outcome."""

    def say(self, sentence: str) -> None:
        """Shows a sentence about the stage, such as a warning; later calls do not replace it."""


def show(events: Iterable[Event], progress: bool | None) -> None:
    """Iterates over the events of a run to the end and shows its progress.

    Args:
        events: generator of the run; the run works only while the next event is requested.
        progress: whether to show progress; None: only in a notebook or terminal.
    """
    notebook = in_notebook()
    if progress is None:
        progress = notebook or sys.stderr.isatty()
    if not progress:
        for _ in events:
            pass
    elif notebook:
        watch(events, NotebookView())
    else:
        follow(events, Console(stderr=True, highlight=False))


def follow(events: Iterable[Event], out: Console) -> None:
    """Iterates over `events` to the end; shows bars if `out` is a terminal, otherwise lines."""
    with bars(out) as shown:
        view = LinesView(out) if shown.disable else BarsView(shown)
        watch(events, view)


def watch(events: Iterable[Event], view: View) -> None:
    """Iterates over `events` to the end and shows each of them in `view`."""
    # Imported here because it loads torch: commands that show no progress must start quickly.
    from fedpress.workspace.state import StageFinished, StageStarted, Tick

    for event in events:
        if isinstance(event, StageStarted):
            view.begin(event.name, "already done" if event.reused else "starting")
        elif isinstance(event, Tick):
            view.move(event.done, max(1, event.total), event.note)
            if event.warning:
                view.say(event.warning)
        elif isinstance(event, StageFinished):
            # Settings that the stage chose automatically -> the chosen value and the reason.
            choices = event.result.get("told")
            if isinstance(choices, dict):
                for key, sentence in choices.items():
                    view.say(f"{key} is {sentence}")
            view.end(_outcome(event.result))


def bars(out: Console) -> Progress:
    """Returns progress bars, 80 columns wide, with the remaining time and a note.

    The bars are disabled if `out` is not a terminal, but a file or a pipe.
    """
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


class BarsView:
    """A `View` for a terminal: one bar for each stage."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown
        self.task = shown.add_task("", visible=False, note="")
        self.name = ""
        self.moved = False

    def begin(self, name: str, note: str) -> None:
        """Adds a bar."""
        self.name = name
        self.moved = False
        self.task = self.shown.add_task(name, total=None, note=note)

    def move(self, done: int, total: int, note: str) -> None:
        """Moves the bar."""
        if self.moved:
            self.shown.update(self.task, completed=done, total=total, note=note)
        else:
            # A resumed stage begins in the middle. `reset` makes the estimate of the remaining
            # time count from there, not from 0.
            self.shown.reset(self.task, completed=done, total=total, note=note)
        self.moved = True

    def end(self, note: str) -> None:
        """Fills the bar."""
        self.shown.update(self.task, total=1, completed=1, note=note)

    def say(self, sentence: str) -> None:
        """Prints above the bars."""
        self.shown.console.print(f"{self.name}: {sentence}", markup=False, soft_wrap=True)


class LinesView:
    """A `View` for a log file or a pipe: one line for each new note."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.name = ""
        self.last = ""

    def begin(self, name: str, note: str) -> None:
        """Prints the first line of a stage."""
        self.name = name
        self.last = ""
        self._print(note)

    def move(self, done: int, total: int, note: str) -> None:
        """Prints the note if it differs from the last one."""
        self._print(note)

    def end(self, note: str) -> None:
        """Prints the last line of a stage."""
        self._print(note)

    def say(self, sentence: str) -> None:
        """Prints a sentence."""
        self.out.print(f"{self.name}: {sentence}", markup=False, soft_wrap=True)

    def _print(self, note: str) -> None:
        # Each step has a note, often the same as the last one. A log file gets a line only if the
        # note changes.
        if note not in ("", self.last):
            self.last = note
            self.say(note)


class NotebookView:
    """A `View` for a notebook: one bar for each stage, in the output of the cell."""

    def __init__(self) -> None:
        from IPython.display import display

        self.rows: list[list[str]] = []  # stage, bar, note
        self.sentences: list[str] = []
        self.handle: Any = display(self._html(), display_id=True)

    def begin(self, name: str, note: str) -> None:
        """Adds a bar."""
        self.rows.append([name, _bar(0.0), note])
        self._draw()

    def move(self, done: int, total: int, note: str) -> None:
        """Moves the bar."""
        self.rows[-1][1:] = [_bar(done / total), note]
        self._draw()

    def end(self, note: str) -> None:
        """Fills the bar."""
        self.rows[-1][1:] = [_bar(1.0), note]
        self._draw()

    def say(self, sentence: str) -> None:
        """Adds a sentence below the bars."""
        self.sentences.append(f"{self.rows[-1][0]}: {sentence}")
        self._draw()

    def _draw(self) -> None:
        self.handle.update(self._html())

    def _html(self) -> Any:
        from IPython.display import HTML

        lines = [
            f"<tr><td>{html.escape(name)}</td><td>{bar}</td><td>{html.escape(note)}</td></tr>"
            for name, bar, note in self.rows
        ]
        said = [f"<div>{html.escape(sentence)}</div>" for sentence in self.sentences]
        return HTML(f"<table>{''.join(lines)}</table>{''.join(said)}")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; False in a plain IPython shell."""
    # A kernel has already imported IPython. Importing it here would cost every script half a
    # second.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _bar(share: float) -> str:
    return f'<progress max="1" value="{share:.3f}"></progress>'


def _outcome(result: Mapping[str, Any]) -> str:
    """Returns the outcome of a stage in one line: the metric on the test set and the model's size.

    Example: "test accuracy 97.2%, 12k parameters".
    """
    shown = MetricFormat.of([dict(result)])
    found = result.get(shown.key)
    score = "" if found is None else f"test {shown.name} {shown.formatted(found)}, "
    floats = stays_float(dict(result))
    kept = f", {floats[0]} of them float ({floats[1]})" if floats else ""
    return f"{score}{units.count(result['parameters'])} parameters{kept}"
