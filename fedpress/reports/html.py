"""A run folder becomes one HTML page: offline, on a phone, on paper, light or dark."""

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
from fedpress.reports import units
from fedpress.reports.detail_tables import (
    failure_table,
    ledger_table,
    left_table,
    metrics_explained,
    metrics_table,
    progress_table,
    runtime_table,
)
from fedpress.reports.draw import svg
from fedpress.reports.figures import figures
from fedpress.reports.headline import score_warning, tiles
from fedpress.reports.metrics import Shown
from fedpress.reports.outcome import outcome
from fedpress.reports.plot import Figure, numbers_of
from fedpress.reports.protection import protections
from fedpress.reports.reading import Run, name_of, read_run
from fedpress.reports.stage_table import runtimes_told, spread_explained, stage_table
from fedpress.reports.table import Table

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Detail:
    """A part of the page that a click unfolds: a table, rows of name and value, or a text.

    Attributes:
        title: what is clicked.
        rows: of name and value.
        text: shown as it is.
        table: shown in place of both.
    """

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Page:
    """A page with one table and figures.

    Attributes:
        name: the title.
        kind: what the page is of, such as "fedpress sweep".
        outcome: what came out, in one sentence.
        facts: version, commit and machine.
        command: that made it.
        table: all numbers.
        note: what the columns of the table mean.
        failed: a sentence for each part that failed.
        figures: what is drawn.
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
    """Draws a run folder as one HTML file and returns its path.

    The file appears whole or not at all.

    Args:
        run: the folder.
        out: the file; None: `report.html` in the folder.

    Raises:
        RunError: if `run` is no run folder or damaged, or `out` cannot be written.
    """
    target = Path(run) / "report.html" if out is None else Path(out)
    return _write(render(read_run(run)), target)


def write_page(page: Page, target: Path) -> Path:
    """Writes a page that is no run, such as a sweep, whole or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    template = _environment().get_template("page.html.j2")
    text = template.render(page=page, **_figures_and_scripts(page.figures))
    return _write(text, target)


def _write(page: str, target: Path) -> Path:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            part.write_text(page, "utf-8")
    return target


def render(run: Run) -> str:
    """Returns the page for a run that was read."""
    stages = run.stages
    before = [run.before] if run.before else []
    stopped = []
    for stage in stages:
        if stage.get("stopped"):
            stopped.append(f"{stage.get('name')} stopped early: {stage['stopped']}.")
    template = _environment().get_template("template.html.j2")
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
        runtimes=runtimes_told(run.result, before=run.before),
        beside=_filled(metrics_table(stages)),
        explained=metrics_explained(stages),
        metric=Shown.of(stages),
        spread=spread_explained(run.result, before=run.before),
        left=_filled(left_table(stages)),
        files=_filled(runtime_table(stages)),
        progress=None if run.finished else progress_table(run.records),
        details=details(run),
        **_figures_and_scripts(figures(run)),
    )


def _figures_and_scripts(figures: list[Figure]) -> dict[str, Any]:
    """Returns what a template needs for its figures: pictures, and the script for the pointer."""
    scripts = [(HERE / "hover.js").read_text(encoding="utf-8")] if figures else []
    return {
        "figures": _drawn(figures),
        # The script is ours and goes in as it is; everything from the run folder is escaped.
        "scripts": [Markup(script) for script in scripts],
        "hashes": [_hash(script) for script in scripts],
    }


def _warnings(run: Run) -> list[str]:
    """Returns what a reader must know, a sentence each."""
    found = [f"{s.get('name')}: {s['warning']}." for s in run.stages if s.get("warning")]
    if left_out := run.result.get("left_out"):
        found.append(f"data: {left_out}.")
    if guesses := score_warning(run.stages):
        found.append(f"{Shown.of(run.stages).name}: {guesses}.")
    return found


def _filled(table: Table) -> Table | None:
    """Returns the table if it has rows."""
    return table if table.rows else None


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class Drawn:
    """A figure on its page.

    Attributes:
        figure: with its title and caption.
        picture: as SVG.
        legend: a colour, a look and a name for each entry.
        data: its numbers as a table.
    """

    figure: Figure
    picture: Markup
    legend: list[tuple[str, str, str]]
    data: Table


def _drawn(figures: list[Figure]) -> list[Drawn]:
    drawn = []
    for at, figure in enumerate(figures):
        picture = svg(figure, f"figure-{at}")
        drawn.append(Drawn(figure, picture, _legend(figure), numbers_of(figure)))
    return drawn


def _legend(figure: Figure) -> list[tuple[str, str, str]]:
    entries = []
    for series in figure.series if figure.legend else ():
        if series.in_legend:
            look = "hollow" if series.hollow else "filled"
            entries.append((str(series.color), look, series.name))
    return entries


def facts_of(environment: dict[str, Any]) -> list[str]:
    """Returns version, commit and machine as short texts; what is not known is left out."""
    facts = []
    if environment.get("fedpress"):
        facts.append(f"fedpress {environment['fedpress']}")
    if environment.get("commit"):
        facts.append(f"commit {str(environment['commit'])[:10]}")
    if environment.get("machine"):
        facts.append(str(environment["machine"]))
    return facts


def _facts(run: Run) -> list[str]:
    """The line under the title: how long, which seed, which version and commit."""
    facts = []
    if units.number(run.result.get("seconds")) is not None:
        facts.append(units.seconds(run.result["seconds"]))
    seed = run.result.get("seed", run.settings.get("seed"))
    if seed is not None:
        facts.append(f"seed {seed}")
    version = run.result.get("version", run.environment.get("fedpress"))
    if version:
        facts.append(f"fedpress {version}")
    commit = run.environment.get("commit")
    if commit:
        facts.append(f"commit {str(commit)[:10]}")
    return facts


def details(run: Run) -> list[Detail]:
    """Returns what can be unfolded at the end of the page."""
    ledger = ledger_table(run.ledger)
    found = [
        Detail("Privacy ledger", table=ledger, rows=[] if ledger else _rows(run.ledger)),
        Detail("Recipe as given", text=run.recipe),
        Detail("Settings as resolved", rows=_rows(run.settings)),
        Detail("Environment and command", rows=_rows(run.environment)),
    ]
    return [entry for entry in found if entry.rows or entry.text or entry.table]


def _rows(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Flattens nested tables to rows like `stage.2.num_rounds`, the way overrides are written."""
    if isinstance(value, dict | list) and value and not _short(value):
        rows = []
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            rows += _rows(item, f"{name}.{key}" if name else str(key))
        return rows
    if not name:
        return []
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(name, text)]


def _short(value: Any) -> bool:
    """Whether a list can stand in one line."""
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _hash(script: str) -> str:
    """Returns the script's name in the page's content security policy: no other script may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
