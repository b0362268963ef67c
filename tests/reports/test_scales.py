from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpress.reports.metrics import MetricFormat
from fedpress.reports.plot import Axis, Panel, Series, score_axis
from fedpress.reports.scales import axis_range, panel_heights, tick_texts, ticks


@given(low=st.floats(-1e9, 1e9), span=st.floats(1e-6, 1e9), most=st.integers(3, 9))
def test_ticks_are_few_rising_and_inside(low, span, most):
    span = max(span, 1e-6 * abs(low))  # closer numbers are drawn as equal ones
    marks = ticks(low, low + span, most)
    assert len(marks) <= most + 2
    assert marks == sorted(set(marks))
    assert all(low - 0.01 * span <= mark <= low + 1.01 * span for mark in marks)


def test_an_axis_of_accuracy_begins_near_the_lowest_one():
    axis = score_axis(MetricFormat.of([{"task": "classification"}]), "test")
    low, high = axis_range(axis, [92.0, 99.0])
    assert 90 < low < 92
    assert 99 < high <= 100


def test_an_axis_of_accuracy_ends_at_0_and_100_percent():
    axis = score_axis(MetricFormat.of([{"task": "classification"}]))
    assert axis_range(axis, [0.5, 99.9]) == (0.0, 100.0)
    low, high = axis_range(axis, [100.0, 100.0])
    assert (low < 99.5, high) == (True, 100.0)


def test_accuracies_that_hardly_differ_do_not_fill_the_picture():
    axis = score_axis(MetricFormat.of([{"task": "classification"}]))
    low, high = axis_range(axis, [95.0, 95.2])
    assert high - low >= 2


def test_an_error_in_units_of_its_own_has_no_bounds():
    axis = score_axis(MetricFormat.of([{"task": "regression"}]))
    low, high = axis_range(axis, [300.0, 320.0])
    assert low < 300
    assert high > 320


@pytest.mark.parametrize("kind", ["bars", "areas"])
def test_bars_and_areas_begin_at_0(kind):
    panel = Panel(Axis("y"), [Series(kind, "s", [1.0, 2.0], [95.0, 97.0])])
    assert min(panel_heights(panel)) == 0
    assert (
        min(panel_heights(Panel(Axis("y"), [Series("line", "s", [1.0, 2.0], [95.0, 97.0])]))) == 95
    )


@given(
    numbers=st.lists(st.floats(-1e9, 1e9), max_size=5),
    low=st.none() | st.floats(-10, 10),
    least=st.floats(0, 5),
)
def test_every_number_is_inside_the_range(numbers, low, least):
    begin, end = axis_range(Axis("x", low=low, least_range=least), numbers)
    assert begin < end
    assert end - begin >= 0.999 * least
    for number in numbers:
        assert number <= end or (low is not None and number < low)
        assert number >= begin or low is not None


def test_ticks_have_as_many_digits_as_they_need():
    assert tick_texts([0.0, 2.5, 5.0]) == ["0.0", "2.5", "5.0"]
    assert tick_texts([4.0]) == ["4"]
    assert tick_texts([]) == []
