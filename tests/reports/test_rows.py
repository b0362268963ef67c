from __future__ import annotations

import pytest
from pictures import of_class, pictures

from fedpress.reports.plot import Axis, Figure, Panel, dots, horizontal_bars


def test_horizontal_bars_are_as_long_as_their_numbers():
    bars = horizontal_bars("b", [2.0, 4.0, 0.0], hover=["a", "b", "c"], labels=["2", "4", "0"])
    figure = Figure(
        "t", "c", Axis("x", low=0.0), [Panel(Axis("", names=["a", "b", "c" * 60]), [bars])]
    )
    for picture in pictures(figure):
        lengths = [float(b.get("width")) for b in of_class(picture, "bar")]
        assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.3)
        assert lengths[2] == 0


def rows_of(series, axis):
    names = ["a", "b", "c"]
    return Figure("t", "c", axis, [Panel(Axis("", names=names), [series])])


def test_bars_begin_at_0_and_dots_where_their_numbers_do():
    values = [95.0, 96.0, 98.0]
    bars = rows_of(horizontal_bars("b", values, hover=[]), Axis("x", bounds=(0.0, 100.0)))
    widths = [float(bar.get("width")) for bar in of_class(pictures(bars)[0], "bar")]
    assert min(widths) > 0.9 * max(widths)

    scattered = rows_of(dots("d", values, hover=["1", "2", "3"]), Axis("x", bounds=(0.0, 100.0)))
    for picture in pictures(scattered):
        places = [float(mark.get("cx")) for mark in of_class(picture, "mark")]
        assert places[1] - places[0] == pytest.approx((places[2] - places[0]) / 3, abs=0.2)
        width = float(picture.get("viewBox").split()[2])
        assert places[2] - places[0] > width / 4, "the differences are to be seen"
        ticks = [t.text for t in of_class(picture, "tick") if t.get("text-anchor") == "middle"]
        assert 90 < float(ticks[0]) <= float(ticks[-1]) <= 100


def test_a_missing_number_leaves_its_row_empty():
    for series in (
        horizontal_bars("b", [1.0, None, 2.0], hover=[]),
        dots("d", [1.0, None, 2.0], hover=[]),
    ):
        for picture in pictures(rows_of(series, Axis("x"))):
            assert len(of_class(picture, "mark")) == 2
