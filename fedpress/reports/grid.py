"""Draws a grid of cells as SVG: a row for each client, a column for each class."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedpress.reports.labels import CHARACTER
from fedpress.reports.marks import tooltip
from fedpress.reports.plot import Figure, Series, total_of
from fedpress.reports.rows import end_of
from fedpress.reports.svg import element

ROW = 22  # pixels from one row to the next
# Characters; longer names of columns are written upwards. Few columns are wider.
SHORT, SHORT_OF_FEW, FEW = 3, 6, 3
LONGEST = 14  # characters of a name that is written upwards
FAINTEST = 0.08  # opacity of a cell that is not empty


def grid_height(names: Sequence[str], columns: Sequence[str]) -> int:
    """Returns the height in pixels of a grid with these names of rows and columns."""
    return round(_head(columns)) + ROW * len(names) + 8


def grid_of_cells(figure: Figure, names: Sequence[str], width: int) -> list[Markup]:
    """Returns the SVG of all cells; a row's cells are as dark as their shares of the row's sum.

    Args:
        figure: a figure with one panel, whose series are columns with one number for each name.
        names: the names of the rows, from top to bottom.
        width: width of the picture in pixels.
    """
    columns = figure.panels[0].series
    ends = [end_of(name) for name in names]
    totals = [total_of([column.x[at] for column in columns]) for at in range(len(names))]
    sums = [f"{total:,.0f}" for total in totals]
    left = min(12 + max(map(len, ends)) * CHARACTER, 0.4 * width)
    right = width - 8 - max(map(len, sums)) * CHARACTER
    # Wider cells would not be read any better.
    each = min((right - left) / len(columns), 60.0)
    top = _head([column.name for column in columns])

    drawn: list[Markup] = []
    for number, column in enumerate(columns):
        drawn.append(_title(column.name, left + (number + 0.5) * each, top - 6, upwards=top > ROW))
    for at, end in enumerate(ends):
        # 4 pixels lower: SVG places a text by its base line, not by its middle.
        line = top + (at + 0.5) * ROW + 4
        drawn.append(element("text", end, x=left - 6, y=line, class_="tick", text_anchor="end"))
        for number, column in enumerate(columns):
            corner = (left + number * each, top + at * ROW)
            drawn.append(_cell(column, at, totals[at], corner, each))
        after = left + each * len(columns) + 6
        drawn.append(element("text", sums[at], x=after, y=line, class_="tick"))
    return drawn


def _head(columns: Sequence[str]) -> float:
    """Returns the height of the names of the columns."""
    longest = max((len(name) for name in columns), default=0)
    room = SHORT_OF_FEW if len(columns) <= FEW else SHORT
    return ROW if longest <= room else 10 + min(longest, LONGEST) * CHARACTER


def _title(name: str, x: float, y: float, *, upwards: bool) -> Markup:
    if not upwards:
        return element("text", name, x=x, y=y, class_="tick", text_anchor="middle")
    short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    # Turned around the lower end of the name, 4 pixels right of the middle of the line.
    turn = f"rotate(-90 {x + 4:.1f} {y:.1f})"
    return element("text", short, x=x + 4, y=y, class_="tick", transform=turn)


def _cell(
    column: Series, at: int, total: float, corner: tuple[float, float], width: float
) -> Markup:
    count = column.x[at] or 0.0
    share = count / total if total else 0.0
    box = {"x": corner[0] + 1, "y": corner[1] + 1, "width": width - 2, "height": ROW - 2}
    look = f"cell {column.color} mark" if count else "cell empty mark"
    # A number with two digits: `element` rounds to pixels.
    opacity = f"{FAINTEST + (1 - FAINTEST) * share:.2f}" if count else None
    title = tooltip(column.hover[at] if column.hover else "")
    return element("rect", title, **box, rx=2, class_=look, fill_opacity=opacity)
