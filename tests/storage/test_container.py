import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedpress.errors import ModelError
from fedpress.storage import container

BLOBS = {"codes:int8:float32": bytes(range(50)), "rest:bias:float32": b"\x01", "empty:x:int8": b""}
DATA = container.to_bytes(BLOBS, '{"architecture":"mlp"}', '{"blobs":{}}')
PAGE = Path(__file__).parents[2] / "docs" / "packed-models.md"


def header(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(changed, rest):
    text = json.dumps(changed).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_what_was_written_is_read():
    assert container.from_bytes(DATA, "x") == (BLOBS, '{"architecture":"mlp"}', '{"blobs":{}}')


def test_any_reader_of_safetensors_opens_it():
    found = load(DATA)
    assert {name: value.tobytes() for name, value in found.items()} == BLOBS


def test_every_flipped_byte_is_found():
    for at in range(len(DATA)):
        for flip in (1, 128):
            bad = bytearray(DATA)
            bad[at] ^= flip
            with pytest.raises(ModelError, match=r"^x: "):
                container.from_bytes(bytes(bad), "x")


def test_every_cut_is_found():
    for size in range(len(DATA)):
        with pytest.raises(
            ModelError, match=r"^x: this packed model is damaged .*; copy or pack it again$"
        ):
            container.from_bytes(DATA[:size], "x")


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=300))
def test_noise_is_no_packed_model(noise):
    with pytest.raises(ModelError, match=r"^x: "):
        container.from_bytes(noise, "x")


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=30), st.integers(0, 1 << 62))
def test_headers_that_promise_much_take_no_memory(rest, size):
    promised = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    with pytest.raises(ModelError, match=r"^x: "):
        container.from_bytes(with_header(promised, rest), "x")


def test_another_version_is_named():
    changed, rest = header(DATA)
    changed["__metadata__"]["version"] = "2"
    with pytest.raises(
        ModelError,
        match=r"x: a packed model of version '2', and this fedpress reads version 1; install",
    ):
        container.from_bytes(with_header(changed, rest), "x")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_safetensors_file_is_not_taken_for_one(metadata):
    import numpy as np

    with pytest.raises(ModelError, match=r"x: a safetensors file, but not a packed model"):
        container.from_bytes(save({"a": np.zeros(3)}, metadata), "x")


@pytest.mark.parametrize("key", ["spec", "table", "checksum"])
def test_a_missing_part_of_the_header_is_damage(key):
    changed, rest = header(DATA)
    del changed["__metadata__"][key]
    with pytest.raises(ModelError, match=r"damaged"):
        container.from_bytes(with_header(changed, rest), "x")


def test_equal_parts_give_equal_bytes_in_any_order():
    assert (
        container.to_bytes(dict(reversed(BLOBS.items())), '{"architecture":"mlp"}', '{"blobs":{}}')
        == DATA
    )


def test_the_hex_example_of_the_page_is_the_file_it_describes():
    data = bytes.fromhex(re.search(r"```hex\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1])
    from fedpress.storage.packed import from_bytes, to_bytes

    spec, model = from_bytes(data, "page")
    assert spec.architecture == "mlp"
    assert [layer.weight.tolist() for layer in model.layers] == [[[0.5, -0.25], [0.0, 0.75]]]
    assert model.layers[0].bias.tolist() == [1.0, -1.0]
    assert to_bytes(spec, model)[0] == data
