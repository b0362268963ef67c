"""Functions that all commands share: option types, locks, errors as text, loading data."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli import completion
from fedpress.errors import FedpressError

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.data import FederatedData
    from fedpress.pipeline.recipe import Recipe

exit_stack = ExitStack()
"""Context managers, such as locks of folders, that `main` closes when the command ends."""
AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE:FUNCTION",
        help="A function that may be called to build a saved model; can be repeated.",
    ),
]
ListKeys = Annotated[bool, typer.Option("--keys", help="List the settings and what they mean.")]
"""`--keys` of a command that has one table of settings."""
ListTables = Annotated[
    bool,
    typer.Option(
        "--keys",
        help="List the keys of a recipe; name tables to list only theirs: --keys federate data.",
    ),
]
"""`--keys` of a command that takes a recipe, which has several tables."""
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="e.g. stage.2.num_rounds=5",
        autocompletion=completion.recipe_keys,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="auto, cpu, cuda, cuda:1 or mps; auto is a CUDA GPU if there is one.",
        autocompletion=completion.devices,
    ),
]
Data = Annotated[Path | None, typer.Option(help="Folder or file of the data set; sets data.path.")]


def required_recipe(recipe: str | None, context: typer.Context) -> str:
    """Returns the recipe argument of a command.

    Raises:
        typer.BadParameter: if it is missing.
    """
    if recipe is None:
        raise typer.BadParameter(
            "give the name of a recipe or a TOML file; fedpress recipes lists them", ctx=context
        )
    return recipe


def resume_command(place: Path) -> str:
    """Returns the command line that resumes the run in `place`."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        words += ["--out", str(place)]
    return shlex.join(["fedpress", *words, "--resume"])


def with_device(overrides: Iterable[str] | None, device: str | None) -> list[str]:
    """Returns the overrides, and after them `device=...` if `--device` was given."""
    return [*(overrides or []), *([f"device={device}"] if device is not None else [])]


def run_to_resume(words: list[str]) -> tuple[Path | None, list[str]]:
    """Finds a run folder among the arguments; returns it (or None) and the other arguments."""
    for position, word in enumerate(words):
        if "=" not in word and (Path(word) / "settings.json").is_file():
            return Path(word), words[:position] + words[position + 1 :]
    return None, words


@contextmanager
def stopping(message: str) -> Iterator[None]:
    """Ends the command with `message` and exit code 130 (as shells do) after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(message, err=True)
        raise typer.Exit(130) from None


def allow_code(names: list[str] | None) -> None:
    """Records the functions that may be called to build saved models."""
    from fedpress.core import consent

    consent.allow(*(names or ()))


def error_text(error: FedpressError) -> str:
    """Returns an error in one line, with arguments as the command line writes them."""
    from fedpress.pipeline.arguments import shell_place, shell_text

    return in_one_line(error.sentence(shell_text, place=shell_place(error.place)))


def show_keys(words: Sequence[str], *, of_stage: bool = False) -> None:
    """Prints the keys of a recipe with their defaults and meanings.

    Args:
        words: names of tables, such as "federate"; empty: all tables.
        of_stage: whether `words` are kinds of stages. Then a codec of the same name is not shown.
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
    if of_stage:
        out_stream.print(
            "The keys seed, device, data.* and model.* of a recipe can be given too, for instance "
            "data.class_weights=balanced. To list them: fedpress run --keys recipe data model",
            markup=False,
            soft_wrap=True,
        )


def in_one_line(text: str) -> str:
    r"""Writes text as a terminal shows it in one line.

    >>> in_one_line("two\nlines")
    'two lines'
    """
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    r"""Escapes control characters: with them, text from a file could move the cursor or hide words.

    >>> visible("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def lock_until_exit(place: Path) -> None:
    """Takes the lock of a run folder until the command ends.

    Raises:
        RunError: if another process works in it; the error names the process.
    """
    from fedpress.workspace import lock

    exit_stack.enter_context(lock.locked(place))


def warn(notes: Iterable[str]) -> None:
    """Prints each note as a warning, on the error stream."""
    for note in notes:
        typer.echo(f"warning: {in_one_line(note)}", err=True)


def load_data(recipe: Recipe, out_stream: Console) -> FederatedData:
    """Loads the data of a recipe, shows progress bars, and prints how many rows are not used."""
    from fedpress.api import progress
    from fedpress.cli import terminal
    from fedpress.pipeline import start

    with progress.bars(out_stream) as bars:
        loaded = start.load_data(recipe, progress=terminal.Loading(bars))
    said = loaded.left_out_sentence(private=recipe.private)
    if said:
        out_stream.print(said, markup=False, soft_wrap=True)
    return loaded
