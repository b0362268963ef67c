"""Converts the TOML text of a recipe, and overrides such as `seed=1`, to checked settings."""

from fedpress.pipeline.recipe.load import checked, completed, effective, from_tables, load, tree
from fedpress.pipeline.recipe.overrides import Override, overridden, overrides_of
from fedpress.pipeline.recipe.settings import ModelSettings, Recipe, schema
from fedpress.pipeline.recipe.tables import REQUIRED, KeyRow, KeyTable, key_tables, keys
from fedpress.pipeline.recipe.text import find, in_one_line, names, plain, write

__all__ = [
    "REQUIRED",
    "KeyRow",
    "KeyTable",
    "ModelSettings",
    "Override",
    "Recipe",
    "checked",
    "completed",
    "effective",
    "find",
    "from_tables",
    "in_one_line",
    "key_tables",
    "keys",
    "load",
    "names",
    "overridden",
    "overrides_of",
    "plain",
    "schema",
    "tree",
    "write",
]
