import pytest
import torch

from fedpress.federation.exchange import Traffic
from fedpress.transport import LocalTransport
from fedpress.wire import Message, pack, unpack


def echo(data: bytes) -> bytes:
    return pack(Message("echo", unpack(data).header, unpack(data).tensors))


def broken(data: bytes) -> bytes:
    raise ValueError("disk is gone")


def test_messages_go_through_bytes_and_come_back():
    transport = LocalTransport({"a": echo, "b": echo})
    replies = dict(transport.exchange({"b": Message("m", {"n": 1}, {"t": torch.ones(3)})}))
    assert list(replies) == ["b"]
    assert replies["b"].kind == "echo"
    assert torch.equal(replies["b"].tensors["t"], torch.ones(3))


def test_clients_are_listed_in_the_order_given():
    assert LocalTransport({"b": echo, "a": echo}).clients() == ["b", "a"]


def test_traffic_is_the_length_of_the_real_messages():
    lengths = Traffic()

    def spy(data: bytes) -> bytes:
        nonlocal lengths
        reply = echo(data) if len(data) % 2 else pack(Message("short"))
        lengths = Traffic(lengths.up + len(reply), lengths.down + len(data))
        return reply

    transport = LocalTransport(dict.fromkeys("abc", spy))
    list(transport.exchange({"a": Message("m", {"x": 1}), "b": Message("m", {"x": 10})}))
    list(transport.exchange({"c": Message("m", {"x": 100}, {"t": torch.randn(1000)})}))
    assert transport.traffic == lengths
    assert lengths.down > 4000


def test_a_handler_that_raises_is_an_error_message_and_others_go_on():
    transport = LocalTransport({"a": echo, "b": broken, "c": echo})
    replies = dict(transport.exchange({name: Message("m") for name in "abc"}))
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
    ((_, got),) = transport.exchange({"a": Message("m")})
    assert got.kind == "error"
    assert reason in got.header["reason"]
    assert transport.traffic.up == len(reply)


def test_an_interrupt_is_not_swallowed():
    def interrupted(data: bytes) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(LocalTransport({"a": interrupted}).exchange({"a": Message("m")}))


def test_replies_come_one_by_one():
    asked = []

    def noted(data: bytes) -> bytes:
        asked.append(1)
        return echo(data)

    replies = LocalTransport(dict.fromkeys("abc", noted)).exchange(
        {name: Message("m") for name in "abc"}
    )
    next(replies)
    assert len(asked) == 1
