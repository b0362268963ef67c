"""Reads dates, and converts them to inputs: days that have passed, and places in year and week."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fedpress.data.cells import cast_text
from fedpress.data.preparation import DATE_PARTS

DAY_ZERO = np.datetime64("2000-01-01T00:00:00", "us")
"""The input "days" counts days from here on. Near today float32 still tells minutes apart."""
FORMS = (
    "%d.%m.%Y",
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d-%m-%Y",
    "%Y/%m/%d",
    "%Y%m%d",
    "%d.%m.%y",
    "%m/%d/%y",
)
"""Usual forms of dates beside ISO 8601, from which `likely_form` chooses."""
TIMES = ("", " %H:%M", " %H:%M:%S")
# Texts from which the form of a column is guessed.
LOOKED_AT = 200


def is_date(kind: Any) -> bool:
    """Returns whether a pyarrow type is a date, with or without a time of day."""
    return bool(types.is_timestamp(kind) or types.is_date(kind))


def local(values: Any) -> Any:
    """Returns dates of a pyarrow type as timestamp("us"), in the local time of their zone.

    Hours and weekdays are those of the place.
    """
    if types.is_timestamp(values.type) and values.type.tz is not None:
        values = pc.local_timestamp(values)
    # Nanoseconds are cut off: no input could show them.
    return values.cast(pa.timestamp("us"), safe=False)


def dates_of_text(text: Any, form: str | None = None) -> Any:
    """Returns timestamp("us") for a pyarrow array of texts; null where a text is no date.

    A time with an offset from UTC, such as 2024-05-01T12:00:00+02:00, counts in UTC.

    Args:
        text: the texts; spaces around them are ignored.
        form: how they are written, in the words of `datetime.strptime`; None: ISO 8601.
    """
    text = pc.utf8_trim_whitespace(text)
    if form is not None:
        # pyarrow's own strptime would read 31.02.2001 as the 3rd of March.
        words = text.unique()
        read = pa.array([_read(word, form) for word in words.to_pylist()], pa.timestamp("us"))
        return pa.chunked_array([read]).take(pc.index_in(text, words))
    plain = cast_text(text, pa.timestamp("us"))
    if plain.null_count == text.null_count:
        return plain
    with_zone = cast_text(text, pa.timestamp("us", "UTC")).cast(pa.timestamp("us"))
    return pc.coalesce(plain, with_zone)


def _read(word: str | None, form: str) -> datetime | None:
    if word is None:
        return None
    try:
        return datetime.strptime(word, form).replace(tzinfo=None)
    except ValueError:
        return None


def dates_of_cells(cells: Sequence[Any], form: str | None = None) -> Any:
    """Returns timestamp("us") for cells of rows; null where a cell is None or no date.

    Args:
        cells: texts, `date`, `datetime`, or whole numbers if `form` says how they are written.
        form: how texts are written; None: ISO 8601.
    """
    texts: list[str | None] = []
    given: list[datetime | None] = []
    for cell in cells:
        written = isinstance(cell, str) or (isinstance(cell, int) and form is not None)
        texts.append(str(cell) if written else None)
        # A datetime is a date, too. Its local time is kept, as for timestamps of Arrow.
        if isinstance(cell, datetime):
            given.append(cell.replace(tzinfo=None))
        elif isinstance(cell, date):
            given.append(datetime(cell.year, cell.month, cell.day))
        else:
            given.append(None)
    read = dates_of_text(pa.chunked_array([pa.array(texts, pa.string())]), form)
    return pc.coalesce(pa.chunked_array([pa.array(given, pa.timestamp("us"))]), read)


def likely_form(text: Any) -> str | None:
    """Returns the first usual form in which all of some texts are dates; None if none fits."""
    known = pc.utf8_trim_whitespace(text.drop_null()).unique()[:LOOKED_AT]
    for form in (day + time for time in TIMES for day in FORMS):
        if len(known) and all(_read(word, form) is not None for word in known.to_pylist()):
            return form
    return None


def parts_of(dates: Any) -> tuple[str, ...]:
    """Returns the parts of dates that become inputs: without "hour" if all are whole days.

    Args:
        dates: timestamp("us") of the public rows. If there are none, all parts are inputs.
    """
    known = _as_numpy(dates.drop_null())
    if len(known) and (known == known.astype("datetime64[D]")).all():
        return tuple(part for part in DATE_PARTS if part != "hour")
    return tuple(DATE_PARTS)


def date_block(dates: Any, parts: Sequence[str]) -> np.ndarray:
    """Returns the inputs of dates, float32 [n, k], with NaN for missing dates.

    Args:
        dates: timestamp("us") [n].
        parts: parts from `DATE_PARTS`, the first of which is "days".

    >>> date_block(pa.chunked_array([pa.array([datetime(2000, 1, 8)])]), ("days", "month")).tolist()
    [[7.0, 0.0, 1.0]]
    """
    found = _as_numpy(dates)
    missing = np.isnat(found)
    # Missing dates need some value until they become NaN.
    known = np.where(missing, DAY_ZERO, found)
    days = (known - DAY_ZERO) / np.timedelta64(1, "D")
    circles = calendar_columns(known, [part for part in parts if part != "days"])
    block = np.stack([days, *circles.values()], axis=1).astype(np.float32)
    block[missing] = np.nan
    return block


def _as_numpy(dates: Any) -> np.ndarray:
    # A column without any date has the type null.
    values: np.ndarray = dates.cast(pa.timestamp("us")).to_numpy()
    return values.astype("datetime64[us]")


def calendar_columns(dates: np.ndarray, parts: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns sine and cosine of parts of dates, float64 [n] each.

    A part is a place on a circle: 23:30 is as near to 0:30 as 0:30 is to 1:30.

    Args:
        dates: `datetime64` [n].
        parts: "hour" (with its minutes), "weekday" and "month".
    """
    days = dates.astype("datetime64[D]")
    seconds = (dates.astype("datetime64[s]") - days).astype(np.int64)
    turns = {
        "hour": seconds / 86_400,
        # 1970-01-01, day 0, was a Thursday.
        "weekday": ((days.astype(np.int64) + 3) % 7) / 7,
        "month": (days.astype("datetime64[M]").astype(np.int64) % 12) / 12,
    }
    found = []
    for part in parts:
        found += [np.sin(2 * np.pi * turns[part]), np.cos(2 * np.pi * turns[part])]
    return dict(zip(calendar_names(parts), found, strict=True))


def calendar_names(parts: Sequence[str]) -> list[str]:
    """Returns the names of the columns of a calendar, in order.

    >>> calendar_names(["hour"])
    ['hour sin', 'hour cos']
    """
    return [f"{part} {wave}" for part in parts for wave in ("sin", "cos")]
