"""Writes the list of files in docs/architecture.md anew: `python scripts/house.py`; a test holds the page to it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## Every file"
INTRODUCTION = "Made by `python scripts/house.py` from the first line of each file's docstring."


def first_line(path: Path) -> str:
    """Returns the first line of a file's docstring: its one idea."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0]


def listing() -> str:
    """Returns the section: a heading for each folder, a line for each file."""
    package = ROOT / "fedpress"
    folders: dict[Path, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        folders.setdefault(path.parent, []).append(path)
    lines = [HEADING, "", INTRODUCTION]
    for folder in sorted(folders):
        lines += ["", f"**`{folder.relative_to(ROOT).as_posix()}/`**", ""]
        lines += [f"- `{path.name}`: {first_line(path)}" for path in folders[folder]]
    return "\n".join(lines) + "\n"


def page() -> str:
    """Returns the page with today's list at its end."""
    text = PAGE.read_text("utf-8")
    kept = re.split(rf"^{re.escape(HEADING)}$", text, flags=re.MULTILINE)[0].rstrip("\n")
    return f"{kept}\n\n{listing()}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
