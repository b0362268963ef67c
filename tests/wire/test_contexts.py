"""Context coding against a plain Python twin, on every kind of value, and on hostile bytes."""

import contextlib
import hashlib
import random

import numpy as np
import pytest
import torch

from fedpress.errors import WireError
from fedpress.wire import ans, contexts, packing
from fedpress.wire.packing import CONTEXTS, expand, shrink


def runs_of_signs(size: int, seed: int = 0, dtype=np.int8) -> np.ndarray:
    """Returns levels whose sizes and signs are like those of their neighbours."""
    chance = np.random.default_rng(seed)
    means = np.repeat(chance.standard_normal(-(-size // 9)) ** 3, 9)[:size]
    return np.rint(2 * means + 0.5 * chance.standard_normal(size)).clip(-40, 40).astype(dtype)


def packed(values: np.ndarray) -> bytes:
    return bytes([CONTEXTS]) + contexts.encode_contexts(
        values, lambda inner: packing.smallest_form(inner, False, depth=1)
    )


def back(data: bytes, like: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(like)
    return expand(memoryview(data), tensor.dtype, list(tensor.shape), "tensors.t").numpy()


def plain_context(known: list[int], gap: int, fine: bool) -> tuple[int, bool]:
    """Returns context and flip of the value between known[gap] and known[gap + 1]."""

    def at(place: int) -> int:
        value = known[place] if 0 <= place < len(known) else 0
        return max(-contexts.CAP, min(contexts.CAP, value))

    size, sign = 0, 0
    for distance in range(8):
        pair = at(gap - distance), at(gap + 1 + distance)
        weight = 14 if distance == 0 else 3 if distance < 4 else 1
        size += weight * (abs(pair[0]) + abs(pair[1]))
        sign += (3, 1)[distance] * sum(pair) if distance < 2 else 0
    row = ((size + 1) ** 2).bit_length() - 1
    # The middle of the class; no tie is near, since its square is not a square of a ratio.
    middle = 0.75 * 2 ** ((row + 1) / 2)
    ratio = min(int(27 * abs(sign) / middle + 0.5), contexts.SIGNS - 1)
    if fine:
        return row * contexts.SIGNS + ratio, sign < 0
    return row // 2 * 3 + min((ratio + 1) // 2, 2), sign < 0


@pytest.mark.parametrize("fine", [False, True])
def test_contexts_are_those_of_a_plain_loop(fine):
    values = runs_of_signs(9_001)
    values[::50] = 99
    for offset in contexts.PASSES:
        pieces = list(contexts.pieces_of(values, offset, fine))
        found = np.concatenate([piece.contexts for piece in pieces])
        flips = np.concatenate([piece.flips for piece in pieces])
        known = values[:: 2 * offset].tolist()
        wanted = [plain_context(known, gap, fine) for gap in range(len(found))]
        assert len(found) == len(values[offset :: 2 * offset])
        assert found.tolist() == [context for context, _ in wanted]
        assert flips.tolist() == [flip for _, flip in wanted]


def test_pieces_give_the_contexts_of_the_whole(monkeypatch):
    values = runs_of_signs(20_011)

    def all_contexts() -> list[int]:
        pieces = contexts.pieces_of(values, 1, True)
        return np.concatenate([piece.contexts for piece in pieces]).tolist()

    whole = all_contexts()
    monkeypatch.setattr(contexts, "CHUNK", 1000)
    assert all_contexts() == whole
    assert np.array_equal(back(packed(values), values), values)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
@pytest.mark.parametrize("size", [8192, 8193, 8199, 30_001])
def test_values_come_back(dtype, size):
    values = runs_of_signs(size, dtype=dtype)
    limits = np.iinfo(dtype)
    values[:4] = limits.min, limits.max, 0, limits.min
    assert np.array_equal(back(packed(values), values), values)


@pytest.mark.parametrize("value", [0, 1, -128, 127, 41])
def test_constant_values_come_back(value):
    values = np.full(8192, value, np.int8)
    assert np.array_equal(back(packed(values), values), values)


def test_noise_of_every_width_comes_back():
    chance = np.random.default_rng(1)
    for bits in (1, 5, 7, 8, 16, 31):
        values = chance.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 8200).astype(np.int32)
        assert np.array_equal(back(packed(values), values), values)


def test_fine_contexts_come_back():
    values = runs_of_signs(contexts.FINE_SIZE + 5)
    data = packed(values)
    assert data[1] == 1
    assert np.array_equal(back(data, values), values)


def test_neighbours_save_bits_where_signs_are_alike():
    values = runs_of_signs(50_000)
    data = shrink(torch.from_numpy(values))
    assert data[0] == CONTEXTS
    assert 8 * len(data) < 0.9 * ans.coded_bits(values)
    assert packing.estimate_bits(values) == pytest.approx(8 * len(data), rel=0.02)


def test_independent_values_keep_classes_of_blocks():
    noise = np.rint(np.random.default_rng(0).standard_normal(50_000)).astype(np.int8)
    assert shrink(torch.from_numpy(noise))[0] == packing.ANS


def test_the_coded_bytes_are_the_same_on_every_machine():
    values = (np.arange(20_000, dtype=np.int64) ** 3 // 7919 % 23 - 11).astype(np.int8)
    values = np.repeat(values[:4000], 5)
    assert hashlib.sha256(packed(values)).hexdigest()[:16] == "634326141e60007c"


def test_hostile_bytes_are_wire_errors_or_other_values():
    values = runs_of_signs(8_300)
    data = packed(values)
    chance = random.Random(0)
    for _ in range(300):
        spoiled = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            # Mostly in the tables, which are in front.
            end = len(spoiled) if chance.random() < 0.3 else 600
            spoiled[chance.randrange(1, end)] = chance.randrange(256)
        if chance.random() < 0.2:
            del spoiled[chance.randrange(1, len(spoiled)) :]
        with contextlib.suppress(WireError):
            back(bytes(spoiled), values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_contexts_of_few_or_unsigned_values_are_refused(dtype):
    size = 8300 if dtype == torch.uint8 else 8000
    data = packed(runs_of_signs(8_300))
    with pytest.raises(WireError, match=r"tensors\.t\.contexts"):
        expand(memoryview(data), dtype, [size], "tensors.t")
