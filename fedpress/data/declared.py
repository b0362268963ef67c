"""Gives a column the type that the recipe declares, and refuses values of another type.

The errors quote a value, also of a private row: they are read where the file lies, and never sent.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fedpress.data.cells import as_text, cast_text, is_number, is_word
from fedpress.data.column_types import ColumnType
from fedpress.data.dates import dates_of_text, is_date, likely_form, local
from fedpress.data.lines import place_of
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError


def as_declared(values: Any, name: str, settings: DataSettings, first_row: int = 0) -> Any:
    """Returns the values of a column in the type that `types` of the recipe gives it.

    Numbers become float64 (booleans and numbers of Arrow stay as they are), words and integer ids
    text, dates timestamp("us"). Images, recordings and texts are left as they are.

    Args:
        values: a `pyarrow.ChunkedArray` [n], without dictionary encoding.
        name: name of the column.
        settings: the `[data]` table of the recipe.
        first_row: number of the first of the values among all rows, for errors.

    Raises:
        DataError: if a value is not of this type. The error says the line, the value and a cure.
    """
    asked = settings.type_of(name)
    assert asked is not None, "checked by the caller"
    given = _Given(values, name, asked, settings, first_row)
    if asked.name == "number":
        return given.numbers()
    if asked.name == "word":
        return given.words()
    if asked.name == "integer id":
        return given.ids()
    return given.dates() if asked.name == "date" else values


class _Given:
    """A column as it was read, and the type that it shall have."""

    def __init__(
        self, values: Any, name: str, asked: ColumnType, settings: DataSettings, first_row: int
    ) -> None:
        self.values = values
        self.name = name
        self.asked = asked
        self.settings = settings
        self.first_row = first_row

    def numbers(self) -> Any:
        kind = self.values.type
        if is_word(kind):
            numbers = cast_text(self.values, pa.float64(), self.settings.decimal)
            self._refuse_lost(
                numbers,
                "is no number",
                f"write a number there, leave the cell empty, or set {self._types('word')}",
            )
            return numbers
        if is_number(kind) or types.is_boolean(kind) or types.is_null(kind):
            return self.values
        raise self._other_kind("expected numbers")

    def words(self) -> Any:
        values = self.values
        # Arrow's decimal numbers are written with their zeros: 1.50.
        if types.is_nested(values.type) or types.is_binary(values.type):
            raise self._other_kind("expected words or numbers")
        return as_text(values)

    def ids(self) -> Any:
        words = self.words()
        digits = pc.match_substring_regex(words, r"^\s*-?\d+\s*$")
        self._refuse_lost(
            pc.if_else(digits, words, None),
            "is no whole number",
            f"correct it, or set {self._types('word')}",
        )
        return words

    def dates(self) -> Any:
        kind, form = self.values.type, self.asked.form
        if is_date(kind):
            return local(self.values)
        if types.is_null(kind):
            return self.values.cast(pa.timestamp("us"))
        if not (is_word(kind) or (types.is_integer(kind) and form is not None)):
            raise self._other_kind("expected dates")
        text = as_text(self.values)
        dates = dates_of_text(text, form)
        self._refuse_lost(dates, f"is no date{self._of_form()}", self._date_cure(text))
        return dates

    def _of_form(self) -> str:
        return f" of the form {self.asked.form}" if self.asked.form else ""

    def _date_cure(self, text: Any) -> str:
        if self.asked.form is not None:
            return "correct it, or leave the cell empty"
        found = likely_form(text) or "%d.%m.%Y"
        return (
            "write it as 2024-05-01 or 2024-05-01 12:30, or say how dates are written: "
            f"{self._types(f'date {found}')}"
        )

    def _refuse_lost(self, found: Any, problem: str, cure: str) -> None:
        """Refuses the first value that is null in `found` and was not null before."""
        lost = pc.and_(pc.is_null(found), pc.is_valid(self.values))
        row = pc.index(lost, True).as_py()
        if row < 0:
            return
        value = str(self.values[row].as_py())[:40]
        raise DataError(
            f"{place_of(self.first_row + row, self.settings)} holds '{value}', which {problem}",
            place=f"column '{self.name}'",
            cure=cure,
        )

    def _types(self, name: str) -> str:
        return f'types = {{ "{self.name}" = "{name}" }}'

    def _other_kind(self, expected: str) -> DataError:
        return DataError(
            f"it holds {self.values.type}, but types says {self.asked.name}; {expected}",
            place=f"column '{self.name}'",
            cure="leave it out of types",
        )
