"""Where an error stands in the recipe: stages and what they call name arguments, which are keys of the recipe here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fedpress.data import DataSettings
from fedpress.errors import FedpressError, RunError, renamed, renaming
from fedpress.stages.base import Stage

_WORD = re.compile(r"\w+")


def in_recipe(place: str, index: int, stage: Stage) -> str:
    """Returns the recipe's key for the place that an error of a stage names.

    Args:
        place: an argument (`score`), a key of the stage (`privacy.delta`, `prune.score` or `stage.score`), something
            else (a file, a field of a message), or empty for the stage as a whole.
        index: of the stage in the recipe.
        stage: its settings. Where arguments below have other names than its keys, `stage.places` says which they are.

    >>> from fedpress.stages.federate.stage import FederateStage
    >>> stage = FederateStage(kind="federate", cohort=5, num_rounds=3)
    >>> in_recipe("privacy.clip_norm", 2, stage), in_recipe("stage.lr", 2, stage), in_recipe("", 2, stage)
    ('recipe.stage[2].privacy.clip_norm', 'recipe.stage[2].lr', 'recipe.stage[2] (federate)')
    """
    at, place = f"recipe.stage[{index}]", renamed(place, stage.places)
    found = _WORD.match(place)
    word = found[0] if found else ""
    rest = place[len(word) :]
    if word in (stage.kind, "stage") and rest[:1] in ("", "."):
        return at + rest
    if word in vars(stage) and rest[:1] in ("", ".", "["):
        return f"{at}.{place}"
    return f"{at} ({stage.name}): {place}" if place else f"{at} ({stage.name})"


@contextmanager
def placed_data() -> Iterator[None]:
    """Lets errors of a data set name the keys of the recipe's table `[data]`."""
    with renaming({key: f"recipe.data.{key}" for key in DataSettings.model_fields}):
        yield


@contextmanager
def placed_model() -> Iterator[None]:
    """Lets errors of a network that is built name the keys of the recipe's table `[model]`."""
    keys = ("architecture", "arguments")
    with renaming({f"spec.{key}": f"recipe.model.{key}" for key in keys}):
        yield


@contextmanager
def placed(index: int, stage: Stage) -> Iterator[None]:
    """Lets errors that pass through name their place in the recipe."""
    try:
        yield
    except RunError:  # the files of the run are no place in the recipe
        raise
    except FedpressError as error:
        error.place = in_recipe(error.place, index, stage)
        raise
