"""Reads columns of a table: finds the type of text columns, and numbers the classes of labels.

The type of a column and its classes are taken from public rows only (`Column.typed_by`), because a
single private row must not add a class to a model that others receive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import types
from torch import Tensor

from fedpress.data.cells import as_text, cast_text, is_word, plain_text, positions_in
from fedpress.data.classes import (
    number_classes,
    rows_that_define_classes,
    with_other_class,
)
from fedpress.data.declared import as_declared
from fedpress.data.examples import TargetRows
from fedpress.data.lines import place_of
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

# Types that the text of a CSV column may have. The first that fits all cells is taken: 0 and 1 must
# become integers, not booleans. If none fits, the column holds words.
TEXT_KINDS = (pa.int64(), pa.bool_(), pa.float64(), pa.timestamp("s"))


@dataclass(frozen=True)
class Column:
    """One column as it is in the file.

    Attributes:
        name: name of the column.
        values: a `pyarrow.ChunkedArray` [n] without dictionary encoding.
        text: whether `values` are the text of a CSV file, whose type is not known yet.
        decimal: decimal separator of numbers in that text.
    """

    name: str
    values: Any
    text: bool = False
    decimal: str = "."

    @classmethod
    def of(cls, table: Any, name: str, settings: DataSettings, first_row: int = 0) -> Column:
        """Returns the column `name` of a table that `fedpress.data.tables` has read.

        Args:
            table: a `pyarrow.Table`.
            name: name of the column.
            settings: the `[data]` table of the recipe.
            first_row: number of the first row of `table` among all rows, for errors.

        Raises:
            DataError: if a value is not of the type that the recipe gives to the column.
        """
        column = table[name]
        if types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if settings.type_of(name) is not None:
            # The user says what the text means, so nothing is left to be found out.
            return cls(name, as_declared(column, name, settings, first_row))
        text = settings.source == "csv" and is_word(column.type)
        return cls(name, column, text, settings.decimal)

    def taken(self, rows: np.ndarray) -> Column:
        """Returns the column with the rows at some positions, in this order."""
        return replace(self, values=self.values.take(pa.array(rows)))

    def typed(self) -> Any:
        """Converts text to the type that all of it has; without any text to float64.

        Example: "3" and "4.5" become float64; "3" and "unknown" stay text. Values that are not
        text in the file are returned unchanged.
        """
        if not self.text:
            return self.values
        kind = self._kind(self.values)
        return self.values if types.is_string(kind) else self.cast(kind)

    def typed_by(self, rows: np.ndarray) -> Any:
        """Converts the text of all rows to the type of the text in `rows`; other text becomes null.

        Example: if `rows` have "3" and "4.5", the type is float64. A cell "unknown" in another row
        becomes null. Values that are not text in the file are returned unchanged.

        Args:
            rows: positions of the rows that decide the type. If there are none, the type is
                float64.
        """
        if not self.text:
            return self.values
        kind = self._kind(self.values.take(pa.array(rows)))
        # Other rows may have decimals where `rows` have integers, so both types count as numbers.
        if types.is_integer(kind):
            kind = pa.float64()
        return self.values if types.is_string(kind) else self.cast(kind)

    def cast(self, kind: Any) -> Any:
        """Converts the text to the pyarrow type `kind`; text of another type becomes null."""
        return cast_text(self.values, kind, self.decimal)

    def stray_texts(self) -> np.ndarray:
        """Returns bool [n]: whether a cell is a text that is no number."""
        wrong = pc.and_(pc.is_null(self.cast(pa.float64())), pc.is_valid(self.values))
        found: np.ndarray = wrong.to_numpy()
        return found

    def _kind(self, values: Any) -> Any:
        """Returns the first of `TEXT_KINDS` to which all texts can be converted, else strings."""
        known = values.drop_null()
        # An empty column fits every type. As numbers it becomes one input; as words it would have
        # none.
        if not len(known):
            return pa.float64()
        for kind in TEXT_KINDS:
            try:
                plain_text(known, kind, self.decimal).cast(kind)
            except pa.ArrowInvalid:
                continue
            return kind
        # A time of day without a date, such as 12:30, is none of the types above.
        times = pc.match_substring_regex(known, r"^\s*\d{1,2}:\d{2}(:\d{2})?\s*$")
        if pc.all(times).as_py():
            return pa.timestamp("s")
        return pa.string()


def class_codes(
    column: Any, name: str, role: str, settings: DataSettings | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Assigns numbers to the distinct values of a column of integers or words.

    Args:
        column: a typed column.
        name: name of the column.
        role: "label" or "client", for errors.
        settings: the `[data]` table, if the column has all rows of its file; for errors.

    Returns:
        int64 [n], positions in the second result; and the sorted values as text.

    Raises:
        DataError: if a value is missing, or is not a whole number, a word or a boolean.
    """
    where = f"{role} column '{name}'"
    refuse_missing(column, where, settings)
    # Tables often store class numbers as floats, such as 1.0.
    if types.is_floating(column.type):
        values = column.to_numpy()
        if not is_whole(values).all():
            raise DataError(
                "holds numbers that are not whole",
                place=where,
                cure="expected whole numbers or words: turn it into classes first",
            )
        column = pa.chunked_array([pa.array(values.astype(np.int64))])
    kind = column.type
    if not (types.is_integer(kind) or is_word(kind) or types.is_boolean(kind)):
        raise DataError(f"holds {column.type}", place=where, cure="expected whole numbers or words")
    values, positions = np.unique(column.to_numpy(), return_inverse=True)
    return torch.from_numpy(positions.astype(np.int64)), tuple(str(value) for value in values)


def is_whole(numbers: np.ndarray) -> np.ndarray:
    """Returns bool [n]: whether each float is a finite integer."""
    whole: np.ndarray = np.isfinite(numbers) & (numbers == np.round(numbers))
    return whole


def refuse_missing(column: Any, where: str, settings: DataSettings | None = None) -> None:
    """Checks that a column of labels or clients has a value in every row.

    Raises:
        DataError: if a row has no value; the error names the first such row.
    """
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(
            f"{place_of(row, settings)} has no value",
            place=where,
            cure="fill it, or set missing = 'drop'",
        )


@dataclass(frozen=True)
class LabelColumn:
    """The label column of a classification."""

    column: Column
    settings: DataSettings

    @property
    def _where(self) -> str:
        return f"label column '{self.column.name}'"

    def partition_labels(self) -> Tensor:
        """Returns int64 [n]: a label for each row, for partitioners such as `dirichlet`.

        Private rows may be used, because these labels only decide which client gets a row.

        Raises:
            DataError: if a label is missing; or, unless the recipe lists the classes, if the number
                of different labels is more than half the number of rows.
        """
        column = self.column.typed()
        refuse_missing(column, self._where, self.settings)
        try:
            values, positions = np.unique(column.to_numpy(), return_inverse=True)
        except (TypeError, pa.ArrowInvalid) as error:
            raise DataError(
                f"holds {column.type}",
                place=self._where,
                cure="expected whole numbers or words",
            ) from error
        # A column of measured numbers, or of names, has nearly as many distinct values as rows.
        if self.settings.classes is None and len(values) > max(2, len(positions) // 2):
            raise DataError(
                f"nearly all of the {len(positions)} rows have different labels",
                place=self._where,
                cure="expected several rows per class: turn numbers into classes first, or set "
                "task = 'regression'",
            )
        return torch.from_numpy(positions.astype(np.int64))

    def targets(self, public: Tensor) -> TargetRows:
        """Returns the classes, and the class number of every row; -1 for an unknown label.

        Args:
            public: positions of the public rows.

        Raises:
            DataError: if no row may define the classes, a row that defines them has no valid label,
                there are fewer than two classes, or no row belongs to any of them.
        """
        if self.settings.classes is not None:
            return with_other_class(self._listed(self.settings.classes), self.settings, self._where)
        rows = rows_that_define_classes(public, len(self.column.values), self.settings, self._where)
        column = self.column.typed_by(rows.numpy())
        usable = column.is_valid().to_numpy()
        # An error may describe public rows. Private rows without a valid label are dropped
        # silently.
        if not usable[rows.numpy()].all():
            refuse_missing(column.take(pa.array(rows.numpy())), self._where)
        if types.is_floating(column.type):
            numbers = column.fill_null(np.nan).to_numpy()
            whole = is_whole(numbers)
            usable &= whole
            column = pa.chunked_array([pa.array(np.where(whole, numbers, 0).astype(np.int64))])
        _, names = class_codes(column.take(pa.array(rows.numpy())), self.column.name, "label")
        if not usable[rows.numpy()].all():
            raise DataError(
                "holds numbers that are not whole",
                place=self._where,
                cure="expected whole numbers or words: turn it into classes first, or set "
                "task = 'regression'",
            )
        words = as_text(column)
        positions = positions_in(words, names)
        y = torch.from_numpy(np.where(usable, positions, -1))
        return number_classes(y, names, public, self.settings, self._where)

    def _listed(self, names: Sequence[str]) -> TargetRows:
        """Returns the class number of every row: its position in the list `classes` of the recipe.

        The list holds text; the column may have another type. The class "1" matches the text "1",
        the text "1.0", the integer 1 and the float 1.0. The classes "true" and "false" match
        booleans, and text in upper or lower case. If `types` says that the column holds words, the
        class "01" matches the text "01" alone.
        """
        column, wanted = self.column, list(names)
        values = column.values
        are_words = is_word(values.type) and self.settings.type_of(column.name) is not None
        if all(map(_is_integer, wanted)) and not are_words:
            # Without leading zeros, because integers from the file are turned into text without
            # them.
            wanted = [str(int(name)) for name in wanted]
            if column.text:
                values = column.cast(pa.float64())
            if types.is_floating(values.type):
                numbers = values.fill_null(np.nan).to_numpy(zero_copy_only=False)
                whole = is_whole(numbers)
                whole_numbers = np.where(whole, numbers, 0).astype(np.int64)
                values = pa.chunked_array([pa.array(whole_numbers, mask=~whole)])
        elif {name.casefold() for name in wanted} <= {"true", "false"}:
            wanted = [name.casefold() for name in wanted]
            if not is_word(values.type):
                values = values.cast(pa.string())
            values = pc.utf8_lower(values)
        y = torch.from_numpy(positions_in(as_text(values), wanted))
        return TargetRows.of_classes(y, tuple(names))


def _is_integer(name: str) -> bool:
    # isdecimal alone would accept digits of other scripts too.
    return name.removeprefix("-").isdecimal() and name.isascii()
