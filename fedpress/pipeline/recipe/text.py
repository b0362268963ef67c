"""The TOML text of a recipe: finds, reads, parses and writes it."""

from __future__ import annotations

import codecs
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from fedpress.core import limits
from fedpress.data.settings import SQLITE
from fedpress.errors import Argument, RecipeError, suggestion
from fedpress.models.memory import TEACHER
from fedpress.stages.table import STAGES

MODEL_KEYS = {key: words for row in STAGES for key, words in row.load().saved_models.items()}
"""Keys whose value is the path of a saved model -> words such as "dense" that are no path."""

TOO_DEEP = "lists and tables are nested too deeply"
"""Problem of errors about the depth of a recipe."""
SHORTEN = "no setting is nested so deeply: close a bracket or shorten a key"
"""Cure of the same errors."""


def names() -> list[str]:
    """Returns the names of the recipes that come with fedpress."""
    return sorted(
        p.name.removesuffix(".toml") for p in _shipped().iterdir() if p.name.endswith(".toml")
    )


def find(name_or_path: str) -> str:
    """Returns the TOML text of a recipe.

    Args:
        name_or_path: the name of a recipe that comes with fedpress, such as "digits", or the path
            of a file. If both exist, the recipe of fedpress is taken.

    Raises:
        RecipeError: if there is neither such a recipe nor such a file, or the file cannot be read.
    """
    path = Path(name_or_path)
    if name_or_path in names():
        text: str = (_shipped() / f"{name_or_path}.toml").read_text("utf-8")
        return text
    # A missing `.toml` file goes to `_read` too: its error is about the file, not about a name.
    if path.suffix == ".toml" or path.is_file():
        return _read(path)
    if (path / "settings.json").is_file():
        raise RecipeError(
            f"'{path}' is the folder of a run",
            place="recipe",
            cure=(
                "resume it with ",
                Argument("resume", path),
                f", or run its recipe again: {path / 'recipe.toml'}",
            ),
        )
    known = f"known are {', '.join(names())}, or give a .toml file"
    raise RecipeError(
        f"no recipe '{name_or_path}'",
        place="recipe",
        cure=suggestion(name_or_path, names(), known),
    )


def _read(path: Path) -> str:
    """Reads a text file in UTF-8, or in UTF-16 with a byte order mark.

    Some Windows editors write UTF-16.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"cannot read '{path}' ({error.strerror})",
            place="recipe",
            cure="give the path of a TOML file",
        ) from error
    # A file in UTF-16 without its mark would be read as text full of zero bytes.
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not utf_16 and b"\0" in data:
        what = (
            "it looks like UTF-16"
            if data.count(0) > len(data) // 3
            else "it contains bytes that are not text"
        )
        raise RecipeError(
            f"cannot read '{path}' ({what})",
            place="recipe",
            cure="give a TOML file that is saved as UTF-8",
        )
    try:
        return data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"cannot read '{path}' (line {line} is not UTF-8, which TOML must be)",
            place="recipe",
            cure="save it as UTF-8",
        ) from error


def parse(toml: str) -> dict[str, Any]:
    """Parses TOML without checking any setting.

    Raises:
        RecipeError: if `toml` is not TOML. For frequent mistakes, such as `True` instead of `true`,
            the error says how to correct them.
    """
    try:
        found = tomllib.loads(toml)
    except RecursionError as error:
        raise RecipeError(TOO_DEEP, place="recipe", cure=SHORTEN) from error
    except ValueError as error:  # also a whole number of thousands of digits
        cure = _cure(toml, str(error))
        raise RecipeError(f"not valid TOML: {error}", place="recipe", cure=cure) from error
    check_depth(found)
    if isinstance(found.get("stage"), dict):
        raise RecipeError(
            "one [stage] in single brackets",
            place="recipe.stage",
            cure="stages are a list, so write [[stage]]",
        )
    for name in ("data", "model"):
        if isinstance(found.get(name), list):
            raise RecipeError(
                "it is a list",
                place=f"recipe.{name}",
                cure=f"a recipe has only one, so write [{name}] with single brackets",
            )
    return found


def check_depth(tree: Any) -> None:
    """Refuses tables and lists that are nested deeper than any setting needs.

    Raises:
        RecipeError: if the nesting is deeper than `fedpress.core.limits` allows.
    """
    if said := limits.above("depth", limits.depth(tree)):
        raise RecipeError(TOO_DEEP, place="recipe", cure=f"{SHORTEN} ({said.problem}; {said.cure})")


def _cure(toml: str, problem: str) -> str:
    """Returns how to correct a frequent mistake in TOML, such as `True` instead of `true`.

    Args:
        toml: the whole text.
        problem: message of the parser, which names the line.
    """
    at = re.search(r"at line (\d+)", problem)
    lines = toml.splitlines()
    line = lines[int(at[1]) - 1] if at and int(at[1]) <= len(lines) else ""
    # Word processors replace plain quotes by curly ones.
    if re.search(r"[\u201c\u201d\u201e\u2018\u2019]", line):
        return "write plain quotes, \" or ', in that line"
    # A Windows path in double quotes: TOML reads `\U` as the beginning of an escape.
    if "escape" in problem or ("\\" in line and "Invalid hex" in problem):
        return "write that path in 'single quotes', or with / in place of \\"
    if re.search(r"Cannot declare \('stage'", problem) or re.fullmatch(
        r"\s*\[stage\]\s*(#.*)?", line
    ):
        return "stages are a list: write [[stage]] with two brackets each time"
    if re.search(r"=\s*(True|False|None)\b", line):
        return "write true and false in small letters, and leave out a key that has no value"
    # A decimal comma, as in German.
    if re.search(r"=\s*-?\d+,\d+\s*(#.*)?$", line):
        return "write decimals with a point"
    if re.search(r"=\s*[A-Za-z_][\w./:-]*\s*(#.*)?$", line):
        return "put words in quotes"
    if toml.lstrip().startswith("{"):
        return "this is JSON; write TOML: tables such as [data], and key = value"
    if re.match(r"\s*[\w-]+:(\s|$)", line):
        return "this looks like YAML; write TOML: tables such as [data], and key = value"
    return "correct that place"


def write(tree: dict[str, Any]) -> str:
    """Writes a recipe as TOML: one line for each key, and one block for each stage.

    Keys whose value is None are left out, since TOML has no None.

    >>> data = {"source": "digits", "path": None}
    >>> print(write({"seed": 1, "data": data, "stage": [{"kind": "train"}]}))
    seed = 1
    <BLANKLINE>
    [data]
    source = "digits"
    <BLANKLINE>
    [[stage]]
    kind = "train"
    <BLANKLINE>
    """
    # tomli-w writes only long lists as blocks, but a stage must always be a block.
    top: dict[str, Any] = {}
    blocks: list[str] = []
    for key, value in plain(tree).items():
        if key == "stage":
            blocks += [f"[[stage]]\n{_lines(stage)}" for stage in value]
        elif isinstance(value, dict):
            blocks.append(f"[{_key(key)}]\n{_lines(value)}")
        else:
            top[key] = value
    return "\n".join([_lines(top), *blocks])


def _lines(table: dict[str, Any]) -> str:
    return "".join(f"{_key(key)} = {in_one_line(value)}\n" for key, value in table.items())


def plain(value: Any) -> Any:
    """Converts a value to types that TOML has: tuples to lists, paths to strings.

    Keys whose value is None are left out.

    >>> plain({"sides": (8, 16), "path": None})
    {'sides': [8, 16]}
    """
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    # A path becomes a string; a string stays the same.
    return value if isinstance(value, bool | int | float) else str(value)


def in_one_line(value: Any) -> str:
    """Writes a value as TOML in one line, as an override `key=value` on the command line needs it.

    >>> in_one_line({"kind": "iid", "shares": [0.5, True]})
    '{kind = "iid", shares = [0.5, true]}'
    """
    if isinstance(value, dict):
        pairs = [f"{_key(key)} = {in_one_line(inner)}" for key, inner in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(in_one_line, value))}]"
    # tomli-w writes only whole documents, so the value is written as a key `x` that is then
    # removed.
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _key(name: str) -> str:
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")


def anchor_(tree: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of data, saved models and teachers absolute, in place.

    Args:
        tree: the recipe as dictionaries.
        folder: folder that the paths are relative to, such as the folder of the recipe file.
    """
    stages = tree.get("stage")
    places = [(tree.get("data"), "path")]
    places += [(tree.get("model"), key) for key in ("checkpoint", "weights")]
    # The recipe is not checked yet, so `stage` may have any type.
    for stage in stages if isinstance(stages, list) else []:
        places += [(stage, key) for key in MODEL_KEYS]
    for table, key in places:
        if not isinstance(table, dict) or not _is_relative(key, table.get(key)):
            continue
        # A path is relative to the recipe's folder. In older versions it was relative to the
        # current folder, which still works.
        beside, here = folder / table[key], Path.cwd() / table[key]
        # A user's function may take any text as its path, so no file of this name need exist.
        own_function = key == "path" and ":" in str(table.get("source", ""))
        if _exists(beside) or not (_exists(here) or own_function):
            table[key] = str(beside.resolve())
        elif _exists(here):
            table[key] = str(here.resolve())
    _anchor_address_(tree, folder)


def _anchor_address_(tree: dict[str, Any], folder: Path) -> None:
    """Makes the path in `data.address = "sqlite:///FILE.db"` absolute, in place."""
    table = tree.get("data")
    if not isinstance(table, dict):
        return
    address = table.get("address")
    if not isinstance(address, str) or not address.startswith(SQLITE):
        return
    path = address.removeprefix(SQLITE)
    # `$NAME` is an environment variable, whose text is not known here.
    if not path.startswith(("~", "$")) and not Path(path).is_absolute():
        table["address"] = f"{SQLITE}{(folder / path).resolve()}"


def _is_relative(key: str, value: object) -> bool:
    """Whether the value of `key` is a relative path, and not a word such as "dense"."""
    if not isinstance(value, str) or value in MODEL_KEYS.get(key, ()):
        return False
    # `TEACHER` begins the name of a module in memory, "~" the path of a home folder, and an address
    # is refused later.
    return not ("://" in value or value.startswith((TEACHER, "~")) or Path(value).is_absolute())


def _exists(path: Path) -> bool:
    # The path of the data may be a pattern such as `shards/*.csv`.
    return any(path.parent.glob(path.name)) if "*" in path.name else path.exists()


def _shipped() -> Any:
    return files("fedpress.pipeline") / "recipes"
