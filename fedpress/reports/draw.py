"""Draws a figure as SVG: one picture for each width that it may have on a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup, escape

from fedpress.reports.grid import grid_of_cells
from fedpress.reports.labels import CHARACTER, LINE, Box, labels
from fedpress.reports.marks import marks
from fedpress.reports.plot import Axis, Figure
from fedpress.reports.rows import named_rows
from fedpress.reports.scales import (
    MARGIN,
    Scale,
    axis_range,
    panel_heights,
    smallest_distance,
    tick_texts,
    ticks,
)
from fedpress.reports.svg import element, horizontal_line, vertical_line

NARROW, NORMAL, WIDE = 330, 500, 980  # widths of a picture in pixels: phone, column, full page
LOOKS = {NARROW: "narrow", NORMAL: "normal", WIDE: "broad"}  # width -> class in page.css
BETWEEN = 46.0  # pixels from one panel to the next
BELOW = 42.0  # pixels for the ticks and the title of the lower axis


def svg(figure: Figure, name: str) -> Markup:
    """Returns the figure as inline SVG, drawn once for each width; CSS shows the fitting picture.

    Args:
        figure: what to draw.
        name: a name that is unique on the page, such as "figure-3". The ids of the picture's title
            and description begin with this name.
    """
    # Text in an SVG that is only scaled would be too small on a phone.
    widths = (NARROW, NORMAL, WIDE) if figure.wide else (NARROW, NORMAL)
    return Markup("\n").join(_picture(figure, width, f"{name}-{width}") for width in widths)


def _picture(figure: Figure, width: int, name: str) -> Markup:
    look = f"drawn {LOOKS[width]}" if figure.wide else f"drawn {LOOKS[width]} only"
    content = [
        element("title", escape(figure.title), id=f"{name}-title"),
        element("desc", escape(figure.caption), id=f"{name}-desc"),
        *_content(figure, width),
    ]
    return element(
        "svg",
        Markup("").join(content),
        # With role, title and description, screen readers can read the picture.
        role="img",
        viewBox=f"0 0 {width} {figure.height}",
        class_=look,
        aria_labelledby=f"{name}-title {name}-desc",
        data_together="" if figure.together else None,
    )


def _content(figure: Figure, width: int) -> list[Markup]:
    bottom = figure.height - BELOW
    names = figure.panels[0].y.names
    if names:
        return _named(figure, names, width)

    ranges = [axis_range(panel.y, panel_heights(panel)) for panel in figure.panels]
    most_ticks = 6 if len(ranges) == 1 else 5
    all_ticks = [ticks(low, high, most_ticks) for low, high in ranges]
    # The panels share the lower axis, so all begin at the same place, far enough from the edge for
    # the widest label of any panel.
    left = max(44.0, 12 + _longest(all_ticks) * CHARACTER)
    known_x: list[float] = []
    for series in figure.series:
        known_x += [x for x in series.x if x is not None]
    x = Scale(*_lower_range(figure, known_x), left, width - 14.0)

    drawn = []
    for number, y in enumerate(_vertical_scales(figure, ranges, bottom)):
        panel = figure.panels[number]
        first = number == 0
        # Notes stand directly above the panel, so its title moves up by one line.
        title_above = 11 + LINE if figure.notes and first else 11
        drawn += _vertical_axis(panel.y, y, all_ticks[number], x, above=title_above)
        for at in figure.rules:
            if x.low <= at <= x.high:
                drawn.append(vertical_line(x(at), y.start, y.end, "rule"))
        drawn += marks(panel, x, y)
        if first:
            frame = Box(x.start, y.end - 8, width - 2, y.start)
            drawn += labels(figure, panel, x, y, frame)
    # Epochs and rounds: a tick at 2.5 would make no sense.
    whole = all(number == int(number) for number in known_x)
    return [*drawn, *_lower_axis(figure, x, bottom, whole=whole)]


def _named(figure: Figure, names: Sequence[str], width: int) -> list[Markup]:
    """Returns a row for each name: cells, or bars and dots above an axis."""
    if figure.series[0].kind == "cells":
        return grid_of_cells(figure, names, width)
    x, drawn = named_rows(figure, names, width)
    return [*drawn, *_lower_axis(figure, x, figure.height - BELOW, whole=False)]


def _longest(all_ticks: Sequence[Sequence[float]]) -> int:
    longest = 1
    for some in all_ticks:
        for text in tick_texts(some):
            longest = max(longest, len(text))
    return longest


def _vertical_scales(
    figure: Figure, ranges: Sequence[tuple[float, float]], bottom: float
) -> Iterator[Scale]:
    """Yields the vertical scale of each panel, from the top down to the pixel `bottom`."""
    # The upper panel has the metric, which matters most, so it is taller than the lower panel.
    shares = [1.0] if len(ranges) == 1 else [0.6, 0.4]
    top = 24.0 + (LINE if figure.notes else 0.0)
    room = bottom - top - BETWEEN * (len(ranges) - 1)
    for share, (low, high) in zip(shares, ranges, strict=True):
        yield Scale(low, high, top + share * room, top)
        top += share * room + BETWEEN


def _lower_range(figure: Figure, known: Sequence[float]) -> tuple[float, float]:
    """Returns the lowest and the highest value on the lower axis."""
    kinds = {series.kind for series in figure.series}
    if "bars" in kinds and known:
        # A bar is centred on its value, so the first and the last bar need half a bar more. A
        # single bar at a large value gets enough that the width of the range does not round to 0.
        half = max(0.5 * smallest_distance(known), 1e-6 * max(map(abs, known)))
        return min(known) - half, max(known) + half
    # A line reaches from edge to edge; points and their labels keep a distance from both edges.
    scattered = bool(kinds & {"points", "steps"}) or any(s.labels for s in figure.series)
    return axis_range(figure.x, known, margin=MARGIN if scattered else 0)


def _vertical_axis(
    axis: Axis, y: Scale, marks: Sequence[float], x: Scale, *, above: float
) -> list[Markup]:
    drawn = [element("text", axis.title, x=2, y=y.end - above, class_="name")]
    for mark, text in zip(marks, tick_texts(marks), strict=True):
        where = {"x": x.start - 6, "y": y(mark) + 4}
        drawn.append(horizontal_line(x.start, x.end, y(mark), "grid"))
        drawn.append(element("text", text, **where, class_="tick", text_anchor="end"))
    return drawn


def _lower_axis(figure: Figure, x: Scale, at: float, *, whole: bool) -> list[Markup]:
    most = 4 if x.end - x.start < 330 else 8  # on a phone more labels would touch each other
    marks = ticks(x.low, x.high, most, whole=whole)
    drawn = [horizontal_line(x.start, x.end, at, "axis")]
    for mark, text in zip(marks, tick_texts(marks), strict=True):
        # The last label stays inside the picture.
        middle = min(x(mark), x.end + 12 - len(text) * CHARACTER / 2)
        where = {"x": middle, "y": at + 16}
        drawn.append(element("text", text, **where, class_="tick", text_anchor="middle"))
    where = {"x": (x.start + x.end) / 2, "y": at + 35}
    drawn.append(element("text", figure.x.title, **where, class_="name", text_anchor="middle"))
    return drawn
