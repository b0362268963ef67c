import pytest
import torch

from fedpress.errors import RunError
from fedpress.federation import DiskState, InMemoryState


@pytest.fixture(params=["recall", "files"])
def memory(request, tmp_path):
    return InMemoryState() if request.param == "recall" else DiskState(tmp_path / "client")


def state(value):
    return {"residual": torch.full((3,), float(value))}


def test_a_client_loads_what_it_had_before_the_round_that_is_asked(memory):
    assert memory.load(1) == {}
    for round in (1, 4, 6):
        memory.save(round, state(round))
    assert memory.load(7)["residual"][0] == 6
    assert memory.load(6)["residual"][0] == 4  # round 6 is asked again
    memory.save(6, state(60))
    assert memory.load(7)["residual"][0] == 60


def test_only_two_states_are_kept_and_later_ones_are_forgotten_when_the_run_goes_back(memory):
    for round in (1, 2, 3, 4):
        memory.save(round, state(round))
    assert memory.load(3) == {}
    memory.save(3, state(30))
    assert memory.load(9)["residual"][0] == 30


def test_notes_stay_whatever_the_round(memory):
    assert memory.entry("member") == {}
    memory.save_entry("member", {"json": torch.arange(4, dtype=torch.uint8)})
    memory.save(5, state(5))
    assert memory.entry("member")["json"].tolist() == [0, 1, 2, 3]


def test_files_outlive_the_process_and_a_damaged_one_is_named(tmp_path):
    DiskState(tmp_path).save(2, state(2))
    assert DiskState(tmp_path).load(3)["residual"].tolist() == [2.0, 2.0, 2.0]
    (tmp_path / "2.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RunError, match=r"2\.safetensors: stored client state is damaged"):
        DiskState(tmp_path).load(3)


def test_a_full_disk_is_an_error_with_the_cure(tmp_path):
    blocked = tmp_path / "client"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(RunError, match="free some space"):
        DiskState(blocked).save(1, state(1))
