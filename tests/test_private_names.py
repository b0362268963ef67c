"""No test touches a private name of fedpress, but for those named here with a reason."""

import ast
from pathlib import Path

import pytest

from tests.sources import tree

ROOT = Path(__file__).parents[1]
EXCEPTIONS = {
    # A client signs what it reports, so only who holds its keys could make such a report: the server's copy is changed.
    ("tests/secagg/test_attacks.py", "_reports"),
    # torch's own table of a module's parameters: gates must leave parameters in it, not tensors.
    ("tests/compress/sparse/test_l0.py", "_parameters"),
}


NOTEBOOK = "_repr_html_"
"""What a notebook calls to show an object: public, in spite of its name."""


def is_private(name: str) -> bool:
    if name == NOTEBOOK:
        return False
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(module: ast.AST) -> set[str]:
    """Returns the private names that a module defines: functions, classes, variables, attributes of `self`."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if is_private(name)}


def touched(module: ast.AST, private: set[str]) -> set[str]:
    """Returns those of the names `private` that a test imports, reads, writes or patches and does not define."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedpress"):
            names |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            words = [part.value for part in node.args if isinstance(part, ast.Constant)]
            names |= {str(word).rpartition(".")[2] for word in words}
    return names & private - defined(module)


def test_no_test_touches_a_private_name():
    private = set()
    for path in (ROOT / "fedpress").rglob("*.py"):
        private |= defined(tree(path))
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        names = touched(tree(path), private)
        found |= {(path.relative_to(ROOT).as_posix(), name) for name in names}
    assert not found - EXCEPTIONS, "test what is public, or make the function public"
    assert not EXCEPTIONS - found, "the list of exceptions names what no test touches any more"


@pytest.mark.parametrize(
    "source",
    [
        "from fedpress.wire.packing import _shrink",
        "packing._shrink(x)",
        'monkeypatch.setattr(packing, "_shrink", None)',
        'monkeypatch.setattr("fedpress.wire.packing._shrink", None)',
        'getattr(packing, "_shrink")',
    ],
)
def test_every_way_to_a_private_name_is_seen(source):
    assert touched(ast.parse(source), {"_shrink"}) == {"_shrink"}


@pytest.mark.parametrize(
    "source", ["class A:\n    def _shrink(self): ...\nA()._shrink()", "x._hooks"]
)
def test_names_of_the_test_itself_and_of_other_libraries_are_its_own_matter(source):
    assert not touched(ast.parse(source), {"_shrink"})
