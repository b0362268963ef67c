"""The small vocabulary of our plots: plain plotly dictionaries, with colours named after the page's CSS variables.

The page's script replaces a `color` like `--blue` by the variable's value, so plots follow the light and the dark
theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fedpress.report.units import number

Spec = dict[str, Any]
BLUE, ORANGE, FAINT, TEXT = "--blue", "--orange", "--faint", "--muted"
LONGEST_NAME = 22


@dataclass(frozen=True)
class Figure:
    """A plot: `spec` is plotly's data and layout, `caption` says in words what is to be seen there."""

    title: str
    caption: str
    spec: Spec
    height: int = 320
    wide: bool = False


def label(value: Any) -> str:
    """Returns a name from the run as text for a plot: plotly would read `<b>` or `<a href>` in it as markup."""
    return escape(str(value), quote=False)


def values(rows: list[Spec], key: str, scale: float = 1.0) -> list[float | None]:
    """Returns one number per row; what is missing or not finite becomes a gap."""
    found = [number(row.get(key)) for row in rows]
    return [None if x is None else x * scale for x in found]


def from_to(numbers: list[float | None]) -> str:
    """Returns the first and the last known of some percentages in words."""
    known = [n for n in numbers if n is not None]
    return f"from {known[0]:.2f}% to {known[-1]:.2f}%" if known else "was not measured"


def total_of(numbers: Sequence[float | None]) -> float:
    """Returns the sum of the known numbers."""
    return sum(n for n in numbers if n is not None)


def line(
    name: str, x: list[Any], y: Sequence[float | None], *, color: str = BLUE, unit: str = "", panel: int = 1
) -> Spec:
    """Returns a line with a point per value, in the given panel."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) < 60 else "lines",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": color, "width": 2},
        "marker": {"color": color, "size": 5},
        "hovertemplate": f"%{{y:.4~g}}{unit}",
        **_axes(panel),
    }


def bars(name: str, x: list[Any], y: list[Any], *, color: str = BLUE, unit: str = "", panel: int = 1) -> Spec:
    """Returns upright bars, in the given panel."""
    hover = f"%{{y:.4~g}}{unit}"
    return {
        "type": "bar",
        "name": name,
        "x": x,
        "y": y,
        "marker": {"color": color},
        "hovertemplate": hover,
        **_axes(panel),
    }


def lying_bars(name: str, names: list[str], lengths: list[Any], *, color: str = BLUE, **more: Any) -> Spec:
    """Returns bars that lie, so that long names can be read on a phone; `names_axis` has the names."""
    hover = [label(n) for n in names]
    bar = {"type": "bar", "orientation": "h", "name": name, "y": list(range(len(names))), "x": lengths}
    return {**bar, "hovertext": hover, "marker": {"color": color}, **more}


def names_axis(names: list[str]) -> Spec:
    """Returns the upright axis of `lying_bars`: every name is shown, the first on top, of a long one its end."""
    ends = [label(n if len(n) <= LONGEST_NAME else "…" + n[1 - LONGEST_NAME :]) for n in names]
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": ends, "ticks": ""}
    return {"title": {"text": ""}, "autorange": "reversed", "showgrid": False, "zeroline": False, **ticks}


def _axes(panel: int) -> Spec:
    return {} if panel == 1 else {"yaxis": f"y{panel}"}


def axis(title: str, **more: Any) -> Spec:
    """Returns an axis with a title."""
    return {"title": {"text": title}, **more}


def note(x: float | None, y: float | None, text: str, **more: Any) -> Spec:
    """Returns a quiet text at a point of a plot."""
    return {"x": x, "y": y, "text": text, "showarrow": False, "font": {"color": TEXT, "size": 12}, **more}


def spec(data: list[Spec], *, x: Spec, y: Spec, **layout: Any) -> Spec:
    """Returns a plot with one panel."""
    return {"data": data, "layout": {"xaxis": x, "yaxis": y, "showlegend": len(data) > 1, **layout}}


def two_panels(data: list[Spec], *, x: Spec, top: Spec, bottom: Spec, **layout: Any) -> Spec:
    """Returns a plot with two panels above each other that share the x axis."""
    layout = {"yaxis": {**top, "domain": [0.46, 1]}, "yaxis2": {**bottom, "domain": [0, 0.36]}, **layout}
    return {"data": data, "layout": {"xaxis": {**x, "anchor": "y2"}, "showlegend": False, **layout}}
