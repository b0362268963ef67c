"""The link that notes who is there passes everything on, and hides what must be hidden."""

import time

import pytest

from fedpress.network import observed
from fedpress.network.gate import Refusal
from fedpress.network.observed import ObservedLink, hides_cohort
from fedpress.pipeline import recipe as recipes
from fedpress.transport.link import Lost, Parcel
from fedpress.wire.message import Message, kind_of, pack
from fedpress.workspace.presence import NAME, read_presence

REFUSED = pack(Refusal("max_epsilon", "8 is more than 5").to_message())


class Line:
    """A link whose answers a test gives."""

    def __init__(self):
        self.there = {"a": True, "b": True, "c": False}
        self.answers = {}
        self.sent = 0

    def online(self):
        return dict(self.there)

    def send(self, parcels):
        tickets = {}
        for name in parcels:
            if self.there[name]:
                self.sent += 1
                tickets[name] = f"t{self.sent}"
        return tickets

    def poll(self, tickets):
        return {one: self.answers.pop(one) for one in tickets if one in self.answers}


def call(request, kind="fit"):
    return Parcel("call", request, "s", pack(Message(kind)))


def answer(request, body=None):
    return Parcel("answer", request, "s", pack(Message("update")) if body is None else body)


def client(link, name):
    return next(one for one in link.now().clients if one.name == name)


@pytest.fixture
def link():
    made = ObservedLink(Line(), hidden=False)
    made.online()
    return made


def test_it_passes_everything_on(link):
    assert link.online() == {"a": True, "b": True, "c": False}
    assert link.send({"a": call("1"), "c": call("2")}) == {"a": "t1"}
    lost = Lost("gone")
    link.link.answers = {"t1": lost}
    assert link.poll(["t1"]) == {"t1": lost}
    assert link.poll(["t1"]) == {}


def test_a_client_is_asked_until_its_answer_comes(link):
    link.send({"a": call("1")})
    assert client(link, "a").awaited
    assert client(link, "b").asked is None
    link.link.answers = {"t1": answer("1")}
    link.poll(["t1"])
    one = client(link, "a")
    assert one.asked is None
    assert one.heard is not None
    assert one.seconds >= 0


def test_a_call_that_is_sent_again_is_as_old_as_it_was(link):
    link.send({"a": call("1")})
    since = client(link, "a").asked
    link.poll([])
    assert not client(link, "a").awaited
    time.sleep(0.01)
    link.send({"a": call("1")})
    one = client(link, "a")
    assert (one.asked, one.awaited) == (since, True)
    link.send({"a": call("2")})
    assert client(link, "a").asked > since


def test_a_refusal_stays_until_another_answer_comes(link):
    link.send({"a": call("1", "offer"), "b": call("2", "offer")})
    link.link.answers = {"t1": answer("1", REFUSED), "t2": answer("2", b"damaged")}
    link.poll(["t1", "t2"])
    assert [(one.name, one.rule) for one in link.now().refused] == [("a", "max_epsilon")]
    link.send({"a": call("3", "offer")})
    link.link.answers = {"t3": answer("3", pack(Message("offered")))}
    link.poll(["t3"])
    assert link.now().refused == ()


def test_pings_are_no_calls(link):
    link.send({"a": Parcel("ping", "p", "", b"")})
    assert client(link, "a").asked is None


def test_where_the_cohort_is_hidden_only_refused_offers_are_noted(tmp_path):
    link = ObservedLink(Line(), hidden=True)
    link.online()
    link.send({"a": call("1", "offer"), "b": call("2", "offer")})
    link.link.answers = {"t1": answer("1", REFUSED), "t2": answer("2", pack(Message("offered")))}
    link.poll(["t1", "t2"])
    before = link.now()
    link.send({"b": call("3", "fit")})
    link.link.answers = {"t3": answer("3", REFUSED)}
    link.poll(["t3"])
    assert link.now().refused == before.refused
    link.now().write(tmp_path)
    assert read_presence(tmp_path).clients == ()
    assert '"name": "a"' not in (tmp_path / NAME).read_text()


def test_the_file_follows_and_a_full_disk_is_no_error(link, tmp_path, monkeypatch):
    monkeypatch.setattr(observed, "EVERY", 0.01)
    folder = tmp_path / "run"
    link.write_into(folder)
    time.sleep(0.1)
    # The folder was missing so far.
    folder.mkdir()
    link.send({"a": call("1")})
    end = time.monotonic() + 20
    while (found := read_presence(folder)) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert found.online == 2
    link.link.answers = {"t1": answer("1")}
    link.poll(["t1"])
    link.close()
    assert all(one.asked is None for one in read_presence(folder).clients)


def test_the_file_is_written_at_most_once_a_second(link, tmp_path):
    link.write_into(tmp_path)
    for at in range(50):
        link.send({"a": call(str(at))})
    time.sleep(0.3)
    assert not (tmp_path / NAME).exists()
    link.close()
    assert (tmp_path / NAME).exists()


@pytest.mark.parametrize(
    ("privacy", "hidden"),
    [
        ("", False),
        ('privacy = { unit = "sample", epsilon = 8.0, delta = 1e-3 }', False),
        (
            'privacy = { unit = "client", trust = "distributed", epsilon = 8.0, delta = 1e-3 }',
            False,
        ),
        ('privacy = { unit = "sample", trust = "central", epsilon = 8.0, delta = 1e-3 }', True),
        ('privacy = { unit = "client", epsilon = 8.0, delta = 1e-3 }', True),
    ],
)
def test_the_trust_says_whether_the_cohort_is_hidden(privacy, hidden):
    text = f"""
[data]
source = "digits"
num_clients = 3
[model]
architecture = "cnn"
[[stage]]
kind = "train"
epochs = 1
[[stage]]
kind = "federate"
num_rounds = 2
{privacy}
"""
    assert hides_cohort(recipes.load(text).stage) is hidden


def test_the_kind_of_a_message_is_read_without_the_rest():
    assert kind_of(pack(Message("offer", {"x": 1}))) == "offer"
