"""The README is short, its links lead somewhere, and what it shows is what happens."""

import re
import tomllib
from pathlib import Path

import pytest

from fedpress.pipeline import recipe as recipes

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_it_is_read_in_one_sitting():
    assert len(TEXT.splitlines()) <= 150
    assert max(map(len, TEXT.splitlines())) <= 160, "a line for people, not a paragraph"


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", "docs/results.md", "docs/index.md"]
)
def test_links_and_named_files_lead_somewhere(path):
    text = (ROOT / path).read_text("utf-8")
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named = re.findall(r"`((?:docs|tests|benchmarks|fedpress|scripts)/[\w./-]+)`", text)
    missing = [f for f in linked if not (ROOT / path).parent.joinpath(f).exists()]
    missing += [f for f in named if not (ROOT / f).exists()]
    assert not missing


@pytest.mark.recipe
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = [body for kind, body in BLOCKS if kind == "python"]
    assert len(code.splitlines()) <= 12
    made: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), made)
    assert re.search(r"^Accuracy .*%", capsys.readouterr().out, re.MULTILINE)
    assert 300 < made["tiny"].after["parameters"] < 600
    assert list(made["file"]) == ["model.onnx"]


def test_the_recipe_of_the_readme_is_one(tmp_path):
    (text,) = [body for kind, body in BLOCKS if kind == "toml"]
    recipe = recipes.load('name = "shown"\n' + text)
    assert [stage.kind for stage in recipe.stage] == [
        s["kind"] for s in tomllib.loads(text)["stage"]
    ]


def test_every_command_of_the_readme_is_one():
    from typer.main import get_command

    from fedpress.cli import app

    known = set(get_command(app).commands)
    code = "\n".join(
        [*(body for kind, body in BLOCKS if not kind), *re.findall(r"`([^`\n]+)`", TEXT)]
    )
    shown = set(re.findall(r"(?:^|; )fedpress (\w+)", code, re.MULTILINE))
    assert shown, "the README shows commands"
    assert shown <= known, shown - known


def test_every_page_is_found_from_the_first_one():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    linked = re.findall(r"\]\(([\w.-]+\.md)\)", (ROOT / "docs" / "index.md").read_text("utf-8"))
    assert set(linked) == pages
    assert len(linked) == len(set(linked))
