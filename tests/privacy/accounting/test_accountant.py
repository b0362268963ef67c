import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting.accountant import GaussianEvent, epsilon, merge, noise_multiplier

# sampling_prob, noise_multiplier, steps, delta, epsilon by PLD, by RDP, and by Opacus' PRV accountant (upper bound)
REFERENCE = [
    (0.042666667, 1.0, 500, 1e-5, 6.3115, 6.9887, 6.3219),
    (0.042666667, 2.0, 500, 1e-5, 2.122, 2.3236, 2.1321),
    (0.042666667, 4.0, 500, 1e-5, 0.9133, 1.002, 0.92336),
    (0.10666667, 1.0, 500, 1e-5, 17.862, 19.529, 17.873),
    (0.10666667, 2.0, 2350, 1e-5, 15.054, 16.226, 15.064),
    (1, 10.0, 100, 1e-5, 4.3772, 4.7285, 4.3874),
    (1, 1.0, 50, 1e-3, 46.024, 49.406, 46.036),
    (1, 5.0, 50, 1e-3, 4.8453, 5.42, 4.8557),
    (1, 20.0, 50, 1e-5, 1.3565, 1.4781, 1.3666),
    (0.1, 1.0, 500, 1e-5, 16.562, 18.159, 16.573),
    (0.1, 4.0, 500, 1e-5, 2.3407, 2.5488, 2.3509),
    (1, 4.0, 50, 1e-5, 8.5959, 9.235, 8.6063),
]


@pytest.mark.parametrize("row", REFERENCE)
def test_epsilon_is_that_of_the_reference(row):
    q, z, steps, delta, pld, rdp, prv = row
    got = epsilon([GaussianEvent(q, z, steps)], delta=delta)
    assert got == pytest.approx(pld, rel=0.0005)  # ten times closer than asked
    assert got <= rdp
    assert got == pytest.approx(prv, rel=0.012)


@pytest.mark.parametrize(
    ("q", "steps", "delta", "expected"),
    [
        (256 / 6000, 500, 1e-5, 0.891),
        (64 / 600, 500, 1e-5, 1.627),
        (1.0, 50, 1e-3, 3.394),
        (0.1, 500, 1e-5, 1.546),
    ],
)
def test_noise_multiplier_is_that_of_the_reference_and_meets_the_budget(q, steps, delta, expected):
    noise = noise_multiplier(epsilon=8, delta=delta, sampling_prob=q, steps=steps)
    assert noise == pytest.approx(expected, abs=6e-4)
    assert 7.99 < epsilon([GaussianEvent(q, noise, steps)], delta=delta) <= 8


@pytest.mark.recipe
def test_a_small_budget_with_rare_samples_is_calibrated_too():
    noise = noise_multiplier(epsilon=0.1, delta=1e-6, sampling_prob=0.001, steps=1000)
    assert 0.099 < epsilon([GaussianEvent(0.001, noise, 1000)], delta=1e-6) <= 0.1


@pytest.mark.recipe
def test_composition_of_unequal_phases_is_that_of_dp_accounting():
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    events = [
        GaussianEvent(0.1, 2.0, 60),
        GaussianEvent(0.02, 1.0, 200),
        GaussianEvent(1.0, 30.0, 5),
    ]
    accountant = PLDAccountant()
    for p in events:
        event = dp_event.PoissonSampledDpEvent(
            p.sampling_prob, dp_event.GaussianDpEvent(p.noise_multiplier)
        )
        accountant.compose(event, p.steps)
    assert epsilon(events, delta=1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    parts = sum(epsilon([p], delta=1e-5) for p in events)
    assert epsilon(events, delta=1e-5) < 0.8 * parts


def test_steps_on_everybody_compose_like_one_gaussian_mechanism():
    from dp_accounting import get_epsilon_gaussian

    got = epsilon([GaussianEvent(1, 4.0, 3), GaussianEvent(1, 2.0, 5)], delta=1e-6)
    assert got == pytest.approx(get_epsilon_gaussian((3 / 16 + 5 / 4) ** -0.5, 1e-6), rel=1e-9)


@given(
    q=st.floats(0.05, 0.99),
    z=st.floats(0.8, 8),
    steps=st.integers(1, 300),
    other=st.integers(1, 300),
)
@settings(max_examples=5, deadline=None)
def test_epsilon_grows_with_steps_and_shrinks_with_noise(q, z, steps, other):
    at = epsilon([GaussianEvent(q, z, steps)], delta=1e-5)
    assert (
        0
        <= at
        <= epsilon([GaussianEvent(q, z, steps), GaussianEvent(q, z, other)], delta=1e-5)
        * (1 + 1e-3)
    )
    assert epsilon([GaussianEvent(q, 1.2 * z, steps)], delta=1e-5) <= at * (1 + 1e-3)


def test_no_steps_cost_nothing_and_no_noise_costs_everything():
    assert epsilon([], delta=1e-5) == 0
    assert epsilon([GaussianEvent(0.1, 0.0, 0), GaussianEvent(0.5, 1.0, 0)], delta=1e-5) == 0
    assert epsilon([GaussianEvent(0.1, 0.0, 1), GaussianEvent(0.5, 1.0, 9)], delta=1e-5) == math.inf
    assert epsilon([GaussianEvent(0.1, math.inf, 10)], delta=1e-5) == 0
    assert merge([GaussianEvent(0.1, 2.0, 0)]) == ()


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 2, math.nan])
def test_delta_outside_zero_and_one_is_refused(delta):
    with pytest.raises(RecipeError, match="delta: got"):
        epsilon([GaussianEvent(0.1, 1.0, 1)], delta=delta)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"epsilon": 0}, "epsilon"),
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"sampling_prob": 0}, "sampling_prob"),
        ({"sampling_prob": 1.1}, "sampling_prob"),
        ({"sampling_prob": math.nan}, "sampling_prob"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"delta": 0}, "delta"),
    ],
)
def test_wrong_arguments_of_the_noise_search_are_refused_by_name(changed, word):
    with pytest.raises(RecipeError, match=f"^{word}: got"):
        noise_multiplier(
            **{"epsilon": 8, "delta": 1e-5, "sampling_prob": 0.1, "steps": 10, **changed}
        )


@pytest.mark.parametrize(
    "numbers", [(0.1, -1.0, 1), (0.1, math.nan, 1), (0.1, 1.0, -1), (0.0, 1.0, 1)]
)
def test_a_phase_refuses_impossible_numbers(numbers):
    with pytest.raises(RecipeError, match="got"):
        GaussianEvent(*numbers)


def test_a_budget_that_no_noise_meets_is_a_privacy_error():
    with pytest.raises(PrivacyError, match="fewer steps"):
        noise_multiplier(epsilon=1e-9, delta=1e-12, sampling_prob=1.0, steps=10**6)


@pytest.mark.recipe
def test_an_answer_for_the_command_line_needs_no_torch_and_little_work():
    code = (
        "import sys, time; from fedpress.privacy.accounting.accountant import noise_multiplier as f;"
        "f(epsilon=8, delta=1e-5, sampling_prob=64 / 600, steps=2350);"
        "assert not {'torch', 'pydantic'} & set(sys.modules);"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        float(done.stdout) < 6
    )  # 1.5 s on an idle core; a grid that is ten times too fine would show
