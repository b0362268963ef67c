"""Creates the commands that work on one model, such as `fedpress prune MODEL`.

There is one command for each kind of stage, and each runs a recipe of this single stage. (A recipe
describes a run as a list of stages, such as train, prune and quantize.)
"""

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
    typer.Option(
        "--checkpoint", help="State dict (.safetensors or .pt) for the model of a function."
    ),
]


Out = Annotated[
    Path | None, typer.Option(help="Run folder; runs/ and the command's name by default.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Resume an interrupted run: --resume RUN is enough.")
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Channel means used in training, such as 0.485,0.456,0.406; none: inputs stay as they "
        "are; data: computed from the data."
    ),
]
Std = Annotated[str | None, typer.Option(help="Standard deviation, such as 0.229,0.224,0.225.")]


def command_of(kind: str) -> Callable[..., None]:
    """Returns the command for one kind of stage, as a function for typer.

    Args:
        kind: kind of the stage, such as "prune".
    """

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
        # A resumed run has its model in the run folder, so `--resume --out RUN` needs none.
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
    # Set here, since shell completion suggests only the keys of this `kind`.
    command.__annotations__["keys"] = Annotated[list[str] | None, settings]
    return command


@dataclass(frozen=True)
class Asked:
    """The arguments of the command, as the user wrote them.

    Attributes:
        kind: kind of the stage, such as "prune".
        model: folder or file of the model, or `module:function`.
        keys: settings of the stage, such as "keep_params=0.5".
        data: name of the data source.
        path: folder or file of the data.
        out: the run folder.
        input_shape: shape of one example, such as "3,32,32".
        checkpoint: file of weights for a model that a function builds.
        mean: mean of each channel, such as "0.5,0.4,0.3", or "none" or "data".
        std: standard deviation of each channel.
        device: device to compute on, such as "cuda:1".
        resume: whether to resume an interrupted run.
    """

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
    """A checked command that can run.

    Attributes:
        bound: the stage with its model and settings.
        data: the loaded data.
        place: path of the run folder.
        folder: the opened run folder if the run is resumed; None if it must be created.
    """

    bound: OneStage
    data: FederatedData
    place: Path
    folder: RunFolder | None


def _made_ready(asked: Asked, out_stream: Console) -> Ready:
    """Builds the recipe of one stage, loads its data, and checks that they fit. Writes nothing."""
    from fedpress.api import progress
    from fedpress.cli import terminal

    with terminal.waiting(out_stream, "starting"):
        from fedpress.api import begin
        from fedpress.pipeline.keys import settings_of
        from fedpress.workspace.folder import RunFolder

        # The model may be built by a function of a module in the current folder.
        begin.find_modules()
        place, bound = _ordered(asked)
        # Locked before the folder is read. A new run is locked in `_run`, which creates its folder.
        if asked.resume and place.is_dir():
            lock_until_exit(place)
        folder = RunFolder.resume(place, settings_of(bound.recipe)) if asked.resume else None
        if folder is None:
            # Checked before the data are loaded, because that may take minutes.
            RunFolder.check_free(place, bound.text)
    if bound.note is not None:
        out_stream.print(error_text(bound.note), markup=False, soft_wrap=True)
    with progress.bars(out_stream) as bars:
        loaded = bound.load_data(terminal.Loading(bars))
    with terminal.waiting(out_stream, "checking that everything fits together"):
        bound.check(loaded)
    return Ready(bound, loaded, place, folder)


def _ordered(asked: Asked) -> tuple[Path, OneStage]:
    """Returns the path of the run folder, and the stage with its model and settings.

    If the only words are `--resume RUN`, both are read from the folder RUN.
    """
    from fedpress.api.begin import default_folder
    from fedpress.pipeline.commands import OneStage
    from fedpress.pipeline.commands.chosen_data import ChosenData, Standardization
    from fedpress.pipeline.commands.subject import ChosenModel
    from fedpress.pipeline.recipe import Override

    if asked.resume:
        words = [*([asked.model] if asked.model is not None else []), *asked.keys]
        # typer takes RUN of `--resume RUN` for the argument MODEL, so all words are searched.
        found, rest = run_to_resume(words) if asked.out is None else (asked.out, words)
        # If there are further words, all arguments are read below as for a new run. The resulting
        # settings must equal those of the interrupted run.
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
    """Runs the stage, writes files and report into the run folder, and returns the result."""
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
        # Command and versions are noted in the folder, so that the run can be repeated.
        warn(write_environment(folder, command, device=device_of(bound.recipe)))
        progress.follow(bound.execute(folder, ready.data), out_stream)
        with terminal.waiting(out_stream, "drawing the report"):
            write_report(place)
    return Result.read(folder, bound.kind)


def _show(ready: Ready, result: Result, out_stream: Console, *, as_json: bool) -> None:
    """Prints a comparison of the model before and after, and the paths of the written files."""
    from fedpress.cli import terminal
    from fedpress.pipeline.commands.subject import NO_SOURCE

    terminal.show_result(out_stream, dict(result.before), dict(result.after))
    if not len(ready.data.test):
        why = "no data were given; give --data SOURCE to measure"
        if ready.bound.recipe.data.source != NO_SOURCE:
            why = "the data have no test examples"
        out_stream.print(f"no metrics, since {why}", markup=False)
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
    """Reads a shape such as `3,32,32` or `3x32x32`; None stays None.

    Raises:
        RecipeError: if the text is not a list of whole numbers above 0.

    >>> shape_of("3,32,32")
    (3, 32, 32)
    """
    if text is None:
        return None
    # `fedpress check` prints a shape as 3x32x32, so a user may copy it from there.
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(
            f"got '{text}', expected whole numbers above 0",
            place="input_shape",
            cure=("give for instance ", Argument("input_shape", (3, 32, 32))),
        )
    return tuple(int(part) for part in parts)


def numbers_of(text: str | None) -> Any:
    """Reads `0.5,0.4,0.3` as a tuple of numbers. A word such as `none` is returned unchanged."""
    if text is None:
        return None
    # An unknown word is not an error here: the code that uses it names the words that it knows.
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text
