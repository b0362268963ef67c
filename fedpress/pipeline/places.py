"""Renames the argument in an error to the recipe key that the user has written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pydantic import BaseModel

from fedpress.data import DataSettings
from fedpress.errors import Argument, FedpressError, RunError, renamed, renaming
from fedpress.pipeline.recipe import ModelSettings
from fedpress.stages.base import Stage

TABLES: dict[str, type[BaseModel]] = {"data": DataSettings, "model": ModelSettings}
"""The tables of a recipe beside its stages."""
_WORD = re.compile(r"\w+")


def in_recipe(place: str, index: int, stage: Stage) -> str:
    """Returns the recipe's key for the place that an error of a stage names.

    Args:
        place: an argument (`score`), a key of the stage (`privacy.delta`, `prune.score` or
            `stage.score`), something else (a file, a field of a message), or empty for the stage as
            a whole.
        index: of the stage in the recipe.
        stage: its settings. Where arguments below have other names than its keys, `stage.places`
            says which they are.

    >>> from fedpress.stages.federate.stage import FederateStage
    >>> stage = FederateStage(kind="federate", cohort=5, num_rounds=3)
    >>> [in_recipe(place, 2, stage) for place in ("privacy.clip_norm", "stage.lr", "")]
    ['recipe.stage[2].privacy.clip_norm', 'recipe.stage[2].lr', 'recipe.stage[2] (federate)']
    >>> in_recipe("data.validation", 2, stage)
    'recipe.data.validation'
    """
    place = renamed(place, stage.places)
    key = _key(place, index, stage)
    if key is not None:
        return key
    at = f"recipe.stage[{index}] ({stage.name})"
    return f"{at}: {place}" if place else at


def _key(name: str, index: int, stage: Stage) -> str | None:
    """Returns the recipe's key of an argument; None if it is none."""
    at = f"recipe.stage[{index}]"
    found = _WORD.match(name)
    word = found[0] if found else ""
    rest = name[len(word) :]
    if word in (stage.kind, "stage") and rest[:1] in ("", "."):
        return at + rest
    if word in vars(stage) and rest[:1] in ("", ".", "["):
        return f"{at}.{name}"
    return _in_table(name)


def _in_table(name: str) -> str | None:
    """Returns the recipe key of `data.path` and so on; None for a file such as `data.csv`."""
    table, _, rest = name.partition(".")
    found = _WORD.match(rest)
    known = table in TABLES and found is not None and found[0] in TABLES[table].model_fields
    return f"recipe.{name}" if known else None


@contextmanager
def placed_data() -> Iterator[None]:
    """Lets errors of a data set name the keys of the recipe's table `[data]`."""
    with renaming({key: f"recipe.data.{key}" for key in DataSettings.model_fields}):
        yield


@contextmanager
def placed_device() -> Iterator[None]:
    """Lets errors of a device that is missing name the key of the recipe."""
    with renaming({"device": "recipe.device"}):
        yield


@contextmanager
def placed_model() -> Iterator[None]:
    """Lets errors of a network that is built name the keys of the recipe's table `[model]`."""
    keys = ("architecture", "arguments")
    try:
        with renaming({f"spec.{key}": f"recipe.model.{key}" for key in keys}):
            yield
    except FedpressError as error:
        if error.place == "model":  # and no file whose name begins so
            error.place = "recipe.model"
        error.change_arguments(lambda one: replace(one, name=_in_table(one.name) or one.name))
        raise


@contextmanager
def placed(index: int, stage: Stage) -> Iterator[None]:
    """Lets errors that pass through name their place in the recipe; their cures name its keys."""

    def named(argument: Argument) -> Argument:
        key = _key(renamed(argument.name, stage.places), index, stage)
        return replace(argument, name=key or argument.name)

    try:
        yield
    except RunError:  # the files of the run are no place in the recipe
        raise
    except FedpressError as error:
        error.place = in_recipe(error.place, index, stage)
        error.change_arguments(named)
        raise
