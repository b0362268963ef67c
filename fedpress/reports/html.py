"""A run folder becomes one HTML page that works offline, on a phone, on paper, by day and by night."""

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
from fedpress.reports.draw import svg
from fedpress.reports.figures import figures
from fedpress.reports.headline import score_warning, tiles
from fedpress.reports.metrics import Shown
from fedpress.reports.plot import Figure, numbers_of
from fedpress.reports.protection import protections
from fedpress.reports.reading import Run, read_run
from fedpress.reports.table import (
    Table,
    failure_table,
    ledger_table,
    left_table,
    metrics_explained,
    metrics_table,
    progress_table,
    runtime_table,
    runtimes_told,
    stage_table,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Detail:
    """A part to unfold: a table, or rows of name and value, or a text as it is."""

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Page:
    """A page with one table and figures; `note` explains the table, `failed` are sentences."""

    name: str
    kind: str
    facts: list[str]
    command: str
    table: Table
    note: str
    failed: list[str]
    figures: list[Figure]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Draws the run folder `run` as one HTML file at `out` (default: `report.html` in the folder) and returns its path.

    The file appears whole or not at all.

    Raises:
        RunError: if `run` is no run folder or damaged, or `out` cannot be written.
    """
    return _write(
        render(read_run(run)), Path(out) if out is not None else Path(run) / "report.html"
    )


def write_page(page: Page, target: Path) -> Path:
    """Writes a page that is no run, such as a sweep, whole or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    scripts = _scripts(page.figures)
    text = (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            figures=_drawn(page.figures),
            scripts=[Markup(script) for script in scripts],
            hashes=[_hash(script) for script in scripts],
        )
    )
    return _write(text, target)


def _write(page: str, target: Path) -> Path:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            part.write_text(page, "utf-8")
    return target


def render(run: Run) -> str:
    """Returns the page for a run that was read."""
    shown, stages = figures(run), run.stages
    scripts = _scripts(shown)
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            run=run,
            path_of_stages=[str(s.get("name") or s.get("kind") or "?") for s in stages],
            facts=_facts(run),
            tiles=tiles([*([run.before] if run.before else []), *stages]),
            protections=protections(stages),
            stopped=[
                f"{s.get('name')} stopped early: {s['stopped']}."
                for s in stages
                if s.get("stopped")
            ],
            warnings=_warnings(run),
            failed=_filled(failure_table(stages, run.records)),
            table=stage_table(run.result, before=run.before) if stages else None,
            runtimes=runtimes_told(run.result, before=run.before),
            beside=_filled(metrics_table(stages)),
            explained=metrics_explained(stages),
            metric=Shown.of(stages),
            left=_filled(left_table(stages)),
            files=_filled(runtime_table(stages)),
            progress=None if run.finished else progress_table(run.records),
            figures=_drawn(shown),
            # Scripts are ours; what comes from the folder is escaped.
            scripts=[Markup(script) for script in scripts],
            hashes=[_hash(script) for script in scripts],
            details=details(run),
        )
    )


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


def _scripts(figures: list[Figure]) -> list[str]:
    return [(HERE / "hover.js").read_text(encoding="utf-8")] if figures else []


@dataclass(frozen=True)
class Drawn:
    """A figure on its page: `legend` has a colour, a look and a name for each entry; `data` its numbers as a table."""

    figure: Figure
    picture: Markup
    legend: list[tuple[str, str, str]]
    data: Table


def _drawn(figures: list[Figure]) -> list[Drawn]:
    return [
        Drawn(figure, svg(figure, f"figure-{at}"), _legend(figure), numbers_of(figure))
        for at, figure in enumerate(figures)
    ]


def _legend(figure: Figure) -> list[tuple[str, str, str]]:
    if not figure.legend:
        return []
    shown = [series for series in figure.series if series.in_legend]
    return [
        (series.color, "hollow" if series.hollow else "filled", series.name) for series in shown
    ]


def facts_of(environment: dict[str, Any]) -> list[str]:
    """Returns version, commit and machine as short texts."""
    facts = [f"fedpress {environment['fedpress']}"] if environment.get("fedpress") else []
    facts += [f"commit {str(environment['commit'])[:10]}"] if environment.get("commit") else []
    return facts + ([str(environment["machine"])] if environment.get("machine") else [])


def _facts(run: Run) -> list[str]:
    """The line under the title: how long, which seed, which version and commit."""
    facts = (
        [units.seconds(run.result["seconds"])]
        if units.number(run.result.get("seconds")) is not None
        else []
    )
    seed = run.result.get("seed", run.settings.get("seed"))
    version = run.result.get("version", run.environment.get("fedpress"))
    commit = run.environment.get("commit")
    facts += [f"seed {seed}"] if seed is not None else []
    facts += [f"fedpress {version}"] if version else []
    return facts + ([f"commit {str(commit)[:10]}"] if commit else [])


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
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [
            row for key, item in items for row in _rows(item, f"{name}.{key}" if name else str(key))
        ]
    return (
        [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
        if name
        else []
    )


def _short(value: Any) -> bool:
    """Whether a list can stand in one line."""
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _hash(script: str) -> str:
    """The script's name in the page's content security policy: no other script may run, and nothing may be loaded."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
