from __future__ import annotations

import json
import shutil

import pytest
from folders import write_run

from fedpress.errors import RunError
from fedpress.reports.reading import read_run, records_by_stage

FILES = [
    "recipe.toml",
    "settings.json",
    "environment.json",
    "records.jsonl",
    "result.json",
    "ledger.json",
]


def test_a_finished_run_is_read_wholly(tmp_path):
    run = read_run(write_run(tmp_path / "x"))
    assert run.finished
    assert run.name == "cifar10-cpu"
    assert [stage["name"] for stage in run.stages] == [
        "train",
        "prune",
        "fine-tune",
        "federate",
        "export",
    ]
    assert [len(steps) for steps in records_by_stage(run.records)] == [7, 1, 10, 20]
    assert run.ledger["unit"] == "sample"
    assert run.recipe.startswith("# cifar10-cpu")


@pytest.mark.parametrize("missing", FILES)
def test_each_file_may_be_missing(tmp_path, missing):
    folder = write_run(tmp_path / "x")
    (folder / missing).unlink()
    run = read_run(folder)
    assert run.finished == (missing != "result.json")
    assert run.name == "cifar10-cpu"


def test_a_torn_last_line_is_ignored(tmp_path):
    folder = write_run(tmp_path / "x")
    whole = read_run(folder).records
    data = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(
        data + '{"stage": 3, "name": "é'.encode()[:-1]
    )  # cut within a letter
    assert read_run(folder).records == whole
    (folder / "records.jsonl").write_bytes(data[:-30])
    assert read_run(folder).records == whole[:-1]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    folder = write_run(tmp_path / "x")
    lines = (folder / "records.jsonl").read_text().split("\n")
    lines[2] = lines[2][:20]
    (folder / "records.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"records\.jsonl: line 3 is damaged.*delete that line"):
        read_run(folder)


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
@pytest.mark.parametrize(
    "file", ["settings.json", "environment.json", "result.json", "ledger.json"]
)
def test_a_damaged_file_is_named(tmp_path, file, text):
    folder = write_run(tmp_path / "x")
    (folder / file).write_text(text)
    with pytest.raises(RunError, match=rf"{file}: .*; restore the file"):
        read_run(folder)


def test_a_folder_that_is_no_run_is_refused_with_a_cure(tmp_path):
    with pytest.raises(RunError, match=r"no such folder; give the folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"not a run folder.*; give the folder"):
        read_run(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunError, match="no such folder"):
        read_run(file)


def test_a_step_that_was_done_twice_counts_once(tmp_path):
    folder = write_run(tmp_path / "x")
    again = {"stage": 0, "kind": "train", "name": "train", "epoch": 7, "epochs": 7, "accuracy": 0.5}
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    first = next(records_by_stage(read_run(folder).records))
    assert [step["epoch"] for step in first] == [1, 2, 3, 4, 5, 6, 7]
    assert first[-1]["accuracy"] == 0.5


def test_nothing_but_the_folder_is_read(tmp_path):
    folder = write_run(tmp_path / "x")
    moved = tmp_path / "elsewhere"
    before = read_run(folder)
    shutil.move(folder, moved)
    assert read_run(moved).records == before.records
