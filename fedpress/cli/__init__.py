"""The command line `fedpress`: registers all commands, and turns errors into one sentence.

This file also contains the short commands: `check`, `report`, `recipes` and `privacy`.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fedpress
from fedpress.cli import completion, compress, models, network
from fedpress.cli import data as data_commands
from fedpress.cli.common import (
    AllowCode,
    AsJson,
    Data,
    Device,
    ListTables,
    Overrides,
    Public,
    allow_code,
    error_text,
    exit_stack,
    in_one_line,
    load_data,
    show_keys,
    warn,
    with_device,
)
from fedpress.cli.logs import show_log, take_flag
from fedpress.cli.run import run
from fedpress.cli.watch import watch
from fedpress.errors import DataError, FedpressError, RecipeError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.data import FederatedData
    from fedpress.pipeline.recipe import Recipe
    from fedpress.privacy.accounting.accountant import Spent

# Heavy imports (torch, pydantic models) stay inside the commands, so that
# `fedpress privacy` answers at once.
# pretty_exceptions_enable is False, because typer's tracebacks can show local variables, which may
# be private data.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress a model, train it where the private data lives, and ship it to a device.",
)
privacy_app = typer.Typer(no_args_is_help=True, help="Ask the privacy accountant.")
app.add_typer(privacy_app, name="privacy")
app.command()(run)
compress.add_commands(app)
models.add_commands(app)
network.add_commands(app)
data_commands.add_commands(app)
app.command()(watch)


@app.callback(invoke_without_command=True)
# `invoke_without_command`, because typer would demand a command before it looks at `--version`.
# `--debug` and `--verbose` are listed only for the help: `main` has removed them from `sys.argv`.
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell what is done, on the error stream.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"fedpress {fedpress.__version__}")
        raise typer.Exit


@app.command()
def check(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name of a shipped recipe, or a TOML file.",
            autocompletion=completion.recipes_or_tables,
        ),
    ] = None,
    overrides: Overrides = None,
    data: Data = None,
    public: Public = None,
    device: Device = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes.")
    ] = False,
    list_keys: ListTables = False,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Draw columns and classes of clients as a page."),
    ] = None,
    code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Checks a recipe without training: columns, sizes, bytes per round, noise, epsilon."""
    from fedpress.pipeline import recipe as recipes

    if list_keys:
        show_keys([*([recipe] if recipe is not None else []), *(overrides or [])])
        return
    if schema:
        typer.echo(recipes.schema())
        return
    if recipe is None:
        raise _no_recipe()
    from fedpress.api import begin
    from fedpress.cli import terminal
    from fedpress.cli.server import public_alone
    from fedpress.pipeline.check import check_recipe

    allow_code(code)
    words = [*with_device(overrides, device), *public_alone(public)]
    _, wanted = begin.load(recipe, words, data)
    out_stream = terminal.console(quiet=as_json)
    elsewhere = public is not None
    loaded = _described_data(wanted, out_stream, elsewhere=elsewhere)
    with terminal.waiting(out_stream, "checking that everything fits together"):
        lines = check_recipe(wanted, loaded, clients_elsewhere=elsewhere)
    said = _drawn(wanted, loaded, draw)
    if as_json:
        _print_json(wanted, loaded, lines)
        return
    terminal.show_check(
        out_stream, f"{wanted.name}: {wanted.description}", loaded.describe(), lines
    )
    terminal.show_inputs(out_stream, loaded, private=wanted.private)
    if elsewhere:
        _name_columns(wanted, loaded, out_stream)
    start = _start(recipe, overrides, data, public, device)
    said += f"everything fits together; start it with: {start}"
    out_stream.print(said, markup=False, soft_wrap=True)


def _drawn(recipe: Recipe, data: FederatedData, page: Path | None) -> str:
    """Draws the data if a page is asked for, and returns a line that says so."""
    if page is None:
        return ""
    from fedpress.api.drawing import draw_data

    draw_data(recipe, data, page)
    return f"drawn: {page}\n"


def _no_recipe() -> RecipeError:
    return RecipeError(
        "give the name of a recipe or a TOML file",
        place="check",
        cure="fedpress recipes lists the names",
    )


def _print_json(recipe: Recipe, data: FederatedData, lines: list[dict[str, Any]]) -> None:
    # The JSON may be passed on, so for a private recipe it tells less about the data.
    about = data.describe(private=recipe.private)
    typer.echo(json.dumps({"recipe": recipe.name, "data": about, "stages": lines}))


def _start(
    recipe: str, overrides: Overrides, data: Path | None, public: Path | None, device: Device
) -> str:
    """Returns the whole command of a run: without the same data another one would begin."""
    # A server has no clients' data.
    name, rows = ("run", data) if public is None else ("server", None)
    parts = ["fedpress", name, recipe, *(overrides or [])]
    for flag, value in (("--data", rows), ("--public", public), ("--device", device)):
        parts += [flag, str(value)] if value is not None else []
    return shlex.join(parts)


def _name_columns(recipe: Recipe, data: FederatedData, out_stream: Console) -> None:
    """Prints the line of a recipe with which clients can compare their columns, if it is missing.

    The clients have the recipe and not the server's table.
    """
    about = data.preparation
    if about is None or not about.of_rows or recipe.data.feature_columns is not None:
        return
    names = json.dumps([column.name for column in about.columns], ensure_ascii=False)
    said = "so that fedpress client --check can compare the columns, write under [data]:"
    out_stream.print(f"{said} feature_columns = {names}", markup=False, soft_wrap=True)


def _described_data(recipe: Recipe, out_stream: Console, *, elsewhere: bool) -> FederatedData:
    """Loads the data of a recipe, with a description of the columns of a table.

    If the clients' file is missing, the error names `--public`.

    Args:
        recipe: the recipe.
        out_stream: where progress is shown.
        elsewhere: whether the clients are on other machines, and this is the server's own data.
    """
    try:
        loaded = load_data(recipe, out_stream, describe="all")
        return loaded.without_clients() if elsewhere else loaded
    except DataError as error:
        path = recipe.data.path
        missing = path is not None and "*" not in path.name and not path.exists()
        # A server has no file of its clients.
        if missing and not elsewhere and any(stage.needs_clients for stage in recipe.stage):
            words = (error.cure,) if isinstance(error.cure, str) else error.cure
            error.cure = (*words, "; if the clients have the data, give --public FILE")
        raise


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; report.html in the folder by default.")
    ] = None,
) -> None:
    """Draws the report of a run, also of an old or unfinished one."""
    from fedpress.reports.html import write_report
    from fedpress.workspace import lock

    # A run that still works is no error, because the report reads only files that are written
    # atomically.
    if who := lock.holder(folder):
        warn([f"{who} still works in {folder}; the report shows what is there so far"])
    typer.echo(write_report(folder, out))


@app.command(name="recipes")
def list_recipes(
    copy: Annotated[
        str | None,
        typer.Option(help="Copy this recipe to NAME.toml here.", autocompletion=completion.recipes),
    ] = None,
) -> None:
    """Lists the shipped recipes; with --copy, copies one of them here for editing."""
    from fedpress.pipeline import recipe as recipes

    if copy is None:
        for name in recipes.names():
            typer.echo(f"{name}\n  {recipes.load(recipes.find(name)).description}")
        return
    text, path = recipes.find(copy), Path(f"{copy}.toml")
    try:
        # "x" refuses an existing file: it may be a recipe that the user has edited.
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RunError("this file exists", place=path, cure="move it away first") from error
    typer.echo(f"{path}: edit it, then: fedpress run {path}")


@privacy_app.command()
def epsilon(
    sampling_prob: Annotated[
        float, typer.Option(help="Chance that one unit takes part in a step (1 = always).")
    ],
    noise_multiplier: Annotated[
        float, typer.Option(help="Noise standard deviation / sensitivity.")
    ],
    steps: Annotated[int, typer.Option(help="Number of noised sums.")],
    delta: Annotated[float, typer.Option(help="Probability that epsilon does not hold.")],
    as_json: AsJson = False,
) -> None:
    """The epsilon of noised steps, if one unit is added or removed (privacy loss distributions)."""
    from fedpress.privacy.accounting import accountant

    _tell_spent(
        accountant.spent(
            [accountant.GaussianEvent(sampling_prob, noise_multiplier, steps)], delta=delta
        ),
        delta,
        as_json,
    )


@privacy_app.command()
def noise(
    epsilon: Annotated[float, typer.Option(help="The budget: largest epsilon.")],
    sampling_prob: Annotated[
        float, typer.Option(help="Chance that one unit takes part in a step (1 = always).")
    ],
    steps: Annotated[int, typer.Option(help="Number of noised sums.")],
    delta: Annotated[float, typer.Option(help="Probability that epsilon does not hold.")],
    as_json: AsJson = False,
) -> None:
    """The smallest noise multiplier with which a number of steps stays within epsilon."""
    from fedpress.privacy.accounting import accountant
    from fedpress.reports import units

    needed = accountant.noise_multiplier(
        epsilon=epsilon, delta=delta, sampling_prob=sampling_prob, steps=steps
    )
    # Computed again, to know whether this epsilon is exact or an upper bound.
    spent = accountant.spent([accountant.GaussianEvent(sampling_prob, needed, steps)], delta=delta)
    if as_json:
        typer.echo(json.dumps({"noise_multiplier": needed} | _bound(spent)))
        return
    # Rounded up: less noise than needed would break the promise.
    typer.echo(f"noise multiplier {units.rounded_up(needed)}")
    if spent.upper_bound:
        typer.echo(
            "This follows from an upper bound on epsilon; slightly less noise may be enough."
        )


def _bound(spent: Spent) -> dict[str, bool]:
    """Returns the JSON entry that marks epsilon as an upper bound; {} if epsilon is exact."""
    return {"upper_bound": True} if spent.upper_bound else {}


def _tell_spent(spent: Spent, delta: float, as_json: bool) -> None:
    """Prints the epsilon that was spent."""
    if as_json:
        finite = spent.epsilon if math.isfinite(spent.epsilon) else None  # JSON knows no infinity
        typer.echo(json.dumps({"epsilon": finite} | _bound(spent)))
        return
    from fedpress.reports import units

    note = f" ({spent.note})" if spent.note else ""
    typer.echo(f"epsilon {units.rounded_up(spent.epsilon)} at delta {delta:g}{note}")


@privacy_app.command()
def compose(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A ledger.json, or a JSON list of mechanism events."),
    ],
    delta: Annotated[float, typer.Option(help="Probability that epsilon does not hold.")],
    as_json: AsJson = False,
) -> None:
    """The epsilon of several Gaussian and Skellam mechanisms together, or of a run's ledger.

    An event is {"sampling_prob", "noise_multiplier", "steps"}, or {"kind": "skellam", "l2", "l1",
    "variance", "steps"}. A Skellam event may also have "sampling_prob" (1 by default) and "failure"
    (0 by default): the probability that one unit moves the sum by more than "l2" in one step.
    """
    from fedpress.privacy.accounting import compose as composing

    _tell_spent(
        composing.spent(file.read_text("utf-8"), delta=delta, place=str(file)), delta, as_json
    )


@privacy_app.command()
def skellam(
    size: Annotated[int, typer.Option(help="Number of values in the sum.")],
    clip_norm: Annotated[float, typer.Option(help="L2 norm by which one unit can move the sum.")],
    clients: Annotated[int, typer.Option(help="Largest number of clients in a round.")],
    survivors: Annotated[
        int, typer.Option(help="Smallest number of clients in a sum; their noise must suffice.")
    ],
    rounds: Annotated[int, typer.Option(help="Number of sums in the whole run.")],
    delta: Annotated[float, typer.Option(help="Probability that epsilon does not hold.")],
    epsilon: Annotated[
        float | None, typer.Option(help="The budget; or give --noise-multiplier.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise standard deviation / clip norm.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits per value; by default the fewest that suffice.")
    ] = None,
    coordinate_limit: Annotated[
        float | None,
        typer.Option(help="Largest size of a value; by default 6 * clip norm / sqrt(size)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Plans distributed noise for secure sums: bits per value, scale, noise, and epsilon."""
    from fedpress.privacy.noise import distributed
    from fedpress.reports import units

    plan = distributed.plan(
        size=size,
        clip_norm=clip_norm,
        coordinate_limit=6 * clip_norm / max(size, 1) ** 0.5
        if coordinate_limit is None
        else coordinate_limit,
        clients=clients,
        survivors=survivors,
        steps=rounds,
        delta=delta,
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        bits=bits,
    )
    # Epsilon is infinite if so few bits cannot hold the sum. It becomes None, since JSON knows no
    # infinity.
    rows = [
        (cost.bits, cost.epsilon if math.isfinite(cost.epsilon) else None) for cost in plan.table()
    ]
    if as_json:
        told = {"bits": plan.bits, "scale": plan.scale, "noise_multiplier": plan.noise_multiplier}
        table = [{"bits": bits, "epsilon": spent} for bits, spent in rows]
        typer.echo(json.dumps(told | {"epsilon": plan.epsilon, "table": table}))
        return
    typer.echo(
        f"{plan.bits} bits, scale {plan.scale:.4g}, "
        f"noise multiplier {units.rounded_up(plan.noise_multiplier)}"
    )
    typer.echo(f"epsilon {units.rounded_up(plan.epsilon)} at delta {delta:g}")
    typer.echo("\nbits  epsilon with this noise")
    for width, spent in rows:
        typer.echo(f"{width:4}  {'does not fit' if spent is None else units.rounded_up(spent)}")


def main() -> None:
    """Runs the command line. An error that the user can cure gives one sentence and exit code 2.

    With `--debug` the error's traceback is shown instead.
    """
    # Taken from `sys.argv` before typer reads it: logging must be set up before a command starts.
    debug, verbose = take_flag("--debug"), take_flag("--verbose", "-v")
    try:
        with show_log(debug=debug, verbose=verbose):
            app()
    except FedpressError as error:
        if debug:
            raise
        _stop(error_text(error))
    # A full disk or a folder without permission is no bug of fedpress either, so the user gets one
    # sentence too.
    except OSError as error:
        if debug:
            raise
        place, reason = error.filename or "a file", error.strerror or str(error)
        cure = "correct that place or choose another, then run again (finished work is kept)"
        said = f"{place}: {reason}; {cure}"
        _stop(in_one_line(said))
    finally:
        # Locks are released also after an error, or the run could not be resumed at once.
        exit_stack.close()


def _stop(message: str) -> None:
    """Prints an error and ends the process with exit code 2."""
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)
