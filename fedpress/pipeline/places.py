"""Renames arguments in errors to keys of the recipe: `score` -> `recipe.stage[2].score`.

The functions that stages call do not know the recipe, so their errors name their own arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pydantic import BaseModel

from fedpress.data import DataSettings
from fedpress.errors import Argument, FedpressError, NetworkError, RunError, renamed, renaming
from fedpress.pipeline.recipe import ModelSettings
from fedpress.stages.base import Stage

TABLES: dict[str, type[BaseModel]] = {"data": DataSettings, "model": ModelSettings}
"""Tables of a recipe other than its stages."""
_WORD = re.compile(r"\w+")


def recipe_place(place: str, index: int, stage: Stage) -> str:
    """Converts the place of an error in a stage to a key of the recipe.

    Args:
        place: what the error is about: an argument (`score`), a key of the stage (`privacy.delta`,
            `prune.score` or `stage.score`), a file, or a field of a network message. Empty: the
            whole stage.
        index: position of the stage in the recipe.
        stage: settings of the stage. `stage.places` maps names of arguments to keys, where the two
            names differ.

    Returns:
        The key in the recipe. If there is no such key, the stage and then `place` unchanged.

    >>> from fedpress.stages.federate.stage import FederateStage
    >>> stage = FederateStage(kind="federate", cohort=5, num_rounds=3)
    >>> [recipe_place(place, 2, stage) for place in ("privacy.clip_norm", "stage.lr", "")]
    ['recipe.stage[2].privacy.clip_norm', 'recipe.stage[2].lr', 'recipe.stage[2] (federate)']
    >>> recipe_place("data.validation", 2, stage)
    'recipe.data.validation'
    """
    place = renamed(place, stage.places)
    key = _key(place, index, stage)
    if key is not None:
        return key
    # The name of a file or message is kept; the stage in which the error occurred goes before it.
    at = f"recipe.stage[{index}] ({stage.name})"
    return f"{at}: {place}" if place else at


def _key(name: str, index: int, stage: Stage) -> str | None:
    """Returns the recipe key of an argument of the stage, data or model; None if there is none."""
    at = f"recipe.stage[{index}]"
    found = _WORD.match(name)
    word = found[0] if found else ""
    rest = name[len(word) :]
    if word in (stage.kind, "stage") and rest[:1] in ("", "."):
        return at + rest
    # "score", "score.x" and "score[0]" name a key; a text such as "score-file" does not.
    if word in vars(stage) and rest[:1] in ("", ".", "["):
        return f"{at}.{name}"
    return _in_table(name)


def _in_table(name: str) -> str | None:
    """Returns the recipe key of `data.path` and so on; None for a file such as `data.csv`."""
    # Only known keys are renamed, since a file name such as "data.csv" also begins with "data.".
    table, _, rest = name.partition(".")
    found = _WORD.match(rest)
    known = table in TABLES and found is not None and found[0] in TABLES[table].model_fields
    return f"recipe.{name}" if known else None


@contextmanager
def errors_of_data() -> Iterator[None]:
    """Renames arguments in errors about a data set to keys of the recipe's table `[data]`."""
    with renaming({key: f"recipe.data.{key}" for key in DataSettings.model_fields}):
        yield


@contextmanager
def errors_of_device() -> Iterator[None]:
    """Renames `device` in errors about a missing device to `recipe.device`."""
    with renaming({"device": "recipe.device"}):
        yield


@contextmanager
def errors_of_model() -> Iterator[None]:
    """Renames arguments in errors about building a model to keys of the table `[model]`."""
    keys = ("architecture", "arguments")
    try:
        with renaming({f"spec.{key}": f"recipe.model.{key}" for key in keys}):
            yield
    except FedpressError as error:
        if error.place == "model":  # exactly: a place such as "model.safetensors" is a file
            error.place = "recipe.model"
        error.change_arguments(lambda one: replace(one, name=_in_table(one.name) or one.name))
        raise


@contextmanager
def errors_of_stage(index: int, stage: Stage) -> Iterator[None]:
    """Renames arguments in errors raised by a stage, in the place and in the cure."""

    def named(argument: Argument) -> Argument:
        key = _key(renamed(argument.name, stage.places), index, stage)
        return replace(argument, name=key or argument.name)

    try:
        yield
    # The place of such an error is a file of the run folder or an option of the command, not an
    # argument of the stage.
    except (RunError, NetworkError):
        raise
    except FedpressError as error:
        error.place = recipe_place(error.place, index, stage)
        error.change_arguments(named)
        raise
