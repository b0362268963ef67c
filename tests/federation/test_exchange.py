import pytest

from fedpress.federation.exchange import Traffic, exchange, failure
from fedpress.transport import LocalTransport
from fedpress.wire import Message, pack, unpack


def echo(data):
    return pack(unpack(data))


def test_every_client_is_sent_its_own_message():
    transport = LocalTransport(dict.fromkeys("abc", echo))
    replies = dict(exchange(transport, {name: Message("m", {"to": name}) for name in "cab"}))
    assert {name: reply.header["to"] for name, reply in replies.items()} == {n: n for n in "abc"}


def test_an_answer_to_an_earlier_question_is_never_taken_for_one_to_this():
    transport = LocalTransport({"a": echo})
    old = transport.send("a", Message("m", {"question": 1}))
    ((_, reply),) = exchange(transport, {"a": Message("m", {"question": 2})})
    assert reply.header["question"] == 2
    assert transport.receive([old])[2].header["question"] == 1


class Silent(LocalTransport):
    """Loses what "b" is sent."""

    def __init__(self, handlers):
        super().__init__(handlers)
        self.lost = set()

    def send(self, client, message):
        request = super().send(client, message)
        if client == "b":
            self.lost.add(request)
        return request

    def receive(self, requests, timeout=None):
        self.waited = timeout
        return super().receive([r for r in requests if r not in self.lost], timeout)


def test_an_exchange_ends_when_nothing_more_comes_and_drops_what_is_late():
    transport = Silent(dict.fromkeys("abc", echo))
    replies = dict(exchange(transport, {n: Message("m") for n in "abc"}, timeout=2.5))
    assert list(replies) == ["a", "c"]
    assert transport.waited == 2.5
    assert LocalTransport.receive(transport, range(10)) is None


@pytest.mark.parametrize("clients", ["", "a"])
def test_an_exchange_with_nobody_is_empty(clients):
    assert dict(exchange(LocalTransport(dict.fromkeys(clients, echo)), {})) == {}


def test_traffic_is_a_sum_and_a_difference_of_counters():
    assert Traffic(10, 7) - Traffic(4, 2) == Traffic(6, 5)
    assert Traffic(4, 2) + Traffic(up=1) == Traffic(5, 2)


def test_a_failure_whose_text_cannot_be_made_is_told_by_its_name():
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    assert failure(Odd()).header["reason"] == "Odd: an error without a text"
