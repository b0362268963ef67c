"""Strangers' files through the command line and the calls: nothing runs that the user has not named, at any door."""

import json
import re
import shutil
import sys

import pytest

import fedpress
from fedpress import storage
from fedpress.core import consent
from fedpress.errors import ModelError
from fedpress.models import ModelSpec, save_model
from fedpress.workspace import started
from tests.harness import finish

NETS = """
from pathlib import Path
import numpy as np
from torch import nn

Path(__file__).with_name("ran").touch()

def net(width=8):
    conv = nn.Conv2d(1, width, 3)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 10))

def data(path):
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(10), 8)
    x = rng.integers(0, 40, (80, 1, 8, 8)) + 20 * y[:, None, None, None]
    return {f"c{i}": (x[i::4].astype(np.uint8), y[i::4]) for i in range(4)}
"""
OWN = """
name = "own"
[data]
source = "nets_of_a_stranger:data"
public_share = 0.5
validation = 4
[model]
architecture = "nets_of_a_stranger:net"
[[stage]]
kind = "train"
epochs = 1
batch_size = 16
lr = 0.05
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose network and data are own functions, as its maker left it."""
    home = tmp_path_factory.mktemp("stranger")
    (home / "nets_of_a_stranger.py").write_text(NETS)
    allowed = consent.withdraw()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        finish(OWN, home / "run")
        storage.pack(*storage.load(home / "run"), home / "m.packed.safetensors")
    consent.withdraw()
    consent.allow(*allowed)
    (home / "ran").unlink()
    sys.modules.pop("nets_of_a_stranger", None)
    return home


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """The run in another user's hands: his process has agreed to nothing; the code lies where he stands."""
    allowed = consent.withdraw()
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "nets_of_a_stranger", raising=False)
    yield tmp_path
    consent.withdraw()
    consent.allow(*allowed)
    sys.modules.pop("nets_of_a_stranger", None)


NET, DATA = "nets_of_a_stranger:net", "nets_of_a_stranger:data"
DIGITS = ["--data", "digits", "data.public_share=0.5"]
DOORS = {
    "prune": ["prune", "run", "keep_params=0.5", "calibration=16", *DIGITS],
    "sparsify": ["sparsify", "run", "density=0.5", *DIGITS],
    "l0": ["l0", "run/stages/0-train", "density=0.5", "epochs=1", *DIGITS],
    "quantize": ["quantize", "m.packed.safetensors", *DIGITS],
    "train": ["train", "run", "epochs=1", *DIGITS],
    "distill": [
        "distill",
        "cnn",
        "teacher=run",
        "epochs=1",
        "model.arguments={in_channels=1,image_size=8}",
        *DIGITS,
    ],
    "pack": ["pack", "run", *DIGITS],
    "export": ["export", "run", *DIGITS],
    "measure": ["measure", "m.packed.safetensors", "--seconds", "0.01"],
}


@pytest.mark.parametrize("words", DOORS.values(), ids=DOORS)
def test_every_command_refuses_a_function_that_its_user_did_not_name(here, shell, words):
    said = shell(*words)
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert said.err.rstrip().endswith(f"add --allow-code {NET}")
    assert not (here / "ran").exists()
    assert not (here / "runs").exists()


def test_the_flag_lets_one_function_in_and_the_data_of_a_run_is_another(here, shell):
    said = shell("quantize", "run", "--allow-code", NET)
    assert said.code == 2
    assert f"data.source: names the code '{DATA}'" in said.err
    assert f"--allow-code {DATA}" in said.err
    assert "or give the data yourself with --data SOURCE" in said.err
    said = shell("quantize", "run", "--allow-code", NET, "--allow-code", DATA)
    assert said.code == 0, said.err
    assert (here / "ran").exists()


def test_a_recipe_is_consent_for_what_it_names_itself(here, shell):
    (here / "own.toml").write_text(OWN)
    said = shell("run", "own.toml", "--out", "mine")
    assert said.code == 0, said.err
    consent.withdraw()  # another day
    said = shell("run", "own.toml", "--out", "mine", "--resume")
    assert said.code == 0, said.err
    consent.withdraw()
    said = shell("run", "own.toml", "model={checkpoint='run'}", "--out", "other")
    assert said.code == 2
    assert f"--allow-code {NET}" in said.err
    said = shell("check", "own.toml", "model={checkpoint='run'}", "--allow-code", NET)
    assert said.code == 0, said.err
    consent.withdraw()
    said = shell(
        "sweep", "own.toml", "model={checkpoint='run'}", "stage.train.lr=0.1,0.2", "--out", "s"
    )
    assert said.code == 2
    assert f"--allow-code {NET}" in said.out


@pytest.mark.recipe
def test_the_recipe_in_a_run_folder_is_consent_only_for_who_started_the_run(
    here, shell, monkeypatch
):
    (here / "own.toml").write_text(OWN)
    assert shell("run", "own.toml", "--out", "mine").code == 0
    consent.withdraw()
    said = shell("run", "--resume", "mine")
    assert said.code == 0, said.err
    consent.withdraw()
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "of-somebody-else"))
    (here / "ran").unlink(missing_ok=True)
    sys.modules.pop("nets_of_a_stranger", None)
    said = shell("run", "--resume", "mine")
    assert said.code == 2
    assert f"add --allow-code {NET} --allow-code {DATA}, or name your own recipe file" in said.err
    assert not (here / "ran").exists()
    said = shell("run", "--resume", "mine", "--allow-code", DATA, "--allow-code", NET)
    assert said.code == 0, said.err
    consent.withdraw()
    assert shell("run", "own.toml", "--out", "mine", "--resume").code == 0


def test_the_mark_of_a_start_fits_no_other_function_and_no_other_place():
    own = started.sign(["nets:Net"], "/a/own.toml")
    assert started.is_signed(own, ["nets:Net"], "/a/own.toml")
    assert not started.is_signed(own, ["os:system"], "/a/own.toml")
    assert not started.is_signed(own, ["nets:Net"], "/b/own.toml")
    assert not started.is_signed(None, ["nets:Net"], "/a/own.toml")


def test_nothing_is_written_through_links_that_lie_in_a_run_folder(here, shell):
    (here / "own.toml").write_text(OWN)
    target = here / "precious"
    target.write_text("as it was")
    assert shell("run", "own.toml", "--out", "mine").code == 0
    for name in ("lock", "records.jsonl", "checksums", "stages/0-train/model.safetensors"):
        path = here / "mine" / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        said = shell("run", "--resume", "mine")
        assert said.code == 2, name
        assert f"mine/{name}: " in said.err
        assert "link" in said.err
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    (here / "mine" / ".report.html.part").symlink_to(target)
    assert shell("report", "mine").code == 0
    assert target.read_text() == "as it was"


def test_a_model_that_does_not_take_what_its_file_declares_is_told_in_one_sentence(tmp_path, shell):
    layers = {
        "": {"layer": "Sequential"},
        "0": {"layer": "Linear", "in_features": 4, "out_features": 2},
    }
    spec = ModelSpec(architecture="torch-layers", arguments={"layers": layers}, input_shape=(5,))
    save_model(tmp_path / "odd", spec, spec.build())
    for command in ("measure", "export", "pack", "quantize"):
        said = shell(command, "odd")
        assert said.code == 2, command
        assert re.search(r"does not take (inputs|examples) of .*5", said.err), command


def test_a_model_given_by_name_is_consent_for_its_own_results(here, shell):
    said = shell("pack", NET, "--input", "1,8,8", "--out", "p")
    assert said.code == 0, said.err
    consent.withdraw()
    assert shell("pack", "p", "--out", "q").code == 2
    assert shell("pack", "p", "--out", "q", "--allow-code", NET).code == 0


@pytest.mark.usefixtures("memory_unmeasured")
def test_a_call_says_and_takes_its_argument(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    for call in (
        lambda **more: fedpress.pack("run", **more).model,
        lambda **more: fedpress.measure(
            ["run"], formats=[], int8=False, seconds=0.01, batches=[1], threads=[1], **more
        ),
        lambda **more: storage.load(here / "run", **more),
    ):
        with pytest.raises(ModelError, match=rf'add allow_code=\("{NET}",\)'):
            call()
        assert not (here / "ran").exists()
        call(allow_code=(NET, DATA))
        (here / "ran").unlink()
        sys.modules.pop("nets_of_a_stranger")
        with pytest.raises(ModelError, match="allow_code"):
            call()


@pytest.mark.parametrize("flag", ["nets", "a:b:c", "", "a:b\x1b[31m"])
def test_the_flag_takes_whole_names_only(here, shell, flag):
    said = shell("measure", "run", "--allow-code", flag)
    assert said.code == 2
    assert "expected package.module:function" in said.err
    assert "\x1b" not in said.err


def test_what_a_file_says_cannot_steer_the_terminal(here, shell):
    path = here / "run" / "stages" / "0-train" / "spec.json"
    page = json.loads(path.read_text()) | {"architecture": "mlp", "arguments": {}}
    page |= {"class_names": ["\x1b[2J\x1b[31mcat", "dog\u202e"] + [str(i) for i in range(8)]}
    path.write_text(json.dumps(page))
    said = shell("quantize", "run/stages/0-train", *DIGITS)
    assert said.code == 2
    assert "\x1b" not in said.err + said.out
    assert "\u202e" not in said.err + said.out
