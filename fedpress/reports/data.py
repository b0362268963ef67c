"""Draws the data of a run: type, missing values and content of each column, classes per client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedpress.reports import units
from fedpress.reports.grid import grid_height
from fedpress.reports.marks import tooltip
from fedpress.reports.plot import Axis, Figure, Panel, Series, short
from fedpress.reports.reading import Json
from fedpress.reports.svg import element

WIDTH, HEIGHT = 132.0, 30.0  # pixels of a small picture
WORDS_SHOWN = 4


@dataclass(frozen=True)
class ColumnLine:
    """One column of the table as the page shows it.

    Attributes:
        name: name of the column.
        type: how it is understood.
        missing: number and share of the cells without a value.
        gaps: a bar for this share.
        content: range of the numbers or dates, or the most frequent words.
        picture: a histogram, or a bar for each of these words.
    """

    name: str
    type: str
    missing: str
    gaps: Markup
    content: str
    picture: Markup


@dataclass(frozen=True)
class DataSection:
    """What a page shows of the data.

    Attributes:
        looked_at: which rows were looked at, in a sentence.
        columns: the columns of the table; empty for data without columns.
        more: a sentence about what is not shown; "" if all is.
        figure: the classes of each client; None if the data have no classes.
    """

    looked_at: str
    columns: list[ColumnLine]
    more: str
    figure: Figure | None


def data_section(shown: Any) -> DataSection | None:
    """Returns the section on data; None if there is nothing to show.

    Args:
        shown: what `fedpress.data.shown.shown` has returned, from a `result.json` perhaps that
            somebody changed.
    """
    if not isinstance(shown, dict):
        return None
    facts = _dictionaries(shown.get("columns"))
    rows = next((int(units.number(one.get("rows")) or 0) for one in facts), 0)
    columns = [_column(one) for one in facts]
    figure = classes_of_clients(shown)
    if not columns and figure is None:
        return None
    if shown.get("rows") == "all":
        looked_at = (
            f"All {rows:,} rows were looked at, private ones too: this page is for the owner of "
            "the data."
            if columns
            else "Private rows were looked at too: this page is for the owner of the data."
        )
    elif columns:
        looked_at = f"Columns are described by the {rows:,} public rows alone."
    else:
        looked_at = ""
    more = units.number(shown.get("more_columns"))
    return DataSection(
        looked_at, columns, f"{more:,.0f} more columns are not shown." if more else "", figure
    )


def _dictionaries(found: Any) -> list[Json]:
    return [one for one in _list(found) if isinstance(one, dict)]


def _list(found: Any) -> list[Any]:
    return list(found) if isinstance(found, list | tuple) else []


def _numbers(found: Any) -> list[float]:
    return [number for number in map(units.number, _list(found)) if number is not None]


def _column(facts: Json) -> ColumnLine:
    missing, rows = (units.number(facts.get(key)) or 0.0 for key in ("missing", "rows"))
    share = missing / rows if rows else 0.0
    text = f"{missing:,.0f} ({units.percent(share, 1)})" if missing else "none"
    content, picture = _content(facts)
    return ColumnLine(
        name=str(facts.get("name")),
        type=str(facts.get("type")),
        missing=text,
        gaps=_gap_bar(share) if missing else Markup(""),
        content=content,
        picture=picture,
    )


def _content(facts: Json) -> tuple[str, Markup]:
    """Returns the content of a column in words and as a small picture."""
    histogram = _numbers(facts.get("histogram"))
    numbers = _numbers(facts.get("numbers"))
    dates = [str(date) for date in _list(facts.get("dates"))]
    if len(numbers) == 3:
        low, middle, high = map(short, numbers)
        hover = _intervals(histogram, numbers[0], numbers[2])
        return f"{low} to {high}, median {middle}", _small_bars(histogram, hover)
    if dates:
        hover = [f"{count:,.0f} rows" for count in histogram]
        return " to ".join(dict.fromkeys(dates)), _small_bars(histogram, hover)
    return _words(facts)


def _words(facts: Json) -> tuple[str, Markup]:
    """Returns the most frequent words, and a bar for each; how many differ if none are known."""
    words = [pair for pair in _list(facts.get("words")) if isinstance(pair, list | tuple)]
    words = [pair for pair in words if len(pair) == 2 and units.number(pair[1]) is not None]
    distinct = int(units.number(facts.get("distinct")) or 0)
    if not words:
        return (f"{distinct:,} different" if distinct else ""), Markup("")
    told = ", ".join(f"{word} {count:,}" for word, count in words[:WORDS_SHOWN])
    more = distinct - min(len(words), WORDS_SHOWN)
    hover = [f"{word}: {count:,}" for word, count in words]
    picture = _small_bars([float(count) for _, count in words], hover)
    return told + (f", {more:,} more" if more > 0 else ""), picture


def _intervals(histogram: Sequence[float], low: float, high: float) -> list[str]:
    """Returns the tooltip of each bar of a histogram of numbers."""
    width = (high - low) / max(1, len(histogram))
    texts = []
    for at, count in enumerate(histogram):
        begin = low + at * width
        texts.append(f"{count:,.0f} rows from {short(begin)} to {short(begin + width)}")
    return texts


def _small_bars(counts: Sequence[float], hover: Sequence[str]) -> Markup:
    """Returns vertical bars without axes, with a tooltip each."""
    most = max(counts, default=0.0)
    if most <= 0:
        return Markup("")
    # A single word is no wide block.
    each = min(WIDTH / len(counts), 16.0)
    drawn = []
    for at, (count, text) in enumerate(zip(counts, hover, strict=True)):
        # An interval with few rows is told from an empty one.
        height = max(1.0, count / most * (HEIGHT - 2)) if count else 0.0
        box = {"x": at * each, "y": HEIGHT - height, "width": each - 1, "height": height}
        drawn.append(element("rect", tooltip(text), **box, class_="bar blue mark"))
    return _small(drawn, WIDTH, HEIGHT, f"{len(counts)} bars, from {hover[0]} to {hover[-1]}")


def _gap_bar(share: float) -> Markup:
    """Returns a bar as long as the share of missing values."""
    wide, high = 60.0, 8.0
    drawn = [
        element("rect", x=0, y=0, width=wide, height=high, rx=2, class_="cell empty"),
        element("rect", x=0, y=0, width=max(1.0, share * wide), height=high, class_="mark orange"),
    ]
    return _small(drawn, wide, high, f"{units.percent(share, 1)} missing")


def _small(drawn: Sequence[Markup], width: float, height: float, about: str) -> Markup:
    return element(
        "svg",
        Markup("").join(drawn),
        role="img",
        aria_label=about,
        class_="small",
        width=width,
        height=height,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
    )


def classes_of_clients(shown: Json) -> Figure | None:
    """Draws how many examples of each class the public part and each client have."""
    classes = [str(name) for name in _list(shown.get("classes"))]
    rows: dict[str, list[float]] = {}
    for name, counts in [("public", shown.get("labels")), *_items(shown.get("clients"))]:
        found = _numbers(counts)
        if len(found) == len(classes) and any(found):
            rows[name] = found
    if len(classes) < 2 or not rows:
        return None
    names = list(rows)
    series = []
    for at, label in enumerate(classes):
        counts = [rows[name][at] for name in names]
        hover = [f"{name}: {rows[name][at]:,.0f} of class {label}" for name in names]
        series.append(Series("cells", label, counts, list(range(len(names))), hover=hover))
    clients = len([name for name in names if name != "public"])
    return Figure(
        "Classes of each client" if clients else "Classes of the public rows",
        _caption(clients, int(units.number(shown.get("more_clients")) or 0), len(classes)),
        Axis("class"),
        [Panel(Axis("", names=names), series)],
        height=grid_height(names, classes),
        wide=True,
    )


def _caption(clients: int, more: int, classes: int) -> str:
    """Returns the caption of a figure of some clients, where `more` are not drawn."""
    said = "The darker a cell, the larger the class's share of the row; at the right the sums."
    if not clients:
        return f"{classes} classes. {said} Private rows were not counted."
    left = f" {more:,} more clients are not drawn." if more else ""
    return f"{clients + more:,} clients and {classes} classes. {said}{left}"


def _items(found: Any) -> list[tuple[str, Any]]:
    return list(found.items()) if isinstance(found, dict) else []
