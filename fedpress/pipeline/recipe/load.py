"""Loads a recipe: applies overrides, checks settings, and writes TOML with absolute paths."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpress.pipeline.recipe.overrides import Override, name_stages_, overridden
from fedpress.pipeline.recipe.settings import Recipe
from fedpress.pipeline.recipe.text import anchor_, parse, plain, write


def load(toml: str, overrides: Sequence[str | Override] = ()) -> Recipe:
    """Reads a recipe from TOML text, applies `overrides`, and checks every setting.

    An override is a text such as `stage.2.num_rounds=5`. A stage without a name is named after its
    kind: `train`, then `train-2` and so on.

    Raises:
        RecipeError: if the text is not TOML, an override names an unknown key, or a setting is
            wrong.
    """
    return checked(tree(toml, overrides))


def checked(found: dict[str, Any]) -> Recipe:
    """Converts the tables of a recipe to checked settings.

    Raises:
        RecipeError: if a setting is wrong.
    """
    return Recipe(**found)


def tree(toml: str, overrides: Sequence[str | Override] = ()) -> dict[str, Any]:
    """Reads TOML text and applies `overrides`, without checking the settings.

    Returns:
        The recipe as nested dictionaries, such as `{"seed": 1, "stage": [{"kind": "train"}]}`.

    Raises:
        RecipeError: if the text is not TOML, or an override has no place in the recipe, for
            example because it names a stage that does not exist.
    """
    return completed(parse(toml), overrides)


def completed(tables: dict[str, Any], overrides: Sequence[str | Override] = ()) -> dict[str, Any]:
    """Returns a copy of `tables` with `overrides` applied and a name for every stage.

    The settings are not checked.

    Raises:
        RecipeError: if an override has no place in the recipe.
    """
    found = copy.deepcopy(tables)
    # Stages are named before the overrides, since an override may refer to a stage by its name, and
    # again after them, since an override may add a stage without a name.
    name_stages_(found)
    found = overridden(found, overrides)
    name_stages_(found)
    return found


def from_tables(
    tables: dict[str, Any], overrides: Sequence[str | Override] = ()
) -> tuple[str, Recipe]:
    """Converts a recipe given as dictionaries to TOML text and checked settings.

    Relative paths are relative to the current folder; they are made absolute.

    Raises:
        RecipeError: if an override has no place in the recipe, or a setting is wrong.
    """
    found = completed(plain(tables), overrides)
    anchor_(found, Path.cwd())
    return write(found), checked(found)


def effective(
    text: str, overrides: Sequence[str | Override] = (), *, folder: Path | None = None
) -> str:
    """Returns the recipe as TOML with overrides applied and relative paths made absolute.

    If nothing changes, `text` itself is returned, with its comments.

    Args:
        text: TOML text of a recipe.
        overrides: changes such as `stage.2.num_rounds=5`. Their paths are relative to the current
            folder.
        folder: folder of the recipe file. None if the recipe is not from a file: then its relative
            paths are relative to the current folder, and stay so if there are no overrides.

    Raises:
        RecipeError: if the text is not TOML, or an override has no place in the recipe.
    """
    found = tree(text)
    anchored = copy.deepcopy(found)
    if folder is not None:
        anchor_(anchored, folder)
    if anchored == found and not overrides:
        return text
    # Paths of a recipe file are absolute by now. Paths of overrides, and of a recipe that is not
    # from a file, are relative to the current folder.
    changed = overridden(anchored, overrides)
    anchor_(changed, Path.cwd())
    name_stages_(changed)
    return write(changed)
