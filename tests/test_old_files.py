"""What earlier versions of fedpress wrote can be opened: models, packed files, messages, recipes, and runs that go on.

The files lie in `tests/data/v0_1_0`, whose README says how they were made. What a user does by the command line is
done by it here, in one process of its own that rounds as the process did which wrote the files.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from fedpress import storage, wire

OLD = Path(__file__).parent / "data" / "v0_1_0"
NUMBERS = json.loads((OLD / "numbers.json").read_text("utf-8"))
MESSAGES = json.loads((OLD / "messages.json").read_text("utf-8"))["messages"]
KILLED = ("secure", "feedback", "sample")
SAME_STREAMS = ("feedback", "sample")
"""Runs that end with the same bits as ever: whoever renews random streams knowingly takes their runs out of here.

"secure" is out: its grid and noise are planned by Brent's method now, in place of a bisection, and differ by less than
a hundredth of a percent.
"""
ROUNDING = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
DECIDES_BITS = {"torch", "numpy", "processor", "instructions", "device", "threads"}
"""What of `environment.json` decides how sums are rounded."""
PROGRAM = """
import contextlib, io, json, sys
from fedpress.cli import main
done = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["fedpress", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Commands:
    """Commands that were run one after another, by name, in a folder with copies of the old files."""

    place: Path
    done: Mapping[str, Done]

    def of(self, name: str) -> Done:
        """Returns what a command came to, which must have gone well."""
        done = self.done[name]
        assert done.code == 0, done.err
        return done


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    place = tmp_path_factory.mktemp("old") / "files"
    shutil.copytree(OLD, place)
    shutil.copytree(place / "secure", place / "secure-begun")
    asked = {
        "report of a finished run": ["report", "finished"],
        "report of a killed run": ["report", "secure-begun"],
        "report of a command": ["report", "command"],
        "privacy": ["privacy", "compose", "finished/ledger.json", "--delta", "1e-4", "--json"],
        "check secure": ["check", "secure.toml", "--json"],
        "check rate": ["check", "rate.toml", "--json"],
        "pack": ["pack", "command", "--out", "again", "--json"],
        **{f"resume {name}": ["run", "--resume", name, "--json"] for name in (*KILLED, "finished")},
    }
    words = [sys.executable, "-c", PROGRAM, json.dumps(list(asked.values()))]
    ran = subprocess.run(
        words,
        cwd=place,
        env=os.environ | ROUNDING,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout.splitlines()[-1])
    return Commands(place, {name: Done(*one) for name, one in zip(asked, results, strict=True)})


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, np.ndarray]:
    """All digits as numbers from 0 to 1 [1797, 1, 8, 8], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(np.round(pixels * (255 / 16)) / 255).float()
    return x.view(-1, 1, 8, 8), labels


def digest(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b of named tensors: name, type, shape and bytes of each, in the order of the names."""
    made = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        made.update(tensor.contiguous().numpy().tobytes())
    return made.hexdigest()


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text("utf-8"))


def last_model(run: Path) -> Path:
    """The model of the last stage."""
    return max((run / "stages").iterdir()) / "model.safetensors"


def rounds_as_then(run: Path) -> bool:
    """Whether this machine rounds as that on which the run was begun, by what was noted when it went on."""
    noted = json.loads((run / "environment.json").read_text("utf-8"))
    return DECIDES_BITS.isdisjoint(noted["resumed"][-1])


@pytest.mark.parametrize("path", NUMBERS["models"])
@torch.no_grad()
def test_an_old_model_gives_the_outputs_that_it_gave(path, digits):
    raw, labels = digits
    told = NUMBERS["models"][path]
    spec, model = storage.load(OLD / path)
    out = model.eval()((raw - spec.mean[0]) / spec.std[0])

    wanted = torch.tensor(told["outputs"])
    # Another order of sums may put an input that lies between two steps of a grid on the other one.
    room = 0.02 * float(wanted.abs().max()) if told["quantized"] else 1e-4
    assert torch.allclose(out[:4], wanted, rtol=0, atol=room)
    accuracy = float((out.argmax(1).numpy() == labels).mean())
    assert accuracy == pytest.approx(told["accuracy"], abs=2 / len(labels))


@pytest.mark.parametrize("path", NUMBERS["files"])
def test_an_old_exported_file_gives_the_outputs_that_it_gave(path, digits):
    spec, _ = storage.load(OLD / path.partition("/")[0])
    session = onnxruntime.InferenceSession(OLD / path)
    x = ((digits[0][:4] - spec.mean[0]) / spec.std[0]).numpy()
    (out,) = session.run(None, {session.get_inputs()[0].name: x})
    wanted = np.array(NUMBERS["files"][path]["outputs"])
    assert np.allclose(out, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("name", MESSAGES)
def test_an_old_message_holds_what_it_held(name):
    told = MESSAGES[name]
    message = wire.unpack(base64.b64decode(told["bytes"]))
    assert message.kind == told["kind"]
    assert dict(message.header) == told["header"]
    found = {
        key: [str(tensor.dtype), list(tensor.shape), digest({key: tensor})]
        for key, tensor in message.tensors.items()
    }
    assert found == told["tensors"]


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_of_an_old_version_goes_on_to_its_end(name, commands):
    commands.of(f"resume {name}")
    told, found = NUMBERS["runs"][name], result(commands.place / name)
    assert found["finished"]
    final = found["final"]
    assert final["rounds"] == told["rounds"]
    assert final["epsilon"] == (
        pytest.approx(told["epsilon"], rel=1e-6) if told["epsilon"] else None
    )
    assert not final["failures"]["refused"], "no round may be lost by going on"
    # 0.2: other noise, or sums that are rounded otherwise
    assert final["accuracy"] == pytest.approx(told["accuracy"], abs=0.2)
    if name in SAME_STREAMS and rounds_as_then(commands.place / name):
        assert digest(load_file(last_model(commands.place / name))) == told["tensors"]
        assert final["accuracy"] == told["accuracy"]


def test_finished_stages_of_a_killed_run_are_not_done_again(commands):
    commands.of("resume secure")
    assert (commands.place / "secure/stages/0-train/result.json").read_bytes() == (
        OLD / "secure/stages/0-train/result.json"
    ).read_bytes()


def test_a_finished_run_of_an_old_version_is_finished_still(commands):
    commands.of("resume finished")
    for path in sorted((OLD / "finished" / "stages").rglob("*.*")):
        again = commands.place / path.relative_to(OLD)
        assert again.read_bytes() == path.read_bytes(), path.name
    assert result(commands.place / "finished") == result(OLD / "finished")


def test_reports_of_old_runs_are_drawn(commands):
    for name in ("report of a finished run", "report of a killed run", "report of a command"):
        commands.of(name)
    page = (commands.place / "finished" / "report.html").read_text("utf-8")
    for stage in result(OLD / "finished")["stages"]:
        assert stage["name"] in page
        assert f"{stage['accuracy']:.2%}" in page
    assert "federate" in (commands.place / "secure-begun" / "report.html").read_text("utf-8")


def test_an_old_ledger_spends_what_it_spent(commands):
    spent = json.loads(commands.of("privacy").out)["epsilon"]
    assert spent == pytest.approx(NUMBERS["runs"]["finished"]["epsilon"], rel=1e-6)


def test_old_recipes_are_read_and_promise_what_they_did(commands):
    federate = json.loads(commands.of("check secure").out)["stages"][-1]
    assert federate["epsilon"] == pytest.approx(NUMBERS["runs"]["secure"]["epsilon"], rel=1e-6)
    assert federate["bits"] == result(OLD / "secure")["stages"][-1].get("bits", federate["bits"])
    rate = json.loads(commands.of("check rate").out)["stages"][-1]
    assert 0.5 < rate["bits_per_value_up"] < 2


def test_the_folder_of_an_old_command_without_data_is_a_model_without_data(commands):
    told = json.loads(commands.of("pack").out)
    assert told["file"]
    assert storage.load(commands.place / "again")[0].architecture == "mlp"
