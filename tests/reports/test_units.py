from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpress.reports import units

FORMS = [
    units.count,
    units.percent,
    units.milliseconds,
    units.seconds,
    units.epsilon,
    units.compact,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "12", [1], True])
def test_what_is_no_number_is_a_dash(form, value):
    assert form(value) == units.DASH


@pytest.mark.parametrize("form", FORMS)
@given(value=st.floats(0, 1e15))
def test_every_number_becomes_a_short_text(form, value):
    assert 1 <= len(form(value)) <= 24


@given(value=st.floats(0, 9.99e14))
def test_a_count_keeps_its_value_to_three_digits(value):
    text, _, prefix = units.count(value).partition(" ")
    size = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    assert float(text) * size == pytest.approx(value, rel=0.006, abs=0.5)
    assert float(text) < 1000


@given(value=st.floats(0, 1e4))
def test_epsilon_is_never_shown_smaller_than_it_is(value):
    assert value - 1e-6 <= float(units.epsilon(value)) <= value + 0.0101


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (599.4, "9 min 59 s"),
        (599.6, "10 min"),
        (3599, "1 h 0 min"),
    ],
)
def test_time_spans_carry_over_at_their_borders(value, text):
    assert units.seconds(value) == text


def test_what_is_too_large_to_be_drawn_is_no_number():
    for value in (float("inf"), float("-inf"), float("nan"), 1e308, 10**400, -(10**400), True, "1"):
        assert units.number(value) is None
    assert units.number(-(10**30)) == -1e30
