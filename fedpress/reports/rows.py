"""Horizontal bars and dots: one row for each name, so that long names can be read on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedpress.reports.labels import CHARACTER
from fedpress.reports.marks import titled
from fedpress.reports.plot import Figure, Series
from fedpress.reports.scales import MARGIN, Scale, axis_range, ticks
from fedpress.reports.svg import element, horizontal_line, vertical_line

LONGEST_NAME = 22
BAR = 0.66  # of the height of a row
FEW_TICKS = 330  # pixels: a narrower picture has room for fewer ticks


@dataclass(frozen=True)
class Row:
    """One row: its middle and its height in pixels."""

    at: int
    middle: float
    height: float


def named_rows(figure: Figure, names: Sequence[str], width: int) -> tuple[Scale, list[Markup]]:
    """Returns the lower scale, and all rows.

    Args:
        figure: with one panel, whose series hold one number for each name.
        names: the first on top.
        width: of the picture, in pixels.
    """
    panel = figure.panels[0]
    ends = [_end(name) for name in names]
    beside = max((len(text) for series in panel.series for text in series.labels), default=0)
    left = min(12 + max(map(len, ends)) * CHARACTER, 0.55 * width)
    x = Scale(*_range(figure), left, width - 12 - beside * CHARACTER)
    top, bottom = 8.0, figure.height - 42.0
    height = (bottom - top) / len(names)

    drawn: list[Markup] = []
    for mark in ticks(x.low, x.high, 4 if width <= FEW_TICKS else 6):
        drawn.append(vertical_line(x(mark), top, bottom, "grid"))
    for at, end in enumerate(ends):
        row = Row(at, top + (at + 0.5) * height, height)
        where = {"x": left - 6, "y": row.middle + 4}
        drawn.append(element("text", end, **where, class_="tick", text_anchor="end"))
        for series in panel.series:
            drawn += _dot(series, row, x) if series.kind == "dots" else _bar(series, row, x)
    return x, drawn


def _end(name: str) -> str:
    """Returns the end of a long name: layers of one block differ there."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def _range(figure: Figure) -> tuple[float, float]:
    """Returns the range of the lower axis: a bar tells its number by its length, so it begins at 0.

    A dot need not.
    """
    series = figure.panels[0].series
    known = [n for one in series for n in one.x if n is not None]
    if all(one.kind == "dots" for one in series):
        return axis_range(figure.x, known, margin=MARGIN)
    low, high = axis_range(figure.x, [0.0, *known], margin=0)
    return (min(low, 0.0) if figure.x.low is None else low), high


def _dot(series: Series, row: Row, x: Scale) -> list[Markup]:
    """Returns one dot with its label, on a faint line; nothing where there is no number."""
    value = series.x[row.at]
    if value is None:
        return []
    title = titled(series.hover[row.at] if series.hover else "")
    where = {"cx": x(value), "cy": row.middle, "r": 5.0}
    return [
        horizontal_line(x.start, x.end, row.middle, "rule"),
        element("circle", title, **where, class_=f"mark {series.color}"),
        *_label(series, row, x(value) + 9),
    ]


def _bar(series: Series, row: Row, x: Scale) -> list[Markup]:
    """Returns one bar with its label; nothing where there is no number."""
    length = series.x[row.at]
    if length is None:
        return []
    title = titled(series.hover[row.at] if series.hover else "")
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
