import json

import pytest
import torch

from fedpress import storage
from fedpress.errors import ModelError
from fedpress.models import load_model
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.pack import PackStage
from tests.harness import finish

RECIPE = """
[data]
source = "digits"
num_clients = 3
examples_per_client = 60
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [8] }
[[stage]]
kind = "train"
epochs = 1
[[stage]]
kind = "pack"
[[stage]]
kind = "pack"
name = "again"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("pack") / "run"
    finish(RECIPE, path)
    return path


def test_the_stage_leaves_a_packed_file_with_the_same_bits(run):
    line = json.loads((run / "result.json").read_text())["stages"][1]
    file = run / line["artifact"]
    assert file.name == "model.packed.safetensors"
    assert not (file.parent / "preparation.json").exists(), "images are fed as the file itself says"
    assert line["verified"] is True
    assert line["float_layers"] == {}
    assert line["file_bytes"] == file.stat().st_size == sum(line["packed_bytes"].values())
    spec, model = storage.load(file)
    known, twin = load_model(run / "stages" / "1-pack")
    assert spec == known
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_each_pack_stage_has_a_file_of_its_own(run):
    files = [
        run / "artifacts" / name
        for name in ("model.packed.safetensors", "again.packed.safetensors")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_run_takes_the_file_over(run, tmp_path):
    finish(RECIPE, tmp_path / "other", reuse=run)
    name = "artifacts/model.packed.safetensors"
    assert (tmp_path / "other" / name).read_bytes() == (run / name).read_bytes()


def test_what_cannot_be_rebuilt_is_refused_before_the_run():
    recipe = recipes.load(RECIPE)
    assert [line["kind"] for line in check_recipe(recipe, load_data(recipe))] == [
        "train",
        "pack",
        "pack",
    ]
    state = first_state(recipe, load_data(recipe))
    state.model.register_buffer("extra", torch.zeros(3))
    with pytest.raises(
        ModelError, match=r"spec: the spec builds another network \('extra' differs\)"
    ):
        PackStage(kind="pack").check(state)
