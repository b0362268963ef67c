"""Small whole runs for the tests of recipe, run and command line: three clients, 180 digits, an instant network."""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.numpy import load_file

# On a server the same examples are drawn every time, so that a commit is judged by its own change; at a desk, new ones.
# No example has a deadline: a busy machine is no fault of the code.
# 40 examples keep the unit tests quick; `--hypothesis-profile=long` looks further.
settings.register_profile("server", derandomize=True, deadline=None, max_examples=40)
settings.register_profile("desk", deadline=None, max_examples=40)
settings.register_profile("long", deadline=None, max_examples=1000)
settings.load_profile("server" if os.environ.get("CI") else "desk")

TINY = """
name = "tiny"
[data]
source = "digits"
num_clients = 3
examples_per_client = 60
public_share = 0.2
validation = 60
[model]
architecture = "cnn"
arguments = { in_channels = 1, image_size = 8 }
[[stage]]
kind = "train"
epochs = 2
batch_size = 64
lr = 0.05
augment = { crop = 0.125 }
[[stage]]
kind = "prune"
keep_params = 0.5
calibration = 64
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 30
trainable = ["head.*"]
privacy = { unit = "sample", epsilon = 8.0, delta = 1e-3 }
"""
EXPORT = '[[stage]]\nkind = "export"\nparity_examples = 16\n'

# Examples in docstrings that run a whole recipe, or measure in a process of their own.
WHOLE_RUNS = {
    "fedpress.api.runs.Run",
    "fedpress.api.runs.check",
    "fedpress.api.runs.report",
    "fedpress.api.runs.run",
    "fedpress.api.sweeps.sweep",
    "fedpress.pipeline.commands.measuring.measure",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the docstring examples that run for seconds into the tier of whole runs."""
    for item in items:
        if item.name in WHOLE_RUNS:
            item.add_marker(pytest.mark.recipe)


def pytest_collection_finish() -> None:
    """Leaves what was imported out of the rounds of the garbage collector: a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


@dataclass(frozen=True)
class Said:
    """What a command left: exit code, output, and what it said of errors."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny() -> str:
    """The text of a recipe that trains, prunes and federates in a second."""
    return TINY


@pytest.fixture(scope="session")
def tiny_export() -> str:
    """The same with an export at the end."""
    return TINY + EXPORT


@pytest.fixture
def tiny_file(tmp_path: Path, tiny: str) -> Path:
    """The recipe as a file."""
    path = tmp_path / "tiny.toml"
    path.write_text(tiny)
    return path


@pytest.fixture(autouse=True, scope="session")
def _state_of_its_own(tmp_path_factory) -> Iterator[None]:
    """Keeps the key of run folders out of the files of who tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _table_of_operators_made_once() -> Iterator[None]:
    """Lets exports share torch's table of ONNX operators, which torch makes anew each time: two thirds of an export."""
    export = torch.onnx.export

    def first_export(*args: Any, **options: Any) -> Any:
        import torch.ao.quantization.fx._decomposed  # the table leaves out operations that are not there yet
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        make = cache(ONNXRegistry.from_torchlib)

        def copied(*versions: int, **named: int) -> ONNXRegistry:
            table = copy(make(*versions, **named))
            table.functions = {name: list(rows) for name, rows in table.functions.items()}
            return table

        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        patch.setattr(torch.onnx, "export", export)
        return export(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", first_export)
        yield


@pytest.fixture(autouse=True, scope="session")
def _disk_not_waited_for() -> Iterator[None]:
    """Leaves out the waits for the disk, thousands of them: what was written outlives a killed process without."""
    with pytest.MonkeyPatch.context() as patch:
        # A descriptor that is closed or none is still an error.
        patch.setattr(os, "fsync", lambda file: os.fstat(file) and None)
        yield


@pytest.fixture
def memory_unmeasured(monkeypatch) -> None:
    """Leaves out the fresh process that memory is measured in, 3 s a model; `tests/deploy/test_measure.py` has it."""
    module = import_module("fedpress.deploy.measure")  # the folder's function has its name
    monkeypatch.setattr(module, "peak_memory", lambda runs, given: 1_000_000)


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys) -> Iterator[Callable[..., Said]]:
    """Runs the command line in this process, in an empty folder."""
    from fedpress import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedpress", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    yield call
    logging.disable(logging.NOTSET)


def left_in(folder: Path) -> dict[str, Any]:
    """Returns all that an equal run must leave too: weights, records and results, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {k: (v.dtype, v.shape, v.tobytes()) for k, v in load_file(path).items()}
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json" and path.name != "environment.json":
            found[name] = _timeless(json.loads(path.read_text()))
        else:
            found[name] = "there"
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _timeless(v)
            for k, v in value.items()
            if k != "seconds" and not k.startswith("latency")
        }
    return [_timeless(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def left() -> Callable[[Path], dict[str, Any]]:
    """See `left_in`."""
    return left_in


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Makes the disk full for every file above so many bytes, until the test ends or -1 is given."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size < 0 else size, before[1]))

    yield limit
    limit(-1)
