"""Describes a figure as data (axes, panels, series of numbers), from which SVG is drawn later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedpress.reports.metrics import MetricFormat
from fedpress.reports.table import Table
from fedpress.reports.units import number

Numbers = Sequence[float | None]
# How a series is drawn; see `Series`.
Kind = Literal["line", "points", "steps", "bars", "areas", "rows", "dots", "cells"]
Color = Literal["blue", "orange", "faint"]
"""Names of colours in the page's style sheet, which has a light and a dark theme.

Blue and orange also differ for colour-blind readers.
"""
BLUE: Color = "blue"
ORANGE: Color = "orange"
FAINT: Color = "faint"
MOST_CIRCLES = 60  # with 60 points or more the circles of a line touch, so none are drawn


@dataclass(frozen=True)
class Axis:
    """One axis of a figure.

    Attributes:
        title: the title, with the unit in brackets, such as "file (MB)".
        low: the lowest value shown; None: it follows from the numbers.
        high: the highest value shown; None: it follows from the numbers.
        bounds: the lowest and the highest value that the axis may reach, such as 0 and 100 percent.
        least_range: least difference between both ends of the axis, such as 2 percentage points, so
            that random fluctuations do not look like a trend. It does not move an end that is set.
        names: names of the rows of horizontal bars, dots or cells, from top to bottom.
    """

    title: str
    low: float | None = None
    high: float | None = None
    bounds: tuple[float, float] | None = None
    least_range: float = 0.0
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Series:
    """A series of points that are drawn in one way; None is a missing number and leaves a gap.

    Attributes:
        kind: how the points are drawn. "steps": joined by a staircase; "rows": horizontal bars;
            "dots": one dot in each row; "cells": one column of a grid, darker where numbers are
            larger.
        name: the name in the legend and the table, such as "loss".
        x: the horizontal value of each point.
        y: the vertical value of each point.
        color: one of the page's colours.
        hover: the tooltip of each point, such as "epoch 3: loss 0.41".
        labels: the text beside each point.
        dotted: whether the line is dotted.
        hollow: whether points are circles without filling.
        marked: whether each point of a line has a circle.
        in_legend: whether the figure's legend has an entry for this series.
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
    """A part of a figure with one vertical axis; all panels of a figure share the lower axis.

    Attributes:
        y: the vertical axis.
        series: what is drawn.
        stacked: whether each series is drawn on top of the series before, so that heights add up.
    """

    y: Axis
    series: Sequence[Series]
    stacked: bool = False


@dataclass(frozen=True)
class Note:
    """A text at the top of the picture, above the value `x` of the lower axis."""

    x: float
    text: str


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Attributes:
        title: the text above the picture.
        caption: what the picture shows, in words with numbers, also for readers who cannot see it.
        x: the lower axis.
        panels: one or two panels, the first on top.
        notes: texts at the top of the first panel.
        rules: values of `x` with a vertical line through all panels.
        height: the height in pixels.
        wide: whether the figure takes the full width of the page.
        together: whether a tooltip shows the numbers of all series at one `x`, instead of the
            numbers of one point.
        legend: whether the figure has a legend.
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
        found: list[Series] = []
        for panel in self.panels:
            found += panel.series
        return found


def score_axis(shown: MetricFormat, before: str = "") -> Axis:
    """Returns the vertical axis of a metric, such as `validation accuracy (%)`."""
    if not shown.metric.share:
        return Axis(shown.axis(before))
    # On most test sets a difference below 2 percentage points is within two standard errors.
    return Axis(shown.axis(before), bounds=(0.0, 100.0), least_range=2.0)


def values(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> list[float | None]:
    """Returns the number under `key` in each row, times `scale`; None where there is no number."""
    found: list[float | None] = []
    for row in rows:
        value = number(row.get(key))
        found.append(None if value is None else value * scale)
    return found


def total_of(numbers: Numbers) -> float:
    """Returns the sum of the numbers that are not None."""
    return sum(n for n in numbers if n is not None)


def short(value: float | None) -> str:
    """Returns a number rounded to four digits, as text.

    >>> short(93.12345), short(1234567.0), short(None)
    ('93.12', '1,235,000', '–')
    """
    if value is None:
        return "–"
    # Four digits are enough for a tooltip, and more look like noise.
    rounded = float(f"{value:.4g}")
    # The format "g" would write numbers from 10,000 on with an exponent.
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def line(
    name: str, x: Numbers, y: Numbers, *, color: Color = "blue", unit: str = "", across: str = ""
) -> Series:
    """Returns a line, with tooltips such as `epoch 3: loss 0.41`.

    Args:
        name: name of the numbers, such as `loss`.
        x: horizontal value of each point.
        y: vertical value of each point.
        color: one of the page's colours.
        unit: unit of `y`, shown in tooltips.
        across: name of `x`, such as `epoch`, shown in tooltips.
    """
    # Circles of a dense line would touch and hide the line.
    hover = _hover(name, x, y, unit, across)
    return Series("line", name, x, y, color, hover, marked=len(x) < MOST_CIRCLES)


def bars(
    name: str, x: Numbers, y: Numbers, *, color: Color = "blue", unit: str = "", across: str = ""
) -> Series:
    """Returns vertical bars; the arguments are the same as for `line`."""
    return Series("bars", name, x, y, color, _hover(name, x, y, unit, across))


def _hover(name: str, x: Numbers, y: Numbers, unit: str, across: str) -> list[str]:
    texts = []
    for place, value in zip(x, y, strict=True):
        texts.append(f"{across} {short(place)}: {name} {short(value)}{unit}".strip())
    return texts


def horizontal_bars(
    name: str,
    lengths: Numbers,
    *,
    hover: Sequence[str],
    labels: Sequence[str] = (),
    color: Color = "blue",
) -> Series:
    """Returns horizontal bars, one for each of the names of the vertical axis.

    Beside horizontal bars, long names can be read on a phone; below vertical bars they cannot.
    """
    return Series("rows", name, lengths, list(range(len(lengths))), color, hover, labels)


def rows_height(rows: int) -> int:
    """Returns the height in pixels of a figure with horizontal bars or dots."""
    each = 24 if rows < 40 else 16  # names at 16 pixels can still be read
    return 110 + each * rows


def dots(name: str, values: Numbers, *, hover: Sequence[str], labels: Sequence[str] = ()) -> Series:
    """Returns dots, one for each of the names of the vertical axis.

    The place of a dot is right on any axis. The length of a bar would be misleading on an axis that
    does not begin at 0.
    """
    return Series("dots", name, values, list(range(len(values))), hover=hover, labels=labels)


def numbers_of(figure: Figure, most: int = 200) -> Table:
    """Returns the figure's numbers as a table, for readers who cannot see the picture.

    Args:
        figure: the figure.
        most: about how many rows to keep. From a longer table, every n-th row is kept, and the
            last row.
    """
    if figure.panels[0].y.names:
        return _by_name(figure)
    places = {tuple(series.x) for series in figure.series}
    # Series with different x do not fit into shared rows.
    if len(places) > 1 or any(series.labels for series in figure.series):
        return _by_point(figure, most)
    # All series have the same x, so one column for it is enough.
    header = [figure.x.title, *(series.name for series in figure.series)]
    columns = [figure.series[0].x, *(series.y for series in figure.series)]
    rows = []
    for at in _thinned(list(range(len(columns[0]))), most):
        rows.append([short(column[at]) for column in columns])
    return Table(header, rows)


def _by_name(figure: Figure) -> Table:
    """Returns a row for each name of horizontal bars."""
    rows = []
    for at, name in enumerate(figure.panels[0].y.names):
        rows.append([name, *(short(series.x[at]) for series in figure.series)])
    return Table(["name", *(series.name for series in figure.series)], rows)


def _by_point(figure: Figure, most: int) -> Table:
    """Returns a row for each point: its name, x and y."""
    points = []
    for series in figure.series:
        points += [(series, at) for at in range(len(series.x))]
    rows = []
    for series, at in _thinned(points, most):
        name = series.hover[at] if series.hover else series.name
        rows.append([name, short(series.x[at]), short(series.y[at])])
    return Table(["point", figure.x.title, figure.panels[0].y.title], rows)


def _thinned(rows: list[Any], most: int) -> list[Any]:
    """Returns about `most` evenly spaced rows and always the last, which has the final number."""
    # -(-a // b) is a / b rounded up.
    every = -(-len(rows) // most) or 1
    kept = rows[::every]
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    return kept
