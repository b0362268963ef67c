import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.noise.mechanism import clip, noise_sum, noised_mean, poisson_batches
from fedpress.privacy.plan import PrivacyPlan


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plan(noise=1.5, clip_norm=0.4):
    return PrivacyPlan("client", clip_norm=clip_norm, sampling_prob=1.0, noise_multiplier=noise)


@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40
    ),
    clip_norm=st.floats(1e-6, 1e6),
)
@settings(max_examples=300, deadline=None)
def test_the_clipped_norm_never_exceeds_the_bound(values, clip_norm):
    update = torch.tensor(values)
    got = clip(update, clip_norm)
    assert got.dtype == torch.float32
    assert float(got.double().norm()) <= clip_norm
    if float(update.double().norm()) <= clip_norm:
        assert torch.equal(got, update)


def test_long_updates_keep_their_direction_and_lose_only_rounding():
    update = torch.randn(100_000, generator=seeded()) * 1e30  # squares overflow float32
    got = clip(update, 0.01)
    assert 0.01 * (1 - 1e-6) < float(got.double().norm()) <= 0.01
    assert torch.allclose(got * float(update.double().norm() / 0.01), update, rtol=1e-4)
    assert torch.equal(clip(torch.zeros(3), 1.0), torch.zeros(3))
    assert (
        clip(torch.tensor(100.0), 1.0) <= 1.0
    )  # a number without dimensions is clipped like any other


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_updates_that_are_not_finite_are_refused(value):
    with pytest.raises(PrivacyError, match="drop this contribution"):
        clip(torch.tensor([1.0, value]), 1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_impossible_clip_norms_are_refused(clip_norm):
    with pytest.raises(RecipeError, match="clip_norm"):
        clip(torch.ones(2), clip_norm)


def test_noise_on_the_sum_has_the_planned_size_and_shape():
    total = torch.linspace(-3, 3, 400_000)
    noise = (noise_sum(total, plan(), seeded()) - total).double()
    assert float(noise.std()) == pytest.approx(0.6, rel=0.01)
    assert abs(float(noise.mean())) < 5 * 0.6 / 400_000**0.5
    assert stats.kstest(noise[:50_000].numpy() / 0.6, "norm").pvalue > 0.001


def test_noise_comes_from_the_given_generator_alone():
    a, b = (noise_sum(torch.zeros(100), plan(), seeded(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, noise_sum(torch.zeros(100), plan(), seeded(6)))
    assert torch.equal(noise_sum(torch.ones(3), plan(noise=0.0), seeded()), torch.ones(3))


def test_the_mean_divides_sum_and_noise_by_the_public_number():
    mean = noised_mean(torch.full((200_000,), 30.0), plan(), expected=10, generator=seeded())
    assert float(mean.mean()) == pytest.approx(3.0, abs=1e-3)
    assert float(mean.std()) == pytest.approx(0.06, rel=0.01)


@pytest.mark.parametrize("expected", [0, -1, math.nan])
def test_a_mean_over_nobody_is_refused(expected):
    with pytest.raises(PrivacyError, match="expected: got"):
        noised_mean(torch.zeros(2), plan(), expected=expected, generator=seeded())


def test_every_example_joins_every_batch_by_its_own_coin():
    n, q, steps = 200, 0.1, 3000
    joined = torch.zeros(steps, n)
    for row, index in zip(joined, poisson_batches(n, q, steps, seeded()), strict=True):
        assert index.dtype == torch.int64
        row[index] = 1
    sizes = joined.sum(1)
    assert float(sizes.mean()) == pytest.approx(n * q, rel=0.01)
    assert float(sizes.var()) == pytest.approx(
        n * q * (1 - q), rel=0.1
    )  # a fixed batch size would have none
    rates = joined.mean(0)
    assert float((rates - q).abs().max()) < 5 * math.sqrt(q * (1 - q) / steps)
    correlation = torch.corrcoef(joined[:, :2].T)[0, 1]
    assert abs(float(correlation)) < 0.1


def test_empty_batches_are_steps_and_probability_one_takes_everybody():
    rare = list(poisson_batches(3, 0.01, 50, seeded()))
    assert len(rare) == 50
    assert sum(len(index) == 0 for index in rare) > 30
    assert [index.tolist() for index in poisson_batches(4, 1.0, 2, seeded())] == [[0, 1, 2, 3]] * 2
    assert [len(index) for index in poisson_batches(0, 0.5, 2, seeded())] == [0, 0]


def test_noise_is_drawn_finer_than_a_float32_normal():
    noise = noise_sum(
        torch.zeros(2**18, dtype=torch.float64), plan(noise=1.0, clip_norm=1.0), seeded(8)
    )
    assert float(stats.kstest(noise[:100_000].double().numpy(), "norm").pvalue) > 0.001
    coarse = torch.randn(2**18, generator=seeded(8), dtype=torch.float32)
    assert not torch.isin(noise.float(), coarse).all()
    same = torch.randn(2**18, generator=seeded(8), dtype=torch.float64)
    assert torch.equal(noise.float(), same.float())
