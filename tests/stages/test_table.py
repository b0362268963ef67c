"""The table of stages feeds recipe, check, run, command line and Python calls: a new stage is a file and a row."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedpress.stages.base import Stage
from fedpress.stages.table import STAGES, commands
from fedpress.stages.union import AnyStage

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-stage.md"
SHRINK = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1]

BESIDE = """
import json
import sys

from fedpress.stages import table

row = table.Row("shrink", "shrink:ShrinkStage", "Multiplies every weight, for instance factor=0.5.")
table.STAGES = (*table.STAGES, row)
"""

COMMAND = """
from fedpress import cli
sys.argv = ["fedpress", *sys.argv[1:]]
cli.main()
"""

CALL = """
import torch
import fedpress

model = torch.nn.Linear(4, 2)
small = fedpress.shrink(model, factor=0.25, input_shape=(4,))
assert torch.equal(small.model.weight, model.weight * 0.25)
print(json.dumps({"facts": small.after["factor"], "words": fedpress.shrink.__doc__.splitlines()[0]}))
"""

RECIPE = """
name = "small"
data = { source = "digits", num_clients = 1, examples_per_client = 1 }
model = { architecture = "mlp", arguments = { in_features = 64, hidden = [8], num_classes = 10 } }
[[stage]]
kind = "shrink"
factor = 0.5
[[stage]]
kind = "shrink"
factor = 0.5
"""


@pytest.fixture
def with_row(tmp_path):
    """Runs a program in a process whose table has one row more."""
    (tmp_path / "shrink.py").write_text(SHRINK)
    (tmp_path / "small.toml").write_text(RECIPE)

    def run(program, *words):
        (tmp_path / "program.py").write_text(BESIDE + program)
        done = subprocess.run(
            [sys.executable, "program.py", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.recipe
def test_a_new_row_is_a_command_with_help_and_keys(with_row):
    assert "Multiplies every weight" in with_row(COMMAND, "--help")
    assert "what weights are multiplied by" in with_row(COMMAND, "shrink", "--keys")


@pytest.mark.recipe
def test_a_new_row_is_checked_and_run_by_a_recipe(with_row, tmp_path):
    lines = json.loads(with_row(COMMAND, "check", "small.toml", "--json"))["stages"]
    assert [line["factor"] for line in lines] == [0.5, 0.5]
    with_row(COMMAND, "run", "small.toml", "--out", "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [line["name"] for line in result["stages"]] == ["shrink", "shrink-2"]
    assert result["finished"]
    assert result["final"]["factor"] == 0.5
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.recipe
def test_a_new_row_is_a_python_call(with_row):
    found = json.loads(with_row(CALL))
    assert found == {"facts": 0.25, "words": "Multiplies every weight, for instance factor=0.5."}


@pytest.mark.parametrize("row", STAGES, ids=lambda row: row.kind)
def test_every_row_loads_a_stage_of_its_kind(row):
    stage = row.load()
    assert issubclass(stage, Stage)
    assert row.kind in stage.model_json_schema()["properties"]["kind"].get(
        "enum", [stage.model_json_schema()["properties"]["kind"].get("const")]
    )
    assert stage in AnyStage.__args__


@pytest.mark.parametrize("row", STAGES, ids=lambda row: row.kind)
def test_what_a_stage_says_of_itself_names_its_own_keys(row):
    stage = row.load()
    named = {*stage.requires_one_of, *stage.defaults_without_data, *stage.saved_models}
    assert named <= stage.model_fields.keys()
    assert stage.changes_model or not stage.simulates_device
    assert not (stage.reports_artifact and stage.repeats_measurements)


def test_the_table_is_read_without_torch():
    program = "import sys; from fedpress.stages import table; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_rows_without_words_have_no_command():
    assert commands().keys() == {row.kind for row in STAGES} - {"measure", "statistics"}
