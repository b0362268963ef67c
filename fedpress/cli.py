"""The command line: run, check, report, recipes, privacy."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fedpress
from fedpress.errors import FedpressError, RecipeError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.recipe import Recipe

# Heavy imports (torch, pydantic models) stay inside the commands: `fedpress privacy` must answer at once.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress a model, train it where the private data lives, and ship it to a device.",
)
privacy_app = typer.Typer(no_args_is_help=True, help="Ask the privacy accountant.")
app.add_typer(privacy_app, name="privacy")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. stage.2.num_rounds=5")]
Data = Annotated[Path | None, typer.Option(help="Folder or file of the data set; sets data.path.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        typer.echo(f"fedpress {fedpress.__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")],
    overrides: Overrides = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    reuse: Annotated[Path | None, typer.Option("--from", help="Take over equal finished stages of this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Runs a recipe into a run folder, with a report at the end."""
    from fedpress import run as runs
    from fedpress.folder import RunFolder, write_json
    from fedpress.report.html import write_report

    text, wanted = _load(recipe, overrides, data)
    place = out or _default_folder(wanted.name, resume)
    folder = RunFolder.resume(place, runs.settings(wanted)) if resume else None
    if folder is None and (place / "settings.json").exists():
        raise RunError(f"{place}: this folder already holds a run; add --resume to go on, or give another --out")
    console = _console(as_json)
    loaded = _data(wanted, console)
    runs.check(wanted, loaded)
    if folder is None:
        folder = RunFolder.create(place, text, runs.settings(wanted))
    write_json(place / "environment.json", runs.environment(shlex.join(["fedpress", *sys.argv[1:]])))
    console.print(f"[bold]{wanted.name}[/] into {place}")
    try:
        _follow(runs.execute(wanted, folder, loaded, reuse=reuse), console)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; everything up to the last epoch or round is saved; go on with {_again()}", err=True)
        raise typer.Exit(130) from None
    result = json.loads((place / "result.json").read_text())
    report_file = write_report(place)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        from fedpress.report.table import rich_table

        console.print(rich_table(result))
        console.print(f"report: {report_file}")


def _default_folder(name: str, resume: bool) -> Path:
    """`runs/NAME`, or with a number behind if that is taken; the last one to resume."""
    taken = [p for i in range(1, 1000) if (p := _numbered(name, i)).exists()]
    if resume:
        return taken[-1] if taken else _numbered(name, 1)
    return _numbered(name, len(taken) + 1)


def _numbered(name: str, number: int) -> Path:
    return Path("runs") / (name if number == 1 else f"{name}-{number}")


def _again() -> str:
    words = sys.argv[1:]
    return shlex.join(["fedpress", *words] if "--resume" in words else ["fedpress", *words, "--resume"])


@app.command()
def check(
    recipe: Annotated[str | None, typer.Argument(help="Name of a shipped recipe, or a TOML file.")] = None,
    overrides: Overrides = None,
    data: Data = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Binds everything without training: sizes, bytes per round, noise and epsilon; exit code 2 if something is wrong."""
    from fedpress import recipe as recipes
    from fedpress import run as runs

    if schema:
        typer.echo(recipes.schema())
        return
    if recipe is None:
        raise RecipeError("check: give the name of a recipe or a TOML file; fedpress recipes lists the names")
    _, wanted = _load(recipe, overrides, data)
    console = _console(as_json)
    loaded = _data(wanted, console)
    lines = runs.check(wanted, loaded)
    if as_json:
        typer.echo(json.dumps({"recipe": wanted.name, "data": loaded.describe(), "stages": lines}))
        return
    _print_check(console, wanted, loaded.describe(), lines)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; report.html in the folder by default.")] = None,
) -> None:
    """Draws the report of a run, also of an old or unfinished one."""
    from fedpress.report.html import write_report

    typer.echo(write_report(folder, out))


@app.command(name="recipes")
def list_recipes(
    copy: Annotated[str | None, typer.Option(help="Copy this recipe to NAME.toml here.")] = None,
) -> None:
    """Lists the shipped recipes; copies one to edit."""
    from fedpress import recipe as recipes

    if copy is None:
        console = _console(False)
        for name in recipes.names():
            console.print(f"[bold]{name:14}[/] {recipes.load(recipes.text(name)).description}")
        return
    text, path = recipes.text(copy), Path(f"{copy}.toml")
    if path.exists():
        raise RunError(f"{path}: this file exists; move it away first")
    path.write_text(text)
    typer.echo(f"{path}: edit it, then: fedpress run {path}")


@privacy_app.command()
def epsilon(
    sampling_prob: Annotated[float, typer.Option(help="Chance that one unit takes part in a step (1 = always).")],
    noise_multiplier: Annotated[float, typer.Option(help="Noise standard deviation / sensitivity.")],
    steps: Annotated[int, typer.Option(help="Number of noised sums.")],
    delta: Annotated[float, typer.Option(help="Chance that the promise fails.")],
    as_json: AsJson = False,
) -> None:
    """The epsilon that so many noised steps spend (add-or-remove, PLD)."""
    from fedpress.privacy import accounting

    spent = accounting.epsilon([accounting.Phase(sampling_prob, noise_multiplier, steps)], delta=delta)
    typer.echo(json.dumps({"epsilon": spent}) if as_json else f"epsilon {spent:.4g} at delta {delta:g}")


@privacy_app.command()
def noise(
    epsilon: Annotated[float, typer.Option(help="The budget.")],
    sampling_prob: Annotated[float, typer.Option(help="Chance that one unit takes part in a step (1 = always).")],
    steps: Annotated[int, typer.Option(help="Number of noised sums.")],
    delta: Annotated[float, typer.Option(help="Chance that the promise fails.")],
    as_json: AsJson = False,
) -> None:
    """The smallest noise multiplier that keeps so many steps within epsilon."""
    from fedpress.privacy import accounting

    needed = accounting.noise_multiplier(epsilon=epsilon, delta=delta, sampling_prob=sampling_prob, steps=steps)
    typer.echo(json.dumps({"noise_multiplier": needed}) if as_json else f"noise multiplier {needed:.4g}")


def _load(recipe: str, overrides: list[str] | None, data: Path | None) -> tuple[str, Recipe]:
    from fedpress import recipe as recipes

    text = recipes.text(recipe)
    extra = [f"data.path={json.dumps(str(data))}"] if data is not None else []
    sys.path.insert(0, str(Path.cwd()))  # own models and data: package.module:function beside the recipe
    return text, recipes.load(text, [*(overrides or []), *extra])


def _console(quiet: bool) -> Console:
    from rich.console import Console

    return Console(stderr=quiet, highlight=False)


def _data(recipe: Recipe, console: Console) -> Any:
    from fedpress import run as runs

    with _bars(console) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None, note="")
            bars.update(tasks[what], completed=done, total=total or None)

        return runs.load_data(recipe, progress=progress)


def _bars(console: Console) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _follow(events: Any, console: Console) -> None:
    """Shows the events of a run as progress bars, one per stage."""
    from fedpress.state import StageFinished, StageStarted, Tick

    with _bars(console) as bars:
        task: Any = None
        for event in events:
            if isinstance(event, StageStarted):
                task = bars.add_task(event.name, total=1, note="taken over" if event.reused else "")
            elif isinstance(event, Tick):
                bars.update(task, completed=event.done, total=max(1, event.total), note=event.note)
            elif isinstance(event, StageFinished):
                bars.update(task, total=1, completed=1, note=f"test accuracy {event.result['accuracy']:.2%}")


def _print_check(console: Console, recipe: Recipe, data: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    console.print(f"[bold]{recipe.name}[/]: {recipe.description}")
    for at, line in enumerate(lines):
        facts = ", ".join(f"{k} {_short(v)}" for k, v in line.items() if k not in ("kind", "name"))
        console.print(f"  [bold]{at} {line['name']}[/] ({line['kind']}): {facts}")
    console.print("everything fits together; start it with fedpress run")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Runs the command line; a user's mistake ends in one sentence and exit code 2."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except FedpressError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if debug:
            raise
        cures = {errno.ENOSPC: "the disk is full; free space and run again with --resume",
                 errno.EACCES: "no permission; choose another folder with --out",
                 errno.EROFS: "this place is read-only; choose another folder with --out"}  # fmt: skip
        cure = cures.get(error.errno or 0, "check the path and run again; finished work can be taken up with --resume")
        typer.echo(f"error: {error.filename or 'file'}: {error.strerror or error}: {cure}", err=True)
        sys.exit(2)
