"""Places labels beside the points of a figure, if possible without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from fedpress.reports.plot import Figure, Note, Panel, Series
from fedpress.reports.scales import Scale, pixel_of
from fedpress.reports.svg import element, pixels

CHARACTER = 7.4  # pixels of one character on average, in the widest usual font
LINE = 15.0  # pixels from one line of text to the next
POINT = 5.0  # pixels from the middle of a point to its edge
FARTHEST = 240  # pixels; farther away a reader no longer sees to which point a label belongs


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; `top` is smaller than `bottom`, as in SVG."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Returns whether two boxes share a pixel; boxes that only touch do not.

        >>> one = Box(0, 0, 10, 10)
        >>> one.overlaps(Box(9, 9, 20, 20)), one.overlaps(Box(10, 0, 20, 10))
        (True, False)
        """
        apart = self.right <= other.left or other.right <= self.left
        return not apart and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        """Returns whether this box lies completely in `other`."""
        across = self.left >= other.left and self.right <= other.right
        return across and self.top >= other.top and self.bottom <= other.bottom


def labels(figure: Figure, panel: Panel, x: Scale, y: Scale, frame: Box) -> list[Markup]:
    """Returns the notes and the labels of points as SVG.

    Args:
        figure: the figure, with its notes.
        panel: the panel, with the series that have labels.
        x: scale of the lower axis.
        y: scale of the vertical axis.
        frame: the box that all labels must be inside of.
    """
    # The box of each label is added, so that the next label avoids it.
    taken = _taken(panel, x, y)
    drawn = [_top_note(note, x, y) for note in figure.notes]
    for series in panel.series:
        for text, a, b in zip(series.labels, series.x, series.y, strict=False):
            place = pixel_of(a, b, x, y)
            if place is not None and text:
                drawn += _label(place, text, frame, taken)
    return drawn


def _taken(panel: Panel, x: Scale, y: Scale) -> list[Box]:
    """Returns the boxes that no label may cover: lines of steps, and points.

    Points of a plain line or of bars count only if the series has labels.
    """
    taken = []
    for series in panel.series:
        if series.kind not in ("points", "steps") and not series.labels:
            continue
        for a, b in zip(series.x, series.y, strict=True):
            place = pixel_of(a, b, x, y)
            if place is not None:
                across, down = place
                taken.append(Box(across - POINT, down - POINT, across + POINT, down + POINT))
    for series in panel.series:
        if series.kind == "steps":
            taken += _boxes_of_steps(series, x, y)
    return taken


def _boxes_of_steps(series: Series, x: Scale, y: Scale) -> list[Box]:
    """Returns two boxes for each step, around its horizontal and its vertical line.

    Each box reaches 2 pixels to both sides of the line.
    """
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
    """Returns the label of the point at the pixel `place`, and adds its box to `taken`."""
    across, down = place
    lines = _shortened(text.split("\n"), frame)
    box, far = _free_box(across, down, lines, frame, taken)
    # Later labels must not cover this one.
    taken.append(box)
    # The width of a text is an estimate. A text left of its point is aligned at its right end, so
    # that an error of the estimate leaves no gap.
    on_the_left = box.right < across
    edge = box.right if on_the_left else box.left
    anchor = "end" if on_the_left else None
    drawn = []
    for at, words in enumerate(lines):
        where = {"x": edge, "y": box.top + (at + 0.8) * LINE}
        drawn.append(element("text", words, **where, class_="label", text_anchor=anchor))
    if far:
        drawn.append(element("path", d=_leader(across, down, box), class_="rule"))
    return drawn


def _shortened(lines: Sequence[str], frame: Box) -> list[str]:
    # A label wider than three quarters of the picture would fit on neither side of most points.
    most = max(6, int(0.75 * (frame.right - frame.left) / CHARACTER))
    shortened = []
    for line in lines:
        shortened.append(line if len(line) <= most else line[: most - 1] + "…")
    return shortened


def _free_box(
    across: float, down: float, lines: Sequence[str], frame: Box, taken: Sequence[Box]
) -> tuple[Box, bool]:
    """Returns the first free box beside the point at the pixel (across, down).

    The second value is whether the box is so far away that a line must connect it to the point.
    """
    width, height = max(map(len, lines)) * CHARACTER, len(lines) * LINE
    near = _near(across, down, width, height)
    centred = min(max(across - width / 2, frame.left), frame.right - width)
    far = []
    for away in range(24, FARTHEST, 16):
        far += [(centred, down - away), (centred, down + away)]
    for at, (left, top) in enumerate([*near, *far]):
        box = Box(left, top, left + width, top + height)
        if box.inside(frame) and not any(box.overlaps(other) for other in taken):
            return box, at >= len(near)
    # No place is free: an overlap inside the picture is better than a label cut off at its edge.
    left = min(max(across + 10, frame.left), frame.right - width)
    top = min(max(down - height / 2, frame.top), frame.bottom - height)
    return Box(left, top, left + width, top + height), False


def _near(across: float, down: float, width: float, height: float) -> list[tuple[float, float]]:
    """Returns places for a label close to a point, as (left, top), in the order of preference."""
    # Right and left come first, because readers look for a label beside its point.
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
    """Returns the SVG path from a point to the nearest edge of its label."""
    edge = box.bottom if box.bottom < down else box.top
    inside = min(max(across, box.left), box.right)
    return f"M{pixels(across)} {pixels(down)}L{pixels(inside)} {pixels(edge)}"
