"""Writes the report of a run as one HTML page, which needs no network, library or other file."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedpress.core.files import replacing, writing
from fedpress.errors import RunError
from fedpress.reports import units
from fedpress.reports.data import data_section
from fedpress.reports.detail_tables import (
    failure_table,
    ledger_table,
    metrics_explained,
    metrics_table,
    progress_table,
    runtime_table,
    unchanged_table,
)
from fedpress.reports.draw import svg
from fedpress.reports.figures import figures
from fedpress.reports.headline import score_warning, tiles
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.outcome import outcome
from fedpress.reports.plot import Figure, numbers_of
from fedpress.reports.protection import protections
from fedpress.reports.reading import Run, name_of, read_run
from fedpress.reports.stage_table import runtimes_explained, spread_explained, stage_table
from fedpress.reports.table import Table

HERE = Path(__file__).parent
"""Folder of the templates, style sheet and script of the pages."""


@dataclass(frozen=True)
class Detail:
    """A part of the page that is folded until its title is clicked.

    Attributes:
        title: the title, such as "Environment and command".
        rows: pairs of name and value, such as ("data.num_clients", "10").
        text: text that is shown without formatting, such as the recipe.
        table: a table that is shown instead of `rows` and `text`; None: there is none.
    """

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Page:
    """A page with one table and figures, for results that are not one run, such as a sweep.

    Attributes:
        name: the title.
        kind: the command that the page reports on, such as "fedpress sweep".
        outcome: the result in one sentence.
        facts: version, commit and machine.
        command: the command line that made the page.
        table: all numbers.
        note: the meaning of the table's columns.
        failed: a sentence for each part that failed.
        figures: the figures below the table.
    """

    name: str
    kind: str
    outcome: str
    facts: list[str]
    command: str
    table: Table
    note: str
    failed: list[str]
    figures: list[Figure]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the report of a run folder as one HTML file and returns its path.

    If the run has not ended, the report shows what it has recorded so far. An older report is
    replaced only when the new one is complete.

    Args:
        run: the folder that `fedpress run --out` wrote.
        out: the HTML file; None: `report.html` in the folder.

    Raises:
        RunError: if `run` is no run folder or damaged, or `out` cannot be written.
    """
    # In the run folder by default, so that the report stays with the numbers it shows.
    target = Path(run) / "report.html" if out is None else Path(out)
    return _write(render(read_run(run)), target)


def write_page(page: Page, target: Path) -> Path:
    """Writes a page, such as the page of a sweep, to the file `target`.

    An older file is replaced only when the new page is complete.

    Raises:
        RunError: if the file cannot be written.
    """
    template = templates().get_template("page.html.j2")
    text = template.render(page=page, **figures_and_scripts(page.figures))
    return _write(text, target)


def _write(page: str, target: Path) -> Path:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            part.write_text(page, "utf-8")
    return target


def render(run: Run) -> str:
    """Returns the HTML text of a run's report."""
    stages = run.stages
    before = [run.before] if run.before else []
    # A stage may end before its last round, for example because its target is reached.
    stopped = []
    for stage in stages:
        if stage.get("stopped"):
            stopped.append(f"{stage.get('name')} stopped early: {stage['stopped']}.")
    data = data_section(run.result.get("data"))
    of_data = [data.figure] if data is not None and data.figure is not None else []
    drawn = figures_and_scripts([*of_data, *figures(run)])
    template = templates().get_template("template.html.j2")
    return template.render(
        run=run,
        path_of_stages=[name_of(stage) for stage in stages],
        facts=_facts(run),
        outcome=outcome(run),
        tiles=tiles([*before, *stages]),
        protections=protections(stages),
        stopped=stopped,
        warnings=_warnings(run),
        failed=_filled(failure_table(stages, run.records)),
        table=stage_table(run.result, before=run.before) if stages else None,
        runtimes=runtimes_explained(run.result, before=run.before),
        beside=_filled(metrics_table(stages)),
        explained=metrics_explained(stages),
        metric=MetricFormat.of(stages),
        spread=spread_explained(run.result, before=run.before),
        left=_filled(unchanged_table(stages)),
        files=_filled(runtime_table(stages)),
        progress=None if run.finished else progress_table(run.records),
        details=details(run),
        data=data,
        data_figures=drawn["figures"][: len(of_data)],
        **(drawn | {"figures": drawn["figures"][len(of_data) :]}),
    )


def write_data_page(shown: dict[str, Any], name: str, facts: list[str], target: Path) -> Path:
    """Writes a page that shows the data of a recipe, to the file `target`.

    Args:
        shown: what `fedpress.data.shown.shown` returns.
        name: the title.
        facts: texts under the title, such as the number of clients.
        target: the file; an older one is replaced only when the new page is complete.

    Raises:
        RunError: if the data have neither columns nor classes, or the file cannot be written.
    """
    data = data_section(shown)
    if data is None:
        raise RunError(
            "the data have neither columns nor up to 20 classes, so there is nothing to draw",
            place="draw",
            cure="leave it out",
        )
    drawn = figures_and_scripts([data.figure] if data.figure is not None else [])
    template = templates().get_template("data_page.html.j2")
    return _write(template.render(name=name, facts=facts, data=data, **drawn), target)


def figures_and_scripts(figures: list[Figure]) -> dict[str, Any]:
    """Returns template variables for figures: pictures, the script of the tooltips, its hash."""
    scripts = [(HERE / "hover.js").read_text(encoding="utf-8")] if figures else []
    return {
        "figures": _drawn(figures),
        # The script is part of fedpress and is not escaped. All text from the run folder is
        # escaped.
        "scripts": [Markup(script) for script in scripts],
        "hashes": [script_hash(script) for script in scripts],
    }


def _warnings(run: Run) -> list[str]:
    """Returns a sentence for each warning about stages, the data and the main metric."""
    found = []
    for stage in run.stages:
        if stage.get("warning"):
            found.append(f"{stage.get('name')}: {stage['warning']}.")
    if left_out := run.result.get("left_out"):
        found.append(f"data: {left_out}.")
    if guesses := score_warning(run.stages):
        found.append(f"{MetricFormat.of(run.stages).name}: {guesses}.")
    return found


def _filled(table: Table) -> Table | None:
    """Returns the table, or None if it has no rows. The page then leaves the section out."""
    return table if table.rows else None


def templates() -> Environment:
    """Returns the templates of pages (Jinja); all text in them is escaped."""
    return Environment(
        loader=FileSystemLoader(HERE),
        # Names in a recipe or a data set may hold HTML: it must not run on the reader's machine.
        autoescape=True,
        # A misspelt variable is an error and not an empty text.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class PageFigure:
    """A figure as the template needs it.

    Attributes:
        figure: the figure, with title and caption.
        picture: the figure as SVG.
        legend: entries of colour, look and name, such as ("blue", "filled", "accuracy").
        data: the numbers of the figure as a table.
    """

    figure: Figure
    picture: Markup
    legend: list[tuple[str, str, str]]
    data: Table


def _drawn(figures: list[Figure]) -> list[PageFigure]:
    drawn = []
    # Ids must be unique on the page, so each figure gets a number.
    for at, figure in enumerate(figures):
        picture = svg(figure, f"figure-{at}")
        drawn.append(PageFigure(figure, picture, _legend(figure), numbers_of(figure)))
    return drawn


def _legend(figure: Figure) -> list[tuple[str, str, str]]:
    # Most figures explain their colours in the caption and need no legend.
    entries = []
    for series in figure.series if figure.legend else ():
        if series.in_legend:
            look = "hollow" if series.hollow else "filled"
            entries.append((str(series.color), look, series.name))
    return entries


def facts_of(environment: dict[str, Any]) -> list[str]:
    """Returns version, commit and machine as texts, such as "fedpress 0.2.0", where known."""
    facts = []
    if environment.get("fedpress"):
        facts.append(f"fedpress {environment['fedpress']}")
    # Ten digits are enough to find a commit.
    if environment.get("commit"):
        facts.append(f"commit {str(environment['commit'])[:10]}")
    if environment.get("machine"):
        facts.append(str(environment["machine"]))
    return facts


def _facts(run: Run) -> list[str]:
    """Returns the texts under the title: duration, seed, version and commit."""
    facts = []
    if units.number(run.result.get("seconds")) is not None:
        facts.append(units.seconds(run.result["seconds"]))
    seed = run.result.get("seed", run.settings.get("seed"))
    if seed is not None:
        facts.append(f"seed {seed}")
    # An unfinished run has no result yet, but its environment is written at the start.
    version = run.result.get("version", run.environment.get("fedpress"))
    if version:
        facts.append(f"fedpress {version}")
    commit = run.environment.get("commit")
    if commit:
        facts.append(f"commit {str(commit)[:10]}")
    return facts


def details(run: Run) -> list[Detail]:
    """Returns the folded parts at the end of the page; empty parts are left out."""
    ledger = ledger_table(run.ledger)
    found = [
        Detail("Privacy ledger", table=ledger, rows=[] if ledger else _rows(run.ledger)),
        Detail("Recipe as given", text=run.recipe),
        Detail("Settings as resolved", rows=_rows(run.settings)),
        Detail("Environment and command", rows=_rows(run.environment)),
    ]
    return [entry for entry in found if entry.rows or entry.text or entry.table]


def _rows(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Flattens nested objects and lists to rows such as ("stage.2.num_rounds", "20").

    The names are the same as in overrides: `fedpress run recipe.toml stage.2.num_rounds=5`.
    """
    if isinstance(value, dict | list) and value and not _is_flat_list(value):
        rows = []
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            inner_name = f"{name}.{key}" if name else str(key)
            rows += _rows(item, inner_name)
        return rows
    if not name:
        return []
    # Strings without quotes, as they are written in overrides on the command line.
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(name, text)]


def _is_flat_list(value: Any) -> bool:
    """Returns whether `value` is a list without tables or lists in it, shown in one row."""
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def script_hash(script: str) -> str:
    """Returns the hash that allows a script in the page's content security policy.

    The browser runs no other script, even if text from a run folder were not escaped.
    """
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
