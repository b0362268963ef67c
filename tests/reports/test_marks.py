from __future__ import annotations

import re

import pytest
from pictures import figure_of, of_class, pictures

from fedpress.reports.plot import Axis, Figure, Panel, Series


def test_points_lie_where_their_numbers_say():
    x, y = [0.0, 5.0, 10.0], [0.0, 2.5, 10.0]
    for picture in pictures(figure_of(Series("points", "p", x, y, hover=["a", "b", "c"]))):
        marks = [(float(m.get("cx")), float(m.get("cy"))) for m in of_class(picture, "mark")]
        (x0, y0), (x1, y1), (x2, y2) = marks
        assert x1 - x0 == pytest.approx((x2 - x0) / 2, abs=0.2)
        assert y0 - y1 == pytest.approx((y0 - y2) / 4, abs=0.2)
        assert y0 > y1 > y2
        assert [m[0].text for m in of_class(picture, "mark")] == ["a", "b", "c"]


def test_a_missing_number_is_a_gap_and_a_lonely_one_a_point():
    series = Series(
        "line", "l", [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, None, 3.0, None], marked=False
    )
    for picture in pictures(figure_of(series)):
        (line,) = of_class(picture, "line")
        assert line.get("d").count("M") == 2
        lonely = [m for m in of_class(picture, "mark") if "unseen" not in m.get("class")]
        assert len(lonely) == 1


def test_stacked_bars_stand_on_each_other_and_end_at_their_sum():
    up, down = (
        Series("bars", "up", [1.0, 2.0], [1.0, 3.0]),
        Series("bars", "down", [1.0, 2.0], [4.0, 2.0]),
    )
    picture = pictures(
        Figure("t", "c", Axis("x"), [Panel(Axis("y", low=0.0), [up, down], stacked=True)])
    )[0]
    boxes = [(float(b.get("y")), float(b.get("height"))) for b in of_class(picture, "bar")]
    (up1, h1), (up2, h2), (down1, g1), (down2, g2) = boxes
    assert h2 == pytest.approx(3 * h1, abs=0.3)
    assert g1 == pytest.approx(4 * h1, abs=0.3)
    assert down1 + g1 == pytest.approx(up1, abs=0.2)
    assert down2 + g2 == pytest.approx(up2, abs=0.2)


def test_long_lines_are_thinned_but_keep_their_peaks():
    heights = [1.0] * 5000
    heights[1234], heights[4321] = 9.0, 0.5
    line = Series(
        "line", "l", [float(i) for i in range(5000)], heights, hover=["x"] * 5000, marked=False
    )
    short = Series("line", "l", line.x[:3], [0.5, 9.0, 1.0], hover=["x"] * 3)
    drawn = of_class(pictures(figure_of(line))[0], "line")[0].get("d")
    few = of_class(pictures(figure_of(short))[0], "line")[0].get("d")
    ends = sorted({float(n) for n in re.findall(r" ([\d.]+)", drawn)})
    assert (ends[0], ends[-1]) == tuple(
        sorted(float(n) for n in re.findall(r" ([\d.]+)", few))[::2]
    )
    assert len(drawn) < 10_000
