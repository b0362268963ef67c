"""A recipe: TOML text and overrides become frozen, checked settings; every mistake is one sentence with its cure."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from fedpress.data import DataSettings
from fedpress.errors import RecipeError, did_you_mean
from fedpress.stages import AnyStage


class ModelSettings(BaseModel):
    """The `[model]` table: a built-in architecture or `package.module:function`, and its arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    arguments: dict[str, JsonValue] = {}


class Recipe(BaseModel):
    """The whole way of a model: data, architecture, and the stages in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("recipe", min_length=1)
    description: str = ""
    seed: int = Field(0, ge=0)
    data: DataSettings
    model: ModelSettings
    stage: tuple[Annotated[AnyStage, Field(discriminator="kind")], ...] = Field(min_length=1)


def names() -> list[str]:
    """Returns the names of the recipes that come with fedpress."""
    return sorted(p.name.removesuffix(".toml") for p in _shipped().iterdir() if p.name.endswith(".toml"))


def text(name_or_path: str) -> str:
    """Returns the TOML text of a shipped recipe or of a file.

    Raises:
        RecipeError: if there is neither.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.exists():
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe: cannot read '{path}' ({error}); give the path of a TOML file") from error
    if name_or_path not in names():
        hint = did_you_mean(name_or_path, names())
        raise RecipeError(
            f"recipe: no recipe '{name_or_path}'{hint}; known are {', '.join(names())}, or give a .toml file"
        )
    return (_shipped() / f"{name_or_path}.toml").read_text()


def load(toml: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads TOML text, applies `overrides` such as `stage.2.num_rounds=5`, and checks everything.

    Raises:
        RecipeError: if the text is no TOML, an override has no place, or a setting is wrong.
    """
    try:
        tree = tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe: not valid TOML: {error}") from error
    for override in overrides:
        _override_(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from error


def schema() -> str:
    """Returns the JSON schema of recipes."""
    return json.dumps(Recipe.model_json_schema(), indent=1)


def _shipped() -> Any:
    return files("fedpress") / "recipes"


def _override_(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override '{override}': expected key=value, for instance stage.2.num_rounds=5 or seed=1")
    keys = path.split(".")
    node: Any = tree
    for position, key in enumerate(keys[:-1]):
        node = _child(node, key, ".".join(keys[: position + 1]), override)
    last = keys[-1]
    if isinstance(node, list):
        _child(node, last, path, override)
        node[int(last)] = _value(value)
    else:
        node[last] = _value(value)


def _child(node: Any, key: str, place: str, override: str) -> Any:
    if isinstance(node, list):
        by_name = next((s for s in node if isinstance(s, dict) and key in (s.get("name"), s.get("kind"))), None)
        if by_name is not None:
            return by_name
        if not key.isdigit() or int(key) >= len(node):
            raise RecipeError(
                f"override '{override}': there is no {place}; stages are numbered from 0 to {len(node) - 1}"
            )
        return node[int(key)]
    if not isinstance(node, dict):
        raise RecipeError(f"override '{override}': {place} has no keys; it is a single value")
    return node.setdefault(key, {})


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = _place(first["loc"])
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(str(first["loc"][-1]), sorted(set(_known_keys())))
        return f"{place}: no such key{hint or '; see fedpress check --schema'}{more}"
    if first["type"] == "missing":
        return f"{place}: this key is missing; add it (fedpress check --schema lists all keys){more}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{place}: {message}{got}{more}"


def _place(loc: tuple[int | str, ...]) -> str:
    """`("stage", 2, "federate", "privacy")` -> `recipe.stage[2].privacy`: the union's tag is no key of the recipe."""
    place, previous = "recipe", None
    for part in loc:
        tag = isinstance(previous, int) or previous == "partition"
        if isinstance(part, int):
            place += f"[{part}]"
        elif not (tag and part in _TAGS):
            place += f".{part}"
        previous = part
    return place


_TAGS = frozenset({"train", "prune", "federate", "export", "iid", "dirichlet", "shards", "quantity", "natural"})


def _known_keys() -> Iterator[str]:
    full = Recipe.model_json_schema()
    for part in (full, *full.get("$defs", {}).values()):
        yield from part.get("properties", {})
