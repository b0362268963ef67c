"""The Python of the pages runs, from top to bottom, as a reader would type it."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page):
    return re.findall(
        r"^```python\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.mark.recipe
def test_the_session_of_the_page_on_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made: dict[str, object] = {}
    for block in blocks("python.md"):
        exec(compile(block, "docs/python.md", "exec"), made)
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    assert made["together"].after["accuracy"] > 0.6
    assert made["run"].finished
    assert capsys.readouterr().out.endswith(
        "keep_param: no such key; did you mean 'keep_params'?\n"
    )
