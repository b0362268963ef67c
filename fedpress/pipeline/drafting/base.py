"""What `fedpress init` writes: a recipe, files beside it, and sentences about its choices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Draft:
    """A recipe that was drafted.

    Attributes:
        text: the recipe as TOML.
        files: name of each further file -> its content; they lie beside the recipe.
        chosen: one sentence for each choice that was made for the user.
    """

    text: str
    files: dict[str, str]
    chosen: tuple[str, ...]


def name_of(stem: str) -> str:
    """Returns a name that a recipe may have: letters, digits, dashes."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in stem)
    return plain.strip("-_") or "recipe"


def relative(path: Path, folder: Path) -> str:
    """Returns a path as a recipe in `folder` names it: relative if it lies there."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
