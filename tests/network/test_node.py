"""The client's thread over a wire that a test holds: connecting, pings, calls and lost answers."""

import time
from dataclasses import dataclass

import pytest

from fedpress.errors import NetworkError
from fedpress.network import node
from fedpress.network.client import serve
from fedpress.network.gate import NoPolicy
from fedpress.network.node import Correspondence
from fedpress.transport.link import Parcel
from fedpress.transport.remote import Presence

PATIENCE = 5.0


@dataclass
class Incoming:
    parcel: Parcel
    number: int = 0


class Wire:
    """What the thread uses; a test puts parcels into `comes` and reads `replies`."""

    def __init__(self):
        self.comes = []
        self.replies = []
        self.connected = 0
        self.closed = False
        self.connecting = []  # errors of the next attempts
        self.receiving = []  # errors of the next receives
        self.replying = []

    def connect(self):
        if self.connecting:
            raise self.connecting.pop(0)
        self.connected += 1

    def receive(self):
        if self.receiving:
            raise self.receiving.pop(0)
        return self.comes.pop(0) if self.comes else None

    def reply(self, incoming, parcel, seconds=0.0):
        if self.replying:
            raise self.replying.pop(0)
        self.replies.append((incoming, parcel))
        return True

    def close(self):
        self.closed = True


def lost(text="cut off", **more):
    return NetworkError(text, place="server:1", cure="wait", **more)


def call(request="x-1", body=b"question", number=0):
    return Incoming(Parcel("call", request, "aa" * 8, body), number)


def ping(number=0):
    return Incoming(Parcel("ping", "p", "", b""), number)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def started(monkeypatch):
    """Returns a function that starts the thread over a wire; all are stopped at the end."""
    monkeypatch.setattr(node.secrets, "randbelow", lambda n: 0)
    made = []

    def start(wire, told=None):
        made.append(Correspondence(wire, "a", (told if told is not None else []).append))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.stop()


def test_a_call_is_handed_over_and_its_answer_sent(started):
    wire = Wire()
    here = started(wire)
    wire.comes.append(call())
    taken = here.next_call(PATIENCE)
    assert taken.parcel.body == b"question"
    here.answer(taken, b"answer", 0.1)
    until(lambda: wire.replies)
    assert wire.replies == [(taken, Parcel("answer", "x-1", "aa" * 8, b"answer"))]


def test_no_call_within_the_time_is_none(started):
    assert started(Wire()).next_call(0.05) is None


def test_a_ping_is_answered_while_a_call_is_worked_on(started):
    wire = Wire()
    here = started(wire)
    wire.comes.append(call())
    here.next_call(PATIENCE)
    wire.comes.append(ping())
    until(lambda: wire.replies)
    ((_, parcel),) = wire.replies
    assert parcel.what == "pong"
    presence = Presence.from_bytes(parcel.body)
    assert (presence.name, presence.boot, presence.working) == ("a", here.boot, ("x-1",))


def test_a_pong_no_longer_names_a_call_that_is_answered(started):
    wire = Wire()
    here = started(wire)
    wire.comes.append(call())
    here.answer(here.next_call(PATIENCE), b"answer", 0.0)
    until(lambda: wire.replies)
    wire.comes.append(ping())
    until(lambda: len(wire.replies) == 2)
    assert Presence.from_bytes(wire.replies[1][1].body).working == ()


def test_a_call_that_comes_again_while_it_is_worked_on_is_answered_once_to_the_later_one(started):
    wire = Wire()
    here = started(wire)
    wire.comes += [call(number=1), call(number=2)]
    taken = here.next_call(PATIENCE)
    until(lambda: not wire.comes)
    wire.comes.append(ping())
    until(lambda: wire.replies)
    here.answer(taken, b"answer", 0.0)
    until(lambda: len(wire.replies) == 2)
    assert wire.replies[1][0].number == 2
    assert here.next_call(0.05) is None


def test_a_call_that_comes_again_after_its_answer_gets_the_same_bytes_without_work(started):
    wire = Wire()
    here = started(wire)
    wire.comes.append(call())
    here.answer(here.next_call(PATIENCE), b"answer", 0.0)
    until(lambda: wire.replies)
    wire.comes.append(call(number=2))
    until(lambda: len(wire.replies) == 2)
    assert wire.replies[1][0].number == 2
    assert wire.replies[1][1].body == b"answer"
    assert here.next_call(0.05) is None


def test_an_answer_whose_connection_failed_is_there_when_it_is_asked_for_again(started):
    wire = Wire()
    told = []
    here = started(wire, told)
    wire.comes.append(call())
    wire.replying.append(lost())
    here.answer(here.next_call(PATIENCE), b"answer", 0.0)
    until(lambda: wire.connected == 2)
    assert wire.replies == []
    wire.comes.append(call(number=2))
    until(lambda: wire.replies)
    assert wire.replies[0][1].body == b"answer"
    assert any("the connection was lost" in sentence for sentence in told)


def test_few_answers_are_kept(started, monkeypatch):
    monkeypatch.setattr(node, "REMEMBERED_BYTES", 10)
    wire = Wire()
    here = started(wire)
    for number, body in enumerate((b"12345", b"12345", b"1", b"x" * 100)):
        wire.comes.append(call(f"x-{number}"))
        here.answer(here.next_call(PATIENCE), body, 0.0)
        until(lambda number=number: len(wire.replies) == number + 1)
    # The newest alone, because it is longer than all that may be kept.
    assert list(here.answered) == ["x-3"]
    for number in range(4, 20):
        wire.comes.append(call(f"x-{number}"))
        here.answer(here.next_call(PATIENCE), b"", 0.0)
        until(lambda number=number: len(wire.replies) == number + 1)
    assert len(here.answered) == node.REMEMBERED


def test_it_connects_again_for_as_long_as_it_takes_and_says_each_reason_once(started, monkeypatch):
    monkeypatch.setattr(node, "LONGEST_WAIT", 0.01)
    wire = Wire()
    wire.connecting = [lost(), lost(), lost("the server does not list the key of this client")]
    told = []
    started(wire, told)
    until(lambda: wire.connected)
    until(lambda: "connected" in told)
    assert [sentence.split(":")[0] for sentence in told] == [
        "waiting for the server",
        "waiting for the server",
        "connected",
    ]
    assert "does not list the key" in told[1]
    wire.receiving.append(lost())
    until(lambda: wire.connected == 2)


def test_a_refusal_ends_the_wait_with_its_error(started):
    wire = Wire()
    wire.connecting = [lost("the server's certificate has expired", refused=True)]
    here = started(wire)
    with pytest.raises(NetworkError, match="expired"):
        here.next_call(PATIENCE)


def test_a_client_that_was_let_in_before_waits_for_the_server_to_do_so_again(started):
    wire, told = Wire(), []
    started(wire, told)
    until(lambda: wire.connected)
    # As after a jump of this machine's clock, which makes certificates and signatures wrong.
    wire.connecting = [lost("this machine's clock is wrong", refused=True)]
    wire.receiving.append(lost())
    until(lambda: wire.connected == 2)
    assert any("clock is wrong" in sentence for sentence in told)


def test_a_fault_of_the_thread_is_raised_where_calls_are_waited_for(started):
    wire = Wire()
    wire.receiving.append(ZeroDivisionError("fault"))
    with pytest.raises(ZeroDivisionError):
        started(wire).next_call(PATIENCE)


@pytest.mark.parametrize("what", ["answer", "pong", "", "import os"])
def test_parcels_of_another_kind_are_dropped(started, what):
    wire = Wire()
    here = started(wire)
    wire.comes += [Incoming(Parcel(what, "x", "", b"")), ping()]
    until(lambda: wire.replies)
    assert here.next_call(0.05) is None


def test_stopping_says_goodbye(started):
    wire = Wire()
    here = started(wire)
    until(lambda: wire.connected)
    here.stop()
    assert wire.closed


def test_serve_answers_calls_with_the_sessions_and_tells_what_it_did():
    class Sessions:
        gate = NoPolicy()

        def answer(self, session, body):
            assert session == "aa" * 8
            return body.upper()

    wire = Wire()
    wire.comes += [call("x-1"), call("x-2")]
    here = Correspondence(wire, "a", lambda sentence: None)
    found = []
    for answered in serve(here, Sessions(), stopped=lambda: len(found) == 2):
        found.append(answered)
    assert [(one.bytes_in, one.bytes_out) for one in found] == [(8, 8), (8, 8)]
    assert wire.replies[0][1].body == b"QUESTION"
    assert wire.closed


def test_serve_notices_that_the_owner_approved_something():
    class Gate(NoPolicy):
        approved = "nothing"

        def consent(self):
            return self.approved

    class Sessions:
        gate = Gate()

    seen = []
    here = Correspondence(Wire(), "a", lambda sentence: None)

    def stopped():
        seen.append(here.consent)
        Gate.approved = "a recipe"
        return len(seen) == 2

    list(serve(here, Sessions(), stopped=stopped))
    assert seen == ["nothing", "a recipe"]


def test_a_pong_passes_on_that_the_owner_approved_something(started):
    wire = Wire()
    started(wire).consent = "a recipe"
    wire.comes.append(ping())
    until(lambda: wire.replies)
    body = wire.replies[0][1].body
    assert Presence.from_bytes(body).consent == "a recipe"
    # An older client says nothing of it.
    assert Presence.from_bytes(body.replace(b"consent", b"another")).consent == ""
