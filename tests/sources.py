"""The source files of the repository, parsed once for all tests that read them."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def tree(path: Path) -> ast.Module:
    """Returns a file as Python reads it; do not change it."""
    return ast.parse(path.read_text("utf-8"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Returns everything in a file, as `ast.walk` finds it."""
    return list(ast.walk(tree(path)))
