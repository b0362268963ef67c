import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.core.finite import is_finite, norm

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 33, 1000, 5003])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-3, 1.0, 6e4, 1e19, 3e38, 1e300])
def test_it_is_what_isfinite_says_of_every_value(dtype, size, scale):
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (drawn.clamp(-1, 1) * scale).to(dtype)
    assert is_finite(x) == bool(torch.isfinite(x).all())
    for bad in BAD if size else ():
        for at in (0, size // 2, size - 1):
            spoilt = x.clone()
            spoilt[at] = bad
            assert not is_finite(spoilt)


@pytest.mark.parametrize("dtype", TYPES[:3], ids=str)
def test_a_norm_of_float32_or_less_is_finite_exactly_if_the_vector_is(dtype):
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert math.isfinite(norm(largest))
    for bad in BAD:
        largest[500] = bad
        assert not math.isfinite(norm(largest))
        largest[500] = 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32), max_size=40))
def test_any_vector_is_judged_as_its_plain_twin_judges_it(values):
    x = torch.tensor(values, dtype=torch.float32)
    plain = math.sqrt(math.fsum(v * v for v in values)) if all(map(math.isfinite, values)) else None
    assert is_finite(x) == (plain is not None)
    assert math.isfinite(norm(x)) == (plain is not None)
    if plain is not None:
        assert norm(x) == pytest.approx(plain, rel=1e-12)


def test_shapes_strides_gradients_and_whole_numbers_are_taken():
    x = torch.ones(4, 6, requires_grad=True)
    assert is_finite(x)
    assert is_finite(x.T[::2])
    assert is_finite(torch.arange(5))
    assert norm(torch.full((2, 2), 2.0)) == 4.0


@pytest.mark.parametrize("scale", [1e-44, 1e-20, 1e-3, 1.0, 1e15, 1e19, 1e38])
@pytest.mark.parametrize("size", [4095, 4096, 12_288, 100_001])
def test_a_long_norm_is_that_in_float64(size, scale):
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(1))
    # Values of one sign, and of one large value among small ones, round the least kindly.
    for x in (drawn, drawn.abs(), torch.full((size,), 0.1), torch.eye(1, size)[0] + 1e-4 * drawn):
        x = (x * scale).clamp(-3e38, 3e38)
        assert norm(x) == pytest.approx(float(x.double().norm()), rel=1e-6, abs=0)
