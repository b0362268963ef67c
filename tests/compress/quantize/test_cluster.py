from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.compress.quantize import shared_values
from fedpress.errors import ModelError


def error(weight, values):
    return float((weight.double()[:, None] - values.double()).square().min(1).values.sum())


def best_error(weight, count):
    """Every way to cut the sorted weights into at most `count` runs, one of which (or none of them) stands for 0."""
    x = weight.double().sort().values
    least = float("inf")
    for runs in range(1, count + 1):
        for cuts in combinations(range(1, len(x)), runs - 1):
            parts = x.tensor_split(cuts)
            means = [float((p - p.mean()).square().sum()) for p in parts]
            zeros = [float(p.square().sum()) for p in parts]
            with_zero = min(sum(means) - m + z for m, z in zip(means, zeros, strict=True))
            least = min(least, with_zero, sum(means) if runs < count else float("inf"))
    return least


@settings(max_examples=60)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8), st.integers(1, 4))
def test_few_weights_get_the_very_best_values(numbers, count):
    weight = torch.tensor(numbers) / 8
    values = shared_values(weight, count)
    assert values.shape == (count,)
    assert 0 in values
    assert values.tolist() == sorted(values.tolist())
    assert error(weight, values) == pytest.approx(best_error(weight, count), abs=1e-6)


def test_many_weights_come_close_to_the_limit_of_a_gaussian():
    """Lloyd-Max with 16 values leaves 0.00955 of a Gaussian's variance (Max 1960); one of ours is held at 0."""
    weight = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
    values = shared_values(weight, 16)
    share = error(weight, values) / float(weight.square().sum())
    assert 0.0093 < share < 0.0108


def test_many_weights_end_where_nothing_moves():
    weight = torch.randn(5000, generator=torch.Generator().manual_seed(1)).pow(3)
    values = shared_values(weight, 8)
    nearest = (weight[:, None] - values).abs().argmin(1)
    for i, value in enumerate(values.tolist()):
        if value:
            assert value == pytest.approx(float(weight[nearest == i].mean()), rel=0.02)


def test_zeros_are_a_value_of_their_own_in_sparse_weights():
    weight = torch.randn(4000, generator=torch.Generator().manual_seed(2)) * (
        torch.arange(4000) % 10 == 0
    )
    values = shared_values(weight, 4)
    assert 0 in values
    assert error(weight, values) < 0.2 * float(weight.square().sum())


def test_the_same_weights_give_the_same_values():
    weight = torch.randn(3000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        shared_values(weight, 16), shared_values(weight.reshape(30, 100).clone(), 16)
    )


@pytest.mark.parametrize("weight", [torch.zeros(1), torch.zeros(2000), torch.full((5,), 2.0)])
def test_constant_weights_are_met_exactly(weight):
    values = shared_values(weight, 4)
    assert error(weight, values) == 0
    assert 0 in values


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(ModelError, match=r"weight: .*not finite; train"):
        shared_values(torch.tensor([1.0, bad]), 4)
