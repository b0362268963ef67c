"""docs/training.md: its recipe fits together, its Python runs, its tables have every row."""

import re
from pathlib import Path

import pytest

from fedpress.training.schedule import SCHEDULES
from fedpress.training.settings import DEFAULTS, TrainSettings
from tests.harness import finish

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def rows(heading):
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    _, *found = re.findall(r"^\| `(\w+)`([^\n]*)\|$", section, re.MULTILINE)  # behind the heading
    return found


@pytest.mark.recipe
def test_the_recipe_of_the_page_runs_and_learns(tmp_path):
    [recipe] = blocks("toml")
    train, federate = finish(recipe, tmp_path / "run")["stages"]
    assert 0.5 < train["accuracy"] < federate["accuracy"] + 0.1


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_of_the_page_runs(code, capsys):
    exec(compile(code, "docs/training.md", "exec"), {"__name__": "page"})


def test_every_optimizer_has_its_row_with_its_defaults():
    words = TrainSettings.model_json_schema()["properties"]["optimizer"]["enum"]
    found = dict(rows("Optimizers"))
    assert list(found) == words
    for word in words:
        s = TrainSettings(epochs=1, optimizer=word)
        *_, lr, decay, _ = (cell.strip() for cell in found[word].split("|"))
        assert (float(lr), float(decay)) == (s.lr, s.weight_decay)
    assert set(DEFAULTS) < set(words)


def test_every_schedule_has_its_row():
    assert [word for word, _ in rows("Learning-rate schedules")] == [*SCHEDULES]
