"""Completes words of the command line when the user presses Tab: recipes, keys and their values.

The shell starts a new process for each Tab, so this file must not import torch, which takes
seconds. It reads the keys from `keys.txt`, which `python scripts/keys.py` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import typer

COMMON_KEYS = ("seed", "device", "data.", "model.")
"""Beginnings of recipe keys that every command on one model takes, besides the stage's keys."""
# Read from files, because the Python objects that know keys and recipes import torch.
KEYS = Path(__file__).with_name("keys.txt")
SHIPPED = Path(__file__).parents[1] / "pipeline" / "recipes"
MAX_MEANING = 60  # characters: more would break the list that a shell shows

Completions = list[tuple[str, str]]
"""Completions: pairs of a word and its meaning."""


class Key(NamedTuple):
    """One key of a recipe.

    Attributes:
        name: full name, such as `stage.train.lr`.
        choices: possible values; empty if they are not a list of words.
        meaning: description of the key.
    """

    name: str
    choices: tuple[str, ...]
    meaning: str


def keys() -> list[Key]:
    """Returns all keys that recipes may have.

    The key of a stage contains the kind of the stage, such as `stage.train.lr`.
    """
    found = []
    for line in KEYS.read_text("utf-8").splitlines():
        name, choices, meaning = line.split("\t")
        found.append(Key(name, tuple(filter(None, choices.split(","))), meaning))
    return found


def recipes(incomplete: str) -> Completions:
    """Returns the shipped recipes and the TOML files that begin with `incomplete`."""
    names = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    own = sorted(str(path) for path in Path().glob(f"{incomplete}*.toml"))
    return [
        *((name, "shipped with fedpress") for name in names if name.startswith(incomplete)),
        *((path, "a recipe here") for path in own),
    ]


def recipes_or_tables(context: typer.Context, incomplete: str) -> Completions:
    """Returns recipes; after `--keys` the names of the tables whose keys can be listed."""
    # typer has parsed the words before this one, so it knows whether `--keys` was given.
    if not context.params.get("list_keys"):
        return recipes(incomplete)
    words = dict.fromkeys(key.name.removeprefix("stage.").partition(".")[0] for key in keys())
    return [(word, "") for word in words if word.startswith(incomplete)]


def sources(incomplete: str) -> Completions:
    """Returns the names of built-in data sets and file formats, such as "digits" and "csv"."""
    return _choices("data.source", incomplete)


def devices(incomplete: str) -> Completions:
    """Returns the names of devices, such as "cpu"."""
    return _choices("device", incomplete)


def architectures(incomplete: str) -> Completions:
    """Returns the built-in model architectures; if none fits, the shell completes file names."""
    return _choices("model.architecture", incomplete)


def _choices(name: str, incomplete: str) -> Completions:
    """Returns the possible values of the key `name` that begin with `incomplete`."""
    words = next(key.choices for key in keys() if key.name == name)
    return [(word, "") for word in words if word.startswith(incomplete)]


def recipe_keys(context: typer.Context, incomplete: str) -> Completions:
    """Returns the keys that can override the recipe on the command line.

    The key of a stage contains the stage's name in this recipe, such as `stage.first_prune.lr`.
    """
    if context.params.get("list_keys"):
        return recipes_or_tables(context, incomplete)
    stages = _stages_of(str(context.params.get("recipe")))
    found = []
    for key in keys():
        table, _, rest = key.name.partition(".")
        kind, _, own = rest.partition(".")
        if table != "stage":
            found.append(key)
        else:
            # If the recipe cannot be read, a stage is named by its kind.
            names = (
                [name for name, stage_kind in stages if stage_kind == kind] if stages else [kind]
            )
            found += [key._replace(name=f"stage.{name}.{own}") for name in names]
    return _fitting(found, incomplete, context.params.get("overrides"))


def stage_keys(kind: str) -> Callable[[typer.Context, str], Completions]:
    """Returns a function that completes the keys of one command, such as `fedpress prune`."""

    def complete(context: typer.Context, incomplete: str) -> Completions:
        # Such a command has one stage, so its keys need no `stage.prune.` before them.
        beginning = f"stage.{kind}."
        own = [
            key._replace(name=key.name.removeprefix(beginning))
            for key in keys()
            if key.name.startswith((beginning, *COMMON_KEYS))
        ]
        return _fitting(own, incomplete, context.params.get("keys"))

    return complete


def _fitting(found: Iterable[Key], incomplete: str, before: Sequence[str] | None) -> Completions:
    """Returns the tables (`data.`) and keys (`lr=`) that begin with `incomplete`.

    If `incomplete` is `key=`, or `key=` and the beginning of a value, returns the key's values.

    Args:
        found: all known keys.
        incomplete: the word to complete.
        before: the words before it. Bash splits `key=value` into three words and completes only
            the last one.
    """
    # Unlike bash (see `before`), zsh and fish pass `key=value` as one word.
    name, equals, value = incomplete.partition("=")
    beginning = f"{name}=" if equals else ""
    *_, last_but_one, last = "", "", *(before or ())
    known = {key.name: key.choices for key in found}
    if last == "=":
        name, value, equals = last_but_one, incomplete, last
    elif not incomplete and last in known:  # click removes an "=" that is a word of its own
        name, equals = last, "="
    if equals:
        words = known.get(name, ())
        return [(f"{beginning}{word}", "") for word in words if word.startswith(value)]
    fitting = [key for key in found if key.name.startswith(incomplete)]
    offered: dict[str, str] = {}
    for key in fitting:
        rest = key.name[len(incomplete) :]
        if "." in rest:
            offered.setdefault(incomplete + rest.partition(".")[0] + ".", "a table")
        else:
            offered[f"{key.name}="] = key.meaning[:MAX_MEANING]
    return list(offered.items())


def _stages_of(recipe: str) -> list[tuple[str, str]]:
    """Returns the name and the kind of each stage of a recipe; [] if it cannot be read."""
    import tomllib  # here, so that `--help` does not wait for it

    path = Path(recipe) if Path(recipe).is_file() else SHIPPED / f"{recipe}.toml"
    try:
        text = path.read_text("utf-8")
        stages = tomllib.loads(text)["stage"]
        return [(str(stage.get("name", stage["kind"])), str(stage["kind"])) for stage in stages]
    # Any mistake in the file: completion must not print an error into the user's command line.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
