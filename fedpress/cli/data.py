"""The commands `init`, which writes a first recipe, and `data describe`, which looks at a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli.common import AsJson, in_one_line
from fedpress.errors import RunError

if TYPE_CHECKING:
    from fedpress.data.describe import TableFacts

data_app = typer.Typer(no_args_is_help=True, help="Look at data before there is a recipe.")


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this file to `app`."""
    app.command()(init)
    app.add_typer(data_app, name="data")


@data_app.command()
def describe(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A table: .csv, .parquet, .arrow, .db.")
    ],
    as_json: AsJson = False,
) -> None:
    """Shows each column's type, missing values, words or numbers, and candidates for the label."""
    from fedpress.data.describe import describe_file

    facts = describe_file(file)
    if as_json:
        typer.echo(json.dumps(facts.to_json()))
        return
    typer.echo(in_one_line(f"{facts.rows:,} rows, {len(facts.columns)} columns ({facts.source})"))
    _show_columns(facts)
    for title, names in (("label", facts.labels), ("client", facts.clients)):
        listed = ", ".join(names[:5]) or "none"
        typer.echo(in_one_line(f"candidates for {title}: {listed}"))
    typer.echo(in_one_line(f"next: fedpress init --data {file}"))


def _show_columns(facts: TableFacts) -> None:
    from fedpress.cli import terminal

    rows = [
        (one.name, one.type, f"{one.missing:,}", terminal.content(one)) for one in facts.columns
    ]
    terminal.show_columns(terminal.console(quiet=False), rows)
    for one in facts.columns:
        if one.note:
            typer.echo(in_one_line(f"note: column '{one.name}': {one.note}"))


def init(
    data: Annotated[
        str,
        typer.Option(help="A table, arrays, a text, a folder of such files, or module:function."),
    ],
    label: Annotated[
        str | None, typer.Option(help="The column to predict; several: months,died.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="The column that names the client of a row; '' for none.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="classification, regression, ...")] = None,
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.toml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
) -> None:
    """Looks at a file and writes a recipe with comments that runs at once."""
    from fedpress.pipeline.drafting import draft

    # Checked first: nobody should answer questions in vain.
    _refuse_existing(out)
    path = Path(data)
    if not yes and sys.stdin.isatty() and path.is_file():
        label, client, task = _asked(path, label, client, task)
    found = draft(data, label=label, client=client, task=task, folder=out.parent)
    beside = {out.parent / name: text for name, text in found.files.items()}
    for file in beside:
        _refuse_existing(file)
    for file, text in {out: found.text, **beside}.items():
        file.write_text(text, encoding="utf-8")
    for line in (*found.chosen, *(f"wrote {file}" for file in (out, *beside))):
        typer.echo(in_one_line(line))
    typer.echo(in_one_line(f"next: fedpress check {out}, then: fedpress run {out}"))


def _refuse_existing(file: Path) -> None:
    if file.exists():
        raise RunError("this file exists", place=file, cure="move it away, or give another --out")


def _asked(
    path: Path, label: str | None, client: str | None, task: str | None
) -> tuple[str, str, str | None]:
    """Asks for what is not given; the answer by default is the most likely one."""
    from fedpress.data.describe import describe_file

    facts = describe_file(path)
    _show_columns(facts)
    if label is None:
        label = typer.prompt("Which column is predicted?", default=next(iter(facts.labels), None))
    if client is None:
        likely = next((name for name in facts.clients if name != label), "none")
        client = typer.prompt("Which column names the client of a row?", default=likely)
        client = "" if client == "none" else client
    return str(label), str(client), task
