"""A client whose owner refused the run is left alone until something changes there."""

import pytest

from fedpress.federation.exchange import exchange
from fedpress.network.gate import Refusal
from fedpress.stages.federate.refusals import AGREED_NOW, WithoutRefusers
from fedpress.transport import LocalTransport
from fedpress.wire.message import Message, pack, unpack

REFUSED = Refusal("families", "no").to_message()


class Owner:
    """A client whose owner refuses the run as long as `refuses` says so."""

    def __init__(self, *, refuses):
        self.refuses = refuses
        self.asked = []
        self.mark = "1"

    def handle(self, request):
        kind = unpack(request).kind
        self.asked.append(kind)
        if self.refuses:
            return pack(REFUSED)
        return pack(Message("agreed" if kind == "agree" else "update", {}))


@pytest.fixture
def owners():
    return {"a": Owner(refuses=True), "b": Owner(refuses=False)}


@pytest.fixture
def transport(owners):
    inner = LocalTransport({name: one.handle for name, one in owners.items()})
    return WithoutRefusers(inner, lambda name: owners[name].mark)


def ask(transport, kind):
    """Asks both clients, and returns the kind of each answer, or the reason of an error."""
    found = {}
    for name, reply in exchange(transport, dict.fromkeys("ab", Message(kind))):
        found[name] = reply.header["reason"] if reply.kind == "error" else reply.kind
    return found


def test_a_refuser_is_sent_nothing_and_its_refusal_is_the_answer(transport, owners):
    assert ask(transport, "agree") == {"a": "refused", "b": "agreed"}
    traffic = transport.traffic
    for _ in range(3):
        assert ask(transport, "fit") == {"a": "refused", "b": "update"}
    assert owners["a"].asked == ["agree"]
    assert owners["b"].asked == ["agree", "fit", "fit", "fit"]
    assert transport.traffic.down > traffic.down


def test_a_change_asks_once_whether_it_agrees_now(transport, owners):
    ask(transport, "agree")
    owners["a"].mark = "2"
    for _ in range(2):
        assert ask(transport, "fit")["a"] == "refused"
    assert owners["a"].asked == ["agree", "agree"]
    owners["a"].mark = "3"
    owners["a"].refuses = False
    assert ask(transport, "fit") == {"a": AGREED_NOW, "b": "update"}
    assert ask(transport, "fit") == {"a": "update", "b": "update"}
    assert owners["a"].asked == ["agree", "agree", "agree", "fit"]


def test_a_mark_that_comes_late_is_no_change(transport, owners):
    owners["a"].mark = ""
    ask(transport, "agree")
    ask(transport, "fit")
    owners["a"].mark = "1"
    ask(transport, "fit")
    assert owners["a"].asked == ["agree"]
    owners["a"].mark = "2"
    ask(transport, "fit")
    assert owners["a"].asked == ["agree", "agree"]


def test_a_question_that_was_cancelled_is_asked_again(transport, owners):
    ask(transport, "agree")
    owners["a"].mark = "2"
    transport.cancel([transport.send("a", Message("fit"))])
    assert owners["a"].asked == ["agree"]
    ask(transport, "fit")
    assert owners["a"].asked == ["agree", "agree"]
    # An answer that was cancelled is given to nobody.
    request = transport.send("a", Message("fit"))
    transport.cancel([request])
    assert transport.receive([request]) is None


def test_an_agreement_asked_as_such_is_answered_as_such(transport, owners):
    ask(transport, "agree")
    owners["a"].refuses = False
    assert ask(transport, "agree") == {"a": "agreed", "b": "agreed"}
    assert ask(transport, "fit") == {"a": "update", "b": "update"}
