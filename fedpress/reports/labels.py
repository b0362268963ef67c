"""Where words stand in a picture: inside it, beside their point, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from fedpress.reports.plot import Figure, Note, Panel, Series
from fedpress.reports.scales import Scale, place_of
from fedpress.reports.svg import element, pixels

CHARACTER = 7.4  # pixels of one character on average, in the widest usual font
LINE = 15.0  # pixels from one line of text to the next
POINT = 5.0  # pixels from the middle of a point to its edge
FARTHEST = 240  # pixels: a label farther away is not seen as that of its point


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Says whether both share a pixel.

        >>> one = Box(0, 0, 10, 10)
        >>> one.overlaps(Box(9, 9, 20, 20)), one.overlaps(Box(10, 0, 20, 10))
        (True, False)
        """
        apart = self.right <= other.left or other.right <= self.left
        return not apart and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        """Says whether `other` holds all of this one."""
        across = self.left >= other.left and self.right <= other.right
        return across and self.top >= other.top and self.bottom <= other.bottom


def labels(figure: Figure, panel: Panel, x: Scale, y: Scale, frame: Box) -> list[Markup]:
    """Returns the notes and the labels of points, each inside the `frame` and on no other."""
    taken = _taken(panel, x, y)
    drawn = [_top_note(note, x, y) for note in figure.notes]
    for series in panel.series:
        for text, a, b in zip(series.labels, series.x, series.y, strict=False):
            place = place_of(a, b, x, y)
            if place is not None and text:
                drawn += _label(place, text, frame, taken)
    return drawn


def _taken(panel: Panel, x: Scale, y: Scale) -> list[Box]:
    """Returns the room of points and staircases, on which no label may stand."""
    taken = []
    for series in panel.series:
        if series.kind not in ("points", "steps") and not series.labels:
            continue
        for a, b in zip(series.x, series.y, strict=True):
            place = place_of(a, b, x, y)
            if place is not None:
                across, down = place
                taken.append(Box(across - POINT, down - POINT, across + POINT, down + POINT))
    for series in panel.series:
        if series.kind == "steps":
            taken += _room_of_steps(series, x, y)
    return taken


def _room_of_steps(series: Series, x: Scale, y: Scale) -> list[Box]:
    known = []
    for a, b in zip(series.x, series.y, strict=True):
        if a is not None and b is not None:
            known.append((x(a), y(b)))
    boxes = []
    for (left, begin), (right, end) in pairwise(known):
        boxes.append(Box(left, begin - 2, right, begin + 2))
        boxes.append(Box(right - 2, min(begin, end), right + 2, max(begin, end)))
    return boxes


def _top_note(note: Note, x: Scale, y: Scale) -> Markup:
    half = len(note.text) * CHARACTER / 2
    middle = min(max(x(note.x), x.start + half), x.end - half)
    return element("text", note.text, x=middle, y=y.end - 5, class_="label middle")


def _label(place: tuple[float, float], text: str, frame: Box, taken: list[Box]) -> list[Markup]:
    """Returns the label of the point at `place`, and adds its room to `taken`."""
    across, down = place
    lines = _shortened(text.split("\n"), frame)
    box, far = _free_box(across, down, lines, frame, taken)
    taken.append(box)
    # Widths are estimates: a text on the left is aligned at its right end, so that it touches its
    # point.
    on_the_left = box.right < across
    drawn = []
    for at, words in enumerate(lines):
        where = {"x": box.right if on_the_left else box.left, "y": box.top + (at + 0.8) * LINE}
        anchor = "end" if on_the_left else None
        drawn.append(element("text", words, **where, class_="label", text_anchor=anchor))
    if far:
        drawn.append(element("path", d=_leader(across, down, box), class_="rule"))
    return drawn


def _shortened(lines: Sequence[str], frame: Box) -> list[str]:
    most = max(6, int(0.75 * (frame.right - frame.left) / CHARACTER))
    return [line if len(line) <= most else line[: most - 1] + "…" for line in lines]


def _free_box(
    across: float, down: float, lines: Sequence[str], frame: Box, taken: Sequence[Box]
) -> tuple[Box, bool]:
    """Returns the first free box beside the point at (across, down).

    The second value says whether it is so far away that it needs a line to its point.
    """
    width, height = max(map(len, lines)) * CHARACTER, len(lines) * LINE
    near = _near(across, down, width, height)
    centred = min(max(across - width / 2, frame.left), frame.right - width)
    far = [(centred, down + sign * away) for away in range(24, FARTHEST, 16) for sign in (-1, 1)]
    for at, (left, top) in enumerate([*near, *far]):
        box = Box(left, top, left + width, top + height)
        if box.inside(frame) and not any(box.overlaps(other) for other in taken):
            return box, at >= len(near)
    # No place is free: two words on each other are better than one outside the picture.
    left = min(max(across + 10, frame.left), frame.right - width)
    top = min(max(down - height / 2, frame.top), frame.bottom - height)
    return Box(left, top, left + width, top + height), False


def _near(across: float, down: float, width: float, height: float) -> list[tuple[float, float]]:
    """Returns left and top of the places close to a point, the best first."""
    right, left, middle = across + 8, across - 8 - width, across - width / 2
    return [
        (across + 10, down - height / 2),
        (across - 10 - width, down - height / 2),
        (right, down - height - 4),
        (left, down - height - 4),
        (right, down + 4),
        (left, down + 4),
        (middle, down - height - 8),
        (middle, down + 8),
    ]


def _leader(across: float, down: float, box: Box) -> str:
    """Returns the path from a point to the nearest edge of its label."""
    edge = box.bottom if box.bottom < down else box.top
    inside = min(max(across, box.left), box.right)
    return f"M{pixels(across)} {pixels(down)}L{pixels(inside)} {pixels(edge)}"
