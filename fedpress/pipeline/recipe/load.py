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
    """Reads TOML text, applies `overrides` such as `stage.2.num_rounds=5`, and checks everything.

    A stage without a name is named after its kind: `train`, then `train-2` and so on.

    Raises:
        RecipeError: if the text is no TOML, an override names no key, or a setting is wrong.
    """
    return checked(tree(toml, overrides))


def checked(found: dict[str, Any]) -> Recipe:
    """Converts the tables of a recipe to checked settings.

    Raises:
        RecipeError: if a setting is wrong.
    """
    return Recipe(**found)


def tree(toml: str, overrides: Sequence[str | Override] = ()) -> dict[str, Any]:
    """Reads TOML text and applies `overrides`; settings are not checked yet.

    Raises:
        RecipeError: if the text is no TOML, or the recipe has no place for an override.
    """
    return completed(parse(toml), overrides)


def completed(tables: dict[str, Any], overrides: Sequence[str | Override] = ()) -> dict[str, Any]:
    """Returns the tables with `overrides` and a name for every stage; does not check settings.

    Raises:
        RecipeError: if the tables have no place for an override.
    """
    found = copy.deepcopy(tables)
    # Stages are named twice: overrides may refer to a stage by its name, and may add a table.
    name_stages_(found)
    found = overridden(found, overrides)
    name_stages_(found)
    return found


def from_tables(
    tables: dict[str, Any], overrides: Sequence[str | Override] = ()
) -> tuple[str, Recipe]:
    """Returns TOML and settings of a recipe given as dictionaries.

    Paths are relative to the current folder.

    Raises:
        RecipeError: if the tables have no place for an override, or a setting is wrong.
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
        folder: folder of the recipe file; None if the recipe is not from a file.

    Raises:
        RecipeError: if the text is no TOML, or the recipe has no place for an override.
    """
    found = tree(text)
    anchored = copy.deepcopy(found)
    if folder is not None:
        anchor_(anchored, folder)
    if anchored == found and not overrides:
        return text
    changed = overridden(anchored, overrides)
    anchor_(changed, Path.cwd())
    name_stages_(changed)
    return write(changed)
