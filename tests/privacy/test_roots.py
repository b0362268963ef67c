"""Brent's method on the safe side, against the plain halving that it took the place of."""

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.errors import PrivacyError
from fedpress.privacy.accounting import accountant, closed_form
from fedpress.privacy.noise import skellam
from fedpress.privacy.roots import bracket, safe_root


def halved(excess, unsafe: float, safe: float) -> float:
    """The oracle: halves until there is no number between the ends, and takes the safe one."""
    while (middle := (unsafe + safe) / 2) not in (unsafe, safe):
        if excess(middle) > 0:
            unsafe = middle
        else:
            safe = middle
    return safe


CURVES = {
    "a line": lambda x, root: root - x,
    "a power": lambda x, root: (root / x) ** 3 - 1,
    "nearly a step": lambda x, root: math.atan(1e6 * (root - x) / root),
    "a step": lambda x, root: 1.0 if x < root else -1.0,
    "infinite below": lambda x, root: math.inf if x < 0.9 * root else root - x,
    "minus infinity above": lambda x, root: -math.inf if x > 1.1 * root else root - x,
}


@pytest.mark.parametrize("curve", CURVES)
@settings(max_examples=50, deadline=None)
@given(root=st.floats(1e-6, 1e6), rtol=st.sampled_from([1e-14, 1e-9, 1e-4]))
def test_the_root_keeps_the_promise_and_lies_next_to_the_halved_one(curve, root, rtol):
    def excess(x: float) -> float:
        return CURVES[curve](x, root)

    found = safe_root(excess, unsafe=root / 3, safe=root * 2, rtol=rtol)
    assert excess(found) <= 0
    assert found == pytest.approx(halved(excess, root / 3, root * 2), rel=4 * rtol + 1e-14)


@settings(max_examples=50, deadline=None)
@given(root=st.floats(1e-6, 1e6))
def test_the_safe_side_may_be_the_lower_one(root):
    found = safe_root(lambda x: x / root - 1, unsafe=root * 5, safe=root / 5)
    assert root * (1 - 1e-12) <= found <= root


@settings(max_examples=50, deadline=None)
@given(root=st.floats(1e-6, 1e6), start=st.floats(1e-6, 1e6))
def test_a_bracket_holds_the_crossing(root, start):
    unsafe, safe = bracket(lambda x: root - x, start)
    assert unsafe < root <= safe <= 2 * unsafe


def test_a_margin_is_kept_where_there_is_room_and_given_up_where_there_is_none():
    assert safe_root(lambda x: 1 - x, unsafe=0.5, safe=2.0, margin=0.1) == pytest.approx(1.1)
    assert safe_root(lambda x: 1 - x, unsafe=0.5, safe=1.05, margin=0.1) == 1.05


def test_a_budget_that_no_noise_meets_is_refused():
    with pytest.raises(PrivacyError, match=r"^epsilon: even noise_multiplier 100000 spends"):
        accountant.noise_multiplier(epsilon=1e-9, delta=1e-9, sampling_prob=1.0, steps=10**9)


@settings(max_examples=60, deadline=None)
@given(mu=st.floats(1e-3, 30), log_delta=st.floats(-40, -1))
def test_the_closed_form_is_inverted_from_above(mu, log_delta):
    delta = math.exp(log_delta)
    found = accountant.epsilon([accountant.GaussianEvent(1.0, 1 / mu, 1)], delta=delta)
    exact = closed_form.total_mu((accountant.GaussianEvent(1.0, 1 / mu, 1),))
    if found == 0:
        assert closed_form.log_delta(exact, 0.0) <= math.log(delta)
        return

    def excess(epsilon: float) -> float:
        return closed_form.log_delta(exact, epsilon) - math.log(delta)

    assert excess(found) <= 0
    assert found == pytest.approx(halved(excess, 1e-12, 1e4), rel=1e-9, abs=1e-11)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 10**7), variance=st.floats(1e-6, 1e10), chance=st.floats(1e-12, 0.5))
def test_the_tail_of_skellam_noise_is_bounded_from_above(size, variance, chance):
    needed = math.log(2 * size / chance)

    def excess(t: float) -> float:
        return needed - skellam.chernoff_exponent(t, variance)

    found = skellam.tail(size, variance, chance)
    assert excess(found) <= 0
    # Where noise is large, the difference of two large numbers has fewer digits.
    assert found == pytest.approx(halved(excess, 1e-9, 2 * found), rel=1e-7)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("epsilon", "prob", "steps", "delta"),
    [(8.0, 1e-3, 2000, 1e-5), (1.0, 0.01, 500, 1e-5), (2.0, 0.5, 100, 1e-6), (4.0, 1.0, 7, 1e-3)],
)
def test_a_calibrated_noise_keeps_the_budget_and_is_the_least_within_a_tenth_of_a_thousandth(
    epsilon, prob, steps, delta
):
    @cache
    def excess(noise: float) -> float:
        event = accountant.GaussianEvent(prob, noise, steps)
        return accountant.epsilon([event], delta=delta) - epsilon

    found = accountant.noise_multiplier(
        epsilon=epsilon, delta=delta, sampling_prob=prob, steps=steps
    )
    assert excess(found) <= 0
    assert excess(found * (1 - 1.5e-4)) > 0
