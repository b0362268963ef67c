from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.reports.draw import CHARACTER, NARROW, WIDE, svg, ticks
from fedpress.reports.plot import Axis, Figure, Note, Panel, Series, lying_bars, numbers_of


def pictures(figure):
    """The figure at all its widths, as trees; a duplicate id or a loose `<` would not parse."""
    return [
        ElementTree.fromstring(one)
        for one in re.findall(r"<svg.*?</svg>", str(svg(figure, "f")), re.S)
    ]


def of_class(picture, word):
    return [element for element in picture.iter() if word in element.get("class", "").split()]


def figure_of(*series, **more):
    return Figure(
        "title",
        "caption",
        Axis("x", low=0.0),
        [Panel(Axis("y", low=0.0, high=10.0), series)],
        **more,
    )


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


def test_lying_bars_are_as_long_as_their_numbers():
    bars = lying_bars("b", [2.0, 4.0, 0.0], hover=["a", "b", "c"], beside=["2", "4", "0"])
    figure = Figure(
        "t", "c", Axis("x", low=0.0), [Panel(Axis("", names=["a", "b", "c" * 60]), [bars])]
    )
    for picture in pictures(figure):
        lengths = [float(b.get("width")) for b in of_class(picture, "bar")]
        assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.3)
        assert lengths[2] == 0


@given(
    points=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=12),
    name=st.text("abcdefgh=.0123456789", min_size=1, max_size=80),
)
@settings(max_examples=40, deadline=None)
def test_labels_stay_inside_the_picture(points, name):
    names = [f"{name}{i}" for i in range(len(points))]
    series = Series(
        "points", "p", [a for a, _ in points], [b for _, b in points], hover=names, beside=names
    )
    figure = Figure(
        "t", "c", Axis("x", low=0.0), [Panel(Axis("y", low=0.0, high=10.0), [series])], wide=True
    )
    for picture in pictures(figure):
        width, height = (float(n) for n in picture.get("viewBox").split()[2:])
        labels = of_class(picture, "label")
        assert len(labels) == len(points)
        for label in labels:
            wide = len(label.text) * CHARACTER
            left = float(label.get("x")) - (wide if label.get("text-anchor") == "end" else 0)
            assert left >= -0.1
            assert left + wide <= width + 0.1
            assert 0 <= float(label.get("y")) <= height


@given(low=st.floats(-1e9, 1e9), span=st.floats(1e-6, 1e9), most=st.integers(3, 9))
def test_ticks_are_few_rising_and_inside(low, span, most):
    span = max(span, 1e-6 * abs(low))  # closer numbers are drawn as equal ones
    marks = ticks(low, low + span, most)
    assert len(marks) <= most + 2
    assert marks == sorted(set(marks))
    assert all(low - 0.01 * span <= mark <= low + 1.01 * span for mark in marks)


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


def test_hostile_words_are_text_everywhere():
    bad = '</title><script>alert(1)</script>"&'
    series = Series("points", bad, [1.0], [1.0], hover=[bad], beside=[bad])
    figure = Figure(
        bad, bad, Axis(bad), [Panel(Axis(bad), [series])], notes=[Note(1.0, None, bad)], wide=True
    )
    for picture in pictures(figure):
        assert {element.tag for element in picture.iter()} <= {
            "svg",
            "title",
            "desc",
            "text",
            "path",
            "circle",
        }
        assert bad in [element.text for element in picture.iter()]


@pytest.mark.parametrize("y", [[5.0], [None], [5.0, 5.0], [1e-12, 2e-12], [-3.0, 1e12]])
def test_odd_numbers_are_drawn(y):
    series = Series("line", "l", [float(i) for i in range(len(y))], y, hover=["h"] * len(y))
    for picture in pictures(Figure("t", "c", Axis("x"), [Panel(Axis("y"), [series])])):
        assert "nan" not in ElementTree.tostring(picture, encoding="unicode")


@pytest.mark.parametrize("x", [[None, None], [1e300, 1e300], [3.0, 3.0], [-1e300, 1.0]])
@pytest.mark.parametrize("kind", ["bars", "areas", "line", "points"])
def test_odd_places_are_drawn(kind, x):
    series = Series(kind, "s", x, [1.0, 2.0], hover=["a", "b"])
    for picture in pictures(
        Figure("t", "c", Axis("x"), [Panel(Axis("y"), [series], stacked=kind != "line")])
    ):
        assert not re.search("nan|inf", ElementTree.tostring(picture, encoding="unicode"))


def test_a_wide_figure_is_drawn_at_three_widths_and_its_numbers_stand_in_a_table():
    series = Series("line", "l", [1.0, 2.0], [3.0, None], hover=["a", "b"])
    widths = [
        float(one.get("viewBox").split()[2]) for one in pictures(figure_of(series, wide=True))
    ]
    assert (widths[0], widths[-1]) == (NARROW, WIDE)
    table = numbers_of(figure_of(series))
    assert (table.header, table.rows) == (["x", "l"], [["1", "3"], ["2", "–"]])
    many = Series("line", "l", [float(i) for i in range(999)], [1.0] * 999)
    assert numbers_of(figure_of(many)).rows[-1] == ["998", "1"]
    assert len(numbers_of(figure_of(many)).rows) <= 201
