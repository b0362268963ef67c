"""Changes single keys of a recipe, with overrides such as `stage.2.num_rounds=5`."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from fedpress.core import limits
from fedpress.errors import RecipeError
from fedpress.pipeline.recipe.text import SHORTEN, TOO_DEEP, check_depth, in_one_line, plain


@dataclass(frozen=True)
class Override:
    """One key of a recipe and its new value.

    Attributes:
        key: path of the key, such as `stage.2.num_rounds`. A stage is named by its position, its
            name, or its kind if no other stage has that kind.
        value: the new value in TOML's types; None removes the key.
        text: the override as the user wrote it, for errors.
    """

    key: str
    value: Any
    text: str

    @classmethod
    def parse(cls, text: str) -> Override:
        """Reads `key=value`.

        The value is written as in TOML, but text needs no quotes. `none` removes the key.

        Raises:
            RecipeError: if there is no `=` or no key, or the value is nested too deeply.

        >>> Override.parse("stage.2.lr=0.1").value, Override.parse("name=none").value
        (0.1, None)
        """
        key, equals, value = text.partition("=")
        # A text without "=" is most likely a flag whose dashes were forgotten.
        if not equals or not key:
            raise RecipeError(
                "expected key=value",
                place=f"override '{text}'",
                cure="write for instance stage.2.num_rounds=5 or seed=1",
            )
        return cls(key, _value(value), text)

    @classmethod
    def of(cls, key: str, value: Any) -> Override:
        """Makes the override that sets `key` to a Python value; a tuple becomes a list.

        >>> Override.of("keep", ("conv1", "fc")).value
        ['conv1', 'fc']
        """
        return cls(key, None if value is None else plain(value), key)

    def as_text(self) -> str:
        """Returns the override as an argument of the command line.

        >>> Override.of("stage.1.keep_params", 0.3).as_text()
        'stage.1.keep_params=0.3'
        """
        value = "none" if self.value is None else in_one_line(self.value)
        return f"{self.key}={value}"

    @property
    def place(self) -> str:
        """Beginning of errors about this override, which names it; a long override is cut."""
        text = self.text
        return f"override '{text}'" if len(text) < 100 else f"override '{text[:40]}...'"


def overrides_of(values: Mapping[str, Any], at: str = "") -> list[Override]:
    """Returns the overrides for keyword arguments such as `seed=1, data={"num_clients": 5}`.

    A dictionary changes only the keys that it names. A dictionary with a `kind` replaces the whole
    table, since another kind has other keys.

    >>> [one.as_text() for one in overrides_of({"seed": 1, "data": {"num_clients": 5}})]
    ['seed=1', 'data.num_clients=5']
    >>> [one.as_text() for one in overrides_of({"data": {"partition": {"kind": "iid"}}})]
    ['data.partition={kind = "iid"}']
    """
    found: list[Override] = []
    for name, value in values.items():
        key = f"{at}.{name}" if at else str(name)
        if isinstance(value, Mapping) and value and "kind" not in value:
            found += overrides_of(value, key)
        else:
            found.append(Override.of(key, value))
    return found


def overridden(tree: dict[str, Any], overrides: Sequence[str | Override]) -> dict[str, Any]:
    """Returns a copy of a recipe with `overrides` applied.

    Args:
        tree: the recipe as nested dictionaries.
        overrides: changes such as `seed=1`, in the order in which they are applied.

    Raises:
        RecipeError: if an override has no place in the recipe, for example because it names a stage
            that does not exist.
    """
    tree = copy.deepcopy(tree)
    for override in overrides:
        _override_(tree, Override.parse(override) if isinstance(override, str) else override)
    return tree


def name_stages_(tree: dict[str, Any]) -> None:
    """Names each unnamed stage after its kind, in place; a second `train` becomes `train-2`."""
    stages = tree.get("stage")
    if not isinstance(stages, list):
        return
    tables = [stage for stage in stages if isinstance(stage, dict)]
    taken = {stage.get("name") for stage in tables if isinstance(stage.get("name"), str)}
    for stage in tables:
        kind = stage.get("kind")
        if "name" not in stage and isinstance(kind, str):
            stage["name"] = _free_name(kind, taken)
            taken.add(stage["name"])


def _free_name(kind: str, taken: Collection[str | None]) -> str:
    if kind not in taken:
        return kind
    return next(f"{kind}-{i}" for i in count(2) if f"{kind}-{i}" not in taken)


def _override_(tree: dict[str, Any], override: Override) -> None:
    # Functions that read the result are recursive and would fail on a key with very many parts. No
    # setting has so many.
    words = override.key.split(".")
    if limits.above("depth", len(words)):
        raise RecipeError(TOO_DEEP, place=override.place, cure=SHORTEN)
    node: Any = tree
    for position, word in enumerate(words):
        at = ".".join(words[:position])
        if not isinstance(node, list | dict):
            raise RecipeError(
                f"{at} is a single value, it has no key '{word}'",
                place=override.place,
                cure=f"set {at} itself",
            )
        key: Any = _index(node, word, at, override) if isinstance(node, list) else word
        if position + 1 == len(words):
            node[key] = override.value
        # A missing table is made: `data.partition.kind=iid` works in a recipe without `partition`.
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
        else:
            node = node[key]


def _index(items: list[Any], key: str, at: str, override: Override) -> int:
    """Returns the list position that `key` names: a number, a stage's name, or a unique kind."""
    tables = [(i, item) for i, item in enumerate(items) if isinstance(item, dict)]
    # Names go before kinds: names are unique, but a name may equal the kind of another stage.
    for word in ("name", "kind"):
        named = [i for i, item in tables if item.get(word) == key]
        if len(named) > 1:
            known = " or ".join(str(items[i].get("name", i)) for i in named)
            raise RecipeError(
                f"{at}.{key} stands for more than one entry",
                place=override.place,
                cure=f"write {known} instead of {key}",
            )
        if named:
            return named[0]
    # `isdigit` alone accepts digits such as "²", which `int` refuses.
    if key.isascii() and key.isdigit() and int(key) < len(items):
        return int(key)
    known = f"numbered from 0 to {len(items) - 1}"
    if words := [str(item["name"]) for _, item in tables if "name" in item]:
        known += f", or named {', '.join(words)}"
    raise RecipeError(f"there is no {at}.{key}", place=override.place, cure=f"entries are {known}")


def _value(text: str) -> Any:
    """Converts the text of a value: `5` to 5, `[1, 2]` to a list, `none` to None, `iid` to text."""
    if text == "none":
        return None
    try:
        found = tomllib.loads(f"x = {text}")
    except RecursionError as error:
        place = f"override '{text[:40]}...'"
        raise RecipeError(TOO_DEEP, place=place, cure=SHORTEN) from error
    except ValueError:
        return text
    check_depth(found)
    # With a line break the text may parse as two keys. Then it is text, not TOML.
    return found["x"] if len(found) == 1 else text
