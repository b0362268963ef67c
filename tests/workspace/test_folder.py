import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch

from fedpress.errors import RunError
from fedpress.workspace.folder import (
    RunFolder,
    first_difference,
    read_json,
    replacing,
    write_json,
    writing,
)


def half_written(path: Path, error: Exception) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, number):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(
        RunError, match=r"x: cannot be written \(.*\).*free some space, then go on with --resume"
    ):
        half_written(path, OSError(number, os.strerror(number)))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path, small_files):
    place = RunFolder(tmp_path).stage(0, "train", "train")
    place.save_progress({"x": torch.zeros(10)}, {"epoch": 1})
    small_files(10_000)
    with pytest.raises(
        RunError,
        match=r"progress.safetensors: cannot be written \(File too large\).*free some space",
    ):
        place.save_progress({"x": torch.zeros(10_000)}, {"epoch": 2})
    small_files(-1)  # the tests' own output may be a long file
    assert place.load_progress()[1]["epoch"] == 1
    assert os.listdir(place.path) == ["progress.safetensors"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_a_place_that_cannot_be_written_says_where_else_to_go(tmp_path, number):
    with (
        pytest.raises(RunError, match=f"{os.strerror(number)}.*choose another place with --out"),
        writing(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_holds_null_for_what_it_cannot_say(tmp_path, value):
    write_json(tmp_path / "x.json", {"a": [value, {"b": (value, 1)}], "c": 0.5})
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": [None, {"b": [None, 1]}],
        "c": 0.5,
    }
    RunFolder(tmp_path).record({"loss": value})
    assert (tmp_path / "records.jsonl").read_text() == '{"loss": null}\n'


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON"), ("[1]", "expected a JSON object"), ("", "JSON")]
)
def test_damaged_json_is_named_with_its_cure(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RunError, match=f"x.json: .*{said}.*burn it"):
        read_json(path, cure="burn it")
    with pytest.raises(RunError, match="no such file"):
        read_json(tmp_path / "y.json")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_records_are_cut_to_whole_ones(tmp_path, count):
    folder = RunFolder(tmp_path)
    folder.cut_records(count)  # there are none yet
    for number in range(2):
        folder.record({"number": number})
    with open(folder.records, "a") as file:
        file.write('{"number": 2, "torn')
    assert folder.count_records() == 2
    folder.cut_records(min(count, folder.count_records()))
    assert [json.loads(x)["number"] for x in folder.records.read_text().splitlines()] == list(
        range(min(count, 2))
    )


def test_a_checkpoint_gives_back_tensors_facts_and_the_place_in_the_records(tmp_path):
    place = RunFolder(tmp_path).stage(0, "train", "train")
    assert place.load_progress() == ({}, {})
    place.record(epoch=1)
    tensors = {
        "a": torch.arange(6).reshape(2, 3).t(),
        "b": torch.tensor(1.5, dtype=torch.float64),
        "e": torch.zeros(0),
    }
    place.save_progress(tensors, {"seconds": 2.5})
    place.record(epoch=2)
    assert place.begin(0) == 2.5
    assert place.run.count_records() == 1
    found, facts = place.load_progress()
    assert facts == {"seconds": 2.5, "records": 1}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


def test_a_run_never_replaces_what_somebody_else_has_put_into_its_folder(tmp_path):
    RunFolder.create(tmp_path / "new", "x", {})
    with pytest.raises(RunError, match="already holds a run; add --resume"):
        RunFolder.create(tmp_path / "new", "x", {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="this is a file"):
        RunFolder.create(tmp_path / "file", "x", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "recipe.toml").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        RunFolder.create(tmp_path / "full", "x", {})
    assert (tmp_path / "full" / "recipe.toml").read_text() == "mine"
    RunFolder.create(tmp_path / "full", "mine", {})  # left by a run that was killed at once


def test_there_must_be_a_run_to_resume_or_to_take_over(tmp_path):
    with pytest.raises(RunError, match="no run to resume"):
        RunFolder.resume(tmp_path, {})
    with pytest.raises(RunError, match="no run in this folder"):
        RunFolder.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"a": 1}, {"a": 2}, "recipe.a was 1, now 2"),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, "recipe.a.b[1].c was 2, now 3"),
        ({"a": [1]}, {"a": [1, 2]}, "recipe.a had 1 entries, now 2"),
        ({}, {"a": 1}, "recipe.a was null, now 1"),
        ({"a": {"b": 1}}, {"a": 5}, 'recipe.a was {"b": 1}, now 5'),
    ],
)
def test_the_first_difference_is_said_in_words(old, new, said):
    assert first_difference(old, new) == said
