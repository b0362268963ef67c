"""The commands `measure` (compares models) and `sweep` (runs a recipe with many settings).

This file also registers the commands that `one_model` creates, such as `fedpress prune`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli import completion
from fedpress.cli.common import (
    AllowCode,
    AsJson,
    Device,
    allow_code,
    error_text,
    stopping,
    warn,
    with_device,
)
from fedpress.cli.one_model import Input, Weights, command_of, shape_of
from fedpress.errors import Argument, RecipeError
from fedpress.stages.table import commands

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.pipeline.sweep import VariantFinished, VariantStarted


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this file, and one for each kind of stage, to `app`."""
    # From the table of stages: a new kind of stage gets its command without a change here.
    for row in commands().values():
        app.command(name=row.kind, help=row.summary)(command_of(row.kind))
    app.command()(measure)
    app.command()(sweep)


def measure(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models, runs, packed or exported files."),
    ],
    formats: Annotated[
        str | None, typer.Option(help="Formats to export to; all installed ones by default.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8/--no-int8", help="Also export with 8-bit integers.")
    ] = True,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,64",
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    seconds: Annotated[
        float, typer.Option(help="Time for each model, batch size and number of threads.")
    ] = 1.0,
    input_shape: Input = None,
    checkpoint: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the records to this JSON file.")] = None,
    code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Compares models: parameters, MACs, file size, memory, and latency in each runtime."""
    from fedpress.cli import terminal

    allow_code(code)
    out_stream = terminal.console(quiet=as_json)
    with terminal.waiting(out_stream, "measuring"):
        from fedpress.api import begin
        from fedpress.pipeline import commands
        from fedpress.workspace.atomic import write_json

        begin.find_modules()
        found = commands.measure(
            models,
            # An empty text means no exports; None means all installed formats.
            formats=None if formats is None else [name for name in formats.split(",") if name],
            int8=int8,
            batches=_whole("batches", batches),
            threads=_whole("threads", threads),
            seconds=seconds,
            input_shape=shape_of(input_shape),
            checkpoint=checkpoint,
        )
    terminal.show_measures(out_stream, found["records"])
    for name, why in found["left_out"].items():
        out_stream.print(f"{name} was left out: {why}", markup=False, soft_wrap=True)
    if out is not None:
        write_json(out, found)
    if as_json:
        typer.echo(json.dumps(found))


def _whole(name: str, text: str) -> list[int]:
    """Reads a list such as `1,64` for the option `name`."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise RecipeError(
            f"got '{text}', expected whole numbers above 0",
            place=name,
            cure=("give for instance ", Argument(name, (1, 64))),
        )
    return [int(part) for part in text.split(",")]


def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a shipped recipe, or a TOML file.", autocompletion=completion.recipes
        ),
    ],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,VALUE...]...",
            help="e.g. stage.prune.keep_params=0.5,0.3,0.1",
            autocompletion=completion.recipe_keys,
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder or file of the data set; sets data.path.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; sweeps/NAME by default. Resumes a sweep in it.")
    ] = None,
    device: Device = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, for mean and spread, such as 0,1,2.")
    ] = None,
    code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Runs a recipe for all combinations of values, and plots the metric against the cost."""
    from fedpress.cli import terminal

    allow_code(code)
    out_stream = terminal.console(quiet=as_json)
    with terminal.waiting(out_stream, "starting"):
        from fedpress.api import sweeps
        from fedpress.pipeline import sweep as sweeping
        from fedpress.reports.sweep import sweep_table, write_sweep
        from fedpress.reports.table import as_rich

        begun = sweeps.new(
            recipe, values or [], _whole_seeds(seeds), with_device([], device), data, out
        )
    variants, place = begun.variants, begun.place
    command = shlex.join(["fedpress", *sys.argv[1:]])
    running = sweeping.execute(begun.text, variants, place, extra=begun.extra, command=command)
    saved = "what was finished is saved"
    with stopping(f"\nstopped; {saved}; the same command goes on: --out {place}"):
        _follow(running, out_stream, len(variants))
    page = write_sweep(place)
    found = json.loads((place / "sweep.json").read_text("utf-8"))
    out_stream.print(as_rich(sweep_table(found)))
    out_stream.print(f"picture: {page}", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(found))
    failed = [variant["name"] for variant in found["variants"] if variant["error"]]
    if failed:
        raise RecipeError(
            f"{len(failed)} of {len(variants)} variants failed ({', '.join(failed)})",
            place="sweep",
            cure="see the table",
        )


def _whole_seeds(text: str | None) -> list[int]:
    """Reads a list of seeds such as `0,1,2`; empty if none is given."""
    if text is None:
        return []
    # Not `_whole`, since 0 is a seed.
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise RecipeError(
            f"got '{text}', expected whole numbers",
            place="seeds",
            cure=("give for instance ", Argument("seeds", (0, 1, 2))),
        )
    return [int(part) for part in text.split(",")]


def _follow(events: Iterable[VariantStarted | VariantFinished], out: Console, total: int) -> None:
    """Runs a sweep to its end, and shows the progress of each variant.

    Args:
        events: the sweep, which runs while its events are read.
        out: where progress is shown.
        total: number of variants.
    """
    from fedpress.api import progress
    from fedpress.pipeline.sweep import VariantFinished, VariantStarted

    number = 0
    for event in events:
        if isinstance(event, VariantStarted):
            number += 1
            warn(event.notes)
            out.print(f"[bold]{number}/{total}[/] ", end="")
            out.print(event.variant.name, markup=False, soft_wrap=True)
            progress.follow(event.events, out)
        elif isinstance(event, VariantFinished) and event.error:
            out.print(f"failed: {error_text(event.error)}", markup=False, soft_wrap=True)
