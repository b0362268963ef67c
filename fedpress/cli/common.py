"""Options and functions that several commands share, such as `--device` and the lock of a run."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli import completion
from fedpress.errors import FedpressError

# Not imported when a command starts: they import torch, and `--help` must answer at once.
if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.data import FederatedData
    from fedpress.data.column_facts import Rows
    from fedpress.pipeline.recipe import Recipe

# Global, because functions that a command calls take locks, which are held until it ends.
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
Public = Annotated[
    Path | None,
    typer.Option(help="The server's file or folder, with public rows alone; sets data.path."),
]
"""`--public` of commands on the server's machine, where the clients' data are not."""
NetworkFolder = Annotated[
    Path | None,
    typer.Option("--network", help="This machine's folder, made by fedpress network init."),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="No TLS and no keys: on this machine alone, to try it out."),
]
LOOPBACK = "127.0.0.1"
"""Address that only programs on this machine can reach."""


def required_recipe(recipe: str | None, context: typer.Context) -> str:
    """Returns the argument RECIPE of a command.

    Raises:
        typer.BadParameter: if the argument is missing.
    """
    # The argument is optional for typer, because `--keys` and `--resume` work without a recipe.
    if recipe is None:
        raise typer.BadParameter(
            "give the name of a recipe or a TOML file; fedpress recipes lists them", ctx=context
        )
    return recipe


def resume_command(place: Path) -> str:
    """Returns the command line that resumes the run in `place`."""
    # The words that the user typed, so that overrides and options are repeated exactly.
    words = [word for word in sys.argv[1:] if word != "--resume"]
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        words += ["--out", str(place)]
    return shlex.join(["fedpress", *words, "--resume"])


def with_device(overrides: Iterable[str] | None, device: str | None) -> list[str]:
    """Returns the overrides (KEY=VALUE), followed by `device=...` if `--device` was given."""
    # Last, because a later override of the same key replaces an earlier one.
    return [*(overrides or []), *([f"device={device}"] if device is not None else [])]


def run_to_resume(words: list[str]) -> tuple[Path | None, list[str]]:
    """Finds a run folder among the arguments.

    Returns:
        The first argument that is a run folder (None if none is), and all other arguments.
    """
    for position, word in enumerate(words):
        # Every run folder contains settings.json; a word with "=" is an override.
        if "=" not in word and (Path(word) / "settings.json").is_file():
            return Path(word), words[:position] + words[position + 1 :]
    return None, words


@contextmanager
def without_collector() -> Iterator[None]:
    """Inside the block, Python does not search for unused objects that refer to each other.

    Imports make a million objects and no garbage, but Python would search through all of them again
    and again: a seventh of the time until a run begins. What was imported is left out of later
    searches too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def stopping(message: str) -> Iterator[None]:
    """After Ctrl-C inside the block, prints `message` and ends the command with exit code 130.

    Shells use 130 = 128 + 2 for a program that signal 2 (SIGINT) has ended.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(message, err=True)
        raise typer.Exit(130) from None


def allow_code(names: list[str] | None) -> None:
    """Allows the functions of `--allow-code` (`module:function`) to be called to build models.

    A saved model names the function that builds it. Such a function is code from a file, so it is
    called only if the user has named it.
    """
    from fedpress.core import consent

    consent.allow(*(names or ()))


def error_text(error: FedpressError) -> str:
    """Returns an error as one line, with arguments in the form of the command line.

    Example: `--input-shape 3,32,32` instead of `input_shape=(3, 32, 32)` in Python.
    """
    from fedpress.pipeline.arguments import shell_place, shell_text

    return in_one_line(error.sentence(shell_text, place=shell_place(error.place)))


def show_keys(words: Sequence[str], *, of_stage: bool = False) -> None:
    """Prints the keys of a recipe with their defaults and meanings.

    Args:
        words: names of tables of a recipe, such as "federate"; empty: all tables.
        of_stage: whether `words` are kinds of stages. Then a codec (a way to encode updates) of the
            same name is not shown.
    """
    from fedpress.cli import terminal
    from fedpress.pipeline import recipe as recipes

    # Before anything is printed: a word that is no table raises an error here.
    tables = recipes.key_tables(words)
    if of_stage:
        asked = set(words)
        # Keep the stage's own table and the tables inside it, such as its privacy.
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
    r"""Returns text as one line that is safe to print: without line breaks or control characters.

    >>> in_one_line("two\nlines")
    'two lines'
    """
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    r"""Escapes control characters, because text from a file could move the cursor or hide words.

    >>> visible("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def lock_until_exit(place: Path) -> None:
    """Locks a run folder until the command ends, so that no other process writes into it.

    Raises:
        RunError: if another process has the lock; the error names the process.
    """
    from fedpress.workspace import lock

    exit_stack.enter_context(lock.locked(place))


def warn(notes: Iterable[str]) -> None:
    """Prints each note as a warning on stderr."""
    # Not on stdout, which with `--json` must contain JSON alone.
    for note in notes:
        typer.echo(f"warning: {in_one_line(note)}", err=True)


def load_data(recipe: Recipe, out_stream: Console, *, describe: Rows = "public") -> FederatedData:
    """Loads the data of a recipe with progress bars. If rows are left out, prints a sentence.

    `describe` is explained at `fedpress.pipeline.start.load_data`.
    """
    from fedpress.api import progress
    from fedpress.cli import terminal
    from fedpress.pipeline import start

    with progress.bars(out_stream) as bars:
        loaded = start.load_data(recipe, progress=terminal.Loading(bars), describe=describe)
    # If the recipe is private, the sentence must not contain numbers of private rows.
    said = loaded.left_out_sentence(private=recipe.private)
    if said:
        out_stream.print(said, markup=False, soft_wrap=True)
    return loaded


@contextmanager
def quit_on_term() -> Iterator[None]:
    """Inside the block, SIGTERM ends the command as Ctrl-C does.

    systemd and Docker send SIGTERM to stop a process. By default Python would then end at once,
    without closing the connection.
    """
    import signal

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
