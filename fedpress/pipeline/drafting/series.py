"""Proposes windows and horizons for a table whose rows follow each other in time."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fedpress.data.describe_series import SeriesFacts

MINUTE, HOUR, DAY = 60, 3600, 86_400
# Of a series, a window, its targets and the gap between two parts must fit several times into each
# part of the data.
WINDOWS_IN_SERIES = 30


@dataclass(frozen=True)
class Proposal:
    """Windows and horizons for rows at a usual distance.

    Attributes:
        most: greatest number of seconds between two rows that the proposal is for.
        window: rows of a window.
        horizon: the rows after the window that are forecast.
        calendar: parts of the date that become inputs.
        unit: what a row is, such as "hour".
    """

    most: float
    window: int
    horizon: tuple[int, ...]
    calendar: tuple[str, ...]
    unit: str


PROPOSALS = (
    Proposal(MINUTE / 2, 50, (1, 10), (), "row"),
    Proposal(HOUR / 2, 60, (1, 10, 60), ("hour",), "row"),
    Proposal(2 * HOUR, 24, (1, 6, 24), ("hour", "weekday"), "hour"),
    Proposal(12 * HOUR, 12, (1, 4), ("hour", "weekday"), "row"),
    Proposal(2 * DAY, 14, (1, 7), ("weekday",), "day"),
    Proposal(float("inf"), 12, (1, 3), ("month",), "row"),
)


def series_lines(series: SeriesFacts, owner: str) -> str:
    """Returns the table `[data.series]` of a recipe, with a comment for each key.

    Args:
        series: how the rows follow each other.
        owner: column that names the client, which tells series apart by itself; "" for none.
    """
    found = proposal(series)
    horizon = list(found.horizon)
    order = series.order[0] if len(series.order) == 1 else list(series.order)
    rows = {
        "window": (found.window, f"{found.unit}s that the network sees"),
        "stride": (max(1, found.window // 4), "rows from one window to the next"),
        "order_column": (order, "sorts the rows"),
        "max_gap": (_number(1.5 * series.step), "seconds; a longer gap ends a series"),
        "horizon": (horizon, f"what is forecast: so many {found.unit}s after the window"),
    }
    if series.by and series.by != owner:
        rows["by"] = ([series.by], "tells series apart")
    if found.calendar:
        rows["calendar"] = (list(found.calendar), "inputs made of the date")
    lines = [f"{key} = {json.dumps(value)}  # {why}" for key, (value, why) in rows.items()]
    return "\n[data.series]\n" + "\n".join(lines) + "\n"


def proposal(series: SeriesFacts) -> Proposal:
    """Returns windows and horizons that fit the step and the length of the series."""
    found = next(one for one in PROPOSALS if series.step <= one.most)
    room = max(2, series.rows // WINDOWS_IN_SERIES)
    if found.window + max(found.horizon) <= room:
        return found
    horizon = tuple(rows for rows in found.horizon if rows <= room // 2) or (1,)
    window = min(found.window, room - max(horizon))
    return Proposal(found.most, max(1, window), horizon, found.calendar, found.unit)


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
