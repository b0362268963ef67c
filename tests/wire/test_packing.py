import hashlib
import math
import random
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from fedpress.errors import WireError
from fedpress.wire import ans, classes, packing
from fedpress.wire.message import DTYPES, FRAME, MAGIC, VERSION, Message, pack, unpack
from fedpress.wire.packing import (
    ANS,
    NBIT,
    RAW,
    SPARSE,
    SizeEstimator,
    estimate_bits,
    expand,
    random_size,
    shrink,
    shrunk_size,
)
from fedpress.wire.reader import ByteReader, varint, zigzag

N = 20_000


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def back(data: bytes, like: torch.Tensor) -> torch.Tensor:
    return expand(memoryview(data), like.dtype, list(like.shape), "tensors.t")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def gauss(scale: float, dtype=torch.int8, n: int = N) -> torch.Tensor:
    return (torch.randn(n, generator=chance()) * scale).round().to(dtype)


def uneven(n: int = N) -> torch.Tensor:
    loud = torch.exp(1.5 * torch.randn(n // 200 + 1, generator=chance(1))).repeat_interleave(200)[
        :n
    ]
    return (torch.randn(n, generator=chance()) * loud).round().to(torch.int16)


TENSORS = {
    "narrow": (gauss(0.5), ANS),
    "mostly zero": (gauss(0.2), ANS),
    "wide": (gauss(900, torch.int16), NBIT),
    "many symbols": (gauss(60, torch.int16), ANS),
    "uneven": (uneven(), ANS),
    "rows": (gauss(0.7).view(8, -1), ANS),
    "outliers": (torch.where(torch.arange(N) % 3000 == 7, 2**30, gauss(1, torch.int32)), ANS),
    "few and far": (torch.tensor([-16314, 70] + [0] * 14, dtype=torch.int16), ANS),
    "secure": (torch.randint(0, 1 << 18, (N,), generator=chance(), dtype=torch.int32), NBIT),
    "constant": (torch.full((N,), -7, dtype=torch.int64), NBIT),
    "extremes": (torch.tensor([-(2**63), 2**63 - 1] * 50), ANS),
    "top k": (
        torch.where(
            torch.rand(N, generator=chance()) < 0.01, torch.randn(N, generator=chance(3)), 0.0
        ),
        SPARSE,
    ),
    "sparse halves": (torch.where(torch.arange(N) % 40 == 0, 1.5, 0.0).half(), SPARSE),
    "sparse integers": (torch.where(torch.arange(N) % 3 == 0, torch.arange(N) * 10**13, 0), ANS),
    "parameters": (torch.randn(N, generator=chance()), RAW),
    "bytes": (torch.randint(0, 256, (N,), generator=chance(), dtype=torch.uint8), RAW),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_to_the_bit_in_the_form_that_suits_them(name):
    tensor, form = TENSORS[name]
    data = shrink(tensor, pack_floats=True)
    assert data[0] == form
    assert len(data) <= 1 + tensor.nbytes
    assert same_bits(back(data, tensor), tensor)


@pytest.mark.recipe
@given(
    hn.arrays(
        st.sampled_from([np.int8, np.uint8, np.int16, np.int32, np.int64, np.float32, np.float64]),
        hn.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=70),
        fill=st.nothing() | st.just(0),
    )
)
@settings(max_examples=150, deadline=None)
def test_any_tensor_comes_back_to_the_bit(array):
    tensor = torch.from_numpy(array)
    for pack_floats in (False, True):
        data = shrink(tensor, pack_floats=pack_floats)
        assert same_bits(back(data, tensor), tensor)
        assert shrunk_size(tensor, pack_floats=pack_floats) == len(data)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 70_001])
@pytest.mark.parametrize("scale", [0.3, 3, 3000])
def test_every_size_comes_back(n, scale):
    for tensor in (
        gauss(scale, torch.int16, n),
        uneven(n),
        gauss(scale, torch.int16, 4 * n).view(4, n),
    ):
        assert same_bits(back(shrink(tensor), tensor), tensor)


def test_minus_zero_and_not_a_number_survive_a_sparse_tensor():
    tensor = torch.zeros(1000)
    tensor[3], tensor[5], tensor[7] = -0.0, math.nan, -math.inf
    data = shrink(tensor, pack_floats=True)
    assert data[0] == SPARSE
    assert same_bits(back(data, tensor), tensor)


def test_coded_values_come_within_a_percent_of_their_entropy():
    q = gauss(1.0, n=400_000)
    p = torch.bincount(q.long() + 10).double() / len(q)
    entropy = -(p[p > 0] * p[p > 0].log2()).sum()
    assert 8 * len(shrink(q)) / len(q) < 1.01 * entropy


def test_classes_of_blocks_save_bits_where_the_activity_or_the_sign_changes(monkeypatch):
    lean = torch.where(torch.rand(N // 200, generator=chance()) < 0.5, -1, 1).repeat_interleave(200)
    signs = (torch.randn(N, generator=chance(2)) * 0.7 + lean).round().to(torch.int8)
    monkeypatch.setattr(packing, "contexts_pay", lambda values: False)
    apart = [len(shrink(t)) for t in (uneven(), signs)]
    monkeypatch.setattr(
        ans,
        "choose_classes",
        lambda v, *_: classes.BlockClasses(v.shape[1], 1, np.zeros(1, np.uint8)),
    )
    together = [len(shrink(t)) for t in (uneven(), signs)]
    assert apart[0] < 0.85 * together[0]
    assert apart[1] < 0.9 * together[1]


def test_rows_have_tables_of_their_own():
    rows = torch.stack([gauss(0.4), gauss(0.4) + 1])
    assert len(shrink(rows)) < 0.75 * len(shrink(rows.T.contiguous().view(-1)))


@pytest.mark.parametrize("name", ["narrow", "many symbols", "uneven", "mostly zero"])
def test_the_estimate_is_within_two_percent(name):
    tensor, _ = TENSORS[name]
    assert estimate_bits(tensor.numpy()) == pytest.approx(8 * len(shrink(tensor)), rel=0.02)


def test_small_tensors_pay_for_no_tables_they_do_not_need():
    assert len(shrink(gauss(0.6, n=2890))) < 560
    assert len(shrink(torch.zeros(2890, dtype=torch.int8))) == 3
    assert len(shrink(torch.tensor([5], dtype=torch.int64))) == 3


def test_the_coded_bytes_are_the_same_on_every_machine():
    # from whole numbers alone: no random generator, no float
    q = torch.tensor(
        [(i * i * 2654435761 >> 13) % 7 * (i // 500 % 3) // 3 - 1 for i in range(8000)],
        dtype=torch.int8,
    )
    data = shrink(q)
    assert data[0] == ANS
    assert hashlib.sha256(data).hexdigest()[:16] == "381c4ea07fafc25a"


def test_dense_parameters_cost_almost_no_time_and_secure_sums_little():
    parameters = torch.randn(1 << 20)
    masked = torch.randint(0, 1 << 18, (1 << 20,), dtype=torch.int32)

    def seconds(tensor):
        start = time.thread_time()
        shrink(tensor)
        return time.thread_time() - start

    assert min(seconds(parameters) for _ in range(3)) < 0.02
    assert min(seconds(masked) for _ in range(3)) < 0.04


def coded(*, rows=1, count=1, block=None, ids=b"", tables=b"", escapes=b"\0", words=b"") -> bytes:
    layout = b"" if block is None else varint(block) + varint(len(ids)) + ids
    return bytes([ANS, rows, count]) + layout + tables + escapes + words


TABLE = zigzag(0) + varint(4) + bytes([0, 0])  # two symbols that are as likely
ONE = zigzag(3) + varint(2)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "form"),
        (bytes([5]), "form"),
        (bytes([RAW, 1]), ""),
        (bytes([RAW]) + bytes(101), ""),
        (bytes([NBIT]) + zigzag(0) + bytes([9]) + bytes(200), "bits"),
        (bytes([NBIT]) + zigzag(200) + bytes([0]), "bits"),
        (bytes([NBIT]) + zigzag(100) + bytes([8]) + b"\xff" * 100, "low"),
        (bytes([NBIT]) + zigzag(0) + bytes([1]) + bytes(12), "bits"),
        (bytes([NBIT]) + zigzag(0) + bytes([1]) + bytes(14), ""),
        (bytes([NBIT]) + b"\xff" * 11, "low"),
        (coded(rows=0), "rows"),
        (coded(rows=17), "rows"),
        (coded(rows=3), "rows"),
        (coded(count=0), "classes"),
        (coded(count=65), "classes"),
        (coded(count=2, block=0), "block"),
        (coded(count=2, block=2 * 31), "block"),
        (coded(count=2, block=2 * 101), "block"),
        (coded(count=2, block=2 * 32, ids=bytes([RAW, 0, 1, 2, 0])), "classes"),
        (coded(count=2, block=2 * 32, ids=bytes([RAW, 0, 1, 0])), ""),
        (coded(), "symbols"),
        (coded(tables=zigzag(0) + varint(0)), "symbols"),
        (coded(tables=zigzag(0) + varint(1 << 20)), "symbols"),
        (coded(tables=zigzag(120) + varint(2 * 100) + bytes(100)), "low"),
        (coded(tables=zigzag(1 << 40) + varint(2)), "low"),
        (coded(tables=zigzag(0) + varint(200) + bytes([0])), "codes"),
        (coded(tables=zigzag(0) + varint(4) + bytes([255, 255])), "codes"),
        (coded(tables=TABLE, escapes=varint(101)), "escapes"),
        (coded(tables=TABLE, escapes=varint(50) + varint(3) + bytes([NBIT, 0, 0])), "words"),
        (coded(tables=zigzag(0) + varint(3) + bytes([0, 0]), words=b"\1" * 40), "escapes"),
        (coded(tables=TABLE, words=b"\1" * 7), "words"),
        (coded(tables=TABLE, words=bytes(8)), "words"),
        (coded(tables=TABLE, words=b"\1" * 400), "words"),
        (coded(tables=ONE, words=b"\1" * 4), "words"),
        (bytes([SPARSE]) + varint(51), "nonzero"),
        (bytes([SPARSE]) + varint(2) + varint(3) + bytes([NBIT, 0, 0]), "bitmap"),
        (bytes([SPARSE]) + varint(0) + varint(3) + bytes([NBIT, 4, 0]), "bitmap"),
        (bytes([SPARSE]) + varint(0) + varint(3) + bytes([NBIT, 0, 0, 9]), ""),
        (
            bytes([SPARSE])
            + varint(0)
            + varint(9)
            + bytes([SPARSE, 0, 6, SPARSE, 0, 3, SPARSE, 0, 0]),
            "form",
        ),
    ],
)
def test_every_fault_of_a_form_is_a_wire_error_that_names_the_field(data, field):
    place = r"^message\.tensors\.t" + (rf"(\.\w+)*\.{field}" if field else "") + r"(\.\w+)*: "
    with pytest.raises(WireError, match=place):
        expand(memoryview(data), torch.int8, [100], "tensors.t")


def test_forms_inside_forms_end():
    deep = b""
    for _ in range(50):
        deep = bytes([SPARSE]) + varint(0) + varint(len(deep)) + deep
    with pytest.raises(WireError, match=r"form: got 3 at depth 3"):
        expand(memoryview(deep), torch.int8, [100], "tensors.t")


def test_varints_of_any_size_come_back():
    for value in (0, 1, 127, 128, (1 << 63) - 1, -1, -(1 << 63)):
        assert ByteReader(memoryview(zigzag(value))).zigzag("x") == value
    with pytest.raises(WireError, match=r"^message\.x: "):
        ByteReader(memoryview(b"\x80" * 12)).varint("x", 1 << 63)
    with pytest.raises(WireError, match=r"^message\.x: got 300, expected at most 299"):
        ByteReader(memoryview(varint(300))).varint("x", 299)


LARGEST = 1 << 20


@pytest.mark.parametrize(
    "tensor",
    [
        gauss(1, n=LARGEST),
        uneven(LARGEST // 2),
        torch.where(torch.arange(LARGEST // 4) % 3 == 0, 1.0, 0.0),
        torch.where(torch.arange(LARGEST // 2) % 3 == 0, 1.0, 0.0).half(),
        torch.randint(0, 1 << 18, (LARGEST // 4,), dtype=torch.int32),
        torch.randn(LARGEST // 4),
    ],
    ids=["coded", "coded, 16 bits", "sparse", "sparse, 16 bits", "n-bit", "raw"],
)
def test_reading_takes_less_than_twice_the_largest_message(tensor):
    data = pack(Message("m", {}, {"t": tensor}))
    torch.zeros(1).numpy()
    tracemalloc.start()
    unpack(data, max_bytes=LARGEST + 1024)
    taken = tracemalloc.get_traced_memory()[1] + tensor.nbytes  # torch's own memory is not traced
    tracemalloc.stop()
    assert taken < 2 * LARGEST + (1 << 19)


def framed(payload: bytes) -> bytes:
    return FRAME.pack(MAGIC, VERSION, len(payload), zlib.crc32(payload)) + payload


def mutated(payload: bytes, dice: random.Random) -> bytes:
    changed = bytearray(payload)
    for _ in range(dice.choice([1, 1, 2, 4])):
        at = dice.randrange(min(len(changed), dice.choice([40, 120, 4000])))
        changed[at] = dice.choice(
            [0, 1, 127, 128, 255, dice.randrange(256), changed[at] ^ 1 << dice.randrange(8)]
        )
    cut = dice.choice([0, 0, 0, 0, -1, -4, 3])
    return bytes(changed[:cut] if cut < 0 else changed + bytes(cut))


def small_messages() -> list[bytes]:
    tensors = {
        name: (t.reshape(-1)[:600] if name != "rows" else t[:, :75].contiguous())
        for name, (t, _) in TENSORS.items()
    }
    tensors["classes"] = uneven(4000)
    tensors["more"] = torch.cat([gauss(0.3, n=2000), gauss(9, n=2000)])
    return [pack(Message("m", {}, {name: t})) for name, t in tensors.items()]


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.recipe)])
def test_thousands_of_mutated_messages_raise_nothing_but_wire_errors(count):
    dice, messages, read, faults = random.Random(0), small_messages(), 0, set()
    assert {m[m.index(b"{}") + 2 :][0] for m in messages} == {1}
    for _ in range(count):
        data = framed(mutated(dice.choice(messages)[FRAME.size :], dice))
        try:
            unpack(data, max_bytes=1 << 16)
            read += 1
        except WireError as error:
            faults.add(str(error)[:8])
    assert faults == {"message."}
    assert (
        0.01 * count < read < 0.99 * count
    )  # the mutations reach the values, and most are found out


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_is_packed(dtype):
    zeros = torch.zeros(5000).to(dtype)
    data = shrink(zeros, pack_floats=True)
    assert len(data) < 10
    assert same_bits(back(data, zeros).view(torch.uint8), zeros.view(torch.uint8))


def test_strided_tensors_are_packed():
    t = gauss(1).view(100, 200).T
    assert torch.equal(back(packing.shrink(t), t), t)


@pytest.mark.parametrize("pack_floats", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_the_computed_size_is_the_packed_one(name, pack_floats):
    tensor = TENSORS[name][0]
    for each in (tensor, tensor[:1], tensor[:0], tensor.reshape(-1)[::3]):
        size = shrunk_size(each, pack_floats=pack_floats)
        assert size == len(shrink(each, pack_floats=pack_floats))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("bits", [1, 3, 8, 13])
def test_the_size_of_every_type_and_range_is_computed(dtype, bits):
    top = min(2**bits - 1, 127)
    values = torch.randint(0, top + 1, (5003,), generator=chance()).to(dtype)
    for each in (values, values - top // 2 if dtype != torch.uint8 else values):
        assert shrunk_size(each) == len(shrink(each))


@pytest.mark.parametrize("bits", [2, 3, 7, 8, 9, 14, 16, 18, 22, 31, 32, 33, 48, 62])
@pytest.mark.parametrize("count", [4096, 4097, 20_001, 150_000])
def test_the_size_of_random_integers_is_known_without_them(bits, count):
    dtype = torch.int32 if bits <= 32 else torch.int64
    half = 1 << (bits - 1)
    drawn = torch.randint(-half, half, (count,), generator=chance()).to(dtype)
    assert random_size(count, bits, dtype.itemsize) == len(shrink(drawn))


@pytest.mark.parametrize("bits", [4, 8, 9, 16, 22, 33])
@pytest.mark.parametrize("count", [1, 5, 40, 910, 4095])
def test_few_random_integers_are_packed_in_the_form_that_is_computed(bits, count):
    dtype = torch.int32 if bits <= 32 else torch.int64
    half = 1 << (bits - 1)
    drawn = torch.randint(-half, half, (count,), generator=chance()).to(dtype)
    assert shrunk_size(drawn, random=True) == len(shrink(drawn))


def test_a_handful_of_random_integers_may_all_be_zero():
    draws = [torch.zeros(count, dtype=torch.int32) for count in range(1, 6)]
    for count in range(1, 20):
        drawn = torch.randint(-2, 2, (20, count), generator=chance()).to(torch.int32)
        draws += list(drawn)
    assert [shrunk_size(one, random=True) for one in draws] == [len(shrink(one)) for one in draws]


def test_floats_are_raw_unless_the_sender_asks_for_less():
    zeros = torch.zeros(1000)
    assert shrink(zeros)[0] == RAW
    assert shrink(zeros) == bytes([RAW]) + bytes(4000)
    assert shrink(zeros, pack_floats=True)[0] == SPARSE


def test_a_raw_size_needs_no_values():
    assert shrunk_size(torch.empty(1 << 20, 1 << 20, device="meta")) == 1 + (4 << 40)


def test_a_table_has_the_symbols_that_cost_less_than_their_escapes():
    chance_ = np.random.default_rng(0)
    counts = chance_.integers(0, 9, (200, 13)) * (chance_.random((200, 13)) < 0.4)
    counts[:, -1] = 0
    for row, table in zip(counts, ans.trimmed_tables(counts, -6), strict=True):
        if not row.any():
            continue

        def cost(first: int, last: int, row=row) -> int:
            inside = int(row[first:last].sum())
            return last - first + ans.ESCAPE_BYTES * (int(row.sum()) - inside)

        least = min(cost(a, b) for a in range(12) for b in range(a + 1, 13))
        first = table.low + 6
        assert cost(first, first + table.symbols) == least
        assert table.escape == (row[first : first + table.symbols].sum() < row.sum())


def test_an_estimator_that_keeps_its_choice_is_near_the_packed_size():
    loud = np.repeat(np.exp(np.random.default_rng(1).standard_normal(200)), 500)
    values = np.random.default_rng(0).standard_normal(100_000) * loud
    signs = np.repeat(np.random.default_rng(2).standard_normal(20_000), 5) * loud
    for x in (values, values / 2 + signs):
        estimator = SizeEstimator()
        for step in (4.0, 3.6, 3.2, 0.5, 0.55, 3.0):
            levels = np.rint(x / step).astype(np.int16)
            real = 8 * len(shrink(torch.from_numpy(levels)))
            assert estimator.bits(levels) == pytest.approx(real, rel=0.025)


@pytest.mark.parametrize("size", [32, 500, 4900, 9000])
def test_random_bytes_are_not_coded_and_repeating_ones_are(size, monkeypatch):
    tried = []
    monkeypatch.setattr(packing.ans, "encode_ints", lambda *_: tried.append(1) or bytes(10**6))
    monkeypatch.setattr(packing, "contexts_pay", lambda values: False)
    chance = torch.Generator().manual_seed(size)
    random = torch.randint(256, (size,), generator=chance, dtype=torch.uint8)
    assert packing.shrunk_size(random) == size + 1
    assert not tried
    # Few different values, and many zeros.
    for repeating in (random % 4 * 60, random // 8 * (random % 2)):
        packing.shrunk_size(repeating)
        assert tried
        tried.clear()
