from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.errors import WireError
from fedpress.storage.codes import expand_codes, shrink_codes

SHAPES = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=3)


def again(tensors):
    return expand_codes(memoryview(shrink_codes(tensors)), [t.shape for t in tensors], "x")


def loud(outs, ins, *, seed=0, spread=1.0):
    """Codes of a layer whose channels and positions differ in size, as those of trained layers do."""
    chance = np.random.default_rng(seed)
    scale = 12 * np.exp(
        spread * (chance.normal(size=(outs, 1, 1)) / 2 + chance.normal(size=(1, ins, 1)))
    )
    return torch.from_numpy(
        np.clip(np.rint(chance.normal(size=(outs, ins, 9)) * scale), -127, 127).astype(np.int8)
    )


@settings(deadline=None, max_examples=30)
@given(shapes=SHAPES, seed=st.integers(0, 99), most=st.sampled_from([0, 1, 7, 128]))
def test_codes_of_any_shape_come_back(shapes, seed, most):
    chance = np.random.default_rng(seed)
    tensors = [
        torch.from_numpy(chance.integers(-most, max(most, 1), shape).astype(np.int8))
        for shape in shapes
    ]
    for found, tensor in zip(again(tensors), tensors, strict=True):
        assert found.dtype == torch.int8
        assert torch.equal(found, tensor)


def test_layers_with_loud_and_quiet_channels_come_back():
    layers = [loud(96, 64, seed=seed).reshape(96, 64, 3, 3) for seed in range(2)] + [
        loud(10, 64)[..., 0]
    ]
    assert all(torch.equal(a, b) for a, b in zip(again(layers), layers, strict=True))


def test_classes_save_bytes_where_channels_differ():
    codes = loud(96, 64)
    shuffled = codes.flatten()[torch.randperm(codes.numel())].view_as(codes)
    assert len(shrink_codes([codes])) < 0.93 * len(shrink_codes([shuffled]))


def test_codes_of_one_gaussian_take_about_their_entropy():
    codes = loud(64, 64, spread=0.0)
    share = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    entropy = -(share * np.log2(share)).sum() * codes.numel() / 8
    assert len(shrink_codes([codes])) < 1.01 * entropy + 120


def test_the_same_codes_give_the_same_bytes():
    assert shrink_codes([loud(32, 16)]) == shrink_codes([loud(32, 16)])


@settings(deadline=None, max_examples=30)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_damage_is_a_wire_error_or_other_codes(at, byte, cut):
    data = bytearray(DATA)
    data[at % len(data)] = byte
    if cut:
        del data[at % len(data) :]
    with suppress(WireError):
        (found,) = expand_codes(memoryview(bytes(data)), [(24, 16, 9)], "x")
        assert found.shape == (24, 16, 9)


DATA = shrink_codes([loud(24, 16)])


def test_codes_of_another_shape_are_refused():
    with pytest.raises(WireError):
        expand_codes(memoryview(DATA), [(24, 17, 9)], "x")
