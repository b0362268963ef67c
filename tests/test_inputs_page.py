"""The example of docs/inputs.md runs as it stands there."""

import json
import re
import types
from pathlib import Path

import pytest
import torch

from fedpress import deploy
from tests.harness import finish

PAGE = Path(__file__).parents[1] / "docs" / "inputs.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.recipe
def test_the_example_of_the_page_is_trained_cut_protected_and_written(tmp_path, monkeypatch):
    (tmp_path / "notes.py").write_text(blocks("python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    train, prune, federate, export = finish(blocks("toml")[0], run)["stages"]
    assert train["accuracy"] > 0.85
    assert prune["parameters"] < 0.72 * train["parameters"]
    assert federate["accuracy"] > 0.75
    assert 0 < federate["epsilon"] <= 8
    assert export["accuracy"] == federate["accuracy"]
    # The lines of the page that open the file.
    x = {
        "tokens": torch.ones(3, 6, dtype=torch.int64).numpy(),
        "lengths": torch.tensor([1, 2, 6]).numpy(),
        "watch": torch.zeros(3, 3).numpy(),
    }
    lines = blocks("python")[1].replace('"artifacts/', f'"{run}/artifacts/')
    names = types.SimpleNamespace(**x).__dict__
    exec(lines, names)
    assert names["logits"].shape == (3, 2)
    words = deploy.open_file(run / "artifacts" / "model.onnx").inputs
    assert {port.name for port in words} == {*x}
    assert json.loads((run / "result.json").read_text())["stages"]
