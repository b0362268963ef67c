"""The task of docs/tasks.md works as it stands there: its file and its row are all that is needed."""

import itertools
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from fedpress import tasks
from tests.harness import stages
from tests.tasks import test_all
from tests.tasks.test_recipes import PRIVATE, SMALL, source

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
SHARED = [
    name
    for name, test in vars(test_all).items()
    if name.startswith("test_")
    and any(m.args == test_all.every.args for m in getattr(test, "pytestmark", []))
]
"""The tests that run over every task of the table, not those of some kinds."""

assert source  # the fixture of made-up data


@pytest.fixture
def quantile(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class Quantile(Task)" in block]
    module = types.ModuleType("quantile")
    monkeypatch.setitem(sys.modules, "quantile", module)
    exec(compile(code, "docs/tasks.md", "exec"), module.__dict__)
    monkeypatch.setitem(tasks.TASKS, "quantile", module.Quantile)
    return module.Quantile


def test_the_loss_of_the_page_is_least_at_the_quantile(quantile):
    y = torch.arange(101.0)
    task = quantile(("delay",), share=0.9)
    losses = [float(task.loss(torch.full((101, 1), z), y)) for z in (80.0, 90.0, 99.0)]
    assert losses[1] == min(losses)
    found = task.summary(task.metrics(torch.full((101, 1), 90.0), y))
    assert found["covered"] == pytest.approx(91 / 101)
    assert {*found} == {*task.keys}


@pytest.mark.recipe
@pytest.mark.parametrize("private", [False, True])
def test_the_task_of_the_page_trains_and_federates(quantile, private, source, tmp_path):
    text = SMALL.format(kind="regression", outputs=1, lr=0.01)
    option = 'task = { kind = "quantile", share = 0.8 }'
    text = text.replace("validation = 20", f"validation = 20\n{option}") + private * PRIVATE
    train, federate = stages(text, tmp_path / "run")
    assert train["task"] == federate["task"] == "quantile"
    assert train["pinball"] > 0
    assert 0 <= federate["covered"] <= 1
    assert bool(federate["client_pinball"]) is not private


def test_the_data_function_of_the_page_gives_next_tokens():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "def speakers" in block]
    names: dict = {}
    exec(compile(code, "docs/tasks.md", "exec"), names)
    for x, y in names["speakers"]().values():
        for ids, following in zip(x["tokens"], y, strict=True):
            said = [int(token) for token in following if token != -100]
            assert said, "no line is empty"
            assert said[:-1] == ids[1 : len(said)].tolist()
            assert (ids[len(said) :] == 0).all(), "padding follows the last token that is asked for"


def test_the_table_of_the_page_has_every_task():
    rows = re.findall(r"^\| `(\w+)` \| ", PAGE.read_text(), re.MULTILINE)
    assert [*tasks.TASKS] == rows[: len(tasks.TASKS)]


def cases_of(shared):
    """Yields the arguments of a shared test, but for the kind of task."""
    marks = [mark.args for mark in shared.pytestmark if mark.name == "parametrize"]
    marks = [(name, values) for name, values in marks if name != "kind"]
    names = [name for name, _ in marks]
    for values in itertools.product(*(values for _, values in marks)):
        yield dict(zip(names, values, strict=True))


@pytest.mark.recipe
@pytest.mark.parametrize("name", SHARED)
def test_the_shared_tests_hold_for_the_task_of_the_page(quantile, name, monkeypatch):
    monkeypatch.setitem(test_all.NAMES, "quantile", ("delay",))
    shared = getattr(test_all, name)
    for case in cases_of(shared):
        shared(kind="quantile", **case)


def test_no_shared_test_is_missing():
    assert len(SHARED) > 10
    assert 'NAMES` of `tests/tasks/test_all.py`, `"quantile": ("delay",)`' in PAGE.read_text()
