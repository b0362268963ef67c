import pytest
import torch

from fedpress.errors import WireError
from fedpress.federate.downlink import LOST, Broadcast, Downlink
from fedpress.federate.transforms import Key, Quantize

SIZE = 5000
CLIENTS = ["a", "b", "c"]


def downlink(rate=1.0):
    return Downlink(SIZE, chain=(Quantize(rate=rate),), first=(Quantize(bits=8),))


def models(count, seed=0):
    """A model that takes `count` steps of training."""
    chance = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, SIZE, generator=chance) * 0.1
    steps[0] += torch.randn(SIZE, generator=chance)
    return steps.cumsum(0)


def receive(agreed, broadcast, client, round, held=None, version=0):
    return agreed.receive(broadcast.tensors(client, round), Key(1, round, client), held, version)


def test_a_client_that_is_always_asked_holds_what_the_server_thinks_it_holds():
    agreed = downlink()
    broadcast, held = Broadcast.open(agreed, 1, CLIENTS, {}), None
    for round, params in enumerate(models(6), start=1):
        broadcast.code(round, params)
        held = receive(agreed, broadcast, "a", round, held, round - 1)
        broadcast.arrived(["a"], {}, round)
        assert torch.equal(held, broadcast.held)
        assert float((held - params).norm() / params.norm()) < 0.15


def test_what_one_difference_lost_the_next_make_up_for():
    agreed = downlink(rate=0.3)
    broadcast, last = Broadcast.open(agreed, 1, CLIENTS, {}), models(1)[0]
    errors = []
    for round in range(1, 30):
        broadcast.code(round, last)
        errors.append(float((broadcast.held - last).norm()))
    assert errors[-1] < 0.05 * errors[0]


def test_a_client_that_missed_rounds_is_sent_their_differences_too():
    agreed = downlink()
    broadcast = Broadcast.open(agreed, 1, CLIENTS, {})
    held = None
    for round, params in enumerate(models(5), start=1):
        broadcast.code(round, params)
        if round in (1, 4):
            held = receive(agreed, broadcast, "b", round, held, 0 if round == 1 else 1)
            broadcast.arrived(["b"], {}, round)
            assert torch.equal(held, broadcast.held)
    assert {name.partition("/")[0] for name in broadcast.tensors("b", 5)} == {"5"}
    assert {name.partition("/")[0] for name in broadcast.tensors("c", 5)} == set("12345")


def test_a_client_that_has_fallen_behind_is_sent_the_whole_model():
    agreed = downlink(rate=8.0)
    broadcast = Broadcast.open(agreed, 1, CLIENTS, {})
    for round, params in enumerate(models(12), start=1):
        broadcast.code(round, params)
    sent = broadcast.tensors("a", 12)
    assert list(sent) == ["params"]
    assert torch.equal(receive(agreed, broadcast, "a", 12), broadcast.held)
    assert sum(broadcast.sizes.values()) <= 4 * SIZE


def test_a_client_that_lost_its_memory_says_so_and_is_sent_the_whole_model_next():
    agreed = downlink()
    broadcast = Broadcast.open(agreed, 1, CLIENTS, {})
    for round, params in enumerate(models(3), start=1):
        broadcast.code(round, params)
        broadcast.arrived(["a"] if round < 3 else [], {}, round)
    with pytest.raises(WireError, match=LOST) as found:
        receive(agreed, broadcast, "a", 3, None, 0)
    broadcast.arrived(["a"], {"a": str(found.value)}, 3)
    assert list(broadcast.tensors("a", 4)) == ["params"]


def test_a_client_that_is_ahead_skips_what_it_has():
    agreed = downlink()
    broadcast = Broadcast.open(agreed, 1, CLIENTS, {})
    steps = models(3)
    broadcast.code(1, steps[0])
    first = receive(agreed, broadcast, "a", 1)
    broadcast.code(2, steps[1])  # the answer to round 1 was lost: the server believes it holds nothing
    assert torch.equal(receive(agreed, broadcast, "a", 2, first, 1), broadcast.held)


def test_the_state_goes_on_to_the_same_bits():
    agreed, steps = downlink(), models(6)
    one = Broadcast.open(agreed, 1, CLIENTS, {})
    for round, params in enumerate(steps, start=1):
        one.code(round, params)
        one.arrived(["b"], {}, round)
    two = Broadcast.open(agreed, 1, CLIENTS, {})
    for round, params in enumerate(steps, start=1):
        two = Broadcast.open(agreed, 1, CLIENTS, two.state() if round > 1 else {})
        two.code(round, params)
        two.arrived(["b"], {}, round)
    assert one.state().keys() == two.state().keys()
    assert all(torch.equal(t, two.state()[name]) for name, t in one.state().items())
    assert one.versions == two.versions == {"a": 0, "b": 6, "c": 0}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, LOST),
        ({"params": torch.ones(3)}, r"fit\.params: got torch.float32 \[3\]"),
        ({"params": torch.full((SIZE,), float("nan"))}, "NaN"),
        ({"params": torch.ones(SIZE), "1/values": torch.ones(SIZE)}, "send one of them"),
        ({"values": torch.ones(SIZE)}, r"fit\.tensors\.values"),
        ({"x/values": torch.ones(SIZE)}, r"fit\.tensors\.x/values"),
        ({"2/values": torch.ones(SIZE)}, LOST),
        ({"1/values": torch.ones(SIZE)}, r"values: got torch.float32"),
    ],
)
def test_a_faulty_request_is_a_wire_error(tensors, reason):
    with pytest.raises(WireError, match=reason):
        downlink().receive(tensors, Key(1, 1, "a"), None, 0)
