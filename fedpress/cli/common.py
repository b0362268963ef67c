"""What several commands share: where a run goes, how it is taken up again, and its data with bars."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.data import FederatedData
    from fedpress.recipe import Recipe

AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE:FUNCTION",
        help="A function that the files of a model may have called to build it; may be given several times.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def default_folder(name: str, resume: bool) -> Path:
    """`runs/NAME`, or the first number behind it that is free; the last one that is there to resume."""
    numbered = [Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 1000)]
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
    """Returns the text of a recipe, and what it and the overrides come to."""
    from fedpress import recipe as recipes

    text = recipes.text(recipe)
    extra = [f"data.path={json.dumps(str(data), ensure_ascii=False)}"] if data is not None else []
    find_modules([str(Path(recipe).resolve().parent)] if Path(recipe).is_file() else [])
    return text, recipes.load(text, [*(overrides or []), *extra])


def find_modules(beside: list[str]) -> None:
    """Lets own models and data, package.module:function, be found `beside` the recipe and in the present folder."""
    from fedpress import own_modules

    own_modules.look_in(*map(Path, beside), Path.cwd())


def allow_code(names: list[str] | None) -> None:
    """Notes which functions the user lets the files of models name."""
    from fedpress import consent

    consent.allow(*(names or ()))


def told(message: str) -> str:
    """Says an error as the command line knows its cures, in one line that a terminal shows as it is."""
    from fedpress.consent import as_flags

    return visible(" ".join(as_flags(message).split()))


def visible(text: str) -> str:
    r"""Writes control characters, with which a file could move the cursor or hide words, as escapes.

    >>> visible("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def load_data(recipe: Recipe, out_stream: Console) -> FederatedData:
    """Loads the data of a recipe, with bars, and says how many rows are left out."""
    from fedpress import run as runs
    from fedpress import terminal

    with terminal.bars(out_stream) as bars:
        loaded = runs.load_data(recipe, progress=terminal.Loading(bars))
    said = loaded.told_left_out(private=any(getattr(stage, "privacy", None) for stage in recipe.stage))
    if said:
        out_stream.print(said, markup=False, soft_wrap=True)
    return loaded
