"""The key `device` in a recipe, on the command line and in Python."""

import json

import pytest
import torch
from torch import nn

import fedpress
from fedpress.errors import FedpressError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.keys import settings_of, stage_keys
from fedpress.pipeline.start import device_of, first_state, load_data


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.recipe
def test_a_run_on_the_cpu_gives_the_bits_of_one_that_chose_by_itself(shell, tiny_file, tmp_path):
    assert shell("run", tiny_file, "--out", "a").code == 0
    assert shell("run", tiny_file, "--out", "b", "--device", "cpu").code == 0
    for stage in ("0-train", "1-prune", "2-federate"):
        one, other = ((tmp_path / run / "stages" / stage) for run in "ab")
        names = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
        assert names
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("words", [["--device", "cuda"], ["device=cuda:1"]])
@pytest.mark.parametrize("command", ["run", "check", "sweep"])
def test_a_missing_device_is_refused_with_a_cure_that_works(shell, tiny_file, command, words):
    said = shell(command, tiny_file, *words)
    assert said.code == 2
    assert "device: there is no 'cuda" in said.err
    assert "on this machine, which has cpu; give device=cpu, or leave it out" in said.err
    assert shell("check", tiny_file, *words, "device=cpu").code == 0 or words[0] == "--device"


def test_a_name_of_no_device_is_refused_with_those_there_are(shell, tiny_file):
    said = shell("check", tiny_file, "--device", "cdua")
    assert said.code == 2
    assert "recipe.device: no device is called 'cdua'" in said.err
    assert "did you mean 'cuda'" in said.err
    assert shell("run", tiny_file, "device=meta").code == 2


def test_a_missing_device_is_refused_before_the_data_are_loaded(tiny):
    recipe = recipes.load(tiny, ["device=mps", "data.source=cifar10", "data.path=nowhere"])
    with pytest.raises(FedpressError, match=r"recipe\.device: there is no 'mps'"):
        load_data(recipe)


def test_the_device_reaches_the_state_of_the_stages(tiny, monkeypatch):
    recipe = recipes.load(tiny, ["device=cuda:1"])
    data = load_data(recipes.load(tiny))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(recipe) == first_state(recipe, data).device == torch.device("cuda", 1)


def test_where_a_run_was_computed_is_no_part_of_what_it_is(tiny):
    here, there = recipes.load(tiny), recipes.load(tiny, ["device=cuda"])
    assert settings_of(here) == settings_of(there)
    assert stage_keys(here) == stage_keys(there)


@pytest.mark.recipe
def test_a_run_that_began_on_a_gpu_goes_on_elsewhere_with_a_warning(shell, tiny_file, tmp_path):
    assert shell("run", tiny_file, "--out", "a", "stage.2.num_rounds=0").code == 0
    recipe = tmp_path / "a" / "recipe.toml"
    recipe.write_text('device = "cuda"\n' + recipe.read_text())
    (tmp_path / "a" / "checksums").unlink()
    noted = tmp_path / "a" / "environment.json"
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"device": "H200"}))
    result = tmp_path / "a" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"finished": False}))

    said = shell("run", "--resume", "a")
    assert said.code == 2
    assert "there is no 'cuda' on this machine" in said.err
    said = shell("run", "--resume", "a", "--device", "cpu")
    assert said.code == 0
    assert "device H200 before, cpu now" in said.err
    assert "its bits will differ" in said.err


def test_a_command_on_one_model_takes_a_device(shell, tmp_path):
    words = ["mlp", "--data", "digits", "epochs=1", "model.arguments={in_features=64}"]
    assert shell("train", *words, "--device", "cuda", "--out", "x").code == 2
    assert not (tmp_path / "x").exists()
    assert shell("train", *words, "--device", "cpu", "--out", "x").code == 0
    said = shell("train", "--resume", "x", "--device", "cuda")
    assert said.code == 2
    assert "there is no 'cuda'" in said.err
    assert shell("train", "--resume", "x", "--device", "cpu").code == 0


def test_a_python_call_takes_a_device():
    model, data = nn.Linear(4, 2), (torch.randn(60, 4), torch.arange(60) % 2)
    on_cpu = fedpress.train(model, data=data, epochs=1, device="cpu").model
    by_itself = fedpress.train(model, data=data, epochs=1).model
    assert torch.equal(on_cpu.weight, by_itself.weight)
    assert torch.equal(
        on_cpu.weight,
        fedpress.train(model, data=data, epochs=1, device=torch.device("cpu")).model.weight,
    )
    with pytest.raises(FedpressError, match=r"^device: there is no 'cuda'.*; give device=\"cpu\""):
        fedpress.train(model, data=data, epochs=1, device="cuda")
