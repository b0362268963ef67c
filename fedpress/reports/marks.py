"""Draws the numbers of a panel as SVG: points, lines, staircases, bars and areas."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedpress.reports.plot import Panel, Series
from fedpress.reports.scales import Part, Scale, pixel_of, smallest_distance, stacked
from fedpress.reports.svg import element, pixels

# Every element makes the page larger and slower. A figure is at most 980 pixels wide.
MOST_HOVERED = 90  # approximate limit for the points of a series that have a tooltip
MOST_VERTICES = 400  # approximate limit for the points of a line, or the bars, that are drawn

Place = tuple[float, float] | None
"""A pixel in the picture; None for a point that is not shown."""


def marks(panel: Panel, x: Scale, y: Scale) -> list[Markup]:
    """Returns the SVG elements of all series of a panel."""
    # Stacked heights depend on all series, so these are drawn together.
    if panel.stacked:
        return _stack(panel, x, y)
    drawn: list[Markup] = []
    for series in panel.series:
        if series.kind == "bars":
            drawn += _stack(Panel(panel.y, [series]), x, y)
        else:
            drawn += _points_and_lines(series, x, y)
    return drawn


def tooltip(text: str) -> Markup | str:
    """Returns the tooltip that a browser shows for a mark; "" for an empty text."""
    return element("title", text) if text else ""


def _points_and_lines(series: Series, x: Scale, y: Scale) -> list[Markup]:
    places = [pixel_of(a, b, x, y) for a, b in zip(series.x, series.y, strict=True)]
    drawn: list[Markup] = []
    if series.kind in ("line", "steps"):
        path = _path(places, steps=series.kind == "steps")
        look = f"line {series.color} dotted" if series.dotted else f"line {series.color}"
        drawn += [element("path", d=path, class_=look)] if path else []

    # A long line has tooltips only at every n-th point. -(-a // b) is a / b rounded up.
    every = 1 if series.marked else -(-len(places) // MOST_HOVERED)
    for at, place in enumerate(places):
        alone = _alone(places, at)
        last = at + 1 == len(places)
        if place is not None and (at % every == 0 or last or alone):
            drawn.append(_point(series, at, place, shown=series.marked or alone))
    return drawn


def _alone(places: Sequence[Place], at: int) -> bool:
    """Returns whether a point has no neighbours: a line through it would have no length."""
    before = places[at - 1] if at else None
    after = places[at + 1] if at + 1 < len(places) else None
    return places[at] is not None and before is None and after is None


def _point(series: Series, at: int, place: tuple[float, float], *, shown: bool) -> Markup:
    """Returns the circle of one point; if it is not `shown`, it is invisible but has a tooltip."""
    # Single points and points with labels are drawn larger than the points of a line, because they
    # are the content of the figure.
    radius = 2.7 if series.marked else 1.0
    if series.kind in ("points", "steps") or series.labels:
        radius = 5.0
    # A dotted line only joins labelled points: the line may be faint, the points must not be.
    color = "blue" if series.labels and series.dotted else series.color
    look = "hollow " if series.hollow else ""
    look = f"mark {look}{color}"
    if not shown:
        radius, look = 4.0, f"mark unseen {color}"  # 4: large enough to be hit by the pointer
    title = tooltip(series.hover[at] if series.hover else "")
    return element("circle", title, cx=place[0], cy=place[1], r=radius, class_=look)


def _path(places: Sequence[Place], *, steps: bool) -> str:
    """Returns the SVG path through some points; a missing point leaves a gap."""
    parts: list[str] = []
    begun = False
    for place in _thinned(places):
        if place is None:
            begun = False
            continue
        across, down = pixels(place[0]), pixels(place[1])
        if not begun:
            parts.append(f"M{across} {down}")
        elif steps:
            parts.append(f"H{across}V{down}")
        else:
            parts.append(f"L{across} {down}")
        begun = True
    return "".join(parts)


def _thinned(places: Sequence[Place]) -> Sequence[Place]:
    """Keeps the lowest and the highest point of each short stretch of a long line.

    Within a pixel or two only these two points are visible, so the line looks the same. A line with
    gaps is returned as it is.
    """
    if len(places) <= MOST_VERTICES or any(place is None for place in places):
        return places
    stretch = -(-2 * len(places) // MOST_VERTICES)
    kept: list[Place] = []
    for begin in range(0, len(places), stretch):
        some = [place for place in places[begin : begin + stretch] if place is not None]
        heights = [down for _, down in some]
        kept_here = {heights.index(min(heights)), heights.index(max(heights))}
        # The ends of the line must not move: readers compare the first and the last value.
        if begin == 0:
            kept_here.add(0)
        kept += [some[at] for at in sorted(kept_here)]
    return [*kept, places[-1]]


def _stack(panel: Panel, x: Scale, y: Scale) -> list[Markup]:
    parts = stacked(panel)
    drawn: list[Markup] = []
    for series in panel.series:
        own = [part for part in parts if part.series is series]
        if not own:
            continue
        if series.kind == "areas":
            drawn += [_area(own, x, y), *_hovered(own, x, y)]
        else:
            drawn += _bars(own, x, y)
    return drawn


def _area(parts: Sequence[Part], x: Scale, y: Scale) -> Markup:
    every = -(-len(parts) // MOST_VERTICES) or 1
    kept = [*parts[:-1:every], parts[-1]]
    upper = [f"{pixels(x(part.x))} {pixels(y(part.base + part.height))}" for part in kept]
    lower = [f"{pixels(x(part.x))} {pixels(y(part.base))}" for part in reversed(kept)]
    outline = "L".join([*upper, *lower])
    return element("path", d=f"M{outline}Z", class_=f"area {parts[0].series.color}")


def _hovered(parts: Sequence[Part], x: Scale, y: Scale) -> list[Markup]:
    """Returns the invisible points at the upper edge of an area that have its tooltips."""
    every = -(-len(parts) // MOST_HOVERED) or 1
    drawn = []
    for part in parts[::every]:
        where = {"cx": x(part.x), "cy": y(part.base + part.height), "r": 4.0}
        look = f"mark unseen {part.series.color}"
        drawn.append(element("circle", tooltip(part.hover), **where, class_=look))
    return drawn


def _bars(parts: Sequence[Part], x: Scale, y: Scale) -> list[Markup]:
    of_one_value = (x.end - x.start) / (x.high - x.low)
    # A quarter of the distance stays empty, so that neighbours can be told apart.
    width = max(0.4, 0.75 * smallest_distance(part.x for part in parts) * of_one_value)
    # More bars than pixels cannot be seen: of each stretch of bars only the highest is drawn, as
    # wide as the whole stretch.
    every = -(-len(parts) // MOST_VERTICES) or 1
    drawn = []
    for begin in range(0, len(parts), every):
        part = max(parts[begin : begin + every], key=lambda one: one.base + one.height)
        top, bottom = y(part.base + part.height), y(part.base)
        box = {"x": x(part.x) - every * width / 2, "y": top, "width": every * width}
        title = tooltip(part.hover if every * len(parts) <= MOST_VERTICES else "")
        look = f"bar {part.series.color} mark"
        drawn.append(element("rect", title, **box, height=max(0.0, bottom - top), class_=look))
    return drawn
