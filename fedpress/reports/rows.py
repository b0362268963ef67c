"""Draws horizontal bars and dots as SVG, one row for each name, such as the name of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedpress.reports.labels import CHARACTER
from fedpress.reports.marks import tooltip
from fedpress.reports.plot import Figure, Series
from fedpress.reports.scales import MARGIN, Scale, axis_range, ticks
from fedpress.reports.svg import element, horizontal_line, vertical_line

LONGEST_NAME = 22  # characters; longer names would leave no room for the bars on a phone
BAR = 0.66  # height of a bar as a share of its row
FEW_TICKS = 330  # pixels: a picture of this width or less has room for fewer ticks


@dataclass(frozen=True)
class Row:
    """One row of the picture.

    Attributes:
        at: index of the row, from 0 at the top.
        middle: vertical middle of the row in pixels.
        height: height of the row in pixels.
    """

    at: int
    middle: float
    height: float


def named_rows(figure: Figure, names: Sequence[str], width: int) -> tuple[Scale, list[Markup]]:
    """Returns the scale of the lower axis, and the SVG of all rows.

    Args:
        figure: a figure with one panel, whose series have one number for each name.
        names: the names of the rows, from top to bottom.
        width: width of the picture in pixels.
    """
    panel = figure.panels[0]
    ends = [end_of(name) for name in names]
    beside = 0
    for series in panel.series:
        for text in series.labels:
            beside = max(beside, len(text))
    # Names get at most 55% of the width, even if a name is then cut off at the left.
    left = min(12 + max(map(len, ends)) * CHARACTER, 0.55 * width)
    x = Scale(*_range(figure), left, width - 12 - beside * CHARACTER)
    top, bottom = 8.0, figure.height - 42.0
    height = (bottom - top) / len(names)

    drawn: list[Markup] = []
    for mark in ticks(x.low, x.high, 4 if width <= FEW_TICKS else 6):
        drawn.append(vertical_line(x(mark), top, bottom, "grid"))
    for at, end in enumerate(ends):
        row = Row(at, top + (at + 0.5) * height, height)
        # 4 pixels lower: SVG places a text by its base line, not by its middle.
        where = {"x": left - 6, "y": row.middle + 4}
        drawn.append(element("text", end, **where, class_="tick", text_anchor="end"))
        for series in panel.series:
            drawn += _dot(series, row, x) if series.kind == "dots" else _bar(series, row, x)
    return x, drawn


def end_of(name: str) -> str:
    """Shortens a long name to its end, where names such as `layer3.0.conv1` differ."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def _range(figure: Figure) -> tuple[float, float]:
    """Returns the lowest and the highest value of the lower axis."""
    series = figure.panels[0].series
    known: list[float] = []
    for one in series:
        known += [number for number in one.x if number is not None]
    if all(one.kind == "dots" for one in series):
        return axis_range(figure.x, known, margin=MARGIN)
    # The length of a bar shows its number, so the axis of bars must begin at 0.
    low, high = axis_range(figure.x, [0.0, *known], margin=0)
    if figure.x.low is None:
        low = min(low, 0.0)
    return low, high


def _dot(series: Series, row: Row, x: Scale) -> list[Markup]:
    """Returns one dot with its label, on a faint line; nothing if the number is missing."""
    value = series.x[row.at]
    if value is None:
        return []
    title = tooltip(series.hover[row.at] if series.hover else "")
    where = {"cx": x(value), "cy": row.middle, "r": 5.0}
    return [
        horizontal_line(x.start, x.end, row.middle, "rule"),
        element("circle", title, **where, class_=f"mark {series.color}"),
        # Right of the dot, whose radius is 5 pixels.
        *_label(series, row, x(value) + 9),
    ]


def _bar(series: Series, row: Row, x: Scale) -> list[Markup]:
    """Returns one bar with its label; nothing if the number is missing."""
    length = series.x[row.at]
    if length is None:
        return []
    title = tooltip(series.hover[row.at] if series.hover else "")
    # The bar begins at the left end of the axis and leaves a gap to the rows above and below.
    box = {
        "x": x(x.low),
        "y": row.middle - BAR / 2 * row.height,
        "width": max(0.0, x(length) - x(x.low)),
        "height": BAR * row.height,
    }
    bar = element("rect", title, **box, class_=f"bar {series.color} mark")
    return [bar, *_label(series, row, x(length) + 5)]


def _label(series: Series, row: Row, left: float) -> list[Markup]:
    if not series.labels:
        return []
    return [element("text", series.labels[row.at], x=left, y=row.middle + 4, class_="tick")]
