"""Lists every key of a recipe with default and meaning, for `--keys`, `help()` and the docs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from fedpress.errors import RecipeError, suggestion
from fedpress.pipeline.recipe.settings import schema_tree
from fedpress.pipeline.recipe.text import in_one_line, plain

Node = Mapping[str, Any]
"""A part of a JSON schema."""
REQUIRED = "required"
"""Shown instead of a default for a key that must be given."""


class KeyRow(NamedTuple):
    """One key of a table.

    Attributes:
        key: name of the key; `augment.flip` is a key of a nested table.
        default: default as TOML; "" if there is none, `REQUIRED` if the key must be given.
        meaning: description, with the allowed values.
    """

    key: str
    default: str
    meaning: str


@dataclass(frozen=True)
class KeyTable:
    """The keys of one table of a recipe.

    Attributes:
        word: name for `--keys`: `data`, or the kind of a stage, codec or algorithm.
        title: header of the table in TOML, such as `[data]`.
        rows: the keys.
        part_of: the `word` of each table that may contain this table.
    """

    word: str
    title: str
    rows: tuple[KeyRow, ...]
    part_of: tuple[str, ...] = ()

    @property
    def is_stage(self) -> bool:
        """Whether this is the table of a stage."""
        return self.title.startswith("[[stage]]")


def key_tables(words: Sequence[str] = ()) -> list[KeyTable]:
    """Lists the tables of a recipe.

    Args:
        words: names of tables, such as "data" or "federate". Only these tables and the tables
            nested in them are returned. Empty: all tables.

    Raises:
        RecipeError: if a word names no table.

    >>> key_tables(["model"])[0].title
    '[model]'
    """
    tables = _all_tables()
    known = [table.word for table in tables]
    for word in words:
        if word not in known:
            raise RecipeError(
                f"there is no table '{word}'",
                place="keys",
                cure=suggestion(word, known) or f"choose from {', '.join(known)}",
            )
    asked = set(words)
    return [table for table in tables if not asked or asked & {table.word, *table.part_of}]


# Making the schema takes half a second, and many functions of `fedpress.api` need it.
@cache
def _all_tables() -> tuple[KeyTable, ...]:
    return tuple(_Reader(schema_tree()).tables())


def keys(kind: str) -> tuple[KeyRow, ...]:
    """Returns the keys of a kind of stage, such as "prune".

    Keys of nested tables are included. Only a table with a `kind` has a `KeyTable` of its own.

    >>> keys("pack")
    ()
    """
    return next(table.rows for table in key_tables([kind]) if table.is_stage)


class _Reader:
    """Converts the JSON schema of recipes to `KeyTable` objects.

    A nested table without a `kind` is listed inside its parent, as `augment.flip`. A nested table
    with a `kind` has a `KeyTable` of its own for each kind, since each kind has other keys.
    """

    def __init__(self, full: dict[str, Any]) -> None:
        self.full = full
        self.choices: dict[str, list[str]] = {}
        """Definition of a table with a `kind` -> names of the tables that it may be in."""
        self.titles: dict[str, str] = {}

    def tables(self) -> Iterator[KeyTable]:
        stages = self.full["properties"]["stage"]["items"]["discriminator"]["mapping"]
        inner = ("data", "model", "stage")
        # The keys outside of all tables, such as `seed`. The tables themselves follow below.
        own = {key: about for key, about in self.full["properties"].items() if key not in inner}
        yield KeyTable("recipe", "at the top", tuple(self._rows({"properties": own}, "recipe")))
        for word in ("data", "model"):
            node = self._opened(self.full["properties"][word])
            yield KeyTable(word, f"[{word}]", tuple(self._rows(node, word)))
        for kind, ref in stages.items():
            rows = [row for row in self._rows(self._at(ref), kind) if row.key not in NAMES]
            yield KeyTable(kind, f'[[stage]] kind = "{kind}"', tuple(rows))
        # A table that is chosen by its kind may contain further such tables: an algorithm contains
        # a server optimizer.
        done: set[str] = set()
        while todo := [name for name in self.choices if name not in done]:
            for name in todo:
                done.add(name)
                yield self._choice(name)

    def _choice(self, name: str) -> KeyTable:
        node = self.full["$defs"][name]
        kind = node["properties"]["kind"]
        word = str(kind["default"])
        rows = [row for row in self._rows(node, word, self.choices[name]) if row.key != "kind"]
        # A kind without settings still needs a row, or the table would be empty.
        rows = rows or [KeyRow("kind", word, kind["description"])]
        title = f'{self.titles[name]} = {{ kind = "{word}" }}'
        return KeyTable(word, title, tuple(rows), tuple(dict.fromkeys(self.choices[name])))

    def _rows(
        self, node: Node, word: str, above: Sequence[str] = (), prefix: str = ""
    ) -> Iterator[KeyRow]:
        """Yields the keys of a table.

        Args:
            node: the schema of the table.
            word: name of the table.
            above: names of the tables that may contain this table.
            prefix: beginning of each key, such as "augment." for a nested table.
        """
        required = node.get("required", ())
        for name, about in node["properties"].items():
            key = f"{prefix}{name}"
            default = REQUIRED if name in required else _default(about)
            kinds = dict(self._kinds(about))
            for table in kinds.values():
                self.choices.setdefault(table, []).extend((word, *above))
                self.titles.setdefault(table, key)
            yield KeyRow(key, default, self._meaning(about, kinds))
            inside = self._opened(about)
            if not kinds and inside is not about and "properties" in inside:
                yield from self._rows(inside, word, above, f"{key}.")

    def _meaning(self, about: Node, kinds: Iterable[str]) -> str:
        parts = (about, about.get("items", {}), *about.get("anyOf", ()))
        words = [str(word) for part in parts for word in part.get("enum", ())]
        words += [str(part["const"]) for part in parts if "const" in part]
        words += kinds
        one_of = f"one of {', '.join(words)}" if words else ""
        return "; ".join(filter(None, (about.get("description", ""), one_of)))

    def _kinds(self, about: Node) -> Iterator[tuple[str, str]]:
        """Yields each value that `kind` may have in a table, with the name of its definition."""
        for part in (about, about.get("items", {}), *about.get("anyOf", ())):
            mapping = part.get("discriminator", {}).get("mapping", {})
            yield from ((word, ref.rpartition("/")[2]) for word, ref in mapping.items())

    def _opened(self, about: Node) -> Node:
        """Returns the schema of the table that a key contains; else the schema of the key."""
        # pydantic writes an optional table as `anyOf` (table or null).
        for part in (about, *about.get("anyOf", ()), *about.get("allOf", ())):
            if "$ref" in part:
                return self._at(part["$ref"])
        return about

    def _at(self, ref: str) -> Node:
        node: Node = self.full["$defs"][ref.rpartition("/")[2]]
        return node


NAMES = ("kind", "name")
"""Keys that every stage has; they are not listed."""


def _default(about: Node) -> str:
    """Writes a default as TOML.

    The default of a table with a `kind` is its kind. The default of any other nested table is "",
    because the keys of that table are listed below it with their own defaults.
    """
    value = about.get("default")
    if isinstance(value, dict):
        value = value.get("kind")
    return "" if value is None else in_one_line(plain(value))
