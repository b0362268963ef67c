import json
import math
import random
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fedpress.wire
from fedpress.errors import WireError
from fedpress.wire.message import (
    DTYPES,
    FRAME,
    MAGIC,
    MAX_TENSORS,
    VERSION,
    Message,
    deliver,
    pack,
    packed_size,
    unpack,
)
from fedpress.wire.reader import varint

UPDATE = Message("update", {"round": 3, "examples": 600}, {"values": torch.tensor([1.0, -0.5])})
RICH = Message(
    "fit",
    {"round": 1, "name": "ä\ud800", "list": [1, 2.5, None, {"deep": True}], "big": (1 << 63) - 1},
    {
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "ints": torch.arange(6, dtype=torch.int8).view(2, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
    },
)


def framed(payload: bytes) -> bytes:
    return FRAME.pack(MAGIC, VERSION, len(payload), zlib.crc32(payload)) + payload


def part(content: bytes) -> bytes:
    return varint(len(content)) + content


def with_header(text: str) -> bytes:
    return framed(part(b"m") + part(text.encode()) + b"\0")


def entry(name: bytes, code: int, shape: list[int], data: bytes = b"") -> bytes:
    return part(name) + bytes([code, len(shape)]) + b"".join(map(varint, shape)) + part(data)


def with_tensors(*entries: bytes, count: int | None = None) -> bytes:
    return framed(
        part(b"m")
        + part(b"{}")
        + varint(len(entries) if count is None else count)
        + b"".join(entries)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_every_tensor_comes_back_as_it_was_sent(dtype, shape):
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    got = unpack(pack(Message("m", {}, {"t": sent}))).tensors["t"]
    assert got.dtype == sent.dtype
    assert got.shape == sent.shape
    assert torch.equal(got, sent)


def test_not_a_number_and_infinity_survive_in_tensors():
    got = unpack(pack(Message("m", {}, {"t": torch.tensor([math.nan, math.inf, -0.0])}))).tensors[
        "t"
    ]
    assert torch.equal(
        got.view(torch.int32), torch.tensor([math.nan, math.inf, -0.0]).view(torch.int32)
    )


def test_kind_and_header_come_back():
    got = unpack(pack(RICH))
    assert got.kind == "fit"
    assert got.header == RICH.header


def test_tensors_that_share_memory_or_are_strided_can_be_sent():
    base = torch.arange(6.0).view(2, 3)
    got = unpack(pack(Message("m", {}, {"a": base, "b": base, "c": base.T}))).tensors
    assert torch.equal(got["b"], base)
    assert torch.equal(got["c"], base.T)


def test_bytes_do_not_depend_on_the_order_of_names():
    a = {"x": torch.ones(2), "y": torch.zeros(1, dtype=torch.int8)}
    one = pack(Message("m", {"p": 1, "q": {"r": 2, "s": 3}}, a))
    two = pack(Message("m", {"q": {"s": 3, "r": 2}, "p": 1}, dict(reversed(a.items()))))
    assert one == two


def test_the_hex_example_of_the_format_page_is_the_message_it_describes():
    page = (Path(fedpress.wire.__file__).parent / "FORMAT.md").read_text()
    data = bytes.fromhex(re.search(r"```hex\n(.*?)```", page, re.DOTALL)[1])
    assert data == pack(UPDATE)
    got = unpack(data)
    assert (got.kind, got.header, got.tensors["values"].tolist()) == (
        "update",
        UPDATE.header,
        [1.0, -0.5],
    )


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda b: b[:10], "length"),
        (lambda b: b"", "length"),
        (lambda b: b[:-1], "length"),
        (lambda b: b + b"\0", "length"),
        (lambda b: b"XXXX" + b[4:], "magic"),
        (lambda b: b[:4] + b"\1\0" + b[6:], "version"),
        (lambda b: b[:4] + b"\3\0" + b[6:], "version"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "crc32"),
        (lambda b: framed(b""), "kind"),
        (lambda b: framed(b"\xff" * 20), "kind"),
        (lambda b: framed(varint(2000) + b"k" * 2000), "kind"),
        (lambda b: framed(part(b"\xff")), "kind"),
        (lambda b: framed(part(b"m") + varint(1 << 21) + b" " * (1 << 21)), "header"),
        (lambda b: with_header("[" * 100_000), "header"),
        (lambda b: with_header("3"), "header"),
        (lambda b: with_header("[]"), "header"),
        (lambda b: with_header('{"a": NaN}'), "header.a"),
        (lambda b: with_header('{"a": [1e999]}'), "header.a[0]"),
        (lambda b: with_header(f'{{"a": {10**30}}}'), "header.a"),
        (lambda b: framed(part(b"m") + part(b"{}")), "tensors"),
        (lambda b: framed(part(b"m") + part(b"{}") + b"\0\0"), "tensors"),
        (lambda b: with_tensors(count=2000), "tensors"),
        (lambda b: with_tensors(entry(b"t", 1, [1 << 30], b"\0")), "tensors.t"),
        (lambda b: with_tensors(entry(b"t", 1, [1]), entry(b"t", 1, [1])), "tensors.t"),
        (lambda b: with_tensors(entry(b"\xff", 1, [1])), "tensors"),
        (lambda b: with_tensors(entry(b"t", 1, [2], b"\0" * 8)), "tensors.t"),
        (lambda b: with_tensors(entry(b"t", 1, [2])), "tensors.t.form"),
        (lambda b: with_tensors(entry(b"t", 1, [0], b"\0")), "tensors.t"),
        (lambda b: with_tensors(entry(b"t", 1, [2], b"\7" + b"\0" * 8)), "tensors.t.form"),
    ],
)
def test_damage_is_a_wire_error_that_names_the_field(damage, field):
    with pytest.raises(WireError, match=rf"^message\.{re.escape(field)}: "):
        unpack(damage(pack(UPDATE)))


def test_types_and_shapes_that_do_not_travel_are_refused_by_name():
    for code, shape in [
        (len(DTYPES), [1]),
        (255, [1]),
        (1, [1] * 9),
        (1, [0, 1 << 62]),
        (1, [0] + [1 << 20] * 4),
    ]:
        with pytest.raises(WireError, match=r"^message\.tensors\.t: "):
            unpack(with_tensors(entry(b"t", code, shape, bytes(5))))


def test_the_first_version_is_refused_with_a_cure():
    old = struct.pack("<4sHQI", MAGIC, 1, 8, zlib.crc32(bytes(8))) + bytes(8)
    with pytest.raises(
        WireError, match=r"message\.version: got 1, expected 2; use the same fedpress on both sides"
    ):
        unpack(old)


def test_small_messages_carry_little_besides_their_content():
    assert len(pack(UPDATE)) == FRAME.size + len('update{"examples":600,"round":3}values') + 8 + 9


def test_a_message_that_would_unpack_to_too_much_is_refused_before_it_is_unpacked(monkeypatch):
    tensors = {"a": torch.zeros(600), "b": torch.zeros(600)}
    data = pack(Message("m", {}, tensors, frozenset(tensors)))
    assert len(data) < 60
    assert unpack(data, max_bytes=4800).tensors["b"].shape == (600,)
    monkeypatch.setattr("fedpress.wire.message.expand", lambda *_: pytest.fail("was unpacked"))
    with pytest.raises(
        WireError,
        match=r"message\.tensors\.b: the tensors unpack to 4800 bytes, more than the 4799",
    ):
        unpack(data, max_bytes=4799)


def test_a_message_above_the_limit_is_refused_before_it_is_read():
    data = pack(UPDATE)
    assert unpack(data, max_bytes=len(data)).kind == "update"
    with pytest.raises(WireError, match=r"message\.length: 69 bytes are more than the 68"):
        unpack(data, max_bytes=len(data) - 1)


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 1 << 63, {1: 2}, b"x", [math.nan]], ids=repr
)
def test_what_json_cannot_carry_is_refused_when_packing(bad):
    with pytest.raises(WireError, match=r"message\.header\.loss"):
        pack(Message("m", {"loss": bad}))


def test_a_tensor_type_that_does_not_travel_is_refused_when_packing():
    with pytest.raises(WireError, match=r"message\.tensors\.t: dtype torch\.complex64"):
        pack(Message("m", {}, {"t": torch.zeros(1, dtype=torch.complex64)}))


def test_too_many_tensors_are_refused():
    with pytest.raises(WireError, match=r"message\.tensors: "):
        unpack(pack(Message("m", {}, {str(i): torch.zeros(0) for i in range(MAX_TENSORS + 1)})))


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [("\ud800", "t", "kind"), ("k", "\ud800", "tensors"), ("k" * 1025, "t", "kind")],
)
def test_names_that_cannot_be_sent_are_refused_when_packing(kind, name, place):
    with pytest.raises(WireError, match=rf"^message\.{place}: "):
        pack(Message(kind, {}, {name: torch.zeros(1)}))


def only_wire_errors(data: bytes) -> None:
    try:
        message = unpack(data, max_bytes=1 << 16)
    except WireError:
        return
    assert pack(message)


def mutated(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 6)):
        start = dice.choice([0, FRAME.size])  # aim at the small fields as often as at the rest
        at = start + dice.randrange(dice.choice([8, len(data) - start]))
        changed[at] = dice.choice(
            [0, 255, ord("["), ord('"'), dice.randrange(256), changed[at] ^ 1 << dice.randrange(8)]
        )
    cut = dice.choice([0, 0, 0, -1, -9, 3])
    return bytes(changed[:cut] if cut < 0 else changed + bytes(cut))


@pytest.mark.parametrize("repair", [False, True], ids=["as damaged", "with a right checksum"])
def test_mutated_messages_raise_nothing_but_wire_errors(repair):
    dice, messages = random.Random(1), [pack(UPDATE), pack(RICH)]
    for _ in range(4000):
        data = mutated(dice.choice(messages), dice)
        only_wire_errors(framed(data[FRAME.size :]) if repair else data)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    leaves, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3)
)
entries = st.builds(
    entry,
    st.binary(max_size=3),
    st.integers(0, 9),
    st.lists(st.integers(0, 9) | st.integers(1 << 29, 1 << 64), max_size=3),
    st.binary(max_size=40),
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(anything, st.lists(entries, max_size=3), st.binary(max_size=3))
@example({"a": "\ud800"}, [], b"")
def test_invented_payloads_raise_nothing_but_wire_errors(header, tensors, rest):
    text = json.dumps(header).encode()
    only_wire_errors(
        framed(part(b"m") + part(text) + varint(len(tensors)) + b"".join(tensors) + rest)
    )


def outcome(action):
    """What `action` returns as bytes, or its error: two of them can be compared."""
    try:
        message = action()
    except WireError as error:
        return str(error)
    return message.header, list(message.tensors), pack(message)


def delivered(message, **limits):
    return deliver(message, packed_size(message), **limits)


def unpacked(message, **limits):
    return unpack(pack(message), **limits)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4), (4, 300)], ids=str)
def test_size_and_delivery_of_every_tensor_are_those_of_its_bytes(dtype, shape):
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    for names in (frozenset(), frozenset({"t"})):
        message = Message("m", {"n": 1}, {"t": sent, "a": sent.clone()}, names)
        assert packed_size(message) == len(pack(message))
        assert outcome(lambda: delivered(message)) == outcome(lambda: unpacked(message))  # noqa: B023


STRANGE = {
    "rich": RICH,
    "no tensors": Message("m"),
    "strided": Message("m", {}, {"t": torch.arange(12.0).view(3, 4).T}),
    "gradient": Message("m", {}, {"t": torch.ones(3, requires_grad=True)}),
    "long header": Message("m", {"text": "x" * (1 << 20)}),
    "many tensors": Message("m", {}, {str(i): torch.zeros(1) for i in range(MAX_TENSORS + 1)}),
    "long name": Message("m", {}, {"x" * 1025: torch.zeros(1)}),
    "long kind": Message("m" * 1025),
    "nine dimensions": Message("m", {}, {"t": torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1)}),
    "complex": Message("m", {}, {"t": torch.zeros(1, dtype=torch.complex64)}),
    "infinite": Message("m", {"x": math.inf}),
    "tuple": Message("m", {"x": (1, 2)}),
    "key of a number": Message("m", {"x": {1: 2}}),
    "too long": Message("m", {}, {"t": torch.zeros(2000)}),
    "unpacks to too much": Message("m", {}, {"t": torch.zeros(2000)}, frozenset({"t"})),
    "subclass of float": Message("m", {"x": torch.tensor(2.5, dtype=torch.float64).numpy()[()]}),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_message_is_delivered_or_refused_as_if_it_went_through_bytes(name):
    message = STRANGE[name]
    limits = {"max_bytes": 4000} if "too" in name else {}
    assert outcome(lambda: delivered(message, **limits)) == outcome(
        lambda: unpacked(message, **limits)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_any_header_is_delivered_or_refused_as_if_it_went_through_bytes(header):
    message = Message("m", header)
    assert outcome(lambda: delivered(message)) == outcome(lambda: unpacked(message))


def test_a_delivered_tensor_shares_the_memory_of_the_sent_one():
    sent = torch.ones(3)
    got = delivered(Message("m", {}, {"t": sent})).tensors["t"]
    assert got.data_ptr() == sent.data_ptr()


def test_packing_takes_the_memory_of_the_bytes_and_no_more():
    message = Message("fit", {}, {"params": torch.zeros(1 << 20)})
    tracemalloc.start()
    data = pack(message)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) <= most < 1.1 * len(data)
