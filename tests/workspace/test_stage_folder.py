import os

import pytest
import torch
from safetensors.torch import save_file

from fedpress.errors import RunError
from fedpress.workspace import stage_folder
from fedpress.workspace.folder import RunFolder


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
    assert place.records.count() == 1
    found, facts = place.load_progress()
    assert facts == {"seconds": 2.5, "records": 1}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


def test_tensors_that_share_memory_are_saved_and_the_others_are_not_copied(tmp_path, monkeypatch):
    place = RunFolder(tmp_path).stage(0, "train", "train")
    whole = torch.arange(6.0)
    tensors = {"whole": whole, "part": whole[2:4], "alone": torch.ones(3), "e": torch.zeros(0)}
    given = []

    def saving(copies, path, **options):
        given.append(copies)
        save_file(copies, path, **options)

    monkeypatch.setattr(stage_folder, "save_file", saving)
    place.save_progress(tensors, {})
    found, _ = place.load_progress()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    for name in ("whole", "alone"):
        assert given[0][name].data_ptr() == tensors[name].data_ptr()
