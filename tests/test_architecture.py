"""The house stays as it is drawn: floors, no import cycles, a true tree on its page, nothing tied to one machine."""

import ast
import importlib.util
import re
import subprocess
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.sources import nodes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedpress"
FLOORS = {
    11: ["__main__"],
    10: ["cli"],
    9: ["api"],
    8: ["reports", "pipeline", "network"],
    7: ["stages"],
    6: ["transport"],
    5: ["federation", "storage", "workspace"],
    4: ["codecs"],
    3: ["models", "data", "training", "compress", "privacy", "secagg", "wire", "deploy"],
    2: ["nn", "tasks"],
    1: ["core"],
    0: ["__init__", "errors"],
}
FLOOR_OF = {place: floor for floor, places in FLOORS.items() for place in places}
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(work|root|home/\w+)/")


def modules() -> dict[str, Path]:
    """Returns every module of the package by its dotted name; a package is named `x.__init__`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if "__pycache__" not in path.parts
    }


MODULES = modules()


def resolve(name: str) -> str | None:
    """Maps `fedpress.wire.packing` to the module `wire.packing`, a package to its `__init__`, the rest to None."""
    if name == "fedpress":
        return "__init__"
    inner = name.removeprefix("fedpress.")
    return next(
        (known for known in (inner, f"{inner}.__init__") if name != inner and known in MODULES),
        None,
    )


def imported(source: str, module: str) -> set[str]:
    """Returns the modules of the package that `source` (the text of `module`) imports, anywhere in the file."""
    found = set()
    tree = ast.parse(source)
    if (
        module == "__init__"
    ):  # what the door names for type checkers alone is imported when it is used
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {resolve(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = ["fedpress", *module.split(".")]
            start = ".".join(
                [*here[: len(here) - node.level], *([node.module] if node.module else [])]
            )
            base = start if node.level else node.module or ""
            found |= {resolve(f"{base}.{alias.name}") or resolve(base) for alias in node.names}
    return {name for name in found if name}


def may_import(here: str, there: str) -> bool:
    """Says whether a file in the place `here` may import from the place `there`."""
    if here == there:
        return True
    return FLOOR_OF[there] < FLOOR_OF[here]


def place(module: str) -> str:
    """Returns the folder or file on a floor that holds `module`."""
    return module.split(".")[0]


@cache
def graph() -> dict[str, set[str]]:
    """Returns the imports of every module; read when a test asks, since every process collects."""
    return {module: imported(path.read_text("utf-8"), module) for module, path in MODULES.items()}


def test_every_file_has_a_floor():
    homeless = sorted({place(module) for module in MODULES} - FLOOR_OF.keys())
    assert not homeless, f"give {homeless} a floor in FLOORS, in both lists of docs/architecture.md"


def test_only_the_errors_and_the_way_in_lie_loose_at_the_root():
    loose = sorted(path.name for path in PACKAGE.iterdir() if path.suffix == ".py")
    assert loose == ["__init__.py", "__main__.py", "errors.py"]


def test_files_import_only_from_floors_below():
    pairs = [
        (m, n)
        for m, names in graph().items()
        for n in names
        if {place(m), place(n)} <= FLOOR_OF.keys()
    ]
    wrong = [f"{m} imports {n}" for m, n in pairs if not may_import(place(m), place(n))]
    assert not wrong, "not a floor below: " + "; ".join(sorted(wrong))


def test_there_are_no_import_cycles():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("here", "there", "allowed"),
    [
        ("cli", "reports", True),
        ("stages", "models", True),
        ("core", "errors", True),
        ("wire", "wire", True),
        ("wire", "models", False),
        ("training", "data", False),
        ("errors", "wire", False),
        ("federation", "stages", False),
        ("federation", "storage", False),
    ],
)
def test_the_rule_of_floors_itself(here, there, allowed):
    assert may_import(here, there) is allowed


def test_imports_are_found_in_every_form():
    source = """
import fedpress.errors, numpy
from fedpress import core, __version__
def late():
    from . import runtime
    from .onnx import require
    from ..core.random import derive
"""
    found = imported(source, "deploy.somewhere")
    assert found == {
        "errors",
        "core.__init__",
        "__init__",
        "deploy.runtime",
        "deploy.onnx",
        "core.random",
    }


def drawn() -> dict[Path, set[str]]:
    """Reads the page's tree: every folder that is drawn open, with the names drawn in it."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    block = re.search(r"^## Rooms\n.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, (
        "docs/architecture.md needs a fenced tree of fedpress/ under the heading '## Rooms'"
    )
    folders: dict[Path, set[str]] = {}
    above: list[tuple[int, Path]] = [(-1, ROOT)]
    for line in block[1].splitlines():
        found = re.match(r"([\s│├└─|`+-]*)([\w.-][\w./-]*)", line)
        if not found:
            continue
        depth = len(found[1])
        while above[-1][0] >= depth:
            above.pop()
        folder = above[-1][1]
        folders.setdefault(folder, set()).add(found[2].rstrip("/"))
        above.append((depth, folder / found[2]))
    return folders


def holds_files(path: Path) -> bool:
    """Says whether `path` is a folder with more in it than Python's own cache; git knows no empty folders."""
    return (
        path.is_dir()
        and path.name != "__pycache__"
        and any(p.name != "__pycache__" for p in path.iterdir())
    )


def test_the_tree_on_the_page_is_the_real_one():
    folders = drawn()
    assert PACKAGE in folders, "the tree on the page must show what is in fedpress/"
    for folder, names in folders.items():
        missing = sorted(name for name in names if not (folder / name).exists())
        assert not missing, (
            f"docs/architecture.md draws {missing} in {folder.relative_to(ROOT)}/, but they are not there"
        )
        if PACKAGE in (folder, *folder.parents):
            real = {
                path.name for path in folder.iterdir() if path.suffix == ".py" or holds_files(path)
            }
            undrawn = sorted(real - names - {"__init__.py"})
            assert not undrawn, (
                f"docs/architecture.md does not draw {undrawn} in {folder.relative_to(ROOT)}/"
            )


def test_the_page_lists_every_file():
    spec = importlib.util.spec_from_file_location("house", ROOT / "scripts" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    text = house.PAGE.read_text("utf-8")
    assert text == house.page(), "docs/architecture.md is old; run: python scripts/house.py"


def test_the_page_draws_the_floors_that_hold():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    block = re.search(r"^## Floors\n.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    drawn_floors = {}
    for line in block[1].splitlines():
        number, *words = re.split(r"\s{2,}", line)  # a column of its own says what a floor is for
        drawn_floors[int(number)] = {word.removesuffix(".py") for word in words[:-1] or words}
    real = {floor: set(names) - {"__init__"} for floor, names in FLOORS.items()}
    assert drawn_floors == real


def test_every_place_that_the_page_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = re.findall(r"^\| `([\w./]+)` \|", text, re.MULTILINE)
    assert len(named) > 20
    assert [name for name in named if not (PACKAGE / name).exists()] == []


def test_no_tracked_file_names_a_path_of_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    found = {
        str(p.relative_to(ROOT)): m[0]
        for p in paths
        if p.is_file() and (m := MACHINE_PATH.search(p.read_bytes()))
    }
    assert not found, f"write these paths relative to the repository: {found}"


@pytest.mark.parametrize(
    ("before", "found"), [(b"see ", True), (b"'", True), (b"", True), (b"frame", False)]
)
def test_paths_of_the_machine_are_recognised(before, found):
    assert bool(MACHINE_PATH.search(before + b"/%s/x" % b"root")) is found


LONGEST = 60
"""Lines of a function, its docstring apart: what fits on a screen."""
MOST_BRANCHES = 15
"""Cyclomatic complexity of a function, counted as radon counts it (its own, without functions inside)."""
BRANCHY = {
    "compress.prune.rules.attention:einsum": "an ATen operation: its cases are its definition",
    "compress.prune.rules.statistics:mix_along_axes": "an ATen operation: its cases are its definition",
}
"""Functions that branch more, and why; it may only become shorter."""


@cache
def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Returns every function of the package with its module and name, such as `wire.ans:encode`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for module, path in MODULES.items():
        for node in nodes(path):
            if isinstance(node, kinds):
                found.append((f"{module}:{node.name}", node))
    return found


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts the lines of a function without its docstring."""
    whole = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is None:
        return whole
    return whole - ((first.end_lineno or first.lineno) - first.lineno + 1)


def branches(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts the ways that part in a function, as radon does."""
    count, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                continue  # has a count of its own
            case ast.If() | ast.IfExp() | ast.ExceptHandler() | ast.Assert() | ast.match_case():
                count += 1
            case ast.For() | ast.AsyncFor() | ast.While():
                count += 1 + bool(node.orelse)
            case ast.Try():
                count += bool(node.orelse)
            case ast.BoolOp():
                count += len(node.values) - 1
            case ast.comprehension():
                count += 1 + len(node.ifs)
        waiting += ast.iter_child_nodes(node)
    return count


def test_functions_fit_on_a_screen():
    long = {name: lines(function) for name, function in functions() if lines(function) > LONGEST}
    assert not long, f"functions of more than {LONGEST} lines; give parts of them a name: {long}"


def test_functions_branch_little_but_for_those_named_here():
    found = {name: branches(f) for name, f in functions() if branches(f) > MOST_BRANCHES}
    new = {name: count for name, count in found.items() if name not in BRANCHY}
    assert not new, (
        f"more than {MOST_BRANCHES} ways part in these; give parts of them a name: {new}"
    )
    gone = sorted(BRANCHY.keys() - found.keys())
    assert not gone, f"these are simple now: take them out of BRANCHY: {gone}"


def test_lines_and_branches_are_counted_right():
    source = '''
def plain(x):
    """Says so.

    In several lines.
    """
    def inner(y):
        return y if y else 0
    for one in x:
        if one and (two or three):
            return [a for a in x if a]
    else:
        return None
'''
    plain = ast.parse(source).body[0]
    assert isinstance(plain, ast.FunctionDef)
    assert lines(plain) == 8
    assert branches(plain) == 1 + 2 + 1 + 2 + 2
