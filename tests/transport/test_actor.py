import pickle
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from fedpress.federation import DiskState, InMemoryState
from fedpress.federation.client_state import load_json, save_json
from fedpress.transport.actor import Host, RecordedState, Stored, Write
from fedpress.wire import Message, pack, unpack


@dataclass
class Counting:
    """A client that counts its requests, and remembers which kinds came."""

    name: str
    common: object = None
    memory: object = field(default_factory=InMemoryState)
    kinds: list = field(default_factory=list)

    def handle(self, request):
        message = unpack(request)
        self.kinds.append(message.kind)
        if message.kind == "bad":
            raise ValueError("disk is gone")
        asked = 1 + load_json(self.memory, "asked").get("count", 0)
        save_json(self.memory, "asked", {"count": asked})
        return pack(Message(message.kind, {"asked": asked, "kinds": self.kinds, "c": self.common}))


def shared(device, words="shared"):
    return f"{words} on {device}"


def broken(device):
    raise ImportError("no module 'nets'")


def host(**clients):
    threads = torch.get_num_threads()
    made = Host()
    sides = pickle.dumps(clients or {"a": Counting("a", memory=None)})
    assert made.load(pickle.dumps(shared), sides, device="cpu", threads=threads) == ""
    return made


def asked(made, kind="m", stored=None):
    reply = made.answer("a", pack(Message(kind)), stored)
    return unpack(reply.data), reply.writes


def test_what_a_client_stores_comes_back_with_its_answer():
    made, memory = host(), InMemoryState()
    message, writes = asked(made, stored=Stored(InMemoryState()))
    assert message.header["asked"] == 1
    assert message.header["c"] == "shared on cpu"
    for write in writes:
        write.store(memory)
    assert load_json(memory, "asked") == {"count": 1}
    assert asked(made)[0].header["asked"] == 2


def test_a_client_goes_on_in_a_new_process_from_what_was_stored():
    memory = InMemoryState()
    save_json(memory, "asked", {"count": 6})
    stored = Stored(memory.copied(), (pack(Message("agree")), pack(Message("bad"))))
    message, writes = asked(host(), stored=stored)
    # What it stores while the earlier messages are repeated comes back too.
    assert message.header["asked"] == 8
    assert len(writes) == 2
    assert message.header["kinds"] == ["agree", "bad", "m"]
    assert load_json(memory, "asked") == {"count": 6}


def test_a_client_is_set_back_when_its_state_is_given_again():
    made = host()
    asked(made, stored=Stored(InMemoryState()))
    assert asked(made)[0].header["asked"] == 2
    message, _ = asked(made, stored=Stored(InMemoryState()))
    assert message.header["asked"] == 1


def test_a_client_that_raises_answers_with_an_error():
    made = host()
    message, writes = asked(made, "bad", Stored(InMemoryState()))
    assert message.header["reason"] == "ValueError: disk is gone"
    assert writes == ()


def test_what_cannot_be_loaded_is_told():
    made = Host()
    sides = pickle.dumps({})
    why = made.load(pickle.dumps(broken), sides, device="cpu", threads=torch.get_num_threads())
    assert why == "ImportError: no module 'nets'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told():
    why = Host().load(b"", b"", device="cuda", threads=torch.get_num_threads())
    assert "no GPU" in why


def test_a_part_of_a_large_tensor_travels_alone():
    memory = RecordedState(InMemoryState())
    memory.save(1, {"part": torch.zeros(100_000)[:2]})
    (write,) = memory.taken()
    assert len(pickle.dumps(write)) < 2000


@pytest.mark.parametrize("kind", [lambda path: InMemoryState(), DiskState])
def test_a_copy_of_a_storage_has_all_of_it_and_is_its_own(kind, tmp_path):
    memory = kind(tmp_path / "memory")
    assert memory.copied().rounds == memory.copied().notes == {}
    for write in [Write(1, "", {"a": torch.ones(2)}), Write(2, "", {}), Write(None, "note-x", {})]:
        write.store(memory)
    save_json(memory, "asked", {"count": 3})
    copy = RecordedState(memory.copied()).copied()
    assert sorted(copy.rounds) == [1, 2]
    assert torch.equal(copy.load(2)["a"], torch.ones(2))
    assert load_json(copy, "asked") == {"count": 3}
    copy.save(9, {"b": torch.zeros(1)})
    save_json(copy, "asked", {})
    assert memory.load(10) == {}
    assert load_json(memory, "asked") == {"count": 3}


def test_a_function_with_arguments_makes_what_clients_share():
    made, threads = Host(), torch.get_num_threads()
    build = pickle.dumps(partial(shared, words="all"))
    sides = pickle.dumps({"a": Counting("a", memory=None)})
    assert made.load(build, sides, device="cpu", threads=threads) == ""
    assert asked(made, stored=Stored(InMemoryState()))[0].header["c"] == "all on cpu"
