"""Figures become SVG: scales, axes, lines, points, bars, areas and labels that stay inside the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from fedpress.reports.plot import Axis, Figure, Note, Panel, Series

CHARACTER = (
    7.4  # pixels that a character of a label takes at most on average, in the widest usual font
)
LINE = 15.0  # pixels from one line of text to the next
LONGEST_NAME = 22
TINIEST = 1e-100  # numbers closer than this are drawn as equal
HOVERED = 90  # so many points of a series answer the pointer
VERTICES = (
    400  # so many points of a line are drawn; of more, the lowest and the highest of each stretch
)
NARROW, NORMAL, WIDE = 330, 500, 980  # widths a figure is drawn at: phone, column, full page


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Returns the pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Says whether both share a pixel."""
        apart = self.right <= other.left or other.right <= self.left
        return not apart and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        """Says whether `other` holds all of this one."""
        across = self.left >= other.left and self.right <= other.right
        return across and self.top >= other.top and self.bottom <= other.bottom


def svg(figure: Figure, name: str) -> Markup:
    """Returns the figure as inline SVG at the widths that its place on a page may have; CSS shows one of them.

    Args:
        figure: what to draw.
        name: of the figure on its page, for the ids of title and description.
    """
    widths = (NARROW, NORMAL, WIDE) if figure.wide else (NARROW, NORMAL)
    return Markup("\n").join(_picture(figure, width, f"{name}-{width}") for width in widths)


def _picture(figure: Figure, width: int, name: str) -> Markup:
    size = {NARROW: "narrow", NORMAL: "normal", WIDE: "broad"}[width] + (
        "" if figure.wide else " only"
    )
    content = [
        tag("title", escape(figure.title), id=f"{name}-title"),
        tag("desc", escape(figure.caption), id=f"{name}-desc"),
        *_content(figure, width),
    ]
    return tag(
        "svg",
        Markup("").join(content),
        role="img",
        viewBox=f"0 0 {width} {figure.height}",
        class_=f"drawn {size}",
        aria_labelledby=f"{name}-title {name}-desc",
        data_together="" if figure.together else None,
    )


def tag(name: str, content: str | Markup = "", **attributes: str | float | None) -> Markup:
    """Returns an element; text and attributes are escaped, `class_` is `class`, and None leaves an attribute out."""
    said = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _pixels(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{}{}>{}</{}>").format(Markup(name), said, content, Markup(name))


def _pixels(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


# Axes ----------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """Returns round numbers from `low` to `high`, at most about `most`.

    >>> ticks(0, 1), ticks(83.2, 94.9), ticks(1, 4, whole=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [85.0, 87.5, 90.0, 92.5], [1.0, 2.0, 3.0, 4.0])
    """
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


def tick_text(value: float, step: float) -> str:
    """Returns a tick's label with as many digits as the step between ticks needs.

    >>> tick_text(0.25, 0.05), tick_text(30.0, 10.0), tick_text(20000.0, 5000.0), tick_text(2e-9, 1e-9)
    ('0.25', '30', '20,000', '2e-09')
    """
    if 0 < step < 1e-4 or abs(value) >= 1e9:
        return f"{value:.3g}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if round(step, digits) != round(step, 10):
        digits += 1  # steps like 2.5
    return f"{value:,.{digits}f}"


def _range(axis: Axis, numbers: Iterable[float], *, tight: bool = False) -> tuple[float, float]:
    known = list(numbers)
    low = axis.low if axis.low is not None else min(known, default=0.0)
    high = axis.high if axis.high is not None else max(known, default=1.0)
    if high - low <= max(1e-6 * max(abs(low), abs(high)), TINIEST):
        spread = abs(low) * 0.05 if abs(low) > TINIEST else 1.0
        low, high = (low if axis.low is not None else low - spread), low + spread
    air = 0.0 if tight else 0.06 * (high - low)
    return (low if axis.low is not None else low - air), (
        high if axis.high is not None else high + air
    )


def _content(figure: Figure, width: int) -> list[Markup]:
    names = figure.panels[0].y.names
    if names:
        return _lying(figure, width, names)
    # The labels of the upright axes are as wide as the longest of them.
    ranges = [_range(panel.y, _heights(panel)) for panel in figure.panels]
    marks = [ticks(low, high, 6 if len(ranges) == 1 else 5) for low, high in ranges]
    left = max(44.0, 12 + _longest(marks) * CHARACTER)

    known_x = [x for series in figure.series for x in series.x if x is not None]
    x = Scale(*_across(figure, known_x), left, width - 14.0)
    bottom = figure.height - 42.0
    drawn: list[Markup] = []
    for number, y in enumerate(_uprights(figure, ranges, bottom)):
        panel = figure.panels[number]
        first = number == 0
        title_above = 11 + LINE if figure.notes and first else 11
        drawn += _upright_axis(panel.y, y, marks[number], x, above=title_above)
        drawn += [_rule(x(at), y) for at in figure.rules if x.low <= at <= x.high]
        drawn += _panel(panel, x, y)
        if first:
            frame = Box(x.start, y.end - 8, width - 2, y.start)
            drawn += _labels(figure, panel, x, y, frame)
    drawn += _lower_axis(figure, x, bottom, whole=_whole(known_x))
    return drawn


def _longest(marks: Sequence[Sequence[float]]) -> int:
    return max((len(text) for some in marks for text in _tick_texts(some)), default=1)


def _uprights(
    figure: Figure, ranges: Sequence[tuple[float, float]], bottom: float
) -> Iterator[Scale]:
    """Yields the upright scale of each panel, from the top of the figure down to the pixel `bottom`."""
    shares = [1.0] if len(ranges) == 1 else [0.6, 0.4]
    between = 46.0
    top = 24.0 + (LINE if any(note.y is None for note in figure.notes) else 0.0)
    room = bottom - top - between * (len(ranges) - 1)
    for share, (low, high) in zip(shares, ranges, strict=True):
        yield Scale(low, high, top + share * room, top)
        top += share * room + between


def _across(figure: Figure, known: Sequence[float]) -> tuple[float, float]:
    """Returns the lowest and the highest value on the axis below; bars need half a bar more at both ends."""
    upright = any(series.kind == "bars" for series in figure.series)
    if not (upright and known):
        return _range(figure.x, known, tight=not upright and not _scattered(figure))
    half = max(0.5 * _distance(known), 1e-6 * max(map(abs, known)))
    return min(known) - half, max(known) + half


def _scattered(figure: Figure) -> bool:
    return any(series.kind in ("points", "steps") or series.beside for series in figure.series)


def _whole(numbers: Sequence[float]) -> bool:
    return all(number == int(number) for number in numbers)


def _distance(numbers: Sequence[float]) -> float:
    """Returns the smallest distance between neighbours."""
    ordered = sorted(set(numbers))
    return min((b - a for a, b in pairwise(ordered)), default=1.0)


def _heights(panel: Panel) -> list[float]:
    """Returns all heights that the panel must show: of what is stacked, the sums; bars and areas stand on 0."""
    if not panel.stacked:
        found = [y for series in panel.series for y in series.y if y is not None]
    else:
        found = [base + height for *_, base, height in _stacked(panel)]
    grounded = any(series.kind in ("bars", "areas") for series in panel.series)
    return [0.0, *found] if grounded else found


def _stacked(panel: Panel) -> list[tuple[Series, int, float, float]]:
    """Returns series, place, base and height of every part of a stack."""
    tops: dict[float, float] = {}
    parts = []
    for series in panel.series:
        for at, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            if x is None:
                continue
            base = tops.get(x, 0.0)
            parts.append((series, at, base, y or 0.0))
            tops[x] = base + (y or 0.0)
    return parts


def _tick_texts(marks: Sequence[float]) -> list[str]:
    step = marks[1] - marks[0] if len(marks) > 1 else abs(marks[0]) if marks else 1.0
    return [tick_text(mark, step) for mark in marks]


def _upright_axis(
    axis: Axis, y: Scale, marks: Sequence[float], x: Scale, *, above: float
) -> list[Markup]:
    drawn = [tag("text", axis.title, x=2, y=y.end - above, class_="name")]
    for mark, text in zip(marks, _tick_texts(marks), strict=True):
        drawn.append(
            tag("path", d=f"M{_pixels(x.start)} {_pixels(y(mark))}H{_pixels(x.end)}", class_="grid")
        )
        drawn.append(
            tag("text", text, x=x.start - 6, y=y(mark) + 4, class_="tick", text_anchor="end")
        )
    return drawn


def _lower_axis(figure: Figure, x: Scale, at: float, *, whole: bool) -> list[Markup]:
    most = 4 if x.end - x.start < 330 else 8
    marks = ticks(x.low, x.high, most, whole=whole)
    drawn = [tag("path", d=f"M{_pixels(x.start)} {_pixels(at)}H{_pixels(x.end)}", class_="axis")]
    for mark, text in zip(marks, _tick_texts(marks), strict=True):
        half = len(text) * CHARACTER / 2
        drawn.append(
            tag(
                "text",
                text,
                x=min(x(mark), x.end + 12 - half),
                y=at + 16,
                class_="tick",
                text_anchor="middle",
            )
        )
    middle = (x.start + x.end) / 2
    drawn.append(
        tag("text", figure.x.title, x=middle, y=at + 35, class_="name", text_anchor="middle")
    )
    return drawn


def _rule(x: float, y: Scale) -> Markup:
    return tag("path", d=f"M{_pixels(x)} {_pixels(y.start)}V{_pixels(y.end)}", class_="rule")


# Series --------------------------------------------------------------------------------------------------------------


def _panel(panel: Panel, x: Scale, y: Scale) -> list[Markup]:
    if panel.stacked:
        return _stack(panel, x, y)
    drawn: list[Markup] = []
    for series in panel.series:
        if series.kind == "bars":
            drawn += _stack(Panel(panel.y, [series]), x, y)
        else:
            drawn += _points_and_lines(series, x, y)
    return drawn


Place = tuple[float, float] | None
"""A pixel in the picture; None for a point that is not shown."""


def _points_and_lines(series: Series, x: Scale, y: Scale) -> list[Markup]:
    places = [_shown(a, b, x, y) for a, b in zip(series.x, series.y, strict=True)]
    drawn: list[Markup] = []
    if series.kind in ("line", "steps"):
        path = _path(places, stairs=series.kind == "steps")
        look = f"line {series.color}" + (" dotted" if series.dotted else "")
        drawn += [tag("path", d=path, class_=look)] if path else []

    every = 1 if series.marked else -(-len(places) // HOVERED)
    for at, place in enumerate(places):
        alone = _alone(places, at)
        last = at + 1 == len(places)
        if place is not None and (at % every == 0 or last or alone):
            drawn.append(_mark(series, at, place, shown=series.marked or alone))
    return drawn


def _shown(a: float | None, b: float | None, x: Scale, y: Scale) -> Place:
    if a is None or b is None or not y.low <= b <= y.high:
        return None
    return x(a), y(b)


def _alone(places: Sequence[Place], at: int) -> bool:
    """Says whether the point has no neighbour, so that no line shows it."""
    before = places[at - 1] if at else None
    after = places[at + 1] if at + 1 < len(places) else None
    return places[at] is not None and before is None and after is None


def _mark(series: Series, at: int, place: tuple[float, float], *, shown: bool) -> Markup:
    """Returns the circle of one point; one that is not `shown` only answers the pointer."""
    radius = 2.7 if series.marked else 1.0
    if series.kind in ("points", "steps") or series.beside:
        radius = 5.0
    color = "blue" if series.beside and series.dotted else series.color
    look = "hollow " if series.hollow else ""
    return tag(
        "circle",
        tag("title", series.hover[at]) if series.hover else "",
        cx=place[0],
        cy=place[1],
        r=radius if shown else 4.0,
        class_=f"mark {look}{color}" if shown else f"mark unseen {color}",
    )


def _path(places: Sequence[Place], *, stairs: bool) -> str:
    parts: list[str] = []
    begun = False
    for place in _thinned(places):
        if place is None:
            begun = False
            continue
        across, down = _pixels(place[0]), _pixels(place[1])
        if not begun:
            parts.append(f"M{across} {down}")
        elif stairs:
            parts.append(f"H{across}V{down}")
        else:
            parts.append(f"L{across} {down}")
        begun = True
    return "".join(parts)


def _thinned(places: Sequence[Place]) -> Sequence[Place]:
    """Keeps the lowest and the highest point of each stretch of a long line, so that it looks the same."""
    if len(places) <= VERTICES or any(place is None for place in places):
        return places
    stretch = -(-2 * len(places) // VERTICES)
    kept: list[Place] = []
    for begin in range(0, len(places), stretch):
        some = [place for place in places[begin : begin + stretch] if place is not None]
        ends = {0, len(some) - 1} if begin in (0, len(places) - 1) else set()
        ends |= {
            min(range(len(some)), key=lambda i: some[i][1]),
            max(range(len(some)), key=lambda i: some[i][1]),
        }
        kept += [some[i] for i in sorted(ends)]
    return [*kept, places[-1]]


def _stack(panel: Panel, x: Scale, y: Scale) -> list[Markup]:
    parts = _stacked(panel)
    drawn: list[Markup] = []
    for series in panel.series:
        own = [part for part in parts if part[0] is series]
        if not own:
            continue
        if series.kind == "areas":
            drawn.append(_area(own, x, y))
            every = -(-len(own) // HOVERED) or 1
            for _, at, base, height in own[::every]:
                title = tag("title", series.hover[at]) if series.hover else ""
                where = {"cx": x(series.x[at] or 0.0), "cy": y(base + height), "r": 4.0}
                drawn.append(tag("circle", title, **where, class_=f"mark unseen {series.color}"))
        else:
            drawn += _upright_bars(own, x, y)
    return drawn


def _area(parts: Sequence[tuple[Series, int, float, float]], x: Scale, y: Scale) -> Markup:
    every = -(-len(parts) // VERTICES) or 1
    kept = [*parts[:-1:every], parts[-1]]
    upper = [
        f"{_pixels(x(s.x[at] or 0.0))} {_pixels(y(base + height))}" for s, at, base, height in kept
    ]
    lower = [
        f"{_pixels(x(s.x[at] or 0.0))} {_pixels(y(base))}" for s, at, base, _ in reversed(kept)
    ]
    return tag("path", d=f"M{'L'.join([*upper, *lower])}Z", class_=f"area {parts[0][0].color}")


def _upright_bars(
    parts: Sequence[tuple[Series, int, float, float]], x: Scale, y: Scale
) -> list[Markup]:
    known = [a for s, at, *_ in parts if (a := s.x[at]) is not None]
    thick = max(0.4, 0.75 * _distance(known) * (x.end - x.start) / (x.high - x.low))
    # Thinner bars than pixels cannot be told apart: of many, the highest of each stretch stands for it.
    every = -(-len(parts) // VERTICES) or 1
    drawn = []
    for begin in range(0, len(parts), every):
        series, at, base, height = max(
            parts[begin : begin + every], key=lambda part: part[2] + part[3]
        )
        across = x(series.x[at] or 0.0)
        title = (
            tag("title", series.hover[at])
            if series.hover and every * len(parts) <= VERTICES
            else ""
        )
        box = {"x": across - every * thick / 2, "y": y(base + height), "width": every * thick}
        look = f"bar {series.color} mark"
        drawn.append(
            tag("rect", title, **box, height=max(0.0, y(base) - y(base + height)), class_=look)
        )
    return drawn


# Lying bars ----------------------------------------------------------------------------------------------------------


def _lying(figure: Figure, width: int, names: Sequence[str]) -> list[Markup]:
    panel = figure.panels[0]
    ends = [name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :] for name in names]
    beside = max((len(text) for series in panel.series for text in series.beside), default=0)
    left = min(12 + max(len(end) for end in ends) * CHARACTER, 0.55 * width)
    right = 12 + beside * CHARACTER
    known = [n for series in panel.series for n in series.x if n is not None]
    low, high = _range(figure.x, [0.0, *known], tight=True)
    low = min(low, 0.0) if figure.x.low is None else figure.x.low
    x = Scale(low, high, left, width - right)
    top, bottom = 8.0, figure.height - 42.0
    row = (bottom - top) / len(names)

    drawn: list[Markup] = []
    for mark in ticks(x.low, x.high, 4 if width == NARROW else 6):
        line = f"M{_pixels(x(mark))} {_pixels(top)}V{_pixels(bottom)}"
        drawn.append(tag("path", d=line, class_="grid"))
    for at, end in enumerate(ends):
        middle = top + (at + 0.5) * row
        drawn.append(tag("text", end, x=left - 6, y=middle + 4, class_="tick", text_anchor="end"))
        for series in panel.series:
            drawn += _lying_bar(series, at, x, middle, row)
    return [*drawn, *_lower_axis(figure, x, bottom, whole=False)]


def _lying_bar(series: Series, at: int, x: Scale, middle: float, row: float) -> list[Markup]:
    """Returns one bar around the height `middle`, with its text; nothing where there is no number."""
    length = series.x[at]
    if length is None:
        return []
    title = tag("title", series.hover[at]) if series.hover else ""
    box = {
        "x": x(x.low),
        "y": middle - 0.33 * row,
        "width": max(0.0, x(length) - x(x.low)),
        "height": 0.66 * row,
    }
    drawn = [tag("rect", title, **box, class_=f"bar {series.color} mark")]
    if series.beside:
        text = series.beside[at]
        drawn.append(tag("text", text, x=x(length) + 5, y=middle + 4, class_="tick"))
    return drawn


# Words in the picture ------------------------------------------------------------------------------------------------


def _labels(figure: Figure, panel: Panel, x: Scale, y: Scale, frame: Box) -> list[Markup]:
    """Returns the notes and the names of points, each where it lies inside the picture and on no other."""
    taken = _taken(panel, x, y)
    drawn = [_top_note(note, x, y) for note in figure.notes if note.y is None]
    for series in panel.series:
        for text, a, b in zip(series.beside, series.x, series.y, strict=False):
            place = _shown(a, b, x, y)
            if place is not None and text:
                drawn += _label(place, text, frame, taken)
    return drawn


def _taken(panel: Panel, x: Scale, y: Scale) -> list[Box]:
    """Returns the room that points and staircases take."""
    taken = []
    for series in panel.series:
        if series.kind not in ("points", "steps") and not series.beside:
            continue
        for a, b in zip(series.x, series.y, strict=True):
            if (place := _shown(a, b, x, y)) is not None:
                across, down = place
                taken.append(Box(across - 5, down - 5, across + 5, down + 5))
    for series in panel.series:
        if series.kind == "steps":
            taken += _stairs(series, x, y)
    return taken


def _label(place: tuple[float, float], text: str, frame: Box, taken: list[Box]) -> list[Markup]:
    """Returns the name of the point at `place`, and adds its room to `taken`."""
    across, down = place
    lines = _fitted(text.split("\n"), frame)
    box, far = _place(across, down, lines, frame, taken)
    taken.append(box)
    # Widths are estimates: a text left of its point ends there, so that it stays beside it.
    left_of = box.right < across
    drawn = []
    for at, said in enumerate(lines):
        where = {"x": box.right if left_of else box.left, "y": box.top + (at + 0.8) * LINE}
        anchor = "end" if left_of else None
        drawn.append(tag("text", said, **where, class_="label", text_anchor=anchor))
    if far:  # from its point, so that it is not told without a line
        drawn.append(tag("path", d=_leader(across, down, box), class_="rule"))
    return drawn


def _stairs(series: Series, x: Scale, y: Scale) -> list[Box]:
    """Returns the room that a staircase takes."""
    known = [
        (x(a), y(b))
        for a, b in zip(series.x, series.y, strict=True)
        if a is not None and b is not None
    ]
    boxes = []
    for (left, begin), (right, end) in pairwise(known):
        boxes.append(Box(left, begin - 2, right, begin + 2))
        boxes.append(Box(right - 2, min(begin, end), right + 2, max(begin, end)))
    return boxes


def _top_note(note: Note, x: Scale, y: Scale) -> Markup:
    half = len(note.text) * CHARACTER / 2
    return tag(
        "text",
        note.text,
        x=min(max(x(note.x), x.start + half), x.end - half),
        y=y.end - 5,
        class_="label middle",
    )


def _fitted(lines: Sequence[str], frame: Box) -> list[str]:
    most = max(6, int(0.75 * (frame.right - frame.left) / CHARACTER))
    return [line if len(line) <= most else line[: most - 1] + "…" for line in lines]


def _place(
    across: float, down: float, lines: Sequence[str], frame: Box, taken: Sequence[Box]
) -> tuple[Box, bool]:
    """Returns where a label stands: the first of some places beside its point that is inside and free."""
    width, height = max(map(len, lines)) * CHARACTER, len(lines) * LINE
    middle = down - height / 2
    tries = [
        (across + 10, middle),
        (across - 10 - width, middle),
        (across + 8, down - height - 4),
        (across - 8 - width, down - height - 4),
        (across + 8, down + 4),
        (across - 8 - width, down + 4),
        (across - width / 2, down - height - 8),
        (across - width / 2, down + 8),
    ]
    near = len(tries)
    tries += [
        (min(max(across - width / 2, frame.left), frame.right - width), down + sign * far)
        for far in range(24, 240, 16)
        for sign in (-1, 1)
    ]
    for at, (left, top) in enumerate(tries):
        box = Box(left, top, left + width, top + height)
        if box.inside(frame) and not any(box.meets(other) for other in taken):
            return box, at >= near
    # No place is free: stay inside, even on top of another.
    left = min(max(across + 10, frame.left), frame.right - width)
    top = min(max(middle, frame.top), frame.bottom - height)
    return Box(left, top, left + width, top + height), False


def _leader(across: float, down: float, box: Box) -> str:
    edge = box.bottom if box.bottom < down else box.top
    inside = min(max(across, box.left), box.right)
    return f"M{_pixels(across)} {_pixels(down)}L{_pixels(inside)} {_pixels(edge)}"
