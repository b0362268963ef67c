"""Makes the commands on one model, such as `fedpress prune`: one for each kind of stage."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpress.cli import completion
from fedpress.cli.common import (
    AllowCode,
    AsJson,
    Device,
    ListKeys,
    allow_code,
    error_text,
    lock_until_exit,
    resume_command,
    run_to_resume,
    show_keys,
    stopping,
    warn,
    with_device,
)
from fedpress.errors import Argument, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.api.result import Result
    from fedpress.data import FederatedData
    from fedpress.pipeline.commands import OneStage
    from fedpress.workspace.folder import RunFolder

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a model or a run, a packed file, or package.module:function.",
        autocompletion=completion.architectures,
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="digits, cifar10, csv, ...; by default that of the run that wrote the model.",
        autocompletion=completion.sources,
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


Out = Annotated[
    Path | None, typer.Option(help="Run folder; runs/ and the command's name by default.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run: --resume RUN alone.")
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Mean per channel in the model's training (0.485,0.456,0.406), or none, or data."
    ),
]
Std = Annotated[str | None, typer.Option(help="Standard deviation, such as 0.229,0.224,0.225.")]


def command_of(kind: str) -> Callable[..., None]:
    """Returns the command of one kind of stage."""

    def command(
        model: Model = None,
        keys: list[str] | None = None,
        data: Source = None,
        path: DataPath = None,
        out: Out = None,
        input_shape: Input = None,
        checkpoint: Weights = None,
        mean: Mean = None,
        std: Std = None,
        device: Device = None,
        resume: Resume = False,
        list_keys: ListKeys = False,
        code: AllowCode = None,
        as_json: AsJson = False,
    ) -> None:
        if list_keys:
            show_keys([kind], of_stage=True)
            return
        if model is None and not (resume and out is not None):
            raise RecipeError(
                "no model was given",
                place="model",
                cure="give the folder of a model or a run, a packed file, or "
                "package.module:function",
            )
        from fedpress.cli import terminal

        allow_code(code)
        out_stream = terminal.console(quiet=as_json)
        asked = Asked(
            kind=kind,
            model=model,
            keys=keys or [],
            data=data,
            path=path,
            out=out,
            input_shape=input_shape,
            checkpoint=checkpoint,
            mean=mean,
            std=std,
            device=device,
            resume=resume,
        )
        with stopping("stopped before the work began; nothing was changed"):
            ready = _made_ready(asked, out_stream)
        result = _run(ready, out_stream)
        _show(ready, result, out_stream, as_json=as_json)

    settings = typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings; --keys lists them.",
        autocompletion=completion.stage_keys(kind),
    )
    # Each kind completes other keys, so this annotation cannot be written in the signature.
    command.__annotations__["keys"] = Annotated[list[str] | None, settings]
    return command


@dataclass(frozen=True)
class Asked:
    """The command's arguments, as the user wrote them."""

    kind: str
    model: str | None
    keys: list[str]
    data: str | None
    path: Path | None
    out: Path | None
    input_shape: str | None
    checkpoint: Path | None
    mean: str | None
    std: str | None
    device: str | None
    resume: bool


@dataclass(frozen=True)
class Ready:
    """A checked command; `folder` is the folder of a resumed run, None for a new run in `place`."""

    bound: OneStage
    data: FederatedData
    place: Path
    folder: RunFolder | None


def _made_ready(asked: Asked, out_stream: Console) -> Ready:
    """Makes the recipe of one stage, loads its data, and checks everything; writes nothing."""
    from fedpress.api import progress
    from fedpress.cli import terminal

    with terminal.waiting(out_stream, "starting"):
        from fedpress.api import begin
        from fedpress.pipeline.keys import settings_of
        from fedpress.workspace.folder import RunFolder

        begin.find_modules()
        place, bound = _ordered(asked)
        if asked.resume and place.is_dir():
            lock_until_exit(place)
        folder = RunFolder.resume(place, settings_of(bound.recipe)) if asked.resume else None
        if folder is None:
            RunFolder.check_free(place, bound.text)
    if bound.note is not None:
        out_stream.print(error_text(bound.note), markup=False, soft_wrap=True)
    with progress.bars(out_stream) as bars:
        loaded = bound.load_data(terminal.Loading(bars))
    with terminal.waiting(out_stream, "checking that everything fits together"):
        bound.check(loaded)
    return Ready(bound, loaded, place, folder)


def _ordered(asked: Asked) -> tuple[Path, OneStage]:
    """Returns the run folder and the recipe; a resumed run has both in its folder."""
    from fedpress.api.begin import default_folder
    from fedpress.pipeline.commands import OneStage
    from fedpress.pipeline.commands.chosen_data import ChosenData, Standardization
    from fedpress.pipeline.commands.subject import ChosenModel
    from fedpress.pipeline.recipe import Override

    if asked.resume:
        words = [*([asked.model] if asked.model is not None else []), *asked.keys]
        found, rest = run_to_resume(words) if asked.out is None else (asked.out, words)
        if found is not None and not rest and OneStage.lies_in(asked.kind, found):
            return found, OneStage.of_folder(
                found, [*map(Override.parse, with_device([], asked.device))]
            )
    if asked.model is None:
        raise RecipeError(
            "no model was given", place="model", cure="give it too, or --resume RUN alone"
        )
    chosen_model = ChosenModel.find(asked.model, weights=asked.checkpoint)
    given = Standardization.of(numbers_of(asked.mean), numbers_of(asked.std))
    examples = ChosenData(asked.data, asked.path, shape_of(asked.input_shape), given=given)
    keys = [Override.parse(key) for key in with_device(asked.keys, asked.device)]
    bound = OneStage.bind(asked.kind, chosen_model, keys, examples)
    return asked.out or default_folder(asked.kind, asked.resume), bound


def _run(ready: Ready, out_stream: Console) -> Result:
    """Runs the stage and draws the report."""
    from fedpress.api import progress
    from fedpress.api.result import Result
    from fedpress.cli import terminal
    from fedpress.pipeline.environment import write_environment
    from fedpress.pipeline.keys import settings_of
    from fedpress.pipeline.start import device_of
    from fedpress.reports.html import write_report
    from fedpress.workspace.folder import RunFolder

    bound, place, folder = ready.bound, ready.place, ready.folder
    if folder is None:
        folder = RunFolder.create(place, bound.text, settings_of(bound.recipe))
        lock_until_exit(place)
    with stopping(f"\nstopped; what was finished is saved; go on with: {resume_command(place)}"):
        command = shlex.join(["fedpress", *sys.argv[1:]])
        warn(write_environment(folder, command, device=device_of(bound.recipe)))
        progress.follow(bound.execute(folder, ready.data), out_stream)
        with terminal.waiting(out_stream, "drawing the report"):
            write_report(place)
    return Result.read(folder, bound.kind)


def _show(ready: Ready, result: Result, out_stream: Console, *, as_json: bool) -> None:
    """Prints the result and the paths of its files."""
    from fedpress.cli import terminal

    terminal.show_result(out_stream, dict(result.before), dict(result.after))
    if not len(ready.data.test):
        out_stream.print(
            "no metrics, since no data were given; give --data SOURCE to measure", markup=False
        )
    if result.artifact is not None:
        out_stream.print(f"file: {result.artifact}", markup=False, soft_wrap=True)
    out_stream.print(f"model: {result.folder}", markup=False, soft_wrap=True)
    report = ready.place / "report.html"
    out_stream.print(f"report: {report}", markup=False, soft_wrap=True)
    if as_json:
        page = {"before": result.before, "after": result.after, "model": str(result.folder)}
        if result.artifact is not None:
            page["file"] = str(result.artifact)
        typer.echo(json.dumps(page))


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Reads `3,32,32` or `3x32x32`.

    Raises:
        RecipeError: if the text is no list of whole numbers above 0.

    >>> shape_of("3,32,32")
    (3, 32, 32)
    """
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(
            f"got '{text}', expected whole numbers above 0",
            place="input_shape",
            cure=("give for instance ", Argument("input_shape", (3, 32, 32))),
        )
    return tuple(int(part) for part in parts)


def numbers_of(text: str | None) -> Any:
    """Reads `0.5,0.4,0.3` as numbers; a word such as `none` is returned as it is."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text
