import json
import math
import random
import re
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fedpress.wire
from fedpress.errors import WireError
from fedpress.wire.message import DTYPES, FRAME, MAGIC, MAX_TENSORS, VERSION, Message, pack, unpack

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


def with_index(index: object, data: bytes = b"") -> bytes:
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    return framed(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_every_tensor_comes_back_as_it_was_sent(dtype, shape):
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    got = unpack(pack(Message("m", {}, {"t": sent}))).tensors["t"]
    assert got.dtype == sent.dtype
    assert got.shape == sent.shape
    assert torch.equal(got, sent)


def test_not_a_number_and_infinity_survive_in_tensors():
    got = unpack(pack(Message("m", {}, {"t": torch.tensor([math.nan, math.inf, -0.0])}))).tensors["t"]
    assert torch.equal(got.view(torch.int32), torch.tensor([math.nan, math.inf, -0.0]).view(torch.int32))


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
    assert (got.kind, got.header, got.tensors["values"].tolist()) == ("update", UPDATE.header, [1.0, -0.5])


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda b: b[:10], "length"),
        (lambda b: b"", "length"),
        (lambda b: b[:-1], "length"),
        (lambda b: b + b"\0", "length"),
        (lambda b: b"XXXX" + b[4:], "magic"),
        (lambda b: b[:4] + b"\2\0" + b[6:], "version"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "crc32"),
        (lambda b: framed(b""), "payload.header_length"),
        (lambda b: framed(b"\xff" * 8), "payload.header_length"),
        (lambda b: framed((1 << 21).to_bytes(8, "little") + b" " * (1 << 21)), "payload.header_length"),
        (lambda b: with_index(b"[" * 100_000), "payload"),
        (lambda b: with_index(b"[]"), "payload.header"),
        (lambda b: with_index({}), "header"),
        (lambda b: with_index({"__metadata__": {"fedpress": "[" * 100_000}}), "header"),
        (lambda b: with_index({"__metadata__": {"fedpress": "3"}}), "header"),
        (lambda b: with_index({"__metadata__": {"fedpress": '{"kind": 1, "header": {}}'}}), "kind"),
        (lambda b: with_index({"__metadata__": {"fedpress": '{"kind": "m", "header": []}'}}), "header"),
        (lambda b: with_index({"__metadata__": {"fedpress": '{"kind": "m", "header": {"a": NaN}}'}}), "header.a"),
        (
            lambda b: with_index({"__metadata__": {"fedpress": '{"kind": "m", "header": {"a": [1e999]}}'}}),
            "header.a[0]",
        ),
        (
            lambda b: with_index({"__metadata__": {"fedpress": f'{{"kind": "m", "header": {{"a": {10**30}}}}}'}}),
            "header.a",
        ),
        (lambda b: with_index({"t": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}}, b"1234"), "payload"),
        (
            lambda b: with_index(
                {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2000)}
            ),
            "payload.header",
        ),
    ],
)
def test_damage_is_a_wire_error_that_names_the_field(damage, field):
    with pytest.raises(WireError, match=rf"^message\.{re.escape(field)}: "):
        unpack(damage(pack(UPDATE)))


def test_types_and_shapes_that_do_not_travel_are_refused_by_name():
    text = '{"kind": "m", "header": {}}'
    for dtype, shape, size in [("C64", [1], 8), ("BOOL", [1], 1), ("F32", [1] * 9, 4), ("F32", [0, 1 << 62], 0)]:
        index = {"__metadata__": {"fedpress": text}, "t": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
        with pytest.raises(WireError, match=r"^message\.tensors\.t: "):
            unpack(with_index(index, bytes(size)))


def test_a_message_above_the_limit_is_refused_before_it_is_read():
    data = pack(UPDATE)
    assert unpack(data, max_bytes=len(data)).kind == "update"
    with pytest.raises(WireError, match=r"message\.length: 194 bytes are more than the 193"):
        unpack(data, max_bytes=len(data) - 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1 << 63, {1: 2}, b"x", [math.nan]], ids=repr)
def test_what_json_cannot_carry_is_refused_when_packing(bad):
    with pytest.raises(WireError, match=r"message\.header\.loss"):
        pack(Message("m", {"loss": bad}))


def test_a_tensor_type_that_does_not_travel_is_refused_when_packing():
    with pytest.raises(WireError, match=r"message\.tensors\.t: dtype torch\.complex64"):
        pack(Message("m", {}, {"t": torch.zeros(1, dtype=torch.complex64)}))


def test_too_many_tensors_are_refused():
    with pytest.raises(WireError, match=r"message\.payload\.header"):
        unpack(pack(Message("m", {}, {str(i): torch.zeros(0) for i in range(MAX_TENSORS + 1)})))


def only_wire_errors(data: bytes) -> None:
    try:
        message = unpack(data, max_bytes=1 << 16)
    except WireError:
        return
    assert pack(message)


def mutated(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 6)):
        start = dice.choice([0, FRAME.size, FRAME.size + 8])  # aim at the small fields as often as at the rest
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
anything = st.recursive(leaves, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3))
views = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "F8_E8M0", "C64", "?"]),
        "shape": st.lists(st.integers(-1, 9) | st.integers(1 << 31, 1 << 64), max_size=3),
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2),
    }
)
metadata = st.fixed_dictionaries(
    {"fedpress": st.builds(json.dumps, anything | st.fixed_dictionaries({"kind": leaves}))}
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    anything
    | st.dictionaries(st.text(max_size=3), views | anything, max_size=3)
    | st.fixed_dictionaries({"__metadata__": metadata | anything, "t": views}),
    st.binary(max_size=64),
)
@example({"__metadata__": None}, b"")
@example(b'{"__metadata__":{"fedpress":"{}"},"__metadata__":5}', b"")
@example({"__metadata__": {"fedpress": '{"kind":"m","header":{"a":"\\ud800"}}'}}, b"")
def test_invented_indices_raise_nothing_but_wire_errors(index, data):
    only_wire_errors(with_index(index, data))
