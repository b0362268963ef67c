import math

import pytest

from fedpress.errors import RecipeError
from fedpress.privacy.plan import PrivacyPlan


def test_calibrated_noise_keeps_all_rounds_within_the_budget():
    plan = PrivacyPlan("sample", clip_norm=0.5, sampling_prob=64 / 600, steps_per_round=10)
    private = plan.calibrate(epsilon=8, num_rounds=50)
    assert private.noise_multiplier == pytest.approx(1.627, abs=6e-4)
    assert 7.99 < private.epsilon(num_rounds=50) <= 8
    assert private.epsilon(num_rounds=51) > 8
    assert private.noise_std == private.noise_multiplier * 0.5
    assert private.sensitivity == 0.5


def test_client_plan_is_that_of_the_reference():
    plan = PrivacyPlan("client", clip_norm=1.0, sampling_prob=1.0, noise_multiplier=5.0, delta=1e-3)
    assert plan.epsilon(num_rounds=50) == pytest.approx(4.8453, rel=1e-3)
    assert plan.epsilon(num_rounds=50, delta=1e-5) > plan.epsilon(num_rounds=50)


def test_a_plan_without_noise_promises_nothing_and_no_rounds_spend_nothing():
    plan = PrivacyPlan("sample", clip_norm=1.0, sampling_prob=0.1)
    assert plan.epsilon(num_rounds=1) == math.inf
    assert plan.epsilon(num_rounds=0) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"unit": "image"},
        {"clip_norm": 0.0},
        {"clip_norm": math.nan},
        {"clip_norm": math.inf},
        {"sampling_prob": 0.0},
        {"sampling_prob": 1.5},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"steps_per_round": 0},
        {"delta": 0.0},
        {"delta": math.nan},
    ],
)
def test_impossible_plans_are_refused_by_name(changed):
    with pytest.raises(RecipeError, match=next(iter(changed))):
        PrivacyPlan(**{"unit": "sample", "clip_norm": 1.0, "sampling_prob": 0.1, **changed})
