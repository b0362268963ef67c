import pytest
import torch

from fedpress.codecs import Key, Quantize
from fedpress.errors import WireError
from fedpress.federation import downlink as downlinks
from fedpress.federation.downlink import LOST_MODEL, SERVER, Broadcast, Downlink

SIZE = 1000
CLIENTS = ["a", "b", "c"]


def agreed(rate=2.0):
    return Downlink(SIZE, chain=(Quantize(rate=rate),), first=(Quantize(bits=8),))


def models(count, seed=0):
    """A model that takes `count` steps of training."""
    chance = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, SIZE, generator=chance) * 0.1
    steps[0] += torch.randn(SIZE, generator=chance)
    return list(enumerate(steps.cumsum(0), start=1))


class Receivers:
    """Clients that hold what they were sent."""

    def __init__(self, downlink):
        self.downlink, self.held = downlink, {}

    def receive(self, sent, round):
        for client, (version, tensors) in sent.items():
            held = self.held.get((client, version))
            assert version == 0 or held is not None
            self.held[client, round] = self.downlink.decode(tensors, held, Key(1, round, SERVER))


def begin(rate=2.0):
    downlink = agreed(rate)
    return Broadcast.open(downlink, 1, CLIENTS, {}), Receivers(downlink)


@pytest.mark.parametrize("cohorts", [["abc"] * 6, ["a", "ab", "c", "b", "ac", "abc"]])
def test_clients_hold_what_the_server_thinks_they_hold(cohorts):
    broadcast, receivers = begin()
    for (round, params), cohort in zip(models(6), cohorts, strict=True):
        receivers.receive(broadcast.encode_for(round, params, list(cohort)), round)
        broadcast.mark_arrived({})
        for client in cohort:
            held = receivers.held[client, round]
            assert torch.equal(held, broadcast.copies[broadcast.holds[client]])
            assert float((held - params).norm() / params.norm()) < 0.1


def test_what_one_difference_lost_the_next_make_up_for():
    broadcast, _ = begin(rate=1.0)
    (_, before), (_, params) = models(2)
    broadcast.encode_for(1, before, ["a"])
    broadcast.mark_arrived({})
    errors = []
    for round in range(2, 8):
        broadcast.encode_for(round, params, ["a"])
        broadcast.mark_arrived({})
        errors.append(float((broadcast.copies[broadcast.holds["a"]] - params).norm()))
    assert errors[-1] < 0.3 * errors[0]


def test_clients_asked_in_the_same_rounds_share_one_copy_and_one_message():
    broadcast, _ = begin()
    for round, params in models(4):
        sent = broadcast.encode_for(round, params, CLIENTS)
        assert len({id(tensors) for _, tensors in sent.values()}) == 1
        broadcast.mark_arrived({})
        assert len(broadcast.copies) == 1


def test_a_client_whose_answer_was_lost_is_sent_the_difference_to_what_it_held_before():
    broadcast, receivers = begin()
    steps = models(3)
    receivers.receive(broadcast.encode_for(1, steps[0][1], ["a"]), 1)
    broadcast.mark_arrived({})
    broadcast.encode_for(2, steps[1][1], ["a"])
    broadcast.mark_arrived({"a": "no reply came"})
    sent = broadcast.encode_for(3, steps[2][1], ["a"])
    assert sent["a"][0] == 1
    receivers.receive(sent, 3)
    broadcast.mark_arrived({})
    assert torch.equal(receivers.held["a", 3], broadcast.copies[broadcast.holds["a"]])


def test_a_client_that_lost_its_model_is_sent_the_whole():
    broadcast, _ = begin()
    (_, one), (_, two), (_, three) = models(3)
    broadcast.encode_for(1, one, ["a"])
    broadcast.mark_arrived({})
    broadcast.encode_for(2, two, ["a"])
    broadcast.mark_arrived({"a": f"fit.from: gone; {LOST_MODEL}"})
    assert broadcast.encode_for(3, three, ["a"])["a"][0] == 0


def test_those_who_were_not_asked_for_longest_fall_behind_where_copies_are_too_many(monkeypatch):
    monkeypatch.setattr(downlinks, "MAX_COPY_BYTES", 2 * 4 * SIZE)
    broadcast, _ = begin()
    for (round, params), client in zip(models(3), CLIENTS, strict=True):
        broadcast.encode_for(round, params, [client])
        broadcast.mark_arrived({})
    assert len(broadcast.copies) == 2
    sent = broadcast.encode_for(4, params, CLIENTS)
    assert [sent[client][0] for client in CLIENTS] == [0, 2, 3]


def test_the_state_goes_on_to_the_same_bits():
    one, _ = begin()
    two, _ = begin()
    for round, params in models(6):
        cohort = CLIENTS[round % 3 :]
        two = Broadcast.open(agreed(), 1, CLIENTS, two.state() if round > 1 else {})
        for each in (one, two):
            each.encode_for(round, params, cohort)
            each.mark_arrived({"b": "gone"} if round == 3 else {})
    assert one.state().keys() == two.state().keys()
    assert all(torch.equal(t, two.state()[name]) for name, t in one.state().items())
    assert one.holds == two.holds


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "'values' is missing"),
        ({"params": torch.ones(SIZE)}, "'values' is missing"),
        ({"values": torch.ones(SIZE)}, r"values: got torch.float32"),
        ({"values": torch.ones(3, dtype=torch.int8)}, "values"),
    ],
)
def test_a_faulty_difference_is_a_wire_error(tensors, reason):
    with pytest.raises(WireError, match=reason):
        agreed().decode(tensors, None, Key(1, 1, SERVER))
