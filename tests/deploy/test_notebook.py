"""A run in a real notebook: bars while it goes on, a table at the end. Needs `pip install nbclient ipykernel`."""

import json
import sys

import pytest

pytestmark = pytest.mark.deploy

CELL = """
import torch, fedpress
x = torch.randn(200, 4)
clients = {"north": (x[:100], x[:100].argmax(1)), "south": (x[100:], x[100:].argmax(1))}
result = fedpress.federate(torch.nn.Sequential(torch.nn.Linear(4, 4)), clients=clients, num_rounds=2)
result
"""


def test_a_cell_shows_bars_and_the_table_of_its_result(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    spec = tmp_path / "kernels" / "here"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "here", "language": "python"}
    spec.joinpath("kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    nbclient.NotebookClient(book, timeout=120, kernel_name="here").execute()
    shown, result = (o for o in book.cells[0].outputs if o.output_type != "stream")
    html = shown.data["text/html"]
    assert html.count("<progress") == 2  # the model as it is, and the federation
    assert 'value="1.000"' in html
    assert "test accuracy" in html
    assert result.data["text/html"].startswith("<table>")
    assert "Accuracy" in result.data["text/plain"]
