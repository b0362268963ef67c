"""A run is not resumed with other data than it began with; what is noted tells others nothing."""

import json
import os
import re

import numpy as np
import pytest
import torch

import fedpress
from fedpress.core.examples import Arrays
from fedpress.data import DataSettings, load
from fedpress.errors import RunError
from fedpress.workspace import fingerprint

RECIPE = """
name = "x"
[data]
source = "csv"
path = "{path}"
client_column = "file"
label_column = "y"
public_share = 0.3
[model]
architecture = "mlp"
[[stage]]
kind = "train"
epochs = 3
batch_size = 8
"""


def table(seed):
    x = np.random.default_rng(seed).normal(size=60)
    return "x,y\n" + "".join(f"{value:.5f},{'yn'[int(value > 0)]}\n" for value in x)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "data").mkdir()
    for seed, name in enumerate("ab"):
        (tmp_path / "data" / f"{name}.csv").write_text(table(seed))
    (tmp_path / "x.toml").write_text(RECIPE.format(path="data"))
    return tmp_path / "data"


def settings(path):
    keys = {"client_column": "file", "label_column": "y", "public_share": 0.3}
    return DataSettings(source="csv", path=path, **keys)


def look(run, asked):
    """Notes the data, or compares them with what was noted."""
    now = fingerprint.seen(load(asked, 0), asked)
    if not (run / fingerprint.NAME).exists():
        run.mkdir(exist_ok=True)
        fingerprint.note(run, now)
        return []
    return fingerprint.compare(run, now, asked)


def test_equal_files_in_another_folder_are_the_same_data(files, tmp_path):
    look(tmp_path / "run", settings(files))
    files.rename(tmp_path / "moved")
    assert look(tmp_path / "run", settings(tmp_path / "moved")) == []


def test_a_file_that_changed_came_or_went_is_named(files, tmp_path):
    run, asked = tmp_path / "run", settings(files)
    look(run, asked)
    before = (files / "b.csv").read_text()
    # Of equal size and time: only its content tells.
    stat = (files / "b.csv").stat()
    (files / "b.csv").write_text(before.replace("0.", "1.", 1))
    os.utime(files / "b.csv", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(RunError, match=r"b\.csv': it has changed since this run began .*restore"):
        look(run, asked)
    (files / "b.csv").write_text(before)
    assert look(run, asked) == []
    (files / "c.csv").write_text(before)
    with pytest.raises(RunError, match=r"c\.csv': it was not there when this run began"):
        look(run, asked)
    (files / "c.csv").unlink()
    (files / "b.csv").unlink()
    with pytest.raises(RunError, match=r"data': a file is missing that this run began with"):
        look(run, asked)


def test_a_single_file_may_be_renamed(files, tmp_path):
    asked = {"client_column": None, "num_clients": 2}
    for name in ("a.csv", "z.csv"):
        path = files / name
        assert look(tmp_path / "run", settings(path).model_copy(update=asked)) == []
        if name == "a.csv":
            path.rename(files / "z.csv")


def test_of_large_files_blocks_are_compared_and_a_new_time_is_told(files, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE", 100)
    monkeypatch.setattr(fingerprint, "BLOCK", 10)
    run, asked = tmp_path / "run", settings(files)
    look(run, asked)
    os.utime(files / "a.csv", ns=(1, 1))
    (warning,) = look(run, asked)
    assert "a.csv' was written again since this run began; it is large" in warning
    text = (files / "a.csv").read_text()
    (files / "a.csv").write_text(text[:-2] + "\t\n")
    with pytest.raises(RunError, match="it has changed"):
        look(run, asked)


def test_what_is_noted_has_no_name_size_or_digest_that_others_know(files, tmp_path, monkeypatch):
    run = tmp_path / "run"
    look(run, settings(files))
    noted = (run / fingerprint.NAME).read_text()
    assert "csv" not in noted
    # A word of its own: any three digits stand in a random key once in some dozens of runs.
    assert re.search(rf"\b{(files / 'a.csv').stat().st_size}\b", noted) is None
    # Another user, with another key, makes other digests of the same files.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    (warning,) = look(run, settings(files))
    assert "could not be compared" in warning
    look(tmp_path / "theirs", settings(files))
    theirs = json.loads((tmp_path / "theirs" / fingerprint.NAME).read_text())
    assert not theirs["files"].keys() & json.loads(noted)["files"].keys()


def interrupted(recipe, **keys):
    going = fedpress.Run.begin(recipe, out="run", **keys)
    events = going.events()
    for _ in range(4):
        next(events)
    events.close()


@pytest.mark.recipe
def test_resume_with_changed_data_is_one_sentence_and_status_two(files, shell, tmp_path):
    interrupted(tmp_path / "x.toml")
    before = (files / "a.csv").read_text()
    (files / "a.csv").write_text(table(5))
    said = shell("run", "--resume", "run")
    assert said.code == 2
    text = " ".join(said.err.split())
    assert "a.csv': it has changed since this run began (last on 20" in text
    assert "start a new run with --out NEW" in text
    (files / "a.csv").write_text(before)
    assert shell("run", "--resume", "run").code == 0
    # A finished run computes nothing more.
    (files / "a.csv").write_text(table(5))
    assert shell("run", "--resume", "run").code == 0


@pytest.mark.recipe
def test_a_run_of_an_older_version_goes_on(files, shell, tmp_path):
    interrupted(tmp_path / "x.toml")
    (tmp_path / "run" / fingerprint.NAME).unlink()
    (files / "a.csv").write_text(table(5))
    assert shell("run", "--resume", "run").code == 0


@pytest.mark.recipe
def test_arrays_in_memory_that_changed_are_found_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [Arrays(torch.randn(40, 3), torch.arange(40) % 2) for _ in range(4)]

    def data(first):
        return fedpress.FederatedData("mine", {"one": first}, *parts[1:], 2, ("a", "b"))

    recipe = {
        "name": "x",
        "data": {"source": "digits"},
        "model": {"architecture": "mlp"},
        "stage": [{"kind": "train", "epochs": 3, "batch_size": 8}],
    }
    interrupted(recipe, data=data(parts[0]))
    changed = Arrays(parts[0].x.clone(), parts[0].y)
    changed.x[3, 1] += 1
    with pytest.raises(RunError, match="data: the examples of the clients are others than when"):
        list(fedpress.Run.resume("run", data=data(changed)).events())
    list(fedpress.Run.resume("run", data=data(parts[0])).events())


@pytest.mark.recipe
def test_no_stage_is_taken_over_from_a_run_with_other_data(files, tmp_path):
    recipe = tmp_path / "x.toml"
    first = fedpress.run(recipe, out=tmp_path / "one", progress=False)
    again = fedpress.run(recipe, out=tmp_path / "two", reuse=tmp_path / "one", progress=False)
    assert again.result["stages"] == first.result["stages"]
    # The same files in another folder are the same data.
    (tmp_path / "moved").mkdir()
    for file in files.iterdir():
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    moved = {"data": tmp_path / "moved", "out": tmp_path / "three", "progress": False}
    fedpress.run(recipe, reuse=tmp_path / "one", **moved)
    (files / "b.csv").write_text(table(7))
    with pytest.raises(RunError) as caught:
        fedpress.run(recipe, out=tmp_path / "four", reuse=tmp_path / "one", progress=False)
    assert str(caught.value) == (
        f"'{tmp_path / 'one'}': its data have other content than those of this run; give the data "
        "that it began with, or do not take stages over from it"
    )
