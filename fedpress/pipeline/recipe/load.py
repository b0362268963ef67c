"""From text and overrides to checked settings, and to the text that stands alone."""

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

    A stage without a name gets that of its kind, with a number behind if it is taken.

    Raises:
        RecipeError: if the text is no TOML, an override has no place, or a setting is wrong.
    """
    return checked(tree(toml, overrides))


def checked(found: dict[str, Any]) -> Recipe:
    """Returns the settings of a recipe that was read.

    Raises:
        RecipeError: if a setting is wrong.
    """
    return Recipe(**found)


def tree(toml: str, overrides: Sequence[str | Override] = ()) -> dict[str, Any]:
    """Reads TOML text and applies `overrides`; nothing is checked yet.

    Raises:
        RecipeError: if the text is no TOML, or an override has no place.
    """
    return completed(parse(toml), overrides)


def completed(tables: dict[str, Any], overrides: Sequence[str | Override] = ()) -> dict[str, Any]:
    """Returns the tables with `overrides` and a name for every stage; checks nothing yet.

    Raises:
        RecipeError: if an override has no place.
    """
    found = copy.deepcopy(tables)
    name_stages_(found)
    found = overridden(found, overrides)
    name_stages_(found)  # also those that an override has put in
    return found


def from_tables(
    tables: dict[str, Any], overrides: Sequence[str | Override] = ()
) -> tuple[str, Recipe]:
    """Returns text and settings of a recipe made in Python; paths count from the present folder.

    Raises:
        RecipeError: if an override has no place, or a setting is wrong.
    """
    found = completed(plain(tables), overrides)
    anchor_(found, Path.cwd())
    return write(found), checked(found)


def effective(
    text: str, overrides: Sequence[str | Override] = (), *, folder: Path | None = None
) -> str:
    """Returns the recipe as TOML with overrides applied and relative paths made absolute.

    It is `text` itself, with its comments, if that says the same already.

    Args:
        text: of a recipe.
        overrides: such as `stage.2.num_rounds=5`; paths in them count from the present folder.
        folder: where the recipe file lies; None for one that came from no file.

    Raises:
        RecipeError: if the text is no TOML, or an override has no place.
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
