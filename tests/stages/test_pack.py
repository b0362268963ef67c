import json

import pytest
import torch

from fedpress import recipe as recipes
from fedpress import run as runs
from fedpress import storage
from fedpress.errors import ModelError
from fedpress.folder import RunFolder
from fedpress.models import load_model
from fedpress.stages import PackStage

PACK = '[[stage]]\nkind = "pack"\n[[stage]]\nkind = "pack"\nname = "again"\n'


def recipe_of(tiny):
    text = tiny[: tiny.rindex("[[stage]]")]  # without federation
    return recipes.load(text + PACK)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("pack") / "run"
    recipe = recipe_of(tiny)
    for _ in runs.execute(recipe, RunFolder.create(path, tiny, runs.settings(recipe)), runs.load_data(recipe)):
        pass
    return path


def test_the_stage_leaves_a_packed_file_with_the_same_bits(run):
    line = json.loads((run / "result.json").read_text())["stages"][2]
    file = run / line["artifact"]
    assert file.name == "model.packed.safetensors"
    assert line["verified"] is True
    assert line["float_layers"] == {}
    assert line["file_bytes"] == file.stat().st_size == sum(line["packed_bytes"].values())
    spec, model = storage.load(file)
    known, twin = load_model(run / "stages" / "2-pack")
    assert spec == known
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_each_pack_stage_has_a_file_of_its_own(run):
    files = [run / "artifacts" / name for name in ("model.packed.safetensors", "again.packed.safetensors")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_run_takes_the_file_over(run, tiny, tmp_path):
    recipe = recipe_of(tiny)
    folder = RunFolder.create(tmp_path / "other", tiny, runs.settings(recipe))
    for _ in runs.execute(recipe, folder, runs.load_data(recipe), reuse=RunFolder.open(run)):
        pass
    name = "artifacts/model.packed.safetensors"
    assert (tmp_path / "other" / name).read_bytes() == (run / name).read_bytes()


def test_what_cannot_be_rebuilt_is_refused_before_the_run(tiny):
    recipe = recipe_of(tiny)
    state = runs.start(recipe, runs.load_data(recipe))
    state.model.register_buffer("extra", torch.zeros(3))
    with pytest.raises(ModelError, match="pack: the spec builds another network \\('extra' differs\\)"):
        PackStage(kind="pack").check(state)
