"""The commands on one model: prune, sparsify, l0, quantize, train, distill, pack, export; measure; and sweep."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli.common import (
    AllowCode,
    AsJson,
    again,
    allow_code,
    default_folder,
    find_modules,
    hold,
    load,
    run_to_resume,
    told,
    warn,
)
from fedpress.errors import RecipeError
from fedpress.stages.table import commands

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.pipeline.sweep import VariantFinished, VariantStarted

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a model or a run, a packed file, or package.module:function.",
    ),
]
Keys = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings; --keys lists them.")
]
Source = Annotated[
    str | None,
    typer.Option(
        "--data", help="digits, cifar10, csv, ...; by default that of the run that left the model."
    ),
]
DataPath = Annotated[Path | None, typer.Option("--path", help="Folder or file of the data.")]
Input = Annotated[
    str | None, typer.Option("--input", help="Shape of one example, such as 3,32,32.")
]
Weights = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="State dict for a function, .safetensors or .pt."),
]


Mean = Annotated[
    str | None,
    typer.Option(
        help="How a model from elsewhere wants its inputs: 0.485,0.456,0.406, or none, or data."
    ),
]
Std = Annotated[str | None, typer.Option(help="Likewise, to divide by: 0.229,0.224,0.225.")]


def add_commands(app: typer.Typer) -> None:
    """Adds a command for each kind of stage, and those on several models."""
    for row in commands().values():
        app.command(name=row.kind, help=row.words)(_command(row.kind))
    app.command()(measure)
    app.command()(sweep)


def _command(kind: str) -> Callable[..., None]:
    def command(
        model: Model = None,
        keys: Keys = None,
        data: Source = None,
        path: DataPath = None,
        out: Annotated[
            Path | None, typer.Option(help="Run folder; runs/ and the command's name by default.")
        ] = None,
        input_shape: Input = None,
        checkpoint: Weights = None,
        mean: Mean = None,
        std: Std = None,
        resume: Annotated[
            bool,
            typer.Option("--resume", help="Go on with an interrupted run: --resume RUN alone."),
        ] = False,
        list_keys: Annotated[
            bool, typer.Option("--keys", help="List the settings and what they mean.")
        ] = False,
        code: AllowCode = None,
        as_json: AsJson = False,
    ) -> None:
        if list_keys:
            _show_keys(kind)
            return
        if model is None and not (resume and out is not None):
            raise RecipeError(
                f"{kind}: give a model: the folder of a model or a run, or package.module:function"
            )
        from fedpress.cli import terminal

        allow_code(code)
        out_stream = terminal.console(quiet=as_json)
        try:
            with terminal.waiting(out_stream, "starting"):
                from fedpress.pipeline.commands import Order, Result
                from fedpress.pipeline.commands.order import Given
                from fedpress.pipeline.commands.subject import Subject
                from fedpress.pipeline.environment import note_environment
                from fedpress.pipeline.keys import settings_of
                from fedpress.pipeline.recipe import Override
                from fedpress.reports.html import write_report
                from fedpress.workspace.folder import RunFolder

                find_modules([])
                words = [*([model] if model is not None else []), *(keys or [])]
                found, rest = run_to_resume(words) if resume and out is None else (out, words)
                if resume and found is not None and not rest and Order.lies_in(kind, found):
                    place, order = (
                        found,
                        Order.of_folder(found),
                    )  # all that was said then lies there
                else:
                    if model is None:
                        raise RecipeError(f"{kind}: give the model too, or --resume RUN alone")
                    subject = Subject.find(model, weights=checkpoint)
                    shape = shape_of(input_shape)
                    how = Given.of(_numbers(mean), _numbers(std))
                    order = Order.bind(
                        kind,
                        subject,
                        [Override.parse(key) for key in keys or ()],
                        source=data,
                        path=path,
                        input_shape=shape,
                        preprocess=how,
                    )
                    place = out or default_folder(kind, resume)
                if resume and place.is_dir():
                    hold(place)
                folder = RunFolder.resume(place, settings_of(order.recipe)) if resume else None
                if folder is None:
                    RunFolder.check_free(place, order.text)
            if order.asks:
                out_stream.print(told(order.asks), markup=False, soft_wrap=True)
            with terminal.bars(out_stream) as bars:
                loaded = order.load_data(terminal.Loading(bars))
            with terminal.waiting(out_stream, "checking that everything fits together"):
                order.check(loaded)
        except KeyboardInterrupt:
            typer.echo("stopped before the work began; nothing was changed", err=True)
            raise typer.Exit(130) from None
        if folder is None:
            folder = RunFolder.create(place, order.text, settings_of(order.recipe))
            hold(place)
        try:
            warn(note_environment(folder, shlex.join(["fedpress", *sys.argv[1:]])))
            terminal.follow(order.execute(folder, loaded), out_stream)
            with terminal.waiting(out_stream, "drawing the report"):
                write_report(place)
        except KeyboardInterrupt:
            typer.echo(
                f"\nstopped; what was finished is saved; go on with: {again(place)}", err=True
            )
            raise typer.Exit(130) from None
        result = Result.read(folder, kind)
        terminal.show_result(out_stream, dict(result.before), dict(result.facts))
        if not len(loaded.test):
            out_stream.print(
                "no accuracy: there was no data; give --data SOURCE to measure it", markup=False
            )
        if result.artifact is not None:
            out_stream.print(f"file: {result.artifact}", markup=False, soft_wrap=True)
        out_stream.print(f"model: {result.folder}", markup=False, soft_wrap=True)
        out_stream.print(f"report: {place / 'report.html'}", markup=False, soft_wrap=True)
        if as_json:
            page = {"before": result.before, "after": result.facts, "model": str(result.folder)}
            typer.echo(
                json.dumps(page | ({"file": str(result.artifact)} if result.artifact else {}))
            )

    return command


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Reads `3,32,32` or `3x32x32`.

    Raises:
        RecipeError: if it says something else.

    >>> shape_of("3,32,32")
    (3, 32, 32)
    """
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"--input: got '{text}', expected whole numbers above 0, such as 3,32,32")
    return tuple(int(part) for part in parts)


def _numbers(text: str | None) -> object:
    """Reads `0.5,0.4,0.3`; a word stays one."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


def _show_keys(kind: str) -> None:
    from fedpress.cli import terminal
    from fedpress.pipeline import recipe as recipes

    terminal.show_keys(terminal.console(quiet=False), recipes.keys(kind))


def measure(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models, runs, packed or exported files."),
    ],
    formats: Annotated[
        str | None, typer.Option(help="Export each model to these too; all installed by default.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="Export on integers too.")] = True,
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
    """Measures models side by side: parameters, MACs, file, memory, latency in each runtime, distance to the peak."""
    from fedpress.cli import terminal

    allow_code(code)
    out_stream = terminal.console(quiet=as_json)
    with terminal.waiting(out_stream, "measuring"):
        from fedpress.pipeline import commands
        from fedpress.workspace.folder import write_json

        find_modules([])
        found = commands.measure(
            models,
            formats=None if formats is None else [name for name in formats.split(",") if name],
            int8=int8,
            batches=_whole("--batches", batches),
            threads=_whole("--threads", threads),
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
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise RecipeError(f"{name}: got '{text}', expected whole numbers above 0, such as 1,64")
    return [int(part) for part in text.split(",")]


def sweep(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,VALUE...]...", help="e.g. stage.prune.keep_params=0.5,0.3,0.1"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder or file of the data set; sets data.path.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; sweeps/NAME by default. One that is there goes on.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, for mean and spread, such as 0,1,2.")
    ] = None,
    code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Runs a recipe for all combinations of values; equal stages are done once; draws accuracy against cost."""
    from fedpress.cli import terminal

    allow_code(code)
    out_stream = terminal.console(quiet=as_json)
    with terminal.waiting(out_stream, "starting"):
        from fedpress.pipeline import recipe as recipes
        from fedpress.pipeline import sweep as sweeps
        from fedpress.reports.sweep import sweep_table, write_sweep
        from fedpress.reports.table import as_rich

        text = load(recipe, None, None)[0]
        extra = (
            [f"data.path={json.dumps(str(data), ensure_ascii=False)}"] if data is not None else []
        )
        variants = sweeps.variants(values or [], _whole_seeds(seeds))
        name = str(recipes.tree(text).get("name", "recipe"))
        place = out or Path("sweeps") / name
    try:
        _follow(sweeps.execute(text, variants, place, extra=extra, command=shlex.join(["fedpress", *sys.argv[1:]])),
                out_stream, len(variants))  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(
            f"\nstopped; what was finished is saved; the same command goes on: --out {place}",
            err=True,
        )
        raise typer.Exit(130) from None
    page = write_sweep(place)
    found = json.loads((place / "sweep.json").read_text("utf-8"))
    out_stream.print(as_rich(sweep_table(found)))
    out_stream.print(f"picture: {page}", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(found))
    failed = [variant["name"] for variant in found["variants"] if variant["error"]]
    if failed:
        raise RecipeError(
            f"sweep: {len(failed)} of {len(variants)} variants failed ({', '.join(failed)}); see the table"
        )


def _whole_seeds(text: str | None) -> list[int]:
    if text is None:
        return []
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise RecipeError(f"--seeds: got '{text}', expected whole numbers, such as 0,1,2")
    return [int(part) for part in text.split(",")]


def _follow(events: Iterable[VariantStarted | VariantFinished], out: Console, total: int) -> None:
    from fedpress.cli import terminal
    from fedpress.pipeline.sweep import VariantFinished, VariantStarted

    number = 0
    for event in events:
        if isinstance(event, VariantStarted):
            number += 1
            warn(event.notes)
            out.print(f"[bold]{number}/{total}[/] ", end="")
            out.print(event.variant.name, markup=False, soft_wrap=True)
            terminal.follow(event.events, out)
        elif isinstance(event, VariantFinished) and event.error:
            out.print(f"failed: {told(event.error)}", markup=False, soft_wrap=True)
