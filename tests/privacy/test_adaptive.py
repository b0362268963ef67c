import math

import pytest
import torch

from fedpress.core.random_source import TorchRandom
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting.accountant import GaussianEvent, epsilon
from fedpress.privacy.adaptive import (
    AdaptiveClip,
    centred_bit,
    count_noise_for,
    share_below,
    update_noise_multiplier,
)


def follow(how, start, norms, rounds, noise, chance):
    clip_norm, path = start, []
    for _ in range(rounds):
        total = sum(centred_bit(norm, clip_norm) for norm in norms) + noise * float(
            chance.normal(1)
        )
        clip_norm = how.update(clip_norm, share_below(total, len(norms)))
        path.append(clip_norm)
    return path


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_the_clip_norm_reaches_the_true_quantile_from_far_above_and_below(quantile, factor):
    chance = TorchRandom(torch.Generator().manual_seed(0))
    norms = (3 * chance.normal(200).exp()).tolist()
    true = float(torch.tensor(norms).quantile(quantile))
    how = AdaptiveClip(quantile=quantile, lr=0.2)
    path = follow(how, factor * true, norms, 220, count_noise_for(1.0, 200), chance)
    late = math.exp(sum(map(math.log, path[-80:])) / 80)
    assert late == pytest.approx(true, rel=0.15)


def test_too_many_below_lower_the_clip_norm_and_too_few_raise_it():
    how = AdaptiveClip(quantile=0.5, lr=0.2)
    assert how.update(2.0, below=1.0) == pytest.approx(2.0 * math.exp(-0.1))
    assert how.update(2.0, below=0.0) == pytest.approx(2.0 * math.exp(0.1))
    assert how.update(2.0, below=0.5) == 2.0


def test_bits_are_centred_and_what_is_no_norm_counts_as_above():
    assert [centred_bit(n, 1.0) for n in (0.0, 1.0, 1.1, math.inf, math.nan)] == [
        0.5,
        0.5,
        -0.5,
        -0.5,
        -0.5,
    ]
    assert share_below(sum([0.5] * 3 + [-0.5] * 1), 4) == 0.75


@pytest.mark.parametrize(("z", "count_noise"), [(1.0, 0.6), (1.0, 2.5), (5.0, 12.5), (0.3, 50.0)])
def test_both_queries_together_cost_what_was_planned(z, count_noise):
    update = update_noise_multiplier(z, count_noise)
    both = epsilon(
        [GaussianEvent(1.0, update, 30), GaussianEvent(1.0, 2 * count_noise, 30)], delta=1e-5
    )
    assert both == pytest.approx(epsilon([GaussianEvent(1.0, z, 30)], delta=1e-5), rel=1e-6)
    assert update > z


def test_the_usual_count_noise_costs_the_update_two_percent_at_most():
    for z, cohort in ((5.0, 10), (1.0, 1000), (0.5, 40)):
        assert 1 < update_noise_multiplier(z, count_noise_for(z, cohort)) / z < 1.021
    assert update_noise_multiplier(0.0, 1.0) == 0.0


def test_bits_that_cost_more_than_all_are_refused_with_a_number_that_would_do():
    with pytest.raises(PrivacyError, match="more than 2"):
        update_noise_multiplier(4.0, 2.0)


def test_a_share_that_is_no_number_is_refused():
    with pytest.raises(PrivacyError, match="finite"):
        AdaptiveClip().update(1.0, math.nan)


@pytest.mark.parametrize(
    "changed",
    [
        {"quantile": 0.0},
        {"quantile": 1.0},
        {"lr": 0.0},
        {"initial": math.inf},
        {"count_noise": -1.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(changed):
    with pytest.raises(RecipeError, match=f"^{next(iter(changed))}: got"):
        AdaptiveClip(**changed)
