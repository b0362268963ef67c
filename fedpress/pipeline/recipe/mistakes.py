"""Converts pydantic's errors to a `RecipeError` that says where the mistake is and what to do."""

from __future__ import annotations

import datetime
import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from fedpress.errors import RecipeError, SettingError, suggestion


def check_values(node: Any, place: str) -> None:
    """Refuses inf, nan and dates: TOML allows them, but no setting takes them.

    Args:
        node: a table, list or value of the recipe.
        place: where `node` is, such as "recipe.data".

    Raises:
        RecipeError: if there is such a value; the error names the first one.
    """
    if isinstance(node, float) and not math.isfinite(node):
        raise RecipeError(
            f"expected a finite number, got {node}", place=place, cure="write a number"
        )
    if isinstance(node, datetime.date | datetime.time):
        raise RecipeError(
            f"no setting is a date or time, got {node}", place=place, cure="put words in quotes"
        )
    if isinstance(node, dict):
        for key, child in node.items():
            check_values(child, f"{place}.{key}")
    if isinstance(node, list):
        for position, child in enumerate(node):
            check_values(child, f"{place}[{position}]")


def first_mistake(
    error: ValidationError, tree: dict[str, Any], recipe: type[BaseModel]
) -> RecipeError:
    """Converts the most useful error of pydantic, and adds how many others there are: "(2 more)".

    An error about an unknown key goes first. A misspelt key causes two errors: the wrong key is
    unknown, and the right key is missing. The first of the two explains the second.

    Args:
        error: pydantic's errors.
        tree: the tables of the recipe.
        recipe: the settings class.
    """
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    # If an entry of a list is wrong, pydantic adds an error that the list is too short. This second
    # error is dropped.
    own = [e for e in found if not any(_inside(other["loc"], e["loc"]) for other in found)]
    more = len({_place(e, tree) for e in own}) - 1
    found_mistake = _mistake(first, _place(first, tree), recipe)
    if more and found_mistake.cure:
        found_mistake.add_cure(f" ({more} more)")
    elif more:
        found_mistake.problem += f" ({more} more)"
    return found_mistake


def _mistake(error: Any, place: str, recipe: type[BaseModel]) -> RecipeError:
    """Converts one error of pydantic.

    Args:
        error: the error. If the check that failed is one of fedpress's own, it contains a
            `SettingError`.
        place: where the mistake is, such as `recipe.stage[1]`.
        recipe: the settings class.
    """
    raised = error.get("ctx", {}).get("error")
    if not isinstance(raised, SettingError):
        problem, cure = _complaint(error, recipe)
        return RecipeError(problem, place=place, cure=cure)
    found = RecipeError(
        raised.problem,
        place=f"{place}.{raised.place}" if raised.place else place,
        cure=raised.cure,
    )
    found.change_arguments(
        lambda one: replace(one, name=_key(one.name, place, recipe.model_fields))
    )
    return found


def _key(argument: str, table: str, tables: Collection[str]) -> str:
    """Converts the name of a setting in an error to its full key in the recipe.

    Args:
        argument: name as the settings class knows it, such as "finetune.epochs".
        table: place of the settings that raised the error.
        tables: names of the other tables of a recipe; a name such as "data.path" begins with one.

    >>> at, tables = "recipe.stage[1]", ("data", "model")
    >>> _key("finetune.epochs", at, tables), _key("data.public_share", at, tables)
    ('recipe.stage[1].finetune.epochs', 'recipe.data.public_share')
    """
    table_of_recipe = "." in argument and argument.partition(".")[0] in tables
    return f"recipe.{argument}" if table_of_recipe else f"{table}.{argument}"


def _inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _complaint(error: Any, recipe: type[BaseModel]) -> tuple[str, str]:
    """Returns what is wrong and what to do about it, for an error of pydantic."""
    kind, loc, value = error["type"], error["loc"], error["input"]
    if kind == "extra_forbidden":
        known = [
            key for key in _schema_at(loc[:-1], recipe).get("properties", {}) if key != loc[-1]
        ]
        return "no such key", suggestion(str(loc[-1]), known) or "see fedpress check --schema"
    if kind == "missing":
        return "this key is missing", "add it (fedpress check --schema lists all keys)"
    # The key `kind` selects the class of a table. pydantic calls it the tag of a union.
    if kind.startswith("union_tag"):
        known = list(_schema_at(loc, recipe)["discriminator"]["mapping"])
        every = ", ".join(known)
        if kind == "union_tag_not_found":
            return "this key is missing", f"add it (one of {every})"
        tag = str(error["ctx"]["tag"])
        return f"there is no '{tag}'", suggestion(tag, known) or f"choose one of {every}"
    if kind in ("tuple_type", "list_type"):
        # A list of tables, such as the stages, has no entry of one word or number.
        simple = "type" in _schema_at(loc, recipe).get("items", {})
        return f"expected a list, got {_short(value)}", f"write [{_short(value)}]" * simple
    message = error["msg"]
    near = ""
    if kind == "literal_error":
        # pydantic gives the allowed words only as text: "'a', 'b' or 'c'".
        near = suggestion(str(value), error["ctx"]["expected"].split("'")[1::2])
    # A setting that says in its class which value is usual.
    elif examples := _schema_at(loc, recipe).get("examples"):
        near = f"give for instance {examples[0]}"
    return f"{message[0].lower()}{message[1:]}, got {_short(value)}", near


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _place(error: Any, tree: Any) -> str:
    """Converts pydantic's location: `("stage", 2, "federate", "lr")` -> `recipe.stage[2].lr`."""
    place, node, kind = "recipe", tree, error["type"]
    *above, last = error["loc"] or ("",)
    before: object = None
    for part in (*above, last):
        # After a list index pydantic adds the kind, which may have the name of a key.
        names_kind = isinstance(before, int) and isinstance(node, dict) and node.get("kind") == part
        before = part
        if names_kind:
            continue
        if isinstance(part, int):
            place += f"[{part}]"
            node = node[part] if isinstance(node, list) and part < len(node) else None
        elif isinstance(node, dict) and (part in node or (kind == "missing" and part is last)):
            place += f".{part}"
            node = node.get(part)
    # If `kind` is missing or wrong, pydantic's location ends at its table.
    return place + (
        f".{error['ctx']['discriminator'].strip(chr(39))}" if kind.startswith("union_tag") else ""
    )


def _schema_at(loc: tuple[int | str, ...], recipe: type[BaseModel]) -> dict[str, Any]:
    """Returns the part of the JSON schema at the location of an error; {} if there is none."""
    full: dict[str, Any] = recipe.model_json_schema()

    def open_(node: dict[str, Any]) -> dict[str, Any]:
        for part in node.get("anyOf", ()):  # a table or null, a list or null
            if "$ref" in part or "discriminator" in part or part.get("type") == "array":
                node = part
        return full["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    node = open_(full)
    for part in loc:
        mapping = node.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            node = open_({"$ref": mapping[part]})
        elif isinstance(part, int):
            node = open_(node.get("items", {}))
        else:
            node = open_(node.get("properties", {}).get(part, {}))
    return node
