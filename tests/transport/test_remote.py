"""The remote transport over a link in memory: beside the local one, and with all that gets lost."""

import json

import pytest
import torch

from fedpress.errors import WireError
from fedpress.federation.exchange import exchange
from fedpress.transport import LocalTransport, link, remote
from fedpress.transport.link import Lost, Pace, Parcel
from fedpress.transport.remote import Presence, RemoteTransport
from fedpress.wire import Message, pack, unpack
from tests.federation.federation import Federation, run_rounds
from tests.transport.memory_link import MemoryClient, MemoryLink


def echo(data):
    return pack(Message("echo", unpack(data).header, unpack(data).tensors))


class Time:
    """A clock that only moves when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += max(seconds, 0.001)


@pytest.fixture
def time(monkeypatch):
    clock = Time()
    monkeypatch.setattr(remote, "time", clock)
    monkeypatch.setattr(remote, "Pace", lambda: Pace(clock.monotonic))
    return clock


def network(*names, handle=echo, **settings):
    """Returns a transport, its link, and what it tells."""
    wire = MemoryLink({name: MemoryClient(handle) for name in names})
    told = []
    made = RemoteTransport(wire, names, "aa" * 8, told=told.append, **settings)
    return made, wire, told


def test_rounds_give_the_bits_and_bytes_of_the_local_transport(time):
    local, other = Federation(3), Federation(3)
    wanted = list(run_rounds(local, 2, transport=local.transport))
    clients = {name: MemoryClient(client.handle) for name, client in other.clients.items()}
    over = RemoteTransport(MemoryLink(clients), list(clients), "aa" * 8)
    found = list(run_rounds(other, 2, transport=over))
    for got, want in zip(found, wanted, strict=True):
        assert got.params.equal(want.params)
        assert (got.bytes_up, got.bytes_down) == (want.bytes_up, want.bytes_down)


def test_answers_and_bytes_are_those_of_the_local_transport(time):
    over, _, _ = network("a", "b", "c")
    local = LocalTransport(dict.fromkeys("abc", echo))
    questions = {
        "a": Message("m", {"x": 1}),
        "b": Message("m", {"x": 10}, {"t": torch.randn(100)}),
        "c": Message("m", {}, {"t": torch.zeros(0)}),
    }
    found, wanted = dict(exchange(over, questions)), dict(exchange(local, questions))
    assert over.clients() == local.clients() == ["a", "b", "c"]
    assert over.traffic == local.traffic
    for name, want in wanted.items():
        assert pack(found[name]) == pack(want)


def test_an_answer_waits_until_its_own_request_is_asked_for(time):
    over, _, _ = network("a", "b")
    early = over.send("a", Message("m", {"n": 1}))
    late = over.send("a", Message("m", {"n": 2}))
    assert dict(exchange(over, {"b": Message("m", {"n": 3})}))["b"].header == {"n": 3}
    assert over.receive([late])[2].header == {"n": 2}
    assert over.receive([early, late])[2].header == {"n": 1}
    assert over.receive([early, late]) is None


def test_equal_messages_travel_as_one_body_in_one_batch(time):
    over, wire, _ = network("a", "b", "c")
    message = Message("m", {}, {"t": torch.ones(1000)})
    list(exchange(over, dict.fromkeys("abc", message)))
    assert wire.bodies == [1]
    assert over.traffic.down == 3 * len(pack(message))


def test_two_calls_of_one_client_are_two_batches(time):
    over, wire, _ = network("a", "b")
    requests = [over.send(name, Message("m")) for name in ("a", "a", "b")]
    for request in requests:
        over.receive([request])
    assert len(wire.bodies) == 2
    assert len(wire.clients["a"].calls) == 2


def test_a_lost_call_is_sent_again_under_the_same_name(time):
    over, wire, _ = network("a")
    wire.lose = 1
    ((_, reply),) = exchange(over, {"a": Message("m", {"n": 1})})
    assert reply.header == {"n": 1}
    first, second = wire.clients["a"].calls
    assert first == second


def test_a_call_that_got_no_ticket_is_sent_when_its_client_is_there(time):
    over, wire, _ = network("a")
    wire.refuse = 1
    ((_, reply),) = exchange(over, {"a": Message("m")})
    assert reply.kind == "echo"
    assert len(wire.clients["a"].calls) == 1


def test_a_ping_that_got_no_ticket_is_sent_again(time):
    over, wire, _ = network("a")
    client = wire.clients["a"]
    client.works = False
    request = over.send("a", Message("m"))
    assert over.receive([request], timeout=1.0) is None
    wire.refuse = 1
    assert over.receive([request], timeout=5.0) is None
    client.start_again()
    client.works = True
    assert over.receive([request])[2].kind == "echo"


def test_a_client_at_work_is_called_once_however_long_it_takes(time):
    over, wire, told = network("a")
    client = wire.clients["a"]
    client.works = False
    request = over.send("a", Message("m"))
    assert over.receive([request], timeout=3600.0) is None
    client.works = True
    assert over.receive([request])[2].kind == "echo"
    assert len(client.calls) == 1
    assert told == []


def test_a_client_that_was_started_again_gets_its_call_again(time):
    over, wire, told = network("a")
    client = wire.clients["a"]
    client.works = False
    request = over.send("a", Message("m"))
    over.receive([request], timeout=10.0)
    client.start_again()
    client.works = True
    assert over.receive([request])[2].kind == "echo"
    assert client.calls == [client.calls[0]] * 2
    assert told == ["client 'a' was started again"]


def test_an_offline_client_is_given_up_after_its_time(time):
    over, wire, told = network("a", "b", lost_after=20.0)
    wire.clients["a"].online = False
    replies = dict(exchange(over, {name: Message("m") for name in "ab"}))
    assert replies["b"].kind == "echo"
    assert replies["a"].kind == "error"
    assert replies["a"].header["reason"] == "lost: it is offline for more than 20 s"
    assert 20 < time.now < 30
    assert all("'a' is offline" in sentence for sentence in told)


def test_the_mark_of_a_client_changes_when_it_is_started_again(time):
    over, wire, told = network("a")
    assert over.mark("a") == ""
    first = over.mark("a")
    assert first
    assert over.mark("a") == first
    wire.clients["a"].start_again()
    over.mark("a")
    assert over.mark("a") not in ("", first)
    assert told == ["client 'a' was started again"]
    # Nothing was called, and nobody who is offline is waited for.
    assert wire.clients["a"].calls == []
    wire.clients["a"].online = False
    assert over.mark("a") == over.mark("a") != ""


def test_no_client_is_named_where_only_the_server_may_know_who_is_asked(time, caplog):
    caplog.set_level("DEBUG", "fedpress")
    over, wire, told = network("anna", "ben", lost_after=20.0, hidden=True)
    wire.clients["anna"].online = False
    wire.clients["ben"].works = False
    requests = [over.send(name, Message("m")) for name in ("anna", "ben")]
    over.receive(requests, timeout=10.0)
    wire.clients["ben"].start_again()
    wire.clients["ben"].works = True
    wire.lose = 1
    for request in requests:
        over.receive([request])
    assert "a client of the round was started again" in told
    assert any("is offline" in sentence for sentence in told)
    said = "".join(told) + caplog.text
    assert "was lost" in said
    assert "anna" not in said
    assert "ben" not in said


def test_a_client_that_comes_back_in_time_is_not_given_up(time):
    over, wire, _ = network("a", lost_after=20.0)
    client = wire.clients["a"]
    client.online = False
    request = over.send("a", Message("m"))
    assert over.receive([request], timeout=15.0) is None
    client.online = True
    client.start_again()
    assert over.receive([request])[2].kind == "echo"


def test_a_silent_client_is_not_waited_for_longer_than_asked(time):
    over, wire, _ = network("a")
    wire.clients["a"].works = False
    request = over.send("a", Message("m"))
    assert over.receive([request], timeout=2.0) is None
    assert time.now == pytest.approx(2.0, abs=0.01)
    assert over.receive([request], timeout=0.0) is None


def test_an_answer_after_cancelling_is_dropped(time):
    over, wire, _ = network("a")
    client = wire.clients["a"]
    client.works = False
    late = over.send("a", Message("m", {"n": 1}))
    over.receive([late], timeout=1.0)
    over.cancel([late])
    client.works = True
    next_one = over.send("a", Message("m", {"n": 2}))
    _, answered, reply = over.receive([late, next_one])
    assert (answered, reply.header) == (next_one, {"n": 2})
    assert over.receive([late]) is None


def test_a_call_that_is_cancelled_before_it_left_is_never_sent(time):
    over, wire, _ = network("a")
    request = over.send("a", Message("m"))
    over.cancel([request])
    assert over.receive([request]) is None
    assert wire.clients["a"].calls == []


def test_two_answers_to_one_call_are_one_answer(time):
    over, wire, _ = network("a")
    client = wire.clients["a"]
    client.works = False
    request = over.send("a", Message("m"))
    over.receive([request], timeout=1.0)
    client.works = True
    wire.poll(["ticket 1"])
    twice = Parcel("answer", client.calls[0], "aa" * 8, pack(Message("again")))
    wire.answer("ticket 1", twice)
    assert over.receive([request])[2].kind == "again"
    wire.answer("ticket 1", twice)
    assert over.receive([request], timeout=5.0) is None


@pytest.mark.parametrize(
    "answer",
    [
        Parcel("answer", "another call", "aa" * 8, pack(Message("m"))),
        Parcel("pong", "another call", "", b"{}"),
        Parcel("answer", "", "", b""),
    ],
)
def test_the_answer_to_another_call_is_an_error_of_that_client(time, answer):
    over, wire, _ = network("a", "b")
    wire.clients["a"].works = False
    requests = [over.send(name, Message("m")) for name in "ab"]
    wire.answer("ticket 1", answer)
    replies = {over.receive(requests)[0]: None for _ in requests}
    assert set(replies) == {"a", "b"}
    assert over.traffic.up == len(echo(pack(Message("m"))))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"", "message.length"),
        (b"x" * 60, "message.magic"),
        (pack(Message("m", {}, {"t": torch.zeros(999)})), "max_bytes"),
    ],
)
def test_a_reply_that_cannot_be_read_is_an_error_message(time, reply, reason):
    over, _, _ = network("a", handle=lambda data: reply, max_bytes=1000)
    ((_, got),) = exchange(over, {"a": Message("m")})
    assert got.kind == "error"
    assert reason in got.header["reason"]
    assert over.traffic.up == len(reply)


@pytest.mark.parametrize(
    "pong",
    [
        b"",
        b"\xff",
        b"[]",
        b"3",
        b"{}",
        b'{"name": "a", "boot": "b", "working": 3, "fedpress": ""}',
        b"[" * 100_000,
        b'{"name": "a", "boot": "b", "fedpress": ""}',
    ],
)
def test_a_pong_that_is_none_changes_nothing(time, pong):
    over, wire, _ = network("a")
    client = wire.clients["a"]
    client.works = False
    request = over.send("a", Message("m"))
    over.receive([request], timeout=1.0)
    wire.poll = lambda tickets: {
        t: Parcel("pong", "", "", pong) for t in tickets if t != "ticket 1"
    }
    assert over.receive([request], timeout=10.0) is None
    del wire.poll
    client.works = True
    assert over.receive([request])[2].kind == "echo"
    with pytest.raises(WireError, match="pong: not a pong"):
        Presence.from_bytes(pong)


def test_a_presence_survives_its_bytes():
    presence = Presence("ä", "0123", ("x-1", "x-2"), "3.0")
    assert Presence.from_bytes(presence.to_bytes()) == presence
    assert json.loads(presence.to_bytes())["working"] == ["x-1", "x-2"]


def test_the_answers_of_an_earlier_server_are_no_answers_to_this_one(time):
    one, wire, _ = network("a")
    other = RemoteTransport(wire, ["a"], "aa" * 8)
    for transport in (one, other):
        list(exchange(transport, {"a": Message("m")}))
    first, second = wire.clients["a"].calls
    assert first != second


def test_a_link_that_fails_ends_the_wait(time):
    over, wire, _ = network("a")

    def fails(tickets):
        raise KeyboardInterrupt

    wire.poll = fails
    with pytest.raises(KeyboardInterrupt):
        list(exchange(over, {"a": Message("m")}))


def test_pauses_grow_with_the_wait_between_two_bounds():
    now = 0.0
    pace = Pace(lambda: now)
    assert pace.seconds() == Pace.SHORTEST
    now = 10.0
    assert pace.seconds() == pytest.approx(0.5)
    now = 1e6
    assert pace.seconds() == Pace.LONGEST
    pace.reset()
    assert pace.seconds() == Pace.SHORTEST
    assert link.Pace is Pace


def test_a_client_whose_answers_are_lost_for_ever_does_not_hold_the_round(time):
    over, wire, _ = network("a", "b")
    wire.clients["a"].works = False
    poll = wire.poll
    lost = Lost("it did not arrive")
    of_a = set()

    def losing(tickets):
        of_a.update(t for t in tickets if wire.waiting.get(t, ("", "", 0))[1] == "a")
        return {**poll(tickets), **{t: lost for t in tickets if t in of_a}}

    wire.poll = losing
    requests = [over.send(name, Message("m")) for name in "ab"]
    assert over.receive(requests)[0] == "b"


def test_calls_to_a_client_that_is_cut_off_wait_until_it_is_back(time):
    over, wire, _ = network("a", lost_after=60.0)
    poll, back = wire.poll, 40.0
    began = time.monotonic()

    def unavailable(tickets):
        # As Flower says at once of a node that is offline.
        wire.clients["a"].online = wire.clients["a"].works = time.monotonic() > began + back
        if wire.clients["a"].online:
            return poll(tickets)
        return dict.fromkeys(tickets, Lost("the node is unavailable"))

    wire.poll = unavailable
    request = over.send("a", Message("m"))
    assert over.receive([request]) is not None
    assert back < time.monotonic() - began < back + 10
    assert over.receive([request]) is None

    began, back = time.monotonic(), 1000.0
    request = over.send("a", Message("m"))
    _, _, message = over.receive([request])
    assert "offline" in str(message.header)
    assert 60 <= time.monotonic() - began < 70
