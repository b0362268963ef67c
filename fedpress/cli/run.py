"""The command `fedpress run`: runs all stages of a recipe, or resumes an interrupted run."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli import cluster, completion
from fedpress.cli.common import (
    AllowCode,
    AsJson,
    Data,
    Device,
    ListTables,
    Overrides,
    allow_code,
    exit_stack,
    load_data,
    required_recipe,
    resume_command,
    run_to_resume,
    show_keys,
    stopping,
    warn,
    with_device,
    without_collector,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.api.begin import CheckedRun
    from fedpress.data import FederatedData
    from fedpress.pipeline.check_beside import ChecksBeside
    from fedpress.pipeline.recipe import Recipe
    from fedpress.workspace.folder import RunFolder
    from fedpress.workspace.state import Engine

Reuse = Annotated[
    Path | None, typer.Option("--from", help="A run whose equal first stages are copied.")
]


def run(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name of a shipped recipe, or a TOML file.",
            autocompletion=completion.recipes_or_tables,
        ),
    ] = None,
    overrides: Overrides = None,
    data: Data = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME by default.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume an interrupted run: --resume RUN; nothing else is needed."
        ),
    ] = False,
    reuse: Reuse = None,
    list_keys: ListTables = False,
    engine: cluster.Engine = "auto",
    workers: cluster.Workers = None,
    at_once: cluster.AtOnce = None,
    bytes: cluster.Bytes = None,
    ray_address: cluster.Address = None,
    cpus_per_client: cluster.Cpus = None,
    gpus_per_client: cluster.Gpus = None,
    actors: cluster.Actors = None,
    code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Runs a recipe, and writes results and a report into a run folder."""
    # typer takes the first word for RECIPE, but it may also be a run folder or a table's name.
    words = [*([recipe] if recipe is not None else []), *(overrides or [])]
    if list_keys:
        show_keys(words)
        return
    given = cluster.Given(
        engine, workers, at_once, bytes, ray_address, cpus_per_client, gpus_per_client, actors
    )
    allow_code(code)
    # Nearly everything that can fail is checked in this block, before the run folder is created.
    with stopping("stopped before the run began; nothing was changed"), without_collector():
        from fedpress.cli import terminal

        out_stream = terminal.console(quiet=as_json)
        with terminal.waiting(out_stream, "starting"):
            from fedpress.workspace.folder import RunFolder

            # First, because the likeliest failure is a Ray cluster that cannot be reached.
            runner = exit_stack.enter_context(given.open())
            words = with_device(words, device)
            bind = _begun if resume else _new
            begun = bind(context, words, data, out)
            earlier = RunFolder.open(reuse) if reuse is not None else None
        loaded = load_data(begun.recipe, out_stream)
        beside = _checked(begun.recipe, loaded, out_stream, alone=engine != "ray")
    report_file = _execute(begun, loaded, out_stream, reuse=earlier, engine=runner, beside=beside)
    show_run(begun.place, report_file, out_stream, as_json=as_json)


def _new(
    context: typer.Context, words: list[str], data: Path | None, out: Path | None
) -> CheckedRun:
    """Checks the recipe of a new run, and that its run folder is free.

    Args:
        context: typer's context of the command, for an error about a missing recipe.
        words: recipe and overrides.
        data: value of `--data`.
        out: value of `--out`.
    """
    from fedpress.api import begin

    recipe, overrides = _parted(words)
    return begin.new(required_recipe(recipe, context), overrides, data, out)


def _begun(
    context: typer.Context, words: list[str], data: Path | None, out: Path | None
) -> CheckedRun:
    """Opens the run to resume, and checks its recipe.

    The arguments are those of `_new`, but `words` may contain the run folder. It needs no recipe,
    because the folder contains one.
    """
    from fedpress.api import begin

    place, rest = run_to_resume(words) if out is None else (out, words)
    recipe, overrides = _parted(rest)
    # Neither RUN nor --out is given: the folder follows from the name of the recipe.
    if place is None:
        checked = begin.load(required_recipe(recipe, context), overrides, data)[1]
        place = begin.default_folder(checked.name, True)
    return begin.checked_resume(place, recipe, overrides, data, exit_stack)


def _parted(words: list[str]) -> tuple[str | None, list[str]]:
    """Returns the recipe (None if the first word is not one), and the overrides."""
    # A file whose name contains "=" is a recipe; any other word with "=" is an override.
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return words[0], words[1:]
    return None, words


def _checked(
    recipe: Recipe, data: FederatedData, out_stream: Console, *, alone: bool
) -> ChecksBeside | None:
    """Checks the first stage, and begins to check the others in a second process.

    Args:
        recipe: the checked settings.
        data: the loaded data.
        out_stream: where a spinner is shown.
        alone: whether the run works on this machine only.

    Returns:
        The checks in the second process; None if all stages have been checked here.

    Raises:
        FedpressError: if a check in this process fails.
    """
    from fedpress.cli import terminal
    from fedpress.core.compiler import postpone_compiler
    from fedpress.pipeline.check import checks
    from fedpress.pipeline.check_beside import ChecksBeside, can_check_beside
    from fedpress.pipeline.start import device_of

    # Here, because by now all classes are imported that it is about.
    postpone_compiler()
    found = checks(recipe, data, sizes=False)
    with terminal.waiting(out_stream, "checking that everything fits together"):
        next(found)
    if alone and can_check_beside(recipe, device_of(recipe)):
        beside = ChecksBeside(found)
        exit_stack.callback(beside.stop)
        return beside
    with terminal.waiting(out_stream, "checking that everything fits together"):
        for _ in found:
            pass
    return None


def _execute(
    begun: CheckedRun,
    data: FederatedData,
    out_stream: Console,
    *,
    reuse: RunFolder | None,
    engine: Engine,
    beside: ChecksBeside | None,
) -> Path:
    """Runs all stages, writes the report, and returns its path.

    Args:
        begun: the checked run, new or resumed.
        data: the loaded data.
        out_stream: where progress is shown.
        reuse: an earlier run whose equal, finished stages are copied.
        engine: runs the simulated clients.
        beside: checks of later stages that are not finished yet. If one fails, a new run's folder
            is removed.
    """
    from fedpress.api import progress
    from fedpress.cli import terminal
    from fedpress.pipeline import run as runs

    place = begun.place
    saved = "all up to the last epoch or round is saved"
    with stopping(f"\nstopped; {saved}; go on with: {resume_command(place)}"):
        # The folder is created only here, so a command that fails earlier leaves nothing behind.
        folder, notes = begun.start(shlex.join(["fedpress", *sys.argv[1:]]), exit_stack, data)
        warn(notes)
        out_stream.print(f"{begun.recipe.name} into {place}", markup=False, soft_wrap=True)
        events = runs.execute(begun.recipe, folder, data, reuse=reuse, engine=engine)
        if beside is not None:
            events = beside.follow(events)
        try:
            progress.follow(events, out_stream)
        finally:
            # Without the second process nothing would have been written.
            if beside is not None and beside.failed and begun.folder is None:
                shutil.rmtree(place)
        from fedpress.reports.html import write_report

        with terminal.waiting(out_stream, "drawing the report"):
            return write_report(place)


def show_run(place: Path, report_file: Path, out_stream: Console, *, as_json: bool) -> None:
    """Prints the result of a finished run: a table of stages, metrics, and the report's path."""
    from fedpress.cli import terminal
    from fedpress.reports.outcome import outcome_of
    from fedpress.reports.stage_table import rich_table, runtimes_explained, spread_explained

    # Read from the file, so that the user sees exactly what was saved.
    result = json.loads((place / "result.json").read_text("utf-8"))
    out_stream.print(rich_table(result, width=out_stream.width))
    # A note is empty if the table has nothing that needs to be explained.
    for note in (spread_explained(result), runtimes_explained(result)):
        if note:
            out_stream.print(note, style="dim", markup=False)
    terminal.show_metrics(out_stream, result)
    out_stream.print()
    out_stream.print(outcome_of(result, warn=False), markup=False)
    out_stream.print(f"report: {report_file}", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(result))
