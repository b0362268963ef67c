"""Every row of the table of transforms keeps what all of them promise."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedpress.codecs import (
    TRANSFORMS,
    VALUES,
    AnyTransform,
    Bound,
    bind_chain,
    check_float,
    decode_chain,
    encode_chain,
)
from fedpress.errors import FedpressError, RecipeError, WireError
from tests.federation.federation import key

CLIP = {"kind": "clip", "clip_norm": 2.0}
ROWS = {
    "clip": [CLIP],
    "topk": [{"kind": "topk", "density": 0.1}],
    "randomk": [{"kind": "randomk", "density": 0.3}],
    "randomk-unbiased": [CLIP, {"kind": "randomk", "density": 0.3, "unbiased": True}],
    "rotate": [CLIP, {"kind": "rotate", "block": 16}],
    "lowrank": [{"kind": "lowrank", "rank": 2}],
    "discretize": [CLIP, {"kind": "discretize", "scale": 100.0}],
    "rotate-discretize": [CLIP, {"kind": "rotate"}, {"kind": "discretize", "scale": 100.0}],
    "randomk-rotate-discretize": [
        CLIP,
        {"kind": "randomk", "density": 0.5},
        {"kind": "rotate"},
        {"kind": "discretize", "scale": 50.0},
    ],
    "noise": [CLIP, {"kind": "noise", "std": 0.1}],
    "skellam": [CLIP, {"kind": "discretize", "scale": 100.0}, {"kind": "noise", "std": 3.0}],
    "quantize": [{"kind": "quantize", "rate": 1.0}],
    "quantize-unbiased": [{"kind": "quantize", "rate": 2.0, "unbiased": True}],
    "quantize-int8": [{"kind": "quantize", "bits": 8}],
    "powers": [{"kind": "powers"}],
    "powers-3": [{"kind": "powers", "k": 3}],
    "sign": [{"kind": "sign"}],
    "ternary": [{"kind": "ternary"}],
    "lossless": [{"kind": "lossless"}],
    "topk-lossless": [{"kind": "topk", "density": 0.1}, {"kind": "lossless"}],
    "topk-quantize": [{"kind": "topk", "density": 0.1}, {"kind": "quantize", "bits": 4}],
}
SHAPES = {1: ((1,),), 2: ((2,),), 7: ((7,),), 300: ((12, 20), (60,)), 1024: ((32, 2, 4, 4),)}


def bound(row, size):
    settings = [TypeAdapter(AnyTransform).validate_python(s) for s in ROWS[row]]
    return bind_chain(settings, Bound(size, shapes=SHAPES[size]))


ADDITIVE = {row for row in ROWS if all(t.additive for t in bound(row, 300)[0])}
"""What says of itself that sums of it decode."""


def vector(size, seed=0, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def there_and_back(chain, x, at=None):
    return decode_chain(chain, encode_chain(chain, x, at or key()), at or key())


def test_every_row_of_the_table_is_tested():
    assert {s["kind"] for row in ROWS.values() for s in row} == TRANSFORMS.keys()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e4])
def test_an_update_comes_back_finite_and_in_its_shape(row, size, scale):
    chain, _ = bound(row, size)
    x = vector(size, scale=scale)
    kept = x.clone()
    back = there_and_back(chain, x)
    assert (back.dtype, back.shape) == (torch.float32, x.shape)
    assert torch.isfinite(back).all()
    assert torch.equal(x, kept)


@pytest.mark.parametrize("row", ROWS)
def test_what_comes_back_points_where_the_update_points(row):
    chain, _ = bound(row, 1024)
    x = vector(1024) / 32
    back = there_and_back(chain, x)
    assert float(torch.nn.functional.cosine_similarity(back, x, 0)) > 0.15


@pytest.mark.parametrize("row", ROWS)
def test_the_same_key_gives_the_same_bits_and_zeros_stay_nearly_zero(row):
    chain, _ = bound(row, 300)
    x = vector(300)
    one, two = encode_chain(chain, x, key()), encode_chain(chain, x, key())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    if "noise" not in row and "skellam" not in row:
        assert float(there_and_back(chain, torch.zeros(300)).abs().max()) <= 1e-6


@pytest.mark.recipe
@pytest.mark.parametrize("row", ROWS)
def test_promised_bounds_hold_on_many_inputs(row):
    chain, end = bound(row, 7)
    chance = torch.Generator().manual_seed(1)
    for trial in range(150):  # of 19 rows: nearly 3,000 inputs
        scale = 10 ** float(torch.empty(()).uniform_(-4, 4, generator=chance))
        x = scale * torch.randn(7, generator=chance)
        if trial % 3 == 0:
            x[torch.rand(7, generator=chance) < 0.7] = 0
        values = encode_chain(chain, x, key(round=trial + 1))[VALUES]
        assert values.shape == (end.size,) or row not in ADDITIVE
        assert float(values.double().norm()) <= end.l2 * (1 + 1e-6)
        # `lossless` sends nothing of a vector of zeros.
        assert max(values.double().abs().flatten().tolist(), default=0.0) <= end.linf * (1 + 1e-6)
        assert values.is_floating_point() != end.integer


@pytest.mark.parametrize("row", sorted(ADDITIVE))
def test_sums_of_additive_rows_decode_to_the_sum(row):
    chain, _ = bound(row, 300)
    a, b = (encode_chain(chain, vector(300, seed), key(f"c{seed}")) for seed in (1, 2))
    together = decode_chain(chain, {VALUES: a[VALUES] + b[VALUES]}, key())
    apart = sum(decode_chain(chain, part, key()) for part in (a, b))
    assert torch.allclose(together, apart, atol=1e-5)


ALONE = [
    "topk",
    "lowrank",
    "lossless",
    "quantize",
    "quantize-unbiased",
    "powers",
    "sign",
    "ternary",
]


@pytest.mark.parametrize("row", [*ALONE, "quantize-int8", "topk-quantize"])
def test_rows_whose_sums_mean_nothing_say_so(row):
    assert row not in ADDITIVE


@pytest.mark.parametrize("row", ROWS)
def test_a_hostile_message_is_a_wire_error_and_nothing_else(row):
    chain, _ = bound(row, 300)
    good = encode_chain(chain, vector(300), key())
    chance = torch.Generator().manual_seed(3)

    def spoilt(tensor):
        yield tensor[:-1] if tensor.ndim and len(tensor) else torch.zeros(3)
        yield tensor.reshape(1, -1)
        yield torch.zeros(0)
        yield tensor.double() if not tensor.is_floating_point() else tensor.long()
        yield (
            torch.full_like(tensor, math.nan)
            if tensor.is_floating_point()
            else torch.full_like(tensor, -1)
        )
        yield (
            torch.full_like(tensor, math.inf)
            if tensor.is_floating_point()
            else torch.full_like(tensor, 127)
        )
        yield torch.randint(-128, 128, tensor.shape, generator=chance).to(tensor.dtype)

    for name, tensor in good.items():
        for bad in spoilt(tensor):
            try:
                back = check_float(decode_chain(chain, good | {name: bad}, key()), 300, "update")
            except WireError:
                continue
            assert torch.isfinite(back).all()
    with pytest.raises(WireError):
        decode_chain(chain, good | {"9.more": torch.ones(1)}, key())


@pytest.mark.parametrize(
    ("chain", "cure"),
    [
        ([{"kind": "discretize", "scale": 1.0}], "put 'clip' before it"),
        ([CLIP, {"kind": "discretize"}], "only a secure sum plans one"),
        ([{"kind": "quantize", "bits": 8}, {"kind": "rotate"}], "before"),
        ([CLIP, {"kind": "rotate", "block": 24}], "power of two"),
        ([{"kind": "topk"}, {"kind": "randomk"}, {"kind": "lowrank"}], "put it first"),
        (
            [CLIP, {"kind": "discretize", "scale": 1.0}, {"kind": "discretize", "scale": 1.0}],
            "already integers",
        ),
    ],
)
def test_transforms_in_a_wrong_order_are_refused_with_the_cure(chain, cure):
    with pytest.raises(RecipeError, match=cure):
        bind_chain(
            [TypeAdapter(AnyTransform).validate_python(s) for s in chain],
            Bound(300, shapes=SHAPES[300]),
        )


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "topk", "density": 0},
        {"kind": "clip", "clip_norm": math.inf},
        {"kind": "rotate", "blok": 4},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises((ValidationError, FedpressError)):
        TypeAdapter(AnyTransform).validate_python(bad)
