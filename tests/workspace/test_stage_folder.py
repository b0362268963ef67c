import os

import pytest
import torch

from fedpress.errors import RunError
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
