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
from sklearn.datasets import load_digits
from torch import Tensor

from fedpress import storage, wire

OLD = Path(__file__).parent / "data" / "v0_1_0"
NUMBERS = json.loads((OLD / "numbers.json").read_text("utf-8"))
MESSAGES = json.loads((OLD / "messages.json").read_text("utf-8"))["messages"]
KILLED = ("secure", "feedback", "sample")
EDITED = "edited"
"""The finished run, of which somebody said that it drew from later streams."""
BUT_ONE = "finished-but-one"
"""The finished run, of which somebody deleted the result of a stage."""
ROUNDING = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
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


by_command = pytest.mark.recipe  # sixteen commands in one process: 15 s


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    place = tmp_path_factory.mktemp("old") / "files"
    shutil.copytree(OLD, place)
    shutil.copytree(place / "secure", place / "secure-begun")
    shutil.copytree(place / "finished", place / "finished-but-one")
    shutil.copytree(place / "finished", place / EDITED)
    settings = place / EDITED / "settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text("utf-8")), "streams": 3}))
    (place / EDITED / "checksums").unlink()
    next((place / "finished-but-one" / "stages").glob("1-*/result.json")).unlink()
    asked = {
        "report of a finished run": ["report", "finished"],
        "report of a killed run": ["report", "secure-begun"],
        "report of a command": ["report", "command"],
        "privacy": ["privacy", "compose", "finished/ledger.json", "--delta", "1e-4", "--json"],
        "check secure": ["check", "secure.toml", "--json"],
        "check rate": ["check", "rate.toml", "--json"],
        "pack": ["pack", "command", "--out", "again", "--json"],
        "anew": ["run", "sample.toml", "--from", "sample", "--out", "new", "--json"],
        "prune a model of a run": ["prune", "finished/stages/0-dense", "keep_params=0.5"],
        "resume edited": ["run", "--resume", EDITED, "--json"],
        **{
            f"resume {name}": ["run", "--resume", name, "--json"]
            for name in (*KILLED, BUT_ONE, "finished")
        },
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


def files(run: Path) -> dict[Path, bytes]:
    """What a run's folder holds, but for the lock and the list of checksums, which is tidied."""
    every = [path for path in run.rglob("*") if path.is_file()]
    return {p.relative_to(run): p.read_bytes() for p in every if p.suffix not in (".lock", "")}


@by_command
def test_a_stage_of_a_finished_run_is_not_done_again_with_other_random_streams(commands):
    done = commands.done[f"resume {BUT_ONE}"]
    assert done.code == 2
    assert "began with random streams of version 1, and this fedpress draws those of" in done.err
    assert result(commands.place / BUT_ONE) == result(OLD / "finished")


@by_command
def test_stages_that_do_not_belong_to_the_streams_that_are_told_are_not_done_again(commands):
    done = commands.done["resume edited"]
    assert done.code == 2
    assert "began with random streams of version 3, and this fedpress draws those of" in done.err
    assert result(commands.place / EDITED) == result(OLD / "finished")


@by_command
@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_of_other_random_streams_is_refused_and_kept(name, commands):
    # Its examples would be dealt to other clients, and what it learned from would be tested on.
    done = commands.done[f"resume {name}"]
    assert done.code == 2
    assert "began with random streams of version 1, and this fedpress draws those of" in done.err
    assert "start it anew with --out NEW" in done.err
    assert files(commands.place / name) == files(OLD / name)


@by_command
def test_a_killed_run_of_other_random_streams_gives_nothing_to_a_new_run(commands):
    done = commands.of("anew")
    assert "already done" not in done.out + done.err
    told, found = NUMBERS["runs"]["sample"], result(commands.place / "new")
    assert found["finished"]
    assert found["final"]["epsilon"] == pytest.approx(told["epsilon"], rel=1e-6)
    assert found["final"]["accuracy"] == pytest.approx(told["accuracy"], abs=0.2)


@by_command
def test_the_examples_of_an_old_run_are_not_put_aside_anew(commands):
    done = commands.done["prune a model of a run"]
    assert done.code == 2
    assert "cannot be told from its training examples" in done.err
    assert "give data=SOURCE" in done.err or "--data" in done.err


@by_command
def test_a_finished_run_of_an_old_version_is_finished_still(commands):
    commands.of("resume finished")
    for path in sorted((OLD / "finished" / "stages").rglob("*.*")):
        again = commands.place / path.relative_to(OLD)
        assert again.read_bytes() == path.read_bytes(), path.name
    # The file is written again by the present version, with the numbers that it had. What is drawn
    # of the data is new.
    again = result(commands.place / "finished") | {"version": "0.1.0"}
    assert again.pop("data")["rows"] == "public"
    assert again == result(OLD / "finished")


@by_command
def test_reports_of_old_runs_are_drawn(commands):
    for name in ("report of a finished run", "report of a killed run", "report of a command"):
        commands.of(name)
    page = (commands.place / "finished" / "report.html").read_text("utf-8")
    for stage in result(OLD / "finished")["stages"]:
        assert stage["name"] in page
        assert f"{stage['accuracy']:.2%}" in page
    assert "federate" in (commands.place / "secure-begun" / "report.html").read_text("utf-8")


@by_command
def test_an_old_ledger_spends_what_it_spent(commands):
    spent = json.loads(commands.of("privacy").out)["epsilon"]
    assert spent == pytest.approx(NUMBERS["runs"]["finished"]["epsilon"], rel=1e-6)


@by_command
def test_old_recipes_are_read_and_promise_what_they_did(commands):
    federate = json.loads(commands.of("check secure").out)["stages"][-1]
    assert federate["epsilon"] == pytest.approx(NUMBERS["runs"]["secure"]["epsilon"], rel=1e-6)
    assert federate["bits"] == result(OLD / "secure")["stages"][-1].get("bits", federate["bits"])
    rate = json.loads(commands.of("check rate").out)["stages"][-1]
    assert 0.5 < rate["bits_per_value_up"] < 2


@by_command
def test_the_folder_of_an_old_command_without_data_is_a_model_without_data(commands):
    told = json.loads(commands.of("pack").out)
    assert told["file"]
    assert storage.load(commands.place / "again")[0].architecture == "mlp"
