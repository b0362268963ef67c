import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.core.random_source import AesCtrRandom
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting import accountant, renyi
from fedpress.privacy.accounting.accountant import epsilon
from fedpress.privacy.noise import skellam
from fedpress.privacy.noise.distributed import BITS, USED_RANGE, plan

DENSE, PRUNED = 11_170_000, 3_350_000


def asked(size=2**16, **more):
    limit = 6 / math.sqrt(size)
    task = {
        "size": size,
        "clip_norm": 1.0,
        "coordinate_limit": limit,
        "clients": 10,
        "survivors": 10,
    }
    return {**task, "steps": 50, "delta": 1e-3, **more}


def test_a_plan_is_that_of_its_closed_forms():
    got = plan(**asked(clip_norm=2.0, survivors=8), noise_multiplier=5.0, bits=18)
    unit = got.scale * 2.0
    assert got.variance * 8 == pytest.approx((5.0 * unit) ** 2)
    beta_term = unit + math.sqrt(2**16) / 2  # sqrt(2 ln(1/beta)) is 1 for beta = exp(-1/2)
    assert got.l2**2 == pytest.approx(unit**2 + 2**16 / 4 + beta_term)
    assert got.l1 == pytest.approx(256 * got.l2)
    assert got.coordinate_limit == pytest.approx(got.scale * 6 / 256)
    noise_tail = skellam.tail(2**16, got.variance * 10, 2**-30)
    assert got.limit == pytest.approx(10 * (got.coordinate_limit + 1) + noise_tail)
    assert got.limit == pytest.approx(USED_RANGE * 2**17, rel=1e-6)  # the finest grid that fits
    assert got.limit <= USED_RANGE * 2**17
    assert got.epsilon == epsilon([got.event(num_rounds=50)], delta=1e-3)
    assert got.event(num_rounds=3).steps == 3


def test_bits_are_the_fewest_that_come_near_the_cost_of_the_noise_alone():
    got = plan(**asked(), noise_multiplier=5.0)
    alone = renyi.epsilon([accountant.GaussianEvent(1.0, 5.0, 50)], delta=1e-3)
    costs = {cost.bits: cost.epsilon for cost in got.table()}
    assert list(costs) == list(BITS)
    assert got.epsilon == costs[got.bits] <= 1.05 * alone < costs[got.bits - 1]
    falling = list(costs.values())
    assert all(a >= b for a, b in pairwise(falling))
    assert falling[-1] == pytest.approx(alone, rel=0.001)


def test_a_pruned_network_needs_fewer_bits_and_less_noise():
    dense, pruned = (plan(**asked(size), noise_multiplier=5.0) for size in (DENSE, PRUNED))
    assert (dense.bits, pruned.bits) == (20, 19)
    assert max(dense.epsilon, pruned.epsilon) < 5.6
    at_16 = [plan(**asked(size), noise_multiplier=5.0, bits=16).epsilon for size in (DENSE, PRUNED)]
    assert at_16[0] > 1.8 * at_16[1]
    noises = [
        plan(**asked(size), epsilon=8.0, bits=18).noise_multiplier for size in (DENSE, PRUNED)
    ]
    assert noises[0] > 1.08 * noises[1]


@pytest.mark.parametrize("bits", [None, 18, 22])
@pytest.mark.parametrize("unit", ["client", "sample"])
def test_a_budget_gets_the_smallest_noise_that_keeps_it(bits, unit):
    got = plan(
        **asked(unit=unit, sampling_prob=1.0 if unit == "client" else 0.2), epsilon=6.0, bits=bits
    )
    assert 5.999 < got.epsilon <= 6.0
    assert bits is None or got.bits == bits
    less = plan(**asked(unit=unit, sampling_prob=got.task.sampling_prob),
                noise_multiplier=0.999 * got.noise_multiplier, bits=got.bits)  # fmt: skip
    assert less.epsilon > 6.0


@pytest.mark.recipe
def test_too_few_bits_name_the_fewest_that_would_do():
    with pytest.raises(PrivacyError, match="take at least 16, with noise_multiplier") as caught:
        plan(**asked(PRUNED), epsilon=8.0, bits=12)
    noise = float(str(caught.value).rpartition(" ")[2])
    assert plan(**asked(PRUNED), noise_multiplier=noise * 1.01, bits=16).epsilon <= 8.0
    with pytest.raises(PrivacyError, match="take at least 15"):
        plan(**asked(clients=10_000, survivors=10_000), noise_multiplier=1.0, bits=9)
    with pytest.raises(PrivacyError, match="take fewer"):
        plan(**asked(clients=2**24, survivors=2**24), noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="fewer steps"):
        plan(**asked(steps=10**9), epsilon=1e-3)


def test_fewer_survivors_are_given_more_noise_each_and_a_coarser_grid():
    all_, few = (plan(**asked(survivors=n), noise_multiplier=5.0, bits=18) for n in (10, 5))
    assert few.scale < all_.scale
    assert few.variance / few.scale**2 == pytest.approx(2 * all_.variance / all_.scale**2)
    assert few.epsilon > all_.epsilon  # rounding weighs more on a coarser grid


def test_rounding_that_nobody_can_repeat_is_charged_to_delta():
    client, sample = (
        plan(**asked(unit=unit), noise_multiplier=5.0, bits=18) for unit in ("client", "sample")
    )
    assert client.event(num_rounds=50).failure == 0
    assert sample.event(num_rounds=50).failure * 50 == pytest.approx(1e-3 / 1000)
    assert sample.l2 > client.l2
    assert sample.epsilon > client.epsilon


def test_the_difference_of_two_sums_rounded_with_the_same_coins_is_a_rounded_difference():
    gen = torch.Generator().manual_seed(0)
    size, draws = 500, 2000
    x, d = 30 * torch.randn(size, generator=gen).double(), torch.randn(size, generator=gen).double()
    d *= 5 / d.norm()
    coins = torch.rand(draws, size, generator=gen, dtype=torch.float64)
    difference = (x + d + coins).floor() - (x + coins).floor()
    assert torch.allclose(difference.mean(0), d, atol=5 * 0.5 / math.sqrt(draws))
    assert float((difference - d).abs().max()) < 1
    for beta in (0.3, 0.02):
        passed = difference.norm(dim=1) > skellam.rounded_sensitivity(5.0, size, beta)
        assert float(passed.double().mean()) <= beta


def test_rounding_again_would_part_two_neighbouring_sums():
    assert plan(**asked(), noise_multiplier=5.0, bits=18).redraws_rounding
    assert not plan(**asked(unit="sample"), noise_multiplier=5.0, bits=18).redraws_rounding
    gen, size, most = torch.Generator().manual_seed(0), 4000, 0.0
    x = torch.full((size,), 0.5, dtype=torch.float64)
    near = x + 0.002  # one example more, of norm 0.13
    allowed = math.sqrt(size / 2)  # about half of all draws are that short

    def short(y, tries):
        return next(
            z for z in ((y + coins).floor() for coins in tries) if float(z.norm()) <= allowed
        )

    for _ in range(100):
        tries = torch.rand(25, size, generator=gen, dtype=torch.float64)
        most = max(most, float((short(near, tries) - short(x, tries)).norm()))
    assert most > 1.2 * skellam.rounded_sensitivity(0.13, size, 1e-6)


@given(
    clients=st.integers(1, 12),
    survivors=st.integers(1, 12),
    bits=st.integers(10, 16),
    noise=st.floats(0.5, 9),
)
@settings(max_examples=15, deadline=None)
def test_no_sum_passes_the_limit(clients, survivors, bits, noise):
    size = 2000
    task = asked(size, clients=clients, survivors=min(clients, survivors), coordinate_limit=0.1)
    try:
        got = plan(**task, noise_multiplier=noise, bits=bits)
    except PrivacyError:
        return
    assert got.limit <= USED_RANGE * 2 ** (bits - 1)
    total = torch.zeros(size, dtype=torch.int64)
    for client in range(
        clients
    ):  # the worst case: every value of every client at its limit, nobody drops out
        chance = AesCtrRandom(bytes([client]) * 32)
        total += (got.coordinate_limit + chance.uniform(size)).floor().long()
        total += skellam.sample(size, got.variance, chance)
    assert int(total.abs().max()) <= got.limit


def test_the_limit_is_met_about_as_rarely_as_planned():
    """With the promise loosened to 1 in 100 the limit is passed, but no more often than that."""
    got = plan(**asked(200, coordinate_limit=1e-3), noise_multiplier=5.0, bits=16)
    limit = skellam.tail(200, got.variance * 10, 1e-2)
    noise = torch.stack(
        [skellam.sample(200 * 3000, got.variance, AesCtrRandom(bytes([c]) * 32)) for c in range(10)]
    ).sum(0)
    passed = float((noise.view(3000, 200).abs().amax(1) > limit).double().mean())
    assert 0 < passed <= 1e-2


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 0},
        {"size": 1.5},
        {"clip_norm": 0.0},
        {"coordinate_limit": math.inf},
        {"clients": 0},
        {"survivors": 11},
        {"steps": 0},
        {"delta": 1.0},
        {"unit": "image"},
        {"sampling_prob": 2.0},
        {"bits": 7},
        {"bits": 33},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
    ],
)
def test_arguments_out_of_range_are_refused_by_name(changed):
    with pytest.raises(RecipeError, match=f"^{next(iter(changed))}: got"):
        plan(**{**asked(), "noise_multiplier": 5.0, **changed})


@pytest.mark.parametrize(
    "changed", [{}, {"epsilon": 8.0, "noise_multiplier": 5.0}, {"epsilon": -1.0}]
)
def test_a_plan_needs_one_of_budget_and_noise(changed):
    with pytest.raises(RecipeError, match=r"^epsilon: "):
        plan(**asked(), **changed)


def test_more_noise_in_equal_bits_takes_a_coarser_grid():
    got = plan(**asked(), noise_multiplier=5.0, bits=14)
    more = plan(**asked(), noise_multiplier=50.0, bits=14)
    assert 8 < got.scale / more.scale < 10.5
    assert more.epsilon < got.epsilon  # but it is not worth ten times the noise
    assert more.epsilon > 5 * plan(**asked(), noise_multiplier=50.0, bits=22).epsilon
