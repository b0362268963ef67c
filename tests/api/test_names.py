"""The front door: its names, how quickly it opens, and that the command line has the same."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import fedpress
from fedpress.api.names import ROWS
from fedpress.cli import app

ROOT = Path(__file__).parents[2]


def resolved(name):
    found = fedpress
    for part in name.split("."):
        if inspect.ismodule(found) and not hasattr(found, part):
            found = importlib.import_module(f"{found.__name__}.{part}")
        else:
            found = getattr(found, part)
    return found


def commands(group=None, before=("fedpress",)):
    """All commands of the command line, as they are typed."""
    found = []
    for name, command in (group or typer.main.get_command(app)).commands.items():
        words = (*before, name)
        inner = hasattr(command, "commands")
        if not inner or command.invoke_without_command:
            found.append(" ".join(words))
        if inner:
            found += commands(command, words)
    return found


def test_the_names_are_sorted_and_none_is_missing():
    assert list(fedpress.__all__) == sorted(fedpress.__all__)
    assert {*dir(fedpress)} == {*fedpress.__all__, "__version__"}
    assert 20 <= len(fedpress.__all__) <= 35


def test_importing_takes_no_time_and_loads_no_torch():
    program = (
        # Processor time: a busy machine is no fault of the import.
        "import sys, time; began = time.process_time(); import fedpress; "
        "print(time.process_time() - began, 'torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    said = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    seconds, torch, pydantic = zip(*(one.stdout.split() for one in said), strict=True)
    assert min(map(float, seconds)) < 0.1
    assert {*torch, *pydantic} == {"False"}


def test_no_room_takes_the_place_of_a_name():
    """A lazy `fedpress.report` beside a package of that name would be the function once and the module afterwards."""
    for module in pkgutil.walk_packages(fedpress.__path__, "fedpress."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for _ in range(2):
        for name in fedpress.__all__:
            assert not inspect.ismodule(getattr(fedpress, name)), name
            assert callable(getattr(fedpress, name)), name


def test_a_name_that_is_not_there_is_told_as_python_tells_it():
    with pytest.raises(AttributeError, match="module 'fedpress' has no attribute 'prun'"):
        _ = fedpress.prun


@pytest.mark.parametrize("name", fedpress.__all__)
def test_every_name_has_a_docstring_with_types(name):
    found = getattr(fedpress, name)
    assert found.__doc__
    function = found if inspect.isfunction(found) else None
    if function is not None:
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty
        assert ">>> " in found.__doc__, "an example that the tests run"


@pytest.mark.parametrize("kind", ["train", "prune", "federate", "quantize"])
def test_help_shows_the_settings_of_a_stage(kind):
    call = getattr(fedpress, kind)
    settings = inspect.signature(call).parameters
    assert {"model", "data", "progress"} < settings.keys()
    for name in {"train": ["epochs"], "prune": ["keep_params"], "federate": ["num_rounds"]}.get(
        kind, ["bits"]
    ):
        assert name in settings
        assert re.search(rf"^    {name}: \w", call.__doc__, re.MULTILINE)


def test_what_exists_in_python_exists_on_the_command_line_and_the_other_way_round():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert {name for name in names if "." not in name} == set(fedpress.__all__)
    assert all(callable(resolved(name)) for name in names)
    typed = [re.match(r"fedpress(?: [a-z0-9]+)+", row.command) for row in ROWS]
    assert sorted(found[0] for found in typed if found) == sorted(commands())


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    for row in ROWS:
        assert f"| `fedpress.{row.name}` | `{row.command}` | {row.description} |" in page


def test_type_checkers_see_the_names_that_are_there():
    source = Path(fedpress.__file__).read_text("utf-8")
    block = source[source.index("if TYPE_CHECKING:") : source.index("__version__")]
    names = re.findall(r"\b(\w+)(?=,|\)|$)", re.sub(r"from [\w.]+ import", "", block), re.MULTILINE)
    assert set(names) >= set(fedpress.__all__)
