from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.errors import WireError
from fedpress.storage.floats import expand_floats, shrink_floats

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def again(values):
    return expand_floats(memoryview(shrink_floats(values)), values.dtype, len(values), "x")


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(raw=st.binary(max_size=400), zeros=st.booleans())
def test_any_bits_come_back(kind, raw, zeros):
    raw = bytes(kind.itemsize * 7 if zeros else 0) + raw
    raw = raw[: len(raw) // kind.itemsize * kind.itemsize]
    values = torch.frombuffer(bytearray(raw), dtype=kind) if raw else torch.empty(0, dtype=kind)
    assert same_bits(again(values), values)


def test_special_values_keep_their_bits():
    values = torch.tensor(
        [0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-45] * 9
    )
    assert same_bits(again(values), values)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_floats_of_one_scale_take_fewer_bytes_than_raw(kind):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).to(kind)
    words = values.view(torch.uint8).numpy().view(f"u{kind.itemsize}")
    exponents = words << 1 >> 1 >> {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}[kind]
    share = np.bincount(exponents) / len(values)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    mantissa_and_sign = (
        8 * kind.itemsize - {torch.float32: 8, torch.float16: 5, torch.bfloat16: 8}[kind]
    )
    bits = 8 * len(shrink_floats(values)) / len(values)
    assert bits < entropy + mantissa_and_sign + 0.1


def test_zeros_take_almost_nothing():
    chance = torch.Generator().manual_seed(0)
    dense = torch.randn(2_000, generator=chance)
    values = torch.zeros(20_000)
    values[torch.randperm(20_000, generator=chance)[:2_000]] = dense
    mask_bits = 20_000 * 0.469  # the entropy of one in ten
    assert len(shrink_floats(values)) < len(shrink_floats(dense)) + mask_bits / 8 * 1.05 + 40


@settings(deadline=None, max_examples=30)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_damage_is_a_wire_error_or_other_values(at, byte, cut):
    values = torch.zeros(1_000)
    values[::7] = torch.arange(143) / 7
    data = bytearray(shrink_floats(values))
    data[at % len(data)] = byte
    if cut:
        del data[at % len(data) :]
    with suppress(WireError):
        found = expand_floats(memoryview(bytes(data)), torch.float32, 1_000, "x")
        assert found.shape == (1_000,)


@pytest.mark.parametrize("data", [b"", b"\x03", b"\x01", b"\x02\x05"])
def test_short_or_unknown_forms_are_refused(data):
    with pytest.raises(WireError):
        expand_floats(memoryview(data), torch.float32, 4, "x")
