import gc
import weakref

import pytest
import torch

from fedpress.errors import WireError
from fedpress.federation.exchange import Traffic, exchange
from fedpress.transport import LocalTransport
from fedpress.transport import packed as packed_module
from fedpress.wire import Message, pack, packed_size, unpack


def echo(data: bytes) -> bytes:
    return pack(Message("echo", unpack(data).header, unpack(data).tensors))


def broken(data: bytes) -> bytes:
    raise ValueError("disk is gone")


def test_messages_go_through_bytes_and_come_back():
    transport = LocalTransport({"a": echo, "b": echo})
    request = transport.send("b", Message("m", {"n": 1}, {"t": torch.ones(3)}))
    client, answered, reply = transport.receive([request])
    assert (client, answered) == ("b", request)
    assert reply.kind == "echo"
    assert torch.equal(reply.tensors["t"], torch.ones(3))


def test_clients_are_listed_in_the_order_given():
    assert LocalTransport({"b": echo, "a": echo}).clients() == ["b", "a"]


@pytest.mark.parametrize("make", [LocalTransport, LocalTransport.of_messages])
def test_a_handler_that_is_replaced_is_called_from_then_on(make):
    transport = make({"a": echo, "b": echo})
    transport.handlers["a"] = broken
    reply = dict(exchange(transport, {"a": Message("m")}))["a"]
    assert "disk is gone" in str(reply.header)


def test_an_answer_waits_until_its_own_request_is_asked_for():
    transport = LocalTransport({"a": echo, "b": echo})
    early = transport.send("a", Message("m", {"n": 1}))
    late = transport.send("a", Message("m", {"n": 2}))
    replies = dict(exchange(transport, {"b": Message("m", {"n": 3})}))
    assert replies["b"].header == {"n": 3}
    assert transport.receive([late])[2].header == {"n": 2}
    assert transport.receive([early, late])[2].header == {"n": 1}
    assert transport.receive([early, late]) is None


def test_a_cancelled_request_is_never_answered_and_its_client_does_no_work():
    asked = []
    transport = LocalTransport({"a": lambda data: asked.append(data) or echo(data)})
    request = transport.send("a", Message("m"))
    transport.cancel([request])
    assert transport.receive([request]) is None
    assert asked == []
    assert transport.traffic.down > 0


@pytest.mark.recipe
def test_a_broadcast_is_packed_once_and_its_bytes_go_with_the_last_request(monkeypatch):
    packed = []
    monkeypatch.setattr(packed_module, "pack", lambda m: packed.append(m.kind) or pack(m))
    transport = LocalTransport(dict.fromkeys("abc", echo))
    message = Message("m", {}, {"t": torch.ones(3)})
    requests = [transport.send(client, message) for client in "abc"]
    assert packed == ["m"]
    held = weakref.ref(message)  # a transport keeps the message as long as its bytes
    del message
    for request in requests:
        gc.collect()
        assert held()
        transport.receive([request])
    gc.collect()
    assert not held()


def test_traffic_is_the_length_of_the_real_messages():
    lengths = Traffic()

    def spy(data: bytes) -> bytes:
        nonlocal lengths
        reply = echo(data) if len(data) % 2 else pack(Message("short"))
        lengths += Traffic(len(reply), len(data))
        return reply

    transport = LocalTransport(dict.fromkeys("abc", spy))
    list(exchange(transport, {"a": Message("m", {"x": 1}), "b": Message("m", {"x": 10})}))
    list(exchange(transport, {"c": Message("m", {"x": 100}, {"t": torch.randn(1000)})}))
    assert transport.traffic == lengths
    assert lengths.down > 4000


def test_a_handler_that_raises_is_an_error_message_and_others_go_on():
    transport = LocalTransport({"a": echo, "b": broken, "c": echo})
    replies = dict(exchange(transport, {name: Message("m") for name in "abc"}))
    assert [reply.kind for reply in replies.values()] == ["echo", "error", "echo"]
    assert replies["b"].header["reason"] == "ValueError: disk is gone"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"", "message.length"),
        (b"x" * 60, "message.magic"),
        (pack(Message("m", {}, {"t": torch.zeros(999)})), "max_bytes"),
    ],
)
def test_a_reply_that_cannot_be_read_is_an_error_message(reply, reason):
    transport = LocalTransport({"a": lambda data: reply}, max_bytes=1000)
    ((_, got),) = exchange(transport, {"a": Message("m")})
    assert got.kind == "error"
    assert reason in got.header["reason"]
    assert transport.traffic.up == len(reply)


def test_an_interrupt_is_not_swallowed():
    def interrupted(data: bytes) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(exchange(LocalTransport({"a": interrupted}), {"a": Message("m")}))


def test_replies_come_one_by_one():
    asked = []

    def noted(data: bytes) -> bytes:
        asked.append(1)
        return echo(data)

    transport = LocalTransport(dict.fromkeys("abc", noted))
    replies = exchange(transport, {name: Message("m") for name in "abc"})
    next(replies)
    assert len(asked) == 1


def test_an_exchange_that_is_left_early_leaves_nothing_open():
    transport = LocalTransport(dict.fromkeys("abc", echo))
    replies = exchange(transport, {name: Message("m") for name in "abc"})
    next(replies)
    replies.close()
    assert transport.receive(range(10)) is None


def answering(message: Message) -> Message:
    return Message("echo", message.header, message.tensors)


def raising(message: Message) -> Message:
    raise ValueError("disk is gone")


def infinite(message: Message) -> Message:
    return Message("m", {"x": float("inf")})


def long(message: Message) -> Message:
    return Message("m", {}, {"t": torch.zeros(999)})


def strange(message: Message) -> Message:
    return Message("m", {}, {"t": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize("answer", [answering, raising, infinite, long, strange])
def test_messages_have_the_traffic_the_limits_and_the_errors_of_bytes(answer):
    requests = [
        Message("m", {"n": 1}, {"t": torch.ones(3)}),
        Message("m", {"text": "x" * (1 << 20)}),
        Message("m"),
    ]
    seen = []
    for transport in (
        LocalTransport({"a": lambda data: pack(answer(unpack(data)))}, max_bytes=1000),
        LocalTransport.of_messages({"a": answer}, max_bytes=1000),
    ):
        for request in requests:
            ((_, reply),) = exchange(transport, {"a": request})
            seen.append((reply.kind, reply.header, pack(reply), transport.traffic))
    assert seen[:3] == seen[3:]
    assert transport.clients() == ["a"]


@pytest.mark.parametrize("make", [LocalTransport, LocalTransport.of_messages])
def test_a_request_that_cannot_be_packed_is_refused_when_it_is_sent(make):
    with pytest.raises(WireError, match="got inf"):
        make({"a": answering}).send("a", Message("m", {"x": float("inf")}))


def test_a_message_to_many_clients_is_counted_once(monkeypatch):
    counted = []
    monkeypatch.setattr(
        packed_module, "packed_size", lambda m: counted.append(m.kind) or packed_size(m)
    )
    transport = LocalTransport.of_messages(dict.fromkeys("abc", answering))
    message = Message("m", {}, {"t": torch.ones(3)})
    for client in "abc":
        transport.send(client, message)
    assert counted == ["m"]
    assert transport.traffic.down == 3 * len(pack(message))


def test_an_interrupt_of_a_message_is_not_swallowed():
    def interrupted(message: Message) -> Message:
        raise KeyboardInterrupt

    transport = LocalTransport.of_messages({"a": interrupted})
    with pytest.raises(KeyboardInterrupt):
        list(exchange(transport, {"a": Message("m")}))
