"""What a figure shows, as plain data: axes, panels, series of numbers and words; `draw` makes it SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedpress.reports.table import Table
from fedpress.reports.units import number

Numbers = Sequence[float | None]
Kind = Literal["line", "points", "steps", "bars", "areas", "lying"]
Color = Literal["blue", "orange", "faint"]
"""Names of the page's colours, which follow the light and the dark theme; the first two differ for every eye."""
BLUE: Color = "blue"
ORANGE: Color = "orange"
FAINT: Color = "faint"


@dataclass(frozen=True)
class Axis:
    """One axis: `low` and `high` where they are given, otherwise what the numbers need.

    `names` are those of lying bars, the first on top.
    """

    title: str
    low: float | None = None
    high: float | None = None
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Series:
    """Numbers of one kind; `hover` says for each what is told beside the pointer, `beside` what stands in the picture.

    `steps` are points that a staircase joins. A missing number is a gap.
    """

    kind: Kind
    name: str
    x: Numbers
    y: Numbers
    color: Color = "blue"
    hover: Sequence[str] = ()
    beside: Sequence[str] = ()
    dotted: bool = False
    hollow: bool = False
    marked: bool = True
    in_legend: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes; panels of a figure share the lower axis."""

    y: Axis
    series: Sequence[Series]
    stacked: bool = False


@dataclass(frozen=True)
class Note:
    """A quiet text beside the point (x, y), or at the top of the picture where `y` is None."""

    x: float
    y: float | None
    text: str


@dataclass(frozen=True)
class Figure:
    """A picture: `caption` says in words what is to be seen there.

    `rules` are upright lines through all panels; with `together` the pointer is told all numbers at its x and not the
    nearest alone.
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


def values(rows: list[dict[str, Any]], key: str, scale: float = 1.0) -> list[float | None]:
    """Returns one number per row; what is missing or not finite becomes a gap."""
    found = [number(row.get(key)) for row in rows]
    return [None if x is None else x * scale for x in found]


def from_to(numbers: Numbers) -> str:
    """Returns the first and the last known of some percentages in words."""
    known = [n for n in numbers if n is not None]
    return f"from {known[0]:.2f}% to {known[-1]:.2f}%" if known else "was not measured"


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
    """Returns a line with a point for each of a few values; `across` names the lower axis for the pointer's words."""
    hover = [
        f"{across} {short(a)}: {name} {short(b)}{unit}".strip() for a, b in zip(x, y, strict=True)
    ]
    return Series("line", name, x, y, color, hover, marked=len(x) < 60)


def bars(
    name: str, x: Numbers, y: Numbers, *, color: Color = "blue", unit: str = "", across: str = ""
) -> Series:
    """Returns upright bars."""
    hover = [
        f"{across} {short(a)}: {name} {short(b)}{unit}".strip() for a, b in zip(x, y, strict=True)
    ]
    return Series("bars", name, x, y, color, hover)


def lying_bars(
    name: str,
    lengths: Numbers,
    *,
    hover: Sequence[str],
    beside: Sequence[str] = (),
    color: Color = "blue",
) -> Series:
    """Returns bars that lie, so that long names can be read on a phone; the axis has the names."""
    return Series("lying", name, lengths, list(range(len(lengths))), color, hover, beside)


def numbers_of(figure: Figure, most: int = 200) -> Table:
    """Returns the figure's numbers as rows, for those who cannot see it; of more than `most`, some and the last."""
    if figure.panels[0].y.names:
        return _by_name(figure)
    header = [figure.x.title]
    if len({tuple(series.x) for series in figure.series}) > 1 or any(
        series.beside for series in figure.series
    ):
        points = [(series, i) for series in figure.series for i in range(len(series.x))]
        rows = [
            [
                series.hover[i] if series.hover else series.name,
                short(series.x[i]),
                short(series.y[i]),
            ]
            for series, i in _thin(points, most)
        ]
        return Table(["point", *header, figure.panels[0].y.title], rows)
    header += [series.name for series in figure.series]
    columns = [figure.series[0].x, *(series.y for series in figure.series)]
    every = _thin(list(range(len(columns[0]))), most)
    return Table(header, [[short(column[i]) for column in columns] for i in every])


def _by_name(figure: Figure) -> Table:
    names = figure.panels[0].y.names
    header = ["name", *(series.name for series in figure.series)]
    return Table(
        header, [[name, *(short(s.x[i]) for s in figure.series)] for i, name in enumerate(names)]
    )


def _thin(rows: list[Any], most: int) -> list[Any]:
    every = -(-len(rows) // most) or 1
    kept = rows[::every]
    return kept if not rows or kept[-1] is rows[-1] else [*kept, rows[-1]]
