"""Where own modules are found: in processes of their own, since an import path belongs to a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = (
    "import sys\nfrom fedpress.core import own_modules\n"
    "own_modules.set_folders(*map(__import__('pathlib').Path, {folders}))\n"
)


def python(
    code: str, cwd: Path, *, folders=(".",), path: str = "", flags=("-P",)
) -> subprocess.CompletedProcess[str]:
    """Runs code with the folders of own modules named, fedpress importable, and the working folder given."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), path]))}
    text = LOADED.format(folders=[str(f) for f in folders]) + code
    return subprocess.run(
        [sys.executable, *flags, "-c", text],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def right(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def house(tmp_path):
    """A folder with own modules that import each other, early and late, and files with the names of libraries."""
    (tmp_path / "nets.py").write_text(
        "import helper_of_nets\n"
        "def late():\n    import late_helper\n    return late_helper.WORD\n"
        "def build():\n    return helper_of_nets.WORD + late()\n"
    )
    (tmp_path / "helper_of_nets.py").write_text("WORD = 'early '\n")
    (tmp_path / "late_helper.py").write_text("WORD = 'late'\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    (tmp_path / "pack" / "inner.py").write_text(
        "from pack.other import WORD\nimport helper_of_nets\n"
    )
    (tmp_path / "pack" / "other.py").write_text("WORD = 'inner'\n")
    for library in ("onnxruntime", "sklearn", "no_such_library", "wave"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit('the working folder ran')\n")
    return tmp_path


@pytest.mark.parametrize("flags", [("-P",), ()], ids=["safe path", "plain"])
def test_an_own_module_is_found_with_what_it_imports_and_nothing_else_is(house, flags):
    code = """
print(own_modules.module_of("nets:build").build(), own_modules.module_of("pack.inner:f").WORD)
for name in ("no_such_library", "late_helper2"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        print("missing")
import wave
print(wave.open.__module__)
"""
    assert right(python(code, house, flags=flags)).split() == [
        "early",
        "late",
        "inner",
        "missing",
        "missing",
        "wave",
    ]


def test_a_module_beside_the_recipe_goes_before_the_working_folder(house, tmp_path_factory):
    other = tmp_path_factory.mktemp("recipes")
    (other / "nets.py").write_text("WORD = 'beside'\n")
    code = "print(own_modules.module_of('nets:x').WORD)"
    assert right(python(code, house, folders=(other, "."))) == "beside"
    assert "early late" in right(
        python("print(own_modules.module_of('nets:x').build())", house, folders=(other / "x", "."))
    )


def test_what_is_named_on_the_path_goes_first(house, tmp_path_factory):
    given = tmp_path_factory.mktemp("given")
    (given / "nets.py").write_text("WORD = 'given'\n")
    done = python("own_modules.module_of('nets:x')", house, path=str(given))
    assert done.returncode
    assert "has the name of the installed module" in done.stderr
    assert (
        right(python("print(own_modules.module_of('nets:x').build())", house, path=str(house)))
        == "early late"
    )


@pytest.mark.parametrize("name", ["onnxruntime", "wave", "sklearn"])
def test_an_own_module_with_the_name_of_an_installed_one_is_told(house, name):
    done = python(f"own_modules.module_of('{name}:net')", house)
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert f"{name}.py has the name of the installed module" in last
    assert f"my_{name}.py" in last


def test_a_folder_without_code_hides_nothing(house):
    (house / "json").mkdir()
    assert right(python("print(own_modules.module_of('json:dumps').dumps(1))", house)) == "1"


@pytest.mark.recipe
def test_no_library_of_a_whole_run_is_taken_from_the_working_folder(house):
    for library in (
        "onnx",
        "rich",
        "jinja2",
        "PIL",
        "pyarrow",
        "sklearn",
        "scipy",
        "typer",
        "pandas",
        "psutil",
    ):
        (house / f"{library}.py").write_text("raise SystemExit('the working folder ran')\n")
    script = "import sys\nsys.argv[0] = 'fedpress'\nfrom fedpress.cli import main\nmain()\n"
    short = ["stage.dense.epochs=1", "stage.fine-tune.epochs=1", "stage.federate.num_rounds=1"]
    words = ["run", "digits", *short, "--out", "r"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *words],
        cwd=house,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "measure", "r", "--seconds", "0.1", "--batches", "1", "--threads", "1"],
        cwd=house, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
