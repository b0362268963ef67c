"""What several commands share: where a run goes, how it is taken up again, and its data with bars."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.errors import Argument, FedpressError, ModelError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.data import FederatedData
    from fedpress.pipeline.recipe import Recipe
    from fedpress.workspace.folder import RunFolder

held = ExitStack()
"""What the command has taken until its end; `main` gives it back."""
AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE:FUNCTION",
        help="A function that the files of a model may have called to build it; may be given several times.",
    ),
]
ListKeys = Annotated[bool, typer.Option("--keys", help="List the settings and what they mean.")]
ListTables = Annotated[
    bool,
    typer.Option(
        "--keys",
        help="List all keys of a recipe; of some tables: --keys federate data.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. stage.2.num_rounds=5")
]
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, cuda:1 or mps; auto is a CUDA GPU if there is one."),
]
Data = Annotated[Path | None, typer.Option(help="Folder or file of the data set; sets data.path.")]


def named(recipe: str | None, context: typer.Context) -> str:
    """Returns the recipe that was named.

    Raises:
        typer.BadParameter: if there is none.
    """
    if recipe is None:
        raise typer.BadParameter(
            "give the name of a recipe or a TOML file; fedpress recipes lists them", ctx=context
        )
    return recipe


def default_folder(name: str, resume: bool) -> Path:
    """`runs/NAME`, or the first number behind it that is free; the last one that is there to resume."""
    numbered = [
        Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 1000)
    ]
    taken = [path for path in numbered if path.exists()]
    if resume:
        return taken[-1] if taken else numbered[0]
    return numbered[numbered.index(taken[-1]) + 1] if taken else numbered[0]


def again(place: Path) -> str:
    """The command that goes on with the run in `place`."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    named = any(word == "--out" or word.startswith("--out=") for word in words)
    return shlex.join(["fedpress", *words, *([] if named else ["--out", str(place)]), "--resume"])


def load(recipe: str, overrides: list[str] | None, data: Path | None) -> tuple[str, Recipe]:
    """Returns the recipe as TOML that stands alone, overrides and data in it, and the checked recipe."""
    from fedpress.pipeline import recipe as recipes

    text = recipes.find(recipe)
    folder = (
        Path(recipe).resolve().parent
        if Path(recipe).is_file() and recipe not in recipes.names()
        else None
    )
    find_modules([str(folder)] if folder else [])
    words = [*(overrides or []), *_of_data(data)]
    recipes.load(text, words)  # says what is wrong in the places that the file has
    text = recipes.effective(text, words, folder=folder)
    return text, recipes.load(text)


def _of_data(data: Path | None) -> list[str]:
    return [f"data.path={json.dumps(str(data), ensure_ascii=False)}"] if data is not None else []


def on_device(overrides: Iterable[str] | None, device: str | None) -> list[str]:
    """Returns overrides with that of `--device` behind them."""
    return [*(overrides or []), *([f"device={device}"] if device is not None else [])]


def given(overrides: list[str] | None, data: Path | None) -> list[str]:
    """Returns overrides as they may be noted in a run folder: the path of the data does not depend on where one is."""
    return [*(overrides or []), *_of_data(data.resolve() if data is not None else None)]


def run_to_resume(words: list[str]) -> tuple[Path | None, list[str]]:
    """Returns the run folder among the words behind `fedpress run --resume`, if there is one, and the other words."""
    for position, word in enumerate(words):
        if "=" not in word and (Path(word) / "settings.json").is_file():
            return Path(word), words[:position] + words[position + 1 :]
    return None, words


def take_up(
    place: Path, recipe: str | None, overrides: list[str], data: Path | None
) -> tuple[Recipe, RunFolder]:
    """Opens the run in `place`; what it was started with needs not be said again.

    Args:
        place: the folder of the run.
        recipe: by name or file, to make sure that it is this one's; None: the one that lies in the folder.
        overrides: further ones, which must not change anything.
        data: where the data lies now, if it moved.

    Raises:
        RunError: if there is no run, or it was started with other settings.
        ModelError: if the recipe in the folder alone names functions, and this user has not started the run.
    """
    from fedpress.pipeline import recipe as recipes
    from fedpress.pipeline.keys import settings_of
    from fedpress.workspace.atomic import read_json
    from fedpress.workspace.damage import check_run
    from fedpress.workspace.folder import RunFolder

    if not (place / "settings.json").exists():
        raise RunError(
            "there is no run to resume", place=place, cure="leave out --resume to start one"
        )
    hold(place)
    check_run(place)
    noted = read_json(place / "environment.json") if (place / "environment.json").exists() else {}
    own = place / "recipe.toml"
    if not own.exists() and recipe is None:
        raise RunError(
            "no such file",
            place=own,
            cure="name the recipe of this run too, as it was when the run began",
        )
    _find_its_functions(own, noted, trusted=recipe is not None)

    stored = None
    if own.exists():
        words = [*overrides, *_of_data(data)]
        stored = recipes.load(recipes.effective(own.read_text("utf-8"), words))
    if recipe is None:
        assert stored is not None
        return stored, RunFolder.resume(place, settings_of(stored))

    wanted = load(recipe, overrides, data)[1]
    settings = RunFolder.open(place).settings
    if settings_of(wanted) != settings and noted.get("overrides"):
        # Perhaps only what was overridden at the start is missing.
        wanted = load(recipe, [*map(str, noted["overrides"]), *overrides], data)[1]
    folder = RunFolder.resume(place, settings_of(wanted))
    if stored is not None and settings_of(stored) == settings:
        return stored, folder
    return wanted, folder


def _find_its_functions(recipe: Path, noted: Mapping[str, object], *, trusted: bool) -> None:
    """Lets the functions that a run's recipe names be found beside the recipe that it was started with.

    Args:
        recipe: in the folder of the run; it may be missing.
        noted: the environment of the run.
        trusted: whether the user has named a recipe, and so does not rest on the one in the folder.

    Raises:
        ModelError: if it names functions that nobody has allowed, and this user has not started the run.
    """
    from fedpress.workspace import started

    functions = started.functions_of(recipe.read_text("utf-8")) if recipe.exists() else []
    told = noted.get("recipe")
    origin = told if isinstance(told, str) else None
    known = started.is_signed(noted.get("started_by"), functions, origin)
    beside = [str(Path(origin).parent)] if known and origin else []
    find_modules([folder for folder in beside if Path(folder).is_dir()])
    if not (trusted or known):
        _refuse_functions(recipe, functions)


def _refuse_functions(recipe: Path, functions: list[str]) -> None:
    """Refuses the recipe of a folder that somebody else may have made, if it names functions nobody has allowed.

    Raises:
        ModelError: with the words to add.
    """
    from fedpress.core import consent

    asked = [name for name in functions if not consent.allowed(name)]
    if asked:
        raise ModelError(
            (
                f"it names {', '.join(map(repr, asked))[:200]}, which would be called, and "
                "nothing shows that you have started this run yourself here"
            ),
            place=recipe,
            cure=(
                "nothing was loaded. If you know that code and trust the folder, add ",
                Argument("allow_code", tuple(asked)),
                ", or name your own recipe file before --resume",
            ),
        )


@contextmanager
def stopping(message: str) -> Iterator[None]:
    """Ends the command with `message` and the status 130 when somebody presses Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(message, err=True)
        raise typer.Exit(130) from None


def find_modules(beside: list[str]) -> None:
    """Lets own models and data, package.module:function, be found `beside` the recipe and in the present folder."""
    from fedpress.core import own_modules

    own_modules.look_in(*map(Path, beside), Path.cwd())


def allow_code(names: list[str] | None) -> None:
    """Notes which functions the user lets the files of models name."""
    from fedpress.core import consent

    consent.allow(*(names or ()))


def told(error: FedpressError) -> str:
    """Says an error as the command line writes arguments, in one line that a terminal shows as it is."""
    from fedpress.pipeline.arguments import in_shell, place_in_shell

    return in_one_line(error.told(in_shell, place=place_in_shell(error.place)))


def show_keys(words: Sequence[str], *, of_stage: bool = False) -> None:
    """Prints the keys of a recipe with their defaults and meanings.

    Args:
        words: the tables that are asked for; all of them where there are none.
        of_stage: whether the words are kinds of stages, and no codec that is called like one.
    """
    from fedpress.cli import terminal
    from fedpress.pipeline import recipe as recipes

    tables = recipes.key_tables(words)
    if of_stage:
        asked = set(words)
        tables = [one for one in tables if one.is_stage or asked & set(one.part_of)]
    out_stream = terminal.console(quiet=False)
    for table in tables:
        terminal.show_keys(out_stream, table.title, table.rows)


def in_one_line(text: str) -> str:
    r"""Writes text as a terminal shows it in one line.

    >>> in_one_line("two\nlines")
    'two lines'
    """
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    r"""Writes control characters, with which a file could move the cursor or hide words, as escapes.

    >>> visible("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def hold(place: Path) -> None:
    """Takes the lock of a run folder until the command ends.

    Raises:
        RunError: if another process works in it, naming that.
    """
    from fedpress.workspace import lock

    held.enter_context(lock.locked(place))


def warn(notes: Iterable[str]) -> None:
    """Tells what a person must know, on the error stream."""
    for note in notes:
        typer.echo(f"warning: {in_one_line(note)}", err=True)


def load_data(recipe: Recipe, out_stream: Console) -> FederatedData:
    """Loads the data of a recipe, with bars, and says how many rows are left out."""
    from fedpress.api import progress
    from fedpress.cli import terminal
    from fedpress.pipeline import start

    with progress.bars(out_stream) as bars:
        loaded = start.load_data(recipe, progress=terminal.Loading(bars))
    said = loaded.left_out_sentence(private=recipe.private)
    if said:
        out_stream.print(said, markup=False, soft_wrap=True)
    return loaded
