"""Converts feature columns of a table to inputs of a network: numbers as they are, words one-hot.

The kind of a column, its list of words and its mean are taken from public rows only. A single
private row must neither add an input to the model nor change a value in the model's file, because
others receive the model and its file.
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

from fedpress.core.examples import MISSING
from fedpress.data.cells import as_text, is_number, is_word, positions_in
from fedpress.data.classes import OTHER
from fedpress.data.columns import Column
from fedpress.data.csv import NO_VALUE
from fedpress.data.dates import date_block, is_date, likely_form, local, parts_of
from fedpress.data.examples import InputRows
from fedpress.data.lines import place_of
from fedpress.data.preparation import InputColumn, Preparation, Unknown
from fedpress.data.settings import DataSettings
from fedpress.errors import Argument, DataError

# A column of words may have this many different words, because each becomes an input. A column
# with more usually holds names or free text.
MOST_WORDS = 100
# A column in which at most this share of the cells are text is one of numbers.
MOST_STRAY = 0.1


@dataclass(frozen=True)
class LearnedFeatures:
    """What the public rows say about feature columns; it makes inputs of any rows of them.

    Each row is encoded by itself, so batches of a table have the inputs of the whole table.

    Attributes:
        columns: how each column becomes inputs, without values for missing cells.
        settings: the `[data]` table of the recipe.
        from_public: whether there were public rows to learn from.
    """

    columns: tuple[InputColumn, ...]
    settings: DataSettings
    from_public: bool

    def encoded(self, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
        """Returns inputs float32 [n, d], NaN for missing cells, and which rows are dropped [n].

        Args:
            columns: the same columns, with any rows.

        Raises:
            DataError: if a column of numbers has other text although the setting `missing` is
                "error".
        """
        rows = len(columns[0].values)
        # Written by columns and turned at once: single columns would be scattered over all rows.
        x = torch.empty((sum(learned.width for learned in self.columns), rows))
        left_out = np.zeros(rows, dtype=bool)
        at = 0
        for learned, column in zip(self.columns, columns, strict=True):
            block, dropped = self._block(learned, column)
            x.numpy()[at : at + learned.width] = block.T
            at += learned.width
            if dropped is not None:
                left_out |= dropped
        return x.T.contiguous(), torch.from_numpy(left_out)

    def may_drop(self) -> bool:
        """Returns whether `encoded` may drop rows."""
        # Only text can be no number, and only words can be on no list.
        drops_text = self.settings.missing == "drop" and self.settings.source == "csv"
        return any(
            drops_text if column.kind in ("number", "truth") else column.unknown == "refused"
            for column in self.columns
        )

    def fill(self, public: Tensor) -> Tensor:
        """Returns what replaces missing cells [d], from the encoded public rows [p, d]."""
        if self.settings.statistics == "private":
            # They are marked until a private statistic fills them.
            return torch.full((public.shape[1],), MISSING)
        # A column without any public value has no mean, and is filled with 0.
        return torch.nan_to_num(public.nanmean(0))

    def filled(self, x: Tensor, left_out: Tensor, fill: Tensor) -> Tensor:
        """Returns encoded rows [n, d] whose missing cells are replaced by `fill` [d].

        Raises:
            DataError: if there was no public row to take the mean from.
        """
        if not has_gaps(x):
            return x
        missing = x.isnan()
        # Rows that are dropped need no values.
        needed = self.settings.statistics == "public" and not self.from_public
        if needed and bool((missing & ~left_out[:, None]).any()):
            raise DataError(
                "'mean' needs public rows, whose mean it takes",
                place="missing",
                cure=(
                    "declare more rows as public with public_share or public_clients, or set "
                    "missing = 'drop'"
                ),
            )
        return torch.where(missing, fill, x)

    def preparation(self, fill: Tensor) -> Preparation:
        """Returns how raw rows become inputs; `fill` [d] replaces missing cells."""
        learned = list(self.columns)
        # The fill values are stored for the device, which must fill missing cells in the same way.
        is_known = self.from_public or self.settings.statistics == "private"
        if self.settings.missing == "mean" and is_known:
            parts = fill.split([column.width for column in learned])
            filled = []
            for column, part in zip(learned, parts, strict=True):
                filled.append(replace(column, fill=tuple(part.tolist())))
            learned = filled
        settings = self.settings
        return Preparation(
            tuple(learned),
            # In other files a text such as "NA" is a word.
            gaps=tuple(NO_VALUE) if settings.source == "csv" else (),
            decimal=settings.decimal,
            delimiter=settings.delimiter,
            encoding=settings.encoding,
            labels=settings.label_columns,
        )

    def _block(self, learned: InputColumn, column: Column) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the inputs of a column [n, k], and bool [n]: whether a row is dropped."""
        if learned.kind == "date":
            return date_block(local(column.values), learned.parts), None
        if learned.kind == "words":
            # Values may be numbers whose words the recipe lists: 1 is the word "1".
            values = as_text(column.values)
            block, unknown = one_hot_block(values, learned.words, learned.unknown)
            return block, unknown if learned.unknown == "refused" else None
        return self._numbers(learned, column)

    def _numbers(
        self, learned: InputColumn, column: Column
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if not column.text:
            return number_block(column.values, column.name), None
        values = column.cast(pa.bool_() if learned.kind == "truth" else pa.float64())
        block = number_block(values, column.name)
        if values.null_count == column.values.null_count:
            return block, None
        # Public rows have numbers here. The cast turned private cells with other text into null.
        not_numbers = values.is_null().to_numpy() & column.values.is_valid().to_numpy()
        # Without public rows a column of text counts as numbers, whatever private rows hold.
        if not self.from_public and column.name not in self.settings.public_words:
            raise _no_public_words(column.name)
        if self.settings.missing == "error":
            raise DataError(
                "it holds numbers, but some rows have other text in this column",
                place=f"feature column '{column.name}'",
                cure="set missing = 'drop' or 'mean', or name it in drop_columns",
            )
        return block, not_numbers if self.settings.missing == "drop" else None


@dataclass(frozen=True)
class FeatureColumns:
    """The feature columns of a table.

    A column of numbers becomes one input, a column of words one input for each word, a column of
    dates the days that have passed and places in year, week and day (`fedpress.data.dates`).
    """

    columns: tuple[Column, ...]
    settings: DataSettings

    def inputs(self, public: Tensor) -> InputRows:
        """Returns the inputs of all rows, float32 [n, d].

        Public rows decide whether a column holds numbers or words, which words it has, and the mean
        that fills missing cells. A word that only private rows have gets no input of its own: the
        number of inputs must not reveal anything about private rows.

        Args:
            public: positions of the public rows.

        Raises:
            DataError: as `learned` and the methods of its result.
        """
        learned = self.learned(public)
        x, left_out = learned.encoded(self.columns)
        fill = learned.fill(x[public])
        x = learned.filled(x, left_out, fill)
        return InputRows(x, left_out, learned.preparation(fill))

    def learned(self, public: Tensor) -> LearnedFeatures:
        """Returns what the public rows say about the columns.

        Args:
            public: positions of the public rows.

        Raises:
            DataError: if a column holds neither numbers, words nor dates; if it has too many words
                or decimal commas; or if no public row gives the words of a column.
        """
        rows = public.numpy()
        found = tuple(self._learned(column, rows) for column in self.columns)
        return LearnedFeatures(found, self.settings, len(public) > 0)

    def _learned(self, column: Column, public: np.ndarray) -> InputColumn:
        """Returns how one column becomes inputs, without values for missing cells."""
        has_list = column.name in self.settings.words
        list_is_public = column.name in self.settings.public_words
        if is_date(column.values.type) and not has_list:
            return self._dates(column, public)
        if has_list:
            # The user listed words for this column, so "1" and "2" are words here.
            values = as_text(column.values)
        else:
            # All rows may decide if the list of words is no secret.
            values = (column if list_is_public else column.taken(public)).typed()
        if not is_word(values.type):
            if column.text and is_date(values.type):
                raise _is_dates(column.name, values)
            return InputColumn(column.name, "truth" if types.is_boolean(values.type) else "number")
        if not has_list and column.text:
            self._refuse_decimal_commas(column, values)
            if not list_is_public:
                self._refuse_stray_text(column, public)
        names, unknown = self._with_other(self._words(column.name, values, public))
        return InputColumn(column.name, "words", tuple(names), unknown)

    def _dates(self, column: Column, public: np.ndarray) -> InputColumn:
        parts = parts_of(local(column.taken(public).values))
        asked = self.settings.type_of(column.name)
        form = asked.form if asked is not None else None
        return InputColumn(column.name, "date", parts=parts, form=form)

    def _words(self, name: str, values: Any, public: np.ndarray) -> list[str]:
        """Returns the words of a column: those of the recipe, or of `values`.

        Args:
            name: name of the column.
            values: the cells that may define the words.
            public: positions of the public rows.
        """
        if name in self.settings.words:
            return list(self.settings.words[name])
        if not len(public) and name not in self.settings.public_words:
            raise _no_public_words(name)
        known = values.drop_null()
        words = known.unique()
        if self.settings.types.get(name) == "integer id" and len(words) == len(known) > 1:
            raise DataError(
                f"all its {len(known):,} ids differ, so they tell rows apart and predict nothing",
                place=f"feature column '{name}'",
                cure=("set ", Argument("drop_columns", (name,))),
            )
        if len(words) > MOST_WORDS:
            raise _too_many_words(name, known)
        return sorted(words.to_pylist())

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

    def _refuse_stray_text(self, column: Column, public: np.ndarray) -> None:
        """Refuses a column of numbers in which a few public cells are text.

        Otherwise a single word would turn each number into a word with an input of its own.
        """
        seen = column.taken(public)
        stray = seen.stray_texts()
        if not 0 < stray.sum() <= MOST_STRAY * (len(seen.values) - seen.values.null_count):
            return
        first = int(stray.argmax())
        # Quoted, because the row is public.
        raise DataError(
            f"it holds numbers, but {place_of(int(public[first]), self.settings)} has the text "
            f"'{str(seen.values[first].as_py())[:40]}'",
            place=f"feature column '{column.name}'",
            cure=(
                "write a number there or leave the cell empty; if the column holds words, add it "
                f'to words = {{ "{column.name}" = ["WORD", "WORD"] }} or to public_words'
            ),
        )

    def _refuse_decimal_commas(self, column: Column, seen: Any) -> None:
        """Refuses a column of words that are really numbers with a decimal comma, such as 3,5."""
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
                cure = "write decimal points, or remove commas that separate thousands"
            raise DataError(
                "its numbers have decimal commas",
                place=f"feature column '{column.name}'",
                cure=cure,
            )


def _too_many_words(name: str, words: Any) -> DataError:
    cure = "name it in drop_columns, or list the important words with words = { ... }"
    if form := likely_form(words):
        cure = f"if these are dates, set {_types_of(name, f'date {form}')}; else {cure}"
    return DataError(
        f"it has more than {MOST_WORDS} different words, too many for one input each",
        place=f"feature column '{name}'",
        cure=cure,
    )


def _is_dates(name: str, values: Any) -> DataError:
    """Returns the error for a column of text that holds dates, which the recipe does not say."""
    # `typed` understands times of day as dates and converts none of them.
    if values.null_count == len(values):
        return DataError(
            "it holds times of day",
            place=f"feature column '{name}'",
            cure=("set ", Argument("drop_columns", (name,)), ", or write hours as numbers"),
        )
    return DataError(
        "it holds dates",
        place=f"feature column '{name}'",
        cure=(
            f"set {_types_of(name, 'date')} to learn from them, or ",
            Argument("drop_columns", (name,)),
        ),
    )


def _types_of(name: str, given: str) -> str:
    return f'types = {{ "{name}" = "{given}" }}'


def _no_public_words(name: str) -> DataError:
    return DataError(
        "it holds words, but there is no public row from which to take the list of words",
        place=f"feature column '{name}'",
        cure=(
            f'add words = {{ "{name}" = ["WORD", "WORD"] }} to [data], or public_words = '
            f'["{name}"] if the list is no secret, or public_share = 0.1'
        ),
    )


def one_hot_block(
    values: Any, words: Sequence[str], unknown: Unknown
) -> tuple[np.ndarray, np.ndarray]:
    """One-hot encodes words: "nurse" in ("cook", "nurse") becomes 0, 1.

    Args:
        values: the words of a column, one for each row.
        words: the words that have inputs.
        unknown: what happens to other words (see `InputColumn.unknown`).

    Returns:
        float32 [n, k] with NaN for missing cells, and bool [n]: whether the word is unknown.
    """
    missing = values.is_null().to_numpy()
    positions = positions_in(values, words)
    is_unknown = (positions < 0) & ~missing
    if unknown == "other":
        positions = np.where(is_unknown, words.index(OTHER), positions)
    block = np.zeros((len(positions), len(words)), dtype=np.float32)
    known = np.flatnonzero(positions >= 0)
    block[known, positions[known]] = 1.0
    # Missing cells stay NaN until they are filled, like missing numbers.
    block[missing] = np.nan
    return block, is_unknown


def has_gaps(x: Tensor) -> bool:
    """Returns whether some of the inputs are NaN, which stands for a missing cell."""
    # A sum with NaN is NaN. It takes a tenth of the time of `isnan`.
    return bool(x.sum().isnan()) and bool(x.isnan().any())


def number_block(column: Any, name: str) -> np.ndarray:
    """Returns numbers or booleans of a typed column as float32 [n, 1], NaN for missing cells.

    Raises:
        DataError: if the column has values of another type.
    """
    kind = column.type
    if types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not is_number(kind) and not types.is_null(kind):
        raise DataError(
            f"holds {kind}",
            place=f"feature column '{name}'",
            cure="expected numbers, words or dates: name it in drop_columns",
        )
    # The way over float64 would give float32 the same bits, more slowly.
    if not types.is_float32(kind):
        column = column.cast(pa.float64())
    numbers: np.ndarray = column.to_numpy(zero_copy_only=False)
    return numbers.astype(np.float32, copy=False)[:, None]
