"""Types that a recipe gives to columns of a table, such as `types = { zip = "integer id" }`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from fedpress.errors import SettingError, suggestion

TYPES = ("number", "word", "integer id", "date", "image", "audio", "text")
"""The types that a recipe may give to a column."""
WORDS = ("word", "integer id")
"""Types of which each different value gets an input of its own."""
_PROBE = datetime(2013, 11, 23)


@dataclass(frozen=True)
class ColumnType:
    """How a column is understood.

    Attributes:
        name: one of `TYPES`.
        form: how dates are written, in the words of `datetime.strptime`; None: ISO 8601, such as
            2024-05-01 or 2024-05-01 12:30:00.

    >>> ColumnType.of("date %d.%m.%Y")
    ColumnType(name='date', form='%d.%m.%Y')
    """

    name: str
    form: str | None = None

    @classmethod
    def of(cls, given: str) -> ColumnType:
        """Reads the type as a recipe writes it."""
        if given.startswith("date "):
            return cls("date", given.removeprefix("date ").strip())
        return cls(given)


def checked_type(given: str) -> str:
    """Returns a type as a recipe writes it.

    Raises:
        SettingError: if there is no such type, or the form of a date does not name a day.
    """
    asked = ColumnType.of(given)
    if asked.name not in TYPES:
        raise SettingError(
            f"no type '{given}' (known: {', '.join(TYPES)})",
            cure=suggestion(given, TYPES, "name one of them"),
        )
    if asked.form is not None and not _names_a_day(asked.form):
        raise SettingError(
            f"'{asked.form}' does not say where year, month and day are",
            cure='write it as in "date %d.%m.%Y" or "date %Y-%m-%d %H:%M"',
        )
    return given


def _names_a_day(form: str) -> bool:
    """Whether a day that is written in this form can be read again."""
    try:
        return datetime.strptime(_PROBE.strftime(form), form).date() == _PROBE.date()
    except ValueError:
        return False
