import torch

from fedpress.federation import DiskState
from fedpress.stages.federate.memories import SERVER, memories_of
from tests.stages.federate.test_sides import NAMES, common

KEPT = {"value": torch.arange(3)}


def memory_of_a(begin, folder):
    return memories_of(begin, NAMES, folder)[0]["a"]


def test_memories_of_other_settings_are_not_taken_up(tmp_path):
    memory_of_a(common(), tmp_path).save(1, KEPT)
    memory_of_a(common(lr=0.5), tmp_path / "elsewhere").save(1, {"value": torch.zeros(3)})
    DiskState(tmp_path / "another" / "00000").save(1, {"value": torch.ones(3)})
    assert torch.equal(memory_of_a(common(), tmp_path).load(2)["value"], KEPT["value"])
    assert memory_of_a(common(lr=0.5), tmp_path).load(2) == {}


def test_the_only_folder_is_that_of_a_run_of_an_older_version(tmp_path):
    DiskState(tmp_path / "0f0e0d0c0b0a0908" / "00000").save(1, KEPT)
    assert torch.equal(memory_of_a(common(), tmp_path).load(2)["value"], KEPT["value"])


def test_every_client_and_the_server_have_a_memory_of_their_own(tmp_path):
    for folder in (None, tmp_path):
        names = [SERVER, *NAMES]  # a client may have any name
        memories, server = memories_of(common(), names, folder)
        assert list(memories) == names
        for one in (SERVER, "a"):
            memories[one].save(1, KEPT)
            assert memories[one].load(2)
        assert all(memory.load(2) == {} for memory in (*map(memories.get, ("b", "c", "d")), server))


def test_a_key_with_its_default_does_not_change_where_memories_lie(tmp_path):
    memory_of_a(common(), tmp_path).save(1, KEPT)
    DiskState(tmp_path / "another" / "00000").save(1, {"value": torch.ones(3)})
    said = common(momentum=0.0, patience=0)
    assert torch.equal(memory_of_a(said, tmp_path).load(2)["value"], KEPT["value"])
