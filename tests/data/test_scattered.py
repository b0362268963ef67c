"""Rows that come in any order lie in the file in theirs."""

import numpy as np
import pytest
import torch

from fedpress.data import scattered


@pytest.mark.parametrize("batch", [1, 7, 50])
@pytest.mark.parametrize("block_rows", [1, 4, 1000])
def test_rows_lie_in_their_places_however_they_come(tmp_path, monkeypatch, batch, block_rows):
    width = 3
    monkeypatch.setattr(scattered, "BLOCK", block_rows * width * 4)
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    # Every fifth row belongs to no part, and is not written.
    places = torch.full((50,), -1)
    wanted = torch.arange(50) % 5 > 0
    places[wanted] = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    with open(tmp_path / "rows", "w+b", buffering=0) as file:
        rows = scattered.ScatteredRows(file, 40, width)
        for part, at in zip(x.split(batch), places.split(batch), strict=True):
            rows.write_(part, at)
    found = np.fromfile(tmp_path / "rows", np.float32).reshape(40, width)
    assert torch.equal(torch.from_numpy(found)[places[wanted]], x[wanted])


def test_a_disk_that_takes_a_part_is_asked_again(tmp_path, monkeypatch):
    whole = scattered.os.pwrite
    monkeypatch.setattr(scattered.os, "pwrite", lambda file, x, at: whole(file, x[:5], at))
    x = torch.arange(12.0).view(4, 3)
    with open(tmp_path / "rows", "w+b", buffering=0) as file:
        scattered.ScatteredRows(file, 4, 3).write_(x, torch.arange(4))
    assert np.fromfile(tmp_path / "rows", np.float32).tolist() == x.flatten().tolist()


def test_a_file_that_somebody_cuts_is_an_error_and_no_endless_wait(tmp_path, monkeypatch):
    # What reading returns behind the end of a file.
    monkeypatch.setattr(scattered.os, "preadv", lambda file, into, at: 0)
    with open(tmp_path / "rows", "w+b", buffering=0) as file:
        rows = scattered.ScatteredRows(file, 4, 3)
        rows.write_(torch.zeros(2, 3), torch.tensor([3, 2]))
        with pytest.raises(OSError, match="cut short"):
            rows.write_(torch.zeros(2, 3), torch.tensor([0, 1]))
