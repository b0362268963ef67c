"""Turns columns of a table into tensors: class numbers of labels, features of numbers and words.

The type of a column and its list of words are taken from public rows only (`Column.typed`). A
single private row must not add an input, a class or a word to a model or file that goes out.
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

from fedpress.data.classes import (
    OTHER,
    number_classes,
    rows_that_define_classes,
    with_other_class,
)
from fedpress.data.csv import NO_VALUE
from fedpress.data.examples import InputRows, TargetRows
from fedpress.data.preparation import InputColumn, Kind, Preparation, Unknown
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

# Most different words of a column: each becomes an input of its own.
MOST_WORDS = 100
# Types that the text of a CSV file may have, in the order in which they are tried; else it is
# words.
TEXT_KINDS = (pa.int64(), pa.bool_(), pa.float64(), pa.timestamp("s"))


@dataclass(frozen=True)
class Column:
    """One column as it is in the file.

    Attributes:
        name: of the column.
        values: a `pyarrow.ChunkedArray` [n] without dictionary encoding.
        text: whether it comes from a CSV file, so that its type has to be found.
        decimal: decimal separator of numbers in text.
    """

    name: str
    values: Any
    text: bool = False
    decimal: str = "."

    @classmethod
    def of(cls, table: Any, name: str, settings: DataSettings) -> Column:
        """Returns the column `name` of a table that `fedpress.data.tables` has read."""
        column = table[name]
        if types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return cls(name, column, settings.source == "csv", settings.decimal)

    def typed(self, rows: np.ndarray | None = None) -> Any:
        """Returns the values in the type that they have in `rows`; others become null.

        Args:
            rows: positions of the rows that decide the type; None: all rows.
        """
        if not self.text:
            return self.values
        if rows is None or not len(rows):
            kind = self._kind(self.values)
        else:
            kind = self._kind(self.values.take(pa.array(rows)))
            # Other rows may have decimals where these have whole numbers: both are numbers.
            if types.is_integer(kind):
                kind = pa.float64()
        if types.is_string(kind):
            return self.values
        return self.cast(kind)

    def cast(self, kind: Any) -> Any:
        """Returns text as numbers, booleans or times; what cannot be read as such becomes null."""
        text = self._plain_text(self.values, kind)
        try:
            return text.cast(kind)
        # Some private cell is of another type. Every different text is then read once.
        except pa.ArrowInvalid:
            words = text.unique()
            read = [_cast_or_none(word, kind) for word in words.to_pylist()]
            return pa.chunked_array([pa.array(read, kind)]).take(pc.index_in(text, words))

    def _kind(self, values: Any) -> Any:
        """Returns the first of `TEXT_KINDS` that all texts have; strings if none."""
        known = values.drop_null()
        # An empty column may be anything; as numbers it is one input, not a list of no words.
        if not len(known):
            return pa.float64()
        for kind in TEXT_KINDS:
            try:
                self._plain_text(known, kind).cast(kind)
            except pa.ArrowInvalid:
                continue
            return kind
        # A time of day alone, such as 12:30, is none of the types above.
        times = pc.match_substring_regex(known, r"^\s*\d{1,2}:\d{2}(:\d{2})?\s*$")
        if pc.all(times).as_py():
            return pa.timestamp("s")
        return pa.string()

    def _plain_text(self, text: Any, kind: Any) -> Any:
        """Returns text as pyarrow reads it: without spaces around, and with a decimal point."""
        text = pc.utf8_trim_whitespace(text)
        if self.decimal == "," and types.is_floating(kind):
            # A point can only separate thousands here: 1.234,5 is 1234.5.
            text = pc.replace_substring(pc.replace_substring(text, ".", ""), ",", ".")
        return text


def _cast_or_none(word: str | None, kind: Any) -> Any:
    try:
        return pa.scalar(word, pa.string()).cast(kind).as_py()
    except pa.ArrowInvalid:
        return None


def class_codes(column: Any, name: str, role: str) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers the different values of a column of integers or words.

    Args:
        column: a typed column.
        name: of the column.
        role: "label" or "client", for errors.

    Returns:
        int64 [n], and the sorted values as text, to which the numbers are positions.

    Raises:
        DataError: if a value is missing, or is neither an integer nor a word.
    """
    where = f"{role} column '{name}'"
    refuse_missing(column, where)
    # Tables often store class numbers as floats, such as 1.0.
    if types.is_floating(column.type):
        values = column.to_numpy()
        if not _is_whole(values).all():
            raise DataError(
                "holds broken numbers",
                place=where,
                cure="expected whole numbers or words: cut it into classes first",
            )
        column = pa.chunked_array([pa.array(values.astype(np.int64))])
    kind = column.type
    if not (types.is_integer(kind) or _is_word(kind) or types.is_boolean(kind)):
        raise DataError(f"holds {column.type}", place=where, cure="expected whole numbers or words")
    values, positions = np.unique(column.to_numpy(), return_inverse=True)
    return torch.from_numpy(positions.astype(np.int64)), tuple(str(value) for value in values)


def _is_whole(numbers: np.ndarray) -> np.ndarray:
    """Returns bool [n]: which floats are finite integers."""
    whole: np.ndarray = np.isfinite(numbers) & (numbers == np.round(numbers))
    return whole


def refuse_missing(column: Any, where: str) -> None:
    """Checks that a column of labels or clients has a value in every row.

    Raises:
        DataError: with the first row that has none.
    """
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(
            f"row {row} has no value", place=where, cure="fill it, or set missing = 'drop'"
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
        """Returns int64 [n]: the label of each row for partitioners.

        It may use private rows, since it decides only which client gets a row.

        Raises:
            DataError: if a label is missing, or nearly every row has its own.
        """
        column = self.column.typed()
        refuse_missing(column, self._where)
        try:
            values, positions = np.unique(column.to_numpy(), return_inverse=True)
        except (TypeError, pa.ArrowInvalid) as error:
            raise DataError(
                f"holds {column.type}",
                place=self._where,
                cure="expected whole numbers or words",
            ) from error
        # A column of numbers to predict, or of names, has nearly as many values as rows.
        if self.settings.classes is None and len(values) > max(2, len(positions) // 2):
            raise DataError(
                f"nearly all of the {len(positions)} rows have a label of their own",
                place=self._where,
                cure="expected classes of some rows each: cut numbers into classes first, or set "
                "task = 'regression'",
            )
        return torch.from_numpy(positions.astype(np.int64))

    def targets(self, public: Tensor) -> TargetRows:
        """Returns the classes and every row's class number; -1 for other labels.

        Args:
            public: positions of the public rows.

        Raises:
            DataError: if nothing defines the classes, or there are fewer than two.
        """
        if self.settings.classes is not None:
            return with_other_class(self._listed(self.settings.classes), self.settings, self._where)
        rows = rows_that_define_classes(public, len(self.column.values), self.settings, self._where)
        column = self.column.typed(rows.numpy())
        usable = column.is_valid().to_numpy()
        # An error may tell of these rows; private rows without a valid label are left out.
        if not usable[rows.numpy()].all():
            refuse_missing(column.take(pa.array(rows.numpy())), self._where)
        if types.is_floating(column.type):
            numbers = column.fill_null(np.nan).to_numpy()
            whole = _is_whole(numbers)
            usable &= whole
            column = pa.chunked_array([pa.array(np.where(whole, numbers, 0).astype(np.int64))])
        _, names = class_codes(column.take(pa.array(rows.numpy())), self.column.name, "label")
        if not usable[rows.numpy()].all():
            raise DataError(
                "holds numbers that are not whole",
                place=self._where,
                cure="expected whole numbers or words: cut it into classes first, or set "
                "task = 'regression'",
            )
        words = as_text(column)
        positions = _positions(words, names)
        y = torch.from_numpy(np.where(usable, positions, -1))
        return number_classes(y, names, public, self.settings, self._where)

    def _listed(self, names: Sequence[str]) -> TargetRows:
        """Finds every row's label in the list of the recipe, whatever its type in the file.

        For example the class "1" is the text "1", the text "1.0", the integer 1 or the float 1.0.
        """
        column, wanted = self.column, list(names)
        values = column.values
        if all(map(_is_integer, wanted)):
            # Without leading zeros, as the integers of the file are written below.
            wanted = [str(int(name)) for name in wanted]
            if column.text:
                values = column.cast(pa.float64())
            if types.is_floating(values.type):
                numbers = values.fill_null(np.nan).to_numpy(zero_copy_only=False)
                whole = _is_whole(numbers)
                whole_numbers = np.where(whole, numbers, 0).astype(np.int64)
                values = pa.chunked_array([pa.array(whole_numbers, mask=~whole)])
        elif {name.casefold() for name in wanted} <= {"true", "false"}:
            wanted = [name.casefold() for name in wanted]
            if not _is_word(values.type):
                values = values.cast(pa.string())
            values = pc.utf8_lower(values)
        y = torch.from_numpy(_positions(as_text(values), wanted))
        return TargetRows.of_classes(y, tuple(names))


def _is_integer(name: str) -> bool:
    # isdecimal alone also takes digits of other scripts.
    return name.removeprefix("-").isdecimal() and name.isascii()


def as_text(column: Any) -> Any:
    """Returns the values as names of classes: `3`, `True`, `ill`; null stays null."""
    # pyarrow would write true and false; numpy and Python write True and False.
    if types.is_boolean(column.type):
        return pc.if_else(column, "True", "False")
    if _is_word(column.type):
        return column
    return column.cast(pa.string())


def _positions(words: Any, names: Sequence[str]) -> np.ndarray:
    """Returns int64 [n]: the position of each word in `names`; -1 if it is not there."""
    found = pc.index_in(words, pa.array(list(names), words.type), skip_nulls=True)
    places: np.ndarray = found.fill_null(-1).to_numpy()
    return places.astype(np.int64)


@dataclass(frozen=True)
class FeatureColumns:
    """The feature columns: one input for a column of numbers, and one for each word of others."""

    columns: tuple[Column, ...]
    settings: DataSettings

    def inputs(self, public: Tensor) -> InputRows:
        """Returns float32 [n, d] for all rows.

        Public rows decide whether a column holds numbers or words, which words it has, and the mean
        that fills missing cells. A word that is on no list gets no input of its own: the number of
        inputs must not tell what private rows hold.

        Args:
            public: positions of the public rows.

        Raises:
            DataError: if a column holds neither numbers nor words, has too many words, or has a
                missing cell that may not be filled.
        """
        rows = public.numpy()
        blocks: list[np.ndarray] = []
        learned: list[InputColumn] = []
        left_out = np.zeros(len(self.columns[0].values), dtype=bool)
        for column in self.columns:
            found, block, dropped = self._block(column, rows)
            learned.append(found)
            blocks.append(block)
            left_out |= dropped
        x = torch.from_numpy(np.concatenate(blocks, axis=1))
        # Rows that are left out need no values.
        gaps = x.isnan() & ~torch.from_numpy(left_out)[:, None]
        if not len(public) and bool(gaps.any()):
            raise DataError(
                "'mean' needs public rows to take the mean of",
                place="missing",
                cure="give public_share or public_clients, or set missing = 'drop'",
            )
        # A column without any public value has no mean, and is filled with 0.
        fill = torch.nan_to_num(x[public].nanmean(0))
        preparation = self._preparation(learned, fill if len(public) else None)
        return InputRows(torch.where(x.isnan(), fill, x), torch.from_numpy(left_out), preparation)

    def _preparation(self, learned: list[InputColumn], fill: Tensor | None) -> Preparation:
        """Returns how raw rows become inputs; `fill` [d] are the means of the public rows."""
        if self.settings.missing == "mean" and fill is not None:
            parts = fill.split([column.width for column in learned])
            filled = []
            for column, part in zip(learned, parts, strict=True):
                filled.append(replace(column, fill=tuple(part.tolist())))
            learned = filled
        gaps = tuple(NO_VALUE) if self.settings.source == "csv" else ()
        return Preparation(tuple(learned), gaps, self.settings.decimal)

    def _block(
        self, column: Column, public: np.ndarray
    ) -> tuple[InputColumn, np.ndarray, np.ndarray]:
        """Returns the inputs of one column.

        Returns:
            How it becomes inputs, the inputs float32 [n, k] with NaN for missing cells, and bool
            [n]: rows that are left out.
        """
        has_list = column.name in self.settings.words
        list_is_public = column.name in self.settings.public_words
        if has_list:
            # A column with a list holds words, even if they look like numbers.
            values = as_text(column.values)
        elif list_is_public:
            values = column.typed()
        else:
            values = column.typed(public)
        if _is_word(values.type):
            if not has_list and column.text:
                seen = values if list_is_public else values.take(pa.array(public))
                self._refuse_decimal_commas(column, seen)
            words = self._words(column.name, values, public)
            names, unknown = self._with_other(words)
            block, has_unknown = one_hot_block(values, names, unknown)
            dropped = has_unknown & (unknown == "refused")
            return InputColumn(column.name, "words", tuple(names), unknown), block, dropped

        block = number_block(values, column.name)
        kind: Kind = "truth" if types.is_boolean(values.type) else "number"
        # Cells with text that is no number, while the public rows have numbers.
        not_numbers = values.is_null().to_numpy() & column.values.is_valid().to_numpy()
        if not_numbers.any() and self.settings.missing == "error":
            raise DataError(
                "it holds numbers, but some rows have something else there",
                place=f"feature column '{column.name}'",
                cure="set missing = 'drop' or 'mean', or name it in drop_columns",
            )
        drops = self.settings.missing == "drop"
        return InputColumn(column.name, kind), block, not_numbers & drops

    def _words(self, name: str, values: Any, public: np.ndarray) -> list[str]:
        """Returns the words of a column, from the recipe or from the rows that may define them."""
        if name in self.settings.words:
            return list(self.settings.words[name])
        if name in self.settings.public_words:
            seen = values
        elif len(public):
            seen = values.take(pa.array(public))
        else:
            raise DataError(
                "it holds words, and no row is public to take the list of words from",
                place=f"feature column '{name}'",
                cure=(
                    f'add words = {{ "{name}" = ["WORD", "WORD"] }} to [data], or public_words = '
                    f'["{name}"] if the list is no secret, or public_share = 0.1'
                ),
            )
        # Such a column mostly holds names or free text.
        if len(seen.unique()) > MOST_WORDS:
            raise DataError(
                f"more than {MOST_WORDS} different words, which is more than can be coded",
                place=f"feature column '{name}'",
                cure="name it in drop_columns, or list those that matter with words = { ... }",
            )
        return sorted(seen.unique().drop_null().to_pylist())

    def _with_other(self, words: list[str]) -> tuple[list[str], Unknown]:
        """Returns the words that get inputs, and how other words are treated."""
        if self.settings.unknown == OTHER:
            # The data may use the word "other" itself.
            if OTHER not in words:
                words = [*words, OTHER]
            return words, "other"
        if self.settings.unknown == "drop":
            return words, "refused"
        return words, "zeros"

    def _refuse_decimal_commas(self, column: Column, seen: Any) -> None:
        """Checks that what seem to be words are not numbers with a decimal comma."""
        known = seen.drop_null()
        if not len(known) or column.decimal == ",":
            return
        with_commas = pc.match_substring_regex(
            known, r"^\s*[+-]?(\d+,\d+|\d{1,3}(\.\d{3})+,\d+|\d+)\s*$"
        )
        if pc.all(with_commas).as_py():
            cure = 'add decimal = "," to [data]'
            # A comma cannot be both delimiter and decimal separator.
            if self.settings.delimiter == ",":
                cure = "write them with points, or without commas if these divide thousands"
            raise DataError(
                "its numbers have decimal commas",
                place=f"feature column '{column.name}'",
                cure=cure,
            )


def one_hot_block(
    values: Any, words: Sequence[str], unknown: Unknown
) -> tuple[np.ndarray, np.ndarray]:
    """One-hot encodes words.

    Returns:
        float32 [n, k] with NaN for missing cells, and bool [n]: whether the word is unknown.
    """
    missing = values.is_null().to_numpy()
    positions = _positions(values, words)
    is_unknown = (positions < 0) & ~missing
    if unknown == "other":
        positions = np.where(is_unknown, words.index(OTHER), positions)
    block = np.zeros((len(positions), len(words)), dtype=np.float32)
    known = np.flatnonzero(positions >= 0)
    block[known, positions[known]] = 1.0
    # All inputs of a missing word are NaN until they are filled, as with numbers.
    block[missing] = np.nan
    return block, is_unknown


def number_block(column: Any, name: str) -> np.ndarray:
    """Returns numbers or booleans of a typed column as float32 [n, 1], NaN for missing cells.

    Raises:
        DataError: if it holds something else.
    """
    kind = column.type
    if types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not is_number(kind) and not types.is_null(kind):
        raise DataError(
            f"holds {kind}",
            place=f"feature column '{name}'",
            cure="expected numbers or words: name it in drop_columns",
        )
    numbers: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return numbers.astype(np.float32)[:, None]


def is_number(kind: Any) -> bool:
    """Whether a type of pyarrow is one of numbers."""
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _is_word(kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))
