"""A table of the arguments of commands: their names in Python, recipe and command line.

>>> from fedpress.errors import Argument, ModelError
>>> cure = ("give ", Argument("input_shape", (3, 32, 32)))
>>> error = ModelError("not known", place="input_shape", cure=cure)
>>> print(error)
input_shape: not known; give input_shape=(3, 32, 32)
>>> print(error.told(in_shell, place=place_in_shell(error.place)))
--input: not known; give --input 3,32,32
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedpress.errors import Argument, FedpressError, Shell


@dataclass(frozen=True)
class Row:
    """One argument.

    Attributes:
        name: of the argument in Python.
        flag: on the command line; a word in capitals for what stands there without one.
        keys: of the recipe that say the same; the first is the one to set.
    """

    name: str
    flag: str
    keys: tuple[str, ...] = ()


ROWS = (
    Row("model", "MODEL", ("model.architecture", "model.checkpoint")),
    Row("models", "MODEL"),
    Row("checkpoint", "--checkpoint", ("model.weights",)),
    Row("data", "--data", ("data.source",)),
    Row("path", "--path", ("data.path",)),
    Row("input_shape", "--input"),
    Row("mean", "--mean", ("data.mean",)),
    Row("std", "--std", ("data.std",)),
    Row("device", "--device", ("device",)),
    Row("out", "--out"),
    Row("allow_code", "--allow-code"),
    Row("formats", "--formats"),
    Row("batches", "--batches"),
    Row("threads", "--threads"),
    Row("seconds", "--seconds"),
    Row("seeds", "--seeds"),
)
"""What commands take beside the keys of their stage, which are called alike everywhere."""

FLAGS = {row.name: row.flag for row in ROWS}
KEYS = {row.name: f"recipe.{row.keys[0]}" for row in ROWS if row.keys}
"""Argument -> the key of a recipe to set in its place."""
NAMES = {f"recipe.{key}": row.name for row in ROWS for key in row.keys}
PARTS = ("recipe.data.public_share", "recipe.data.validation")
"""Keys that make the parts of a data set."""
_STAGE = re.compile(r"recipe\.stage\[0\](?: \([^)]*\))?")  # a command is a recipe of one stage
_BEGINNING = re.compile(r"\w+(?:\.\w+)*")


def in_command(place: str, kind: str) -> str:
    """Returns what a command calls a place of its recipe.

    >>> in_command("recipe.data.mean[1]", "prune"), in_command("recipe.data.validation", "prune")
    ('mean[1]', 'data.validation')
    >>> at = "recipe.stage[0]"
    >>> in_command(f"{at}.keep_params", "prune"), in_command(f"{at} (prune)", "prune")
    ('keep_params', 'prune')
    """
    stage = _STAGE.match(place)
    if stage is not None:
        rest = place[stage.end() :]
        return rest[1:] if rest.startswith(".") else kind + rest
    found = _BEGINNING.match(place)
    key = found[0] if found else ""
    if key in NAMES:
        return NAMES[key] + place[len(key) :]
    return place.removeprefix("recipe.")


@contextmanager
def naming_arguments(kind: str, *, all_public: bool = False) -> Iterator[None]:
    """Renames recipe keys in errors that pass through to the arguments of the command `kind`.

    Args:
        kind: of the command, and of its stage.
        all_public: whether all data that are given count as public, and no table of a recipe
            divides them: then giving others is the only way to other parts.
    """

    def named(argument: Argument) -> Argument:
        if all_public and argument.name in PARTS and argument.value is not None:
            return Argument("data", "SOURCE")
        return replace(argument, name=in_command(argument.name, kind))

    try:
        yield
    except FedpressError as error:
        error.place = in_command(error.place, kind)
        error.change_arguments(named)
        raise


def in_shell(part: Argument | Shell) -> str:
    """Writes a part of a cure for the command line: a flag, or `key=value`.

    >>> in_shell(Argument("data", "SOURCE")), in_shell(Argument("allow_code", ("nets:Net",)))
    ('--data SOURCE', '--allow-code nets:Net')
    >>> key = "recipe.stage[1].privacy.epsilon"
    >>> in_shell(Argument("keep_params", 0.5)), in_shell(Argument(key, 8))
    ('keep_params=0.5', 'stage.1.privacy.epsilon=8')
    """
    if isinstance(part, Shell):
        return part.words
    flag = FLAGS.get(part.name)
    if flag is None:
        key = re.sub(r"\[(\d+)\]", r".\1", part.name.removeprefix("recipe."))
        return key if part.value is None else shlex.quote(f"{key}={_as_toml(part.value)}")
    if part.value is None:
        return flag
    # Typer takes a repeated flag, not a list behind one flag.
    if part.name == "allow_code" and isinstance(part.value, tuple):  # one flag for each name
        return " ".join(f"{flag} {shlex.quote(name)}" for name in part.value)
    row = part.value if isinstance(part.value, tuple) else (part.value,)
    value = ",".join(shlex.quote(str(one)) for one in row)
    return f"{flag} {value}" if flag.startswith("--") else value


def _as_toml(value: object) -> str:
    if isinstance(value, str | Path):
        return str(value)  # a word needs no quotes behind `key=`
    return json.dumps(value)  # numbers, true, and lists are written alike


def place_in_shell(place: str) -> str:
    """Returns what the command line calls a place that names an argument; any other as it is.

    >>> place_in_shell("mean[1]"), place_in_shell("keep_params"), place_in_shell("data.mean")
    ('--mean[1]', 'keep_params', 'data.mean')
    """
    name, bracket, rest = place.partition("[")
    return FLAGS.get(name, name) + bracket + rest
