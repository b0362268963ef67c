"""Pictures of figures as trees, for the tests of what is drawn."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from fedpress.reports.draw import svg
from fedpress.reports.plot import Axis, Figure, Panel


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
