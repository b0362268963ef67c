"""Columns of a table to tensors: labels to class numbers, clients to owners, numbers and words to features.

What a column holds, and which words there are, is learned from public rows alone (`Column.typed`): a single private row
must not add an input, a class or a word to what leaves the house.
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

from fedpress.data.classes import OTHER, checked, number_classes, rows_that_define_classes
from fedpress.data.csv import NO_VALUE
from fedpress.data.examples import InputRows, TargetRows
from fedpress.data.preparation import InputColumn, Kind, Preparation, Unknown
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

MOST_WORDS = 100
TEXT_KINDS = (pa.int64(), pa.bool_(), pa.float64(), pa.timestamp("s"))
"""What the text of a CSV file may mean, in the order in which it is tried; anything else is words."""


@dataclass(frozen=True)
class Column:
    """One column as it lies in the file.

    Attributes:
        name: of the column.
        values: a `pyarrow.ChunkedArray` [n] without dictionary coding.
        text: whether it comes from a CSV file, where all values are text and their kind has to be found.
        decimal: what stands before the decimals in text.
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
        """Returns the values as what they are in `rows` (all rows by default); what is of another kind becomes null."""
        if not self.text:
            return self.values
        if rows is None or not len(rows):
            kind = self._kind(self.values)
        else:
            kind = self._kind(self.values.take(pa.array(rows)))
            # Other rows may have decimals where these have whole numbers: both are numbers.
            kind = pa.float64() if types.is_integer(kind) else kind
        return self.values if types.is_string(kind) else self.cast(kind)

    def cast(self, kind: Any) -> Any:
        """Returns text as numbers, truth values or times; what cannot be read as `kind` becomes null."""
        text = self._plain_text(self.values, kind)
        try:
            return text.cast(kind)
        except pa.ArrowInvalid:  # some private cell is of another kind: look at each word once
            words = text.unique()
            read = pa.chunked_array(
                [pa.array([_read(word, kind) for word in words.to_pylist()], kind)]
            )
            return read.take(pc.index_in(text, words))

    def _kind(self, values: Any) -> Any:
        known = values.drop_null()
        if not len(known):
            return pa.float64()
        for kind in TEXT_KINDS:
            try:
                self._plain_text(known, kind).cast(kind)
            except pa.ArrowInvalid:
                continue
            return kind
        times = pc.match_substring_regex(known, r"^\s*\d{1,2}:\d{2}(:\d{2})?\s*$")
        return pa.timestamp("s") if pc.all(times).as_py() else pa.string()

    def _plain_text(self, text: Any, kind: Any) -> Any:
        text = pc.utf8_trim_whitespace(text)
        if self.decimal == "," and types.is_floating(kind):
            # A point can only divide thousands here: 1.234,5 is 1234.5.
            text = pc.replace_substring(pc.replace_substring(text, ".", ""), ",", ".")
        elif self.decimal == "," and types.is_integer(kind):
            text = pc.replace_substring(
                text, ",", "no number"
            )  # 1,5 is no whole number in any notation
        return text


def _read(word: str | None, kind: Any) -> Any:
    try:
        return pa.scalar(word, pa.string()).cast(kind).as_py()
    except pa.ArrowInvalid:
        return None


def codes(column: Any, name: str, role: str) -> tuple[Tensor, tuple[str, ...]]:
    """Returns int64 [n] and the sorted values that they stand for: whole numbers or words.

    Args:
        column: a typed column.
        name: of the column.
        role: "label" or "client", for errors.

    Raises:
        DataError: if a value is missing, or is neither a whole number nor a word.
    """
    where = f"{role} column '{name}'"
    refuse_missing(column, where)
    if types.is_floating(column.type):
        values = column.to_numpy()
        if not (np.isfinite(values) & (values == np.round(values))).all():
            raise DataError(
                "holds broken numbers",
                place=where,
                cure="expected whole numbers or words: cut it into classes first",
            )
        column = pa.chunked_array([pa.array(values.astype(np.int64))])
    if not (
        types.is_integer(column.type) or _is_word(column.type) or types.is_boolean(column.type)
    ):
        raise DataError(f"holds {column.type}", place=where, cure="expected whole numbers or words")
    values, positions = np.unique(column.to_numpy(), return_inverse=True)
    return torch.from_numpy(positions.astype(np.int64)), tuple(str(value) for value in values)


def refuse_missing(column: Any, where: str) -> None:
    """Raises DataError if a value is missing in a column of labels or clients."""
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(
            f"row {row} has no value", place=where, cure="fill it, or set missing = 'drop'"
        )


@dataclass(frozen=True)
class Labels:
    """The label column: which classes there are follows from the rows that may name them."""

    column: Column
    settings: DataSettings

    @property
    def _where(self) -> str:
        return f"label column '{self.column.name}'"

    def dealing(self) -> Tensor:
        """Returns int64 [n], equal where labels are equal, for partitioners that deal by label.

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
        if self.settings.classes is None and len(values) > max(2, len(positions) // 2):
            raise DataError(
                f"nearly all of the {len(positions)} rows have a label of their own",
                place=self._where,
                cure="expected classes of some rows each: cut numbers into classes first, or set "
                "task = 'regression'",
            )
        return torch.from_numpy(positions.astype(np.int64))

    def targets(self, public: Tensor) -> TargetRows:
        """Returns the classes and every row's number; -1 for labels that are none of them.

        Raises:
            DataError: if nothing says which classes there are, or there are fewer than two.
        """
        if self.settings.classes is not None:
            return checked(self._listed(self.settings.classes), self.settings, self._where)
        rows = rows_that_define_classes(public, len(self.column.values), self.settings, self._where)
        column = self.column.typed(rows.numpy())
        usable = column.is_valid().to_numpy()
        if not usable[rows.numpy()].all():  # public rows, so that it may be told
            refuse_missing(column.take(pa.array(rows.numpy())), self._where)
        if types.is_floating(column.type):
            numbers = column.fill_null(np.nan).to_numpy()
            whole = np.isfinite(numbers) & (numbers == np.round(numbers))
            usable &= whole
            column = pa.chunked_array([pa.array(np.where(whole, numbers, 0).astype(np.int64))])
        _, names = codes(column.take(pa.array(rows.numpy())), self.column.name, "label")
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
        """Finds every row's label in the list of the recipe, whatever kind the file gives it."""
        column, wanted = self.column, list(names)
        values = column.values
        if all(_whole(name) for name in wanted):
            wanted = [str(int(name)) for name in wanted]
            values = column.cast(pa.float64()) if column.text else values
            if types.is_floating(values.type):
                numbers = values.fill_null(np.nan).to_numpy(zero_copy_only=False)
                whole = np.isfinite(numbers) & (numbers == np.round(numbers))
                whole_numbers = np.where(whole, numbers, 0).astype(np.int64)
                values = pa.chunked_array([pa.array(whole_numbers, mask=~whole)])
        elif {name.casefold() for name in wanted} <= {"true", "false"}:
            wanted = [name.casefold() for name in wanted]
            values = pc.utf8_lower(values if _is_word(values.type) else values.cast(pa.string()))
        y = torch.from_numpy(_positions(as_text(values), wanted))
        return TargetRows.of_classes(y, tuple(names))


def _whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii()


def as_text(column: Any) -> Any:
    """Returns the values as the names that classes have: `3`, `True`, `ill`; null stays null."""
    if types.is_boolean(column.type):
        return pc.if_else(column, "True", "False")
    return column if _is_word(column.type) else column.cast(pa.string())


def _positions(words: Any, names: Sequence[str]) -> np.ndarray:
    """Returns int64 [n]: where each word stands in `names`, -1 if it does not."""
    found = pc.index_in(words, pa.array(list(names), words.type), skip_nulls=True)
    places: np.ndarray = found.fill_null(-1).to_numpy()
    return places.astype(np.int64)


@dataclass(frozen=True)
class Features:
    """The feature columns: each a number, or one input for each word of its list."""

    columns: tuple[Column, ...]
    settings: DataSettings

    def inputs(self, public: Tensor) -> InputRows:
        """Returns float32 [n, d] for all rows, with what is learned from the positions `public` of public rows.

        Learned are: whether a column holds numbers or words, its words, and the mean that fills a gap. A word that is
        on no list gets no input of its own: the shape of the input must not tell what private rows hold.

        Raises:
            DataError: if a column holds neither numbers nor words, too many words, or a gap that may not be filled.
        """
        rows = public.numpy()
        blocks: list[np.ndarray] = []
        learned: list[InputColumn] = []
        left_out = np.zeros(len(self.columns[0].values), dtype=bool)
        for column in self.columns:
            found, block, unknown = self._block(column, rows)
            learned.append(found)
            blocks.append(block)
            left_out |= unknown
        x = torch.from_numpy(np.concatenate(blocks, axis=1))
        gaps = x.isnan() & ~torch.from_numpy(left_out)[:, None]
        if not len(public) and bool(gaps.any()):
            raise DataError(
                "'mean' needs public rows to take the mean of",
                place="missing",
                cure="give public_share or public_clients, or set missing = 'drop'",
            )
        fill = torch.nan_to_num(x[public].nanmean(0))
        preparation = self._preparation(learned, fill if len(public) else None)
        return InputRows(torch.where(x.isnan(), fill, x), torch.from_numpy(left_out), preparation)

    def _preparation(self, learned: list[InputColumn], fill: Tensor | None) -> Preparation:
        """Says how raw rows become inputs; `fill` [d] are the means of the public rows, if there are any."""
        if self.settings.missing == "mean" and fill is not None:
            parts = fill.split([column.width for column in learned])
            learned = [
                replace(c, fill=tuple(part.tolist()))
                for c, part in zip(learned, parts, strict=True)
            ]
        gaps = tuple(NO_VALUE) if self.settings.source == "csv" else ()
        return Preparation(tuple(learned), gaps, self.settings.decimal)

    def _block(
        self, column: Column, public: np.ndarray
    ) -> tuple[InputColumn, np.ndarray, np.ndarray]:
        """Returns what was learned, float32 [n, k] with NaN for gaps, and bool [n]: rows that are to be left out."""
        listed = column.name in self.settings.words
        open_ = column.name in self.settings.public_words
        values = column.values if listed else column.typed(None if open_ else public)
        if listed and not _is_word(values.type):
            values = as_text(values)
        if _is_word(values.type):
            if not listed and column.text:
                self._refuse_decimal_commas(
                    column, values if open_ else values.take(pa.array(public))
                )
            words = self._words(column.name, values, public)
            names, unknown = self._with_other(words)
            block, odd = one_hot(values, names, unknown)
            drop = odd if unknown == "refused" else np.zeros_like(odd)
            return InputColumn(column.name, "words", tuple(names), unknown), block, drop
        block = numbers(values, column.name)
        kind: Kind = "truth" if types.is_boolean(values.type) else "number"
        # Text that is no number where the public rows have numbers.
        odd = values.is_null().to_numpy() & column.values.is_valid().to_numpy()
        if odd.any() and self.settings.missing == "error":
            raise DataError(
                "it holds numbers, but some rows have something else there",
                place=f"feature column '{column.name}'",
                cure="set missing = 'drop' or 'mean', or name it in drop_columns",
            )
        drop = odd if self.settings.missing == "drop" else np.zeros_like(odd)
        return InputColumn(column.name, kind), block, drop

    def _words(self, name: str, values: Any, public: np.ndarray) -> list[str]:
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
        if len(seen.unique()) > MOST_WORDS:
            raise DataError(
                f"more than {MOST_WORDS} different words, which is more than can be coded",
                place=f"feature column '{name}'",
                cure="name it in drop_columns, or list those that matter with words = { ... }",
            )
        return sorted(seen.unique().drop_null().to_pylist())

    def _with_other(self, words: list[str]) -> tuple[list[str], Unknown]:
        """Returns the words that have inputs, and what others are."""
        if self.settings.unknown == OTHER:
            return words if OTHER in words else [*words, OTHER], "other"
        return words, "refused" if self.settings.unknown == "drop" else "zeros"

    def _refuse_decimal_commas(self, column: Column, seen: Any) -> None:
        known = seen.drop_null()
        if not len(known) or column.decimal == ",":
            return
        if pc.all(
            pc.match_substring_regex(known, r"^\s*[+-]?(\d+,\d+|\d{1,3}(\.\d{3})+,\d+|\d+)\s*$")
        ).as_py():
            cure = 'add decimal = "," to [data]'
            if self.settings.delimiter == ",":  # which cannot be both
                cure = "write them with points, or without commas if these divide thousands"
            raise DataError(
                "its numbers have decimal commas",
                place=f"feature column '{column.name}'",
                cure=cure,
            )


def one_hot(values: Any, words: Sequence[str], unknown: Unknown) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 [n, k]: 1 where the input's word stands, NaN for gaps; and bool [n]: rows of an unknown word."""
    missing = values.is_null().to_numpy()
    positions = _positions(values, words)
    odd = (positions < 0) & ~missing
    if unknown == "other":
        positions = np.where(odd, words.index(OTHER), positions)
    block = np.zeros((len(positions), len(words)), dtype=np.float32)
    known = np.flatnonzero(positions >= 0)
    block[known, positions[known]] = 1.0
    block[missing] = np.nan
    return block, odd


def numbers(column: Any, name: str) -> np.ndarray:
    """Returns the numbers or truth values of a typed column as float32 [n, 1], with NaN for gaps.

    Raises:
        DataError: if it holds something else.
    """
    kind = column.type
    if types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not (
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or types.is_null(kind)
    ):
        raise DataError(
            f"holds {kind}",
            place=f"feature column '{name}'",
            cure="expected numbers or words: name it in drop_columns",
        )
    numbers: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return numbers.astype(np.float32)[:, None]


def _is_word(kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))
