"""What a figure shows, as plain data: axes, panels, series of numbers and words.

`draw` makes it SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedpress.reports.metrics import Shown
from fedpress.reports.table import Table
from fedpress.reports.units import number

Numbers = Sequence[float | None]
Kind = Literal["line", "points", "steps", "bars", "areas", "rows", "dots"]
Color = Literal["blue", "orange", "faint"]
"""Names of the page's colours, which follow the light and the dark theme.

The first two differ for every eye.
"""
BLUE: Color = "blue"
ORANGE: Color = "orange"
FAINT: Color = "faint"
MANY_POINTS = 60  # a line of so many points is drawn without circles


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: with the unit in brackets.
        low: where it begins; None: as low as the numbers need.
        high: where it ends; None: as high as the numbers need.
        bounds: values that the axis never passes, such as 0 and 100 percent.
        least_range: an axis without `low` and `high` shows at least so much: chance must not look
            like a change.
        names: of the rows of horizontal bars or dots, the first on top.
    """

    title: str
    low: float | None = None
    high: float | None = None
    bounds: tuple[float, float] | None = None
    least_range: float = 0.0
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Series:
    """Numbers of one kind; a missing number is a gap.

    Attributes:
        kind: `steps` are points joined by a staircase, `rows` horizontal bars, `dots` one dot in
            each row.
        name: for the legend and the table.
        x: one for each point.
        y: one for each point.
        color: one of the page's colours.
        hover: what the pointer is told of each point.
        labels: what stands beside each point in the picture.
        dotted: whether the line is dotted.
        hollow: whether points are circles without filling.
        marked: whether each point of a line is drawn.
        in_legend: whether the legend names it.
    """

    kind: Kind
    name: str
    x: Numbers
    y: Numbers
    color: Color = "blue"
    hover: Sequence[str] = ()
    labels: Sequence[str] = ()
    dotted: bool = False
    hollow: bool = False
    marked: bool = True
    in_legend: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes; all panels of a figure share the lower axis."""

    y: Axis
    series: Sequence[Series]
    stacked: bool = False


@dataclass(frozen=True)
class Note:
    """A quiet text at the top of the picture, above the place `x` of the lower axis."""

    x: float
    text: str


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Attributes:
        title: above it.
        caption: says in words what the picture shows.
        x: the lower axis.
        panels: one or two, the first on top.
        notes: at the top of the first panel.
        rules: places of vertical lines through all panels.
        height: in pixels.
        wide: whether it takes the whole width of the page.
        together: whether the pointer is told all numbers at its place on the lower axis, not the
            nearest alone.
        legend: whether it has a legend.
    """

    title: str
    caption: str
    x: Axis
    panels: Sequence[Panel]
    notes: Sequence[Note] = ()
    rules: Sequence[float] = ()
    height: int = 320
    wide: bool = False
    together: bool = False
    legend: bool = False

    @property
    def series(self) -> list[Series]:
        """All series, from top to bottom."""
        return [series for panel in self.panels for series in panel.series]


def score_axis(shown: Shown, before: str = "") -> Axis:
    """Returns the axis of a metric, such as `validation accuracy (%)`.

    Points on it need not begin at 0.

    A share never passes 0 and 100%, and it shows at least two points: less is chance on most test
    sets.
    """
    if not shown.metric.share:
        return Axis(shown.axis(before))
    return Axis(shown.axis(before), bounds=(0.0, 100.0), least_range=2.0)


def values(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> list[float | None]:
    """Returns one number per row; what is missing or not finite becomes a gap."""
    found = [number(row.get(key)) for row in rows]
    return [None if x is None else x * scale for x in found]


def total_of(numbers: Numbers) -> float:
    """Returns the sum of the known numbers."""
    return sum(n for n in numbers if n is not None)


def short(value: float | None) -> str:
    """Returns a number with four digits.

    >>> short(93.12345), short(1234567.0), short(None)
    ('93.12', '1,235,000', '–')
    """
    if value is None:
        return "–"
    rounded = float(f"{value:.4g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def line(
    name: str, x: Numbers, y: Numbers, *, color: Color = "blue", unit: str = "", across: str = ""
) -> Series:
    """Returns a line with a point for each of a few values.

    The pointer is told for instance `epoch 3: loss 0.41`.

    Args:
        name: of the numbers, such as `loss`.
        x: places on the lower axis.
        y: one number for each.
        color: of the line.
        unit: of the numbers, behind each.
        across: name of the lower axis, such as `epoch`.
    """
    hover = _hover(name, x, y, unit, across)
    return Series("line", name, x, y, color, hover, marked=len(x) < MANY_POINTS)


def bars(
    name: str, x: Numbers, y: Numbers, *, color: Color = "blue", unit: str = "", across: str = ""
) -> Series:
    """Returns vertical bars; the arguments are those of `line`."""
    return Series("bars", name, x, y, color, _hover(name, x, y, unit, across))


def _hover(name: str, x: Numbers, y: Numbers, unit: str, across: str) -> list[str]:
    told = []
    for place, value in zip(x, y, strict=True):
        told.append(f"{across} {short(place)}: {name} {short(value)}{unit}".strip())
    return told


def horizontal_bars(
    name: str,
    lengths: Numbers,
    *,
    hover: Sequence[str],
    labels: Sequence[str] = (),
    color: Color = "blue",
) -> Series:
    """Returns horizontal bars, whose names can be read on a phone.

    The vertical axis has the names.
    """
    return Series("rows", name, lengths, list(range(len(lengths))), color, hover, labels)


def rows_height(rows: int) -> int:
    """Returns the height in pixels of a figure with so many rows."""
    each = 24 if rows < 40 else 16  # names at 16 pixels can still be read
    return 110 + each * rows


def dots(name: str, values: Numbers, *, hover: Sequence[str], labels: Sequence[str] = ()) -> Series:
    """Returns one dot in the row of each name.

    Unlike a bar it can be read on an axis that does not begin at 0.
    """
    return Series("dots", name, values, list(range(len(values))), hover=hover, labels=labels)


def numbers_of(figure: Figure, most: int = 200) -> Table:
    """Returns the figure's numbers as rows, for those who cannot see it.

    Of more than `most`, some and the last.
    """
    if figure.panels[0].y.names:
        return _by_name(figure)
    places = {tuple(series.x) for series in figure.series}
    if len(places) > 1 or any(series.labels for series in figure.series):
        return _by_point(figure, most)
    header = [figure.x.title, *(series.name for series in figure.series)]
    columns = [figure.series[0].x, *(series.y for series in figure.series)]
    every = _thinned(list(range(len(columns[0]))), most)
    return Table(header, [[short(column[at]) for column in columns] for at in every])


def _by_name(figure: Figure) -> Table:
    """Returns a row for each name of horizontal bars."""
    rows = []
    for at, name in enumerate(figure.panels[0].y.names):
        rows.append([name, *(short(series.x[at]) for series in figure.series)])
    return Table(["name", *(series.name for series in figure.series)], rows)


def _by_point(figure: Figure, most: int) -> Table:
    """Returns a row for each point, where the series have different places."""
    points = [(series, at) for series in figure.series for at in range(len(series.x))]
    rows = []
    for series, at in _thinned(points, most):
        name = series.hover[at] if series.hover else series.name
        rows.append([name, short(series.x[at]), short(series.y[at])])
    return Table(["point", figure.x.title, figure.panels[0].y.title], rows)


def _thinned(rows: list[Any], most: int) -> list[Any]:
    every = -(-len(rows) // most) or 1
    kept = rows[::every]
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    return kept
