"""A recipe: TOML text and overrides become frozen, checked settings; every mistake is one sentence with its cure."""

from __future__ import annotations

import codecs
import copy
import datetime
import json
import math
import re
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from fedpress.core import limits
from fedpress.data import DataSettings
from fedpress.errors import RecipeError, did_you_mean
from fedpress.models.memory import TEACHER
from fedpress.stages.table import STAGES
from fedpress.stages.union import AnyStage
from fedpress.workspace.state import Name

MODEL_KEYS = {key: words for row in STAGES for key, words in row.load().saved_models.items()}
"""Keys of stages that may hold the path of a saved model, with the words that are none."""


class ModelSettings(BaseModel):
    """The `[model]` table: a built-in architecture or `package.module:function`, and its arguments.

    Or a saved model as `checkpoint`: a model's folder, a run, a stage of one, or a packed file. `weights` are a state
    dict, safetensors or what torch.save wrote, for an architecture that is not to begin with fresh ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str | None = None
    arguments: dict[str, JsonValue] = {}
    checkpoint: Path | None = None
    weights: Path | None = None

    @property
    def trained(self) -> bool:
        """Whether the model comes with weights that somebody has trained."""
        return self.checkpoint is not None or self.weights is not None

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelSettings:
        if (self.architecture is None) == (self.checkpoint is None):
            raise ValueError("give either architecture or checkpoint, one of the two")
        if self.checkpoint is not None and self.weights is not None:
            raise ValueError(
                "a checkpoint has weights of its own; leave weights out, or give architecture instead"
            )
        return self


class Recipe(BaseModel):
    """The whole way of a model: data, architecture, and the stages in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = "recipe"
    description: str = ""
    seed: int = Field(0, ge=0)
    data: DataSettings
    model: ModelSettings
    stage: tuple[Annotated[AnyStage, Field(discriminator="kind")], ...] = Field(min_length=1)

    @property
    def private(self) -> bool:
        """Whether a stage promises something about the clients' rows."""
        return any(stage.private for stage in self.stage)

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        # Folders, streams of chance and charges go by the name: two stages that share it would share their noise.
        seen = [stage.name for stage in self.stage]
        twice = next((name for name in seen if seen.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two stages are named '{twice}'; give every stage a name of its own")
        return self


def names() -> list[str]:
    """Returns the names of the recipes that come with fedpress."""
    return sorted(
        p.name.removesuffix(".toml") for p in _shipped().iterdir() if p.name.endswith(".toml")
    )


def text(name_or_path: str) -> str:
    """Returns the TOML text of a shipped recipe or of a file; a shipped name goes first.

    Raises:
        RecipeError: if there is neither.
    """
    path = Path(name_or_path)
    if name_or_path in names():
        return (_shipped() / f"{name_or_path}.toml").read_text("utf-8")
    if path.suffix == ".toml" or path.is_file():
        return _read(path)
    if (path / "settings.json").is_file():
        raise RecipeError(
            f"recipe: '{path}' is the folder of a run; go on with it by --resume {path}, or run its recipe again: "
            f"{path / 'recipe.toml'}"
        )
    hint = did_you_mean(name_or_path, names())
    raise RecipeError(
        f"recipe: no recipe '{name_or_path}'{hint}; known are {', '.join(names())}, or give a .toml file"
    )


def _read(path: Path) -> str:
    """Reads a file that is UTF-8, or says by its first bytes that it is UTF-16, as Windows editors write it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"recipe: cannot read '{path}' ({error.strerror}); give the path of a TOML file"
        ) from error
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not utf_16 and b"\0" in data:
        what = (
            "it looks like UTF-16"
            if data.count(0) > len(data) // 3
            else "it holds bytes that are no text"
        )
        raise RecipeError(
            f"recipe: cannot read '{path}' ({what}); give a TOML file that is saved as UTF-8"
        )
    try:
        return data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"recipe: cannot read '{path}' (line {line} is not UTF-8, which TOML must be); save it as UTF-8"
        ) from error


def effective(text: str, overrides: Sequence[str] = (), *, folder: Path | None = None) -> str:
    """Returns the TOML that stands alone: with the overrides in it, and its relative paths counted from `folder`.

    It is `text` itself, with its comments, if that says the same already.

    Args:
        text: of a recipe.
        overrides: such as `stage.2.num_rounds=5`; paths in them count from the present folder.
        folder: where the recipe file lies; None for one that came from no file.

    Raises:
        RecipeError: if the text is no TOML, or an override has no place.
    """
    plain = tree(text)
    anchored = copy.deepcopy(plain)
    if folder is not None:
        _anchor_(anchored, folder)
    if anchored == plain and not overrides:
        return text
    changed = overridden(anchored, overrides)
    _anchor_(changed, Path.cwd())
    _name_stages_(changed)
    return toml(changed)


def _anchor_(tree: dict[str, Any], folder: Path) -> None:
    """Makes relative paths absolute: of the data, of a saved model, of a teacher."""
    data, model, stages = tree.get("data"), tree.get("model"), tree.get("stage")
    places = [(model, "checkpoint"), (model, "weights")]
    for stage in stages if isinstance(stages, list) else []:
        places += [(stage, key) for key in MODEL_KEYS]
    for table, key in [(data, "path"), *places]:
        if not isinstance(table, dict):
            continue
        value = table.get(key)
        if (
            not isinstance(value, str)
            or value in MODEL_KEYS.get(key, ())
            or value.startswith(TEACHER)
            or value.startswith("~")
            or Path(value).is_absolute()
        ):
            continue
        beside, here = folder / value, Path.cwd() / value
        own_function = key == "path" and ":" in str(
            table.get("source", "")
        )  # its path may be anything
        if _exists(beside) or not (_exists(here) or own_function):
            table[key] = str(beside.resolve())
        elif _exists(here):  # as older versions counted
            table[key] = str(here.resolve())


def _exists(path: Path) -> bool:
    return any(path.parent.glob(path.name)) if "*" in path.name else path.exists()


def load(toml: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads TOML text, applies `overrides` such as `stage.2.num_rounds=5`, and checks everything.

    A stage without a name gets that of its kind, with a number behind if it is taken.

    Raises:
        RecipeError: if the text is no TOML, an override has no place, or a setting is wrong.
    """
    found = tree(toml, overrides)
    _check_values(found, "recipe")
    try:
        return Recipe.model_validate(found)
    except ValidationError as error:
        raise RecipeError(_sentence(error, found)) from error


def tree(toml: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads TOML text and applies `overrides`; nothing is checked yet.

    Raises:
        RecipeError: if the text is no TOML, or an override has no place.
    """
    try:
        found = tomllib.loads(toml)
    except RecursionError as error:
        raise RecipeError(f"recipe: {NESTED}") from error
    except ValueError as error:  # also a whole number of thousands of digits
        raise RecipeError(f"recipe: not valid TOML: {error}; {_cure(toml, str(error))}") from error
    _check_depth(found)
    if isinstance(found.get("stage"), dict):
        raise RecipeError(
            "recipe.stage: one [stage] in single brackets; stages are a list, so write [[stage]]"
        )
    for name in ("data", "model"):
        if isinstance(found.get(name), list):
            raise RecipeError(
                f"recipe.{name}: it is a list; there is one only, so write [{name}] with single brackets"
            )
    _name_stages_(found)
    found = overridden(found, overrides)
    _name_stages_(found)  # also those that an override has put in
    return found


NESTED = "lists and tables lie too deep inside each other; no setting needs that, so close a bracket or shorten a key"


def _check_depth(tree: Any) -> None:
    if said := limits.above("depth", limits.depth(tree)):
        raise RecipeError(f"recipe: {NESTED} ({said})")


def _cure(toml: str, problem: str) -> str:
    """Says what to do about frequent mistakes in TOML."""
    at = re.search(r"at line (\d+)", problem)
    lines = toml.splitlines()
    line = lines[int(at[1]) - 1] if at and int(at[1]) <= len(lines) else ""
    if re.search(r"[\u201c\u201d\u201e\u2018\u2019]", line):
        return "write plain quotes, \" or ', in that line"
    if "escape" in problem or ("\\" in line and "Invalid hex" in problem):
        return "write that path in 'single quotes', or with / in place of \\"
    if re.search(r"Cannot declare \('stage'", problem) or re.fullmatch(
        r"\s*\[stage\]\s*(#.*)?", line
    ):
        return "stages are a list: write [[stage]] with two brackets each time"
    if re.search(r"=\s*(True|False|None)\b", line):
        return "write true and false in small letters, and leave out a key that has no value"
    if re.search(r"=\s*-?\d+,\d+\s*(#.*)?$", line):
        return "write decimals with a point"
    if re.search(r"=\s*[A-Za-z_][\w./:-]*\s*(#.*)?$", line):
        return "put words in quotes"
    if toml.lstrip().startswith("{"):
        return "this is JSON; write TOML: tables such as [data], and key = value"
    if re.match(r"\s*[\w-]+:(\s|$)", line):
        return "this looks like YAML; write TOML: tables such as [data], and key = value"
    return "correct that place"


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of `tree` with `overrides` such as `seed=1` in it.

    Raises:
        RecipeError: if one has no place.
    """
    tree = copy.deepcopy(tree)
    for override in overrides:
        _override_(tree, override)
    return tree


def toml(tree: dict[str, Any]) -> str:
    """Writes plain values as TOML, one line for each key and one block for each stage; what is None is left out.

    >>> print(toml({"seed": 1, "data": {"source": "digits"}, "stage": [{"kind": "train"}]}))
    seed = 1
    <BLANKLINE>
    [data]
    source = "digits"
    <BLANKLINE>
    [[stage]]
    kind = "train"
    <BLANKLINE>
    """
    tables = {key: value for key, value in tree.items() if isinstance(value, dict)}
    blocks = [("", {k: v for k, v in tree.items() if k not in tables and k != "stage"})]
    blocks += [(f"[{key}]\n", table) for key, table in tables.items()]
    blocks += [("[[stage]]\n", table) for table in tree.get("stage", ())]
    return "\n".join(
        head + "".join(f"{_key(k)} = {toml_value(v)}\n" for k, v in table.items() if v is not None)
        for head, table in blocks
    )


def toml_value(value: Any) -> str:
    """Writes one value as TOML in one line.

    >>> toml_value({"kind": "iid", "shares": [0.5, True]})
    '{kind = "iid", shares = [0.5, true]}'
    """
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items() if v is not None)
            + "}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(
        value if isinstance(value, bool | int | float) else str(value), ensure_ascii=False
    )


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def schema() -> str:
    """Returns the JSON schema of recipes."""
    return json.dumps(Recipe.model_json_schema(), indent=1)


def keys(kind: str) -> list[tuple[str, str, str]]:
    """Returns name, default and meaning of every key of a kind of stage."""
    full = Recipe.model_json_schema()
    mapping = full["properties"]["stage"]["items"]["discriminator"]["mapping"]
    rows = []
    for name, about in full["$defs"][mapping[kind].rpartition("/")[2]]["properties"].items():
        if name in ("kind", "name"):
            continue
        default = toml_value(about["default"]) if about.get("default") is not None else ""
        choices = [x for part in (about, *about.get("anyOf", ())) for x in part.get("enum", ())]
        one_of = f"one of {', '.join(map(str, choices))}" if choices else ""
        rows.append(
            (name, default, "; ".join(filter(None, (about.get("description", ""), one_of))))
        )
    return rows


def _shipped() -> Any:
    return files("fedpress.pipeline") / "recipes"


def _name_stages_(tree: dict[str, Any]) -> None:
    stages = tree.get("stage")
    tables = (
        [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    )
    taken = {stage.get("name") for stage in tables if isinstance(stage.get("name"), str)}
    for stage in tables:
        if "name" not in stage and isinstance(kind := stage.get("kind"), str):
            numbered = (kind if i == 1 else f"{kind}-{i}" for i in count(1))
            stage["name"] = next(name for name in numbered if name not in taken)
            taken.add(stage["name"])


def _override_(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(
            f"override '{override}': expected key=value, for instance stage.2.num_rounds=5 or seed=1"
        )
    keys = path.split(".")
    if limits.above("depth", len(keys)):
        raise RecipeError(f"override '{override[:40]}...': {NESTED}")
    node: Any = tree
    for position, word in enumerate(keys):
        at = ".".join(keys[:position])
        if not isinstance(node, list | dict):
            raise RecipeError(
                f"override '{override}': {at} is a single value, it has no key '{word}'"
            )
        key: Any = _index(node, word, at, override) if isinstance(node, list) else word
        if position + 1 == len(keys):
            node[key] = _value(value)
        else:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]


def _index(items: list[Any], key: str, at: str, override: str) -> int:
    """The position in a list that `key` names: its number, the stage's name, or a kind that only one stage has."""
    tables = [(i, item) for i, item in enumerate(items) if isinstance(item, dict)]
    for word in ("name", "kind"):
        named = [i for i, item in tables if item.get(word) == key]
        if len(named) > 1:
            known = " or ".join(str(items[i].get("name", i)) for i in named)
            raise RecipeError(
                f"override '{override}': {at}.{key} is more than one; write {known} in its place"
            )
        if named:
            return named[0]
    if key.isascii() and key.isdigit() and int(key) < len(items):
        return int(key)
    words = [str(item["name"]) for _, item in tables if "name" in item]
    known = f"numbered from 0 to {len(items) - 1}" + (
        f", or named {', '.join(words)}" if words else ""
    )
    raise RecipeError(f"override '{override}': there is no {at}.{key}; they are {known}")


def _value(text: str) -> Any:
    """`5`, `0.1`, `true`, `[1, 2]` and `{a = 1}` as in TOML; `none` unsets a key; anything else is a word."""
    if text == "none":
        return None
    try:
        found = tomllib.loads(f"x = {text}")
    except RecursionError as error:
        raise RecipeError(f"override '{text[:40]}...': {NESTED}") from error
    except ValueError:
        return text
    _check_depth(found)
    return found["x"] if len(found) == 1 else text


def _check_values(node: Any, place: str) -> None:
    """Refuses what TOML can say and a setting cannot be: inf, nan, and dates."""
    if isinstance(node, float) and not math.isfinite(node):
        raise RecipeError(f"{place}: expected a finite number, got {node}")
    if isinstance(node, datetime.date | datetime.time):
        raise RecipeError(f"{place}: no setting is a date or time, got {node}; put words in quotes")
    for key, child in node.items() if isinstance(node, dict) else ():
        _check_values(child, f"{place}.{key}")
    for position, child in enumerate(node) if isinstance(node, list) else ():
        _check_values(child, f"{place}[{position}]")


def _sentence(error: ValidationError, tree: dict[str, Any]) -> str:
    """The first mistake in one sentence; an unknown key goes before the rest, since a misspelt key is also missing."""
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    # A list of which a part is wrong is also called too short: that follows from it, and is no mistake of its own.
    inner = [e["loc"] for e in found]
    own = [
        e
        for e in found
        if not any(len(i) > len(e["loc"]) and i[: len(e["loc"])] == e["loc"] for i in inner)
    ]
    more = len({_place(e, tree) for e in own}) - 1
    return f"{_place(first, tree)}: {_complaint(first)}" + (f" ({more} more)" if more else "")


def _complaint(error: Any) -> str:
    kind, loc, value = error["type"], error["loc"], error["input"]
    if kind == "extra_forbidden":
        known = [key for key in _schema_at(loc[:-1]).get("properties", {}) if key != loc[-1]]
        return f"no such key{did_you_mean(str(loc[-1]), known) or '; see fedpress check --schema'}"
    if kind == "missing":
        return "this key is missing; add it (fedpress check --schema lists all keys)"
    if kind.startswith("union_tag"):
        known = list(_schema_at(loc)["discriminator"]["mapping"])
        if kind == "union_tag_not_found":
            return f"this key is missing; add it (one of {', '.join(known)})"
        tag = str(error["ctx"]["tag"])
        return f"there is no '{tag}'" + (
            did_you_mean(tag, known) or f"; choose one of {', '.join(known)}"
        )
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return message
    near = (
        did_you_mean(str(value), error["ctx"]["expected"].split("'")[1::2])
        if kind == "literal_error"
        else ""
    )
    return f"{message}, got {_short(value)}{near}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _place(error: Any, tree: Any) -> str:
    """`("stage", 2, "federate", "lr")` -> `recipe.stage[2].lr`: the name of a union's row is no key of the recipe."""
    place, node, kind = "recipe", tree, error["type"]
    *above, last = error["loc"] or ("",)
    for part in (*above, last):
        if isinstance(part, int):
            place += f"[{part}]"
            node = node[part] if isinstance(node, list) and part < len(node) else None
        elif isinstance(node, dict) and (part in node or (kind == "missing" and part is last)):
            place += f".{part}"
            node = node.get(part)
    return place + (
        f".{error['ctx']['discriminator'].strip(chr(39))}" if kind.startswith("union_tag") else ""
    )


def _schema_at(loc: tuple[int | str, ...]) -> dict[str, Any]:
    """The part of the JSON schema that describes the place of an error; empty if there is none."""
    full: dict[str, Any] = Recipe.model_json_schema()

    def open_(node: dict[str, Any]) -> dict[str, Any]:
        for part in node.get("anyOf", ()):  # a table or null
            if "$ref" in part or "discriminator" in part:
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
