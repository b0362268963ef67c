from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from pictures import figure_of, pictures

from fedpress.reports.draw import NARROW, WIDE
from fedpress.reports.plot import Axis, Figure, Note, Panel, Series, numbers_of


def test_hostile_words_are_text_everywhere():
    bad = '</title><script>alert(1)</script>"&'
    series = Series("points", bad, [1.0], [1.0], hover=[bad], labels=[bad])
    figure = Figure(
        bad, bad, Axis(bad), [Panel(Axis(bad), [series])], notes=[Note(1.0, bad)], wide=True
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
