"""Lists the names of each command argument: in Python, on the command line and in a recipe.

An error names arguments as Python or a recipe does. A user of the command line sees flags instead:

>>> from fedpress.errors import Argument, ModelError
>>> cure = ("give ", Argument("input_shape", (3, 32, 32)))
>>> error = ModelError("not known", place="input_shape", cure=cure)
>>> print(error)
input_shape: not known; give input_shape=(3, 32, 32)
>>> print(error.sentence(shell_text, place=shell_place(error.place)))
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
    """The names of one argument.

    Attributes:
        name: name in Python, such as `data`.
        flag: flag on the command line, such as `--data`; capitals such as `MODEL` for a positional
            argument.
        keys: keys of a recipe with the same meaning, such as `data.source`. Errors of a recipe
            suggest the first of them. Empty: no key has this meaning.
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
    Row("unknown", "--unknown"),
    Row("out", "--out"),
    Row("resume", "--resume"),
    Row("allow_code", "--allow-code"),
    Row("formats", "--formats"),
    Row("batches", "--batches"),
    Row("threads", "--threads"),
    Row("seconds", "--seconds"),
    Row("seeds", "--seeds"),
    Row("engine", "--engine"),
    Row("engine.bytes", "--bytes"),
    Row("engine.workers", "--workers"),
    Row("engine.at_once", "--at-once"),
    Row("engine.address", "--ray-address"),
    Row("engine.cpus_per_client", "--cpus-per-client"),
    Row("engine.gpus_per_client", "--gpus-per-client"),
    Row("engine.actors", "--actors"),
)
"""Arguments with several names. Keys of a stage, such as `keep_params`, have only one name."""

FLAGS = {row.name: row.flag for row in ROWS}
"""Argument -> its flag, or capitals such as `MODEL` for a positional argument."""
KEYS = {row.name: f"recipe.{row.keys[0]}" for row in ROWS if row.keys}
"""Argument -> the key of a recipe with the same meaning."""
NAMES = {f"recipe.{key}": row.name for row in ROWS for key in row.keys}
"""Key of a recipe -> the argument with the same meaning."""
PARTS = ("recipe.data.public_share", "recipe.data.validation")
"""Keys that set the number of public examples and of validation examples."""
_STAGE = re.compile(r"recipe\.stage\[0\](?: \([^)]*\))?")  # a command is a recipe of one stage
_BEGINNING = re.compile(r"\w+(?:\.\w+)*")


def command_place(place: str, kind: str) -> str:
    """Converts a place in the recipe of a command to the name of the command's argument.

    A command such as `fedpress prune` runs a recipe of one stage, which the user does not see.

    >>> command_place("recipe.data.mean[1]", "prune")
    'mean[1]'
    >>> command_place("recipe.data.validation", "prune")
    'data.validation'
    >>> at = "recipe.stage[0]"
    >>> command_place(f"{at}.keep_params", "prune"), command_place(f"{at} (prune)", "prune")
    ('keep_params', 'prune')
    """
    # The only stage of the recipe is the command itself, so its place is left out.
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
def errors_of_command(kind: str, *, all_public: bool = False) -> Iterator[None]:
    """Renames recipe keys in errors of the `with` block to arguments of the command `kind`.

    Args:
        kind: kind of stage, which is also the name of the command.
        all_public: whether all data of the command are public already. Then a larger
            `data.public_share` gives no further examples, so the error asks for other data instead.
    """

    def named(argument: Argument) -> Argument:
        if all_public and argument.name in PARTS and argument.value is not None:
            # A larger public share would add no examples, because all are public already.
            return Argument("data", "SOURCE")
        return replace(argument, name=command_place(argument.name, kind))

    try:
        yield
    except FedpressError as error:
        error.place = command_place(error.place, kind)
        error.change_arguments(named)
        raise


def shell_text(part: Argument | Shell) -> str:
    """Converts an argument that an error suggests to command-line text: a flag, or `key=value`.

    >>> shell_text(Argument("data", "SOURCE")), shell_text(Argument("allow_code", ("nets:Net",)))
    ('--data SOURCE', '--allow-code nets:Net')
    >>> key = "recipe.stage[1].privacy.epsilon"
    >>> shell_text(Argument("keep_params", 0.5)), shell_text(Argument(key, 8))
    ('keep_params=0.5', 'stage.1.privacy.epsilon=8')
    """
    if isinstance(part, Shell):
        return part.text
    flag = FLAGS.get(part.name)
    if flag is None:
        # On the command line, positions are written as in overrides: `stage.1`, not `stage[1]`.
        key = re.sub(r"\[(\d+)\]", r".\1", part.name.removeprefix("recipe."))
        return key if part.value is None else shlex.quote(f"{key}={_as_toml(part.value)}")
    if part.value is None:
        return flag
    # Typer takes a repeated flag, not a list behind one flag.
    if part.name == "allow_code" and isinstance(part.value, tuple):
        return " ".join(f"{flag} {shlex.quote(name)}" for name in part.value)
    row = part.value if isinstance(part.value, tuple) else (part.value,)
    value = ",".join(shlex.quote(str(one)) for one in row)
    # A flag in capitals, such as MODEL, is only a placeholder for a positional argument.
    return f"{flag} {value}" if flag.startswith("--") else value


def _as_toml(value: object) -> str:
    if isinstance(value, str | Path):
        return str(value)  # the command line takes words without quotes
    return json.dumps(value)  # JSON and TOML agree on numbers, booleans and lists


def shell_place(place: str) -> str:
    """Converts the name of an argument in an error to its flag; other names stay the same.

    >>> shell_place("mean[1]"), shell_place("keep_params"), shell_place("data.mean")
    ('--mean[1]', 'keep_params', 'data.mean')
    """
    name, bracket, rest = place.partition("[")
    return FLAGS.get(name, name) + bracket + rest
