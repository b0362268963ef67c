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
from fedpress.data.preparation import InputColumn, Kind, Preparation, Unknown
from fedpress.data.settings import DataSettings
from fedpress.errors import Argument, DataError

# A column of words may have this many different words, because each becomes an input. A column
# with more usually holds names or free text.
MOST_WORDS = 100
# A column in which at most this share of the cells are text is one of numbers.
MOST_STRAY = 0.1


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
            DataError: if a column holds neither numbers, words nor dates; if it has too many words
                or decimal commas; if no public row gives the words or the mean of a column; or if a column
                of numbers has other text although the setting `missing` is "error".
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
        if self.settings.statistics == "private":
            return self._to_be_filled(x, learned, torch.from_numpy(left_out))
        # Rows that are dropped need no values.
        gaps = x.isnan() & ~torch.from_numpy(left_out)[:, None]
        if not len(public) and bool(gaps.any()):
            raise DataError(
                "'mean' needs public rows, whose mean it takes",
                place="missing",
                cure=(
                    "declare more rows as public with public_share or public_clients, or set "
                    "missing = 'drop'"
                ),
            )
        # A column without any public value has no mean, and is filled with 0.
        fill = torch.nan_to_num(x[public].nanmean(0))
        # The fill values are stored for the device, which must fill missing cells in the same way.
        preparation = self._preparation(learned, fill if len(public) else None)
        return InputRows(torch.where(x.isnan(), fill, x), torch.from_numpy(left_out), preparation)

    def _to_be_filled(self, x: Tensor, learned: list[InputColumn], left_out: Tensor) -> InputRows:
        """Returns inputs whose missing cells are marked until a private statistic fills them.

        Args:
            x: the inputs [n, d], NaN where a cell is missing.
            learned: the columns, without fill values.
            left_out: whether a row is dropped, bool [n].
        """
        marks = torch.full((x.shape[1],), MISSING)
        preparation = self._preparation(learned, marks)
        # With another setting of `missing`, only rows that are left out have gaps.
        return InputRows(torch.where(x.isnan(), marks, x), left_out, preparation)

    def _preparation(self, learned: list[InputColumn], fill: Tensor | None) -> Preparation:
        """Returns how raw rows become inputs.

        Args:
            learned: the columns, without fill values.
            fill: means of the public rows [d], for missing cells; None without public rows.
        """
        if self.settings.missing == "mean" and fill is not None:
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

    def _block(
        self, column: Column, public: np.ndarray
    ) -> tuple[InputColumn, np.ndarray, np.ndarray]:
        """Returns the inputs of one column.

        Returns:
            A description of how the column becomes inputs; the inputs float32 [n, k] with NaN for
            missing cells; and bool [n]: whether a row is left out.
        """
        has_list = column.name in self.settings.words
        if is_date(column.values.type) and not has_list:
            return self._dates(column, public)
        list_is_public = column.name in self.settings.public_words
        if has_list:
            # The user listed words for this column, so "1" and "2" are words here.
            values = as_text(column.values)
        elif list_is_public:
            values = column.typed()
        else:
            values = column.typed(public)
        if not is_word(values.type):
            return self._numbers(column, values, public)
        if not has_list and column.text:
            seen = values if list_is_public else values.take(pa.array(public))
            self._refuse_decimal_commas(column, seen)
            if not list_is_public:
                self._refuse_stray_text(column, public)
        words = self._words(column.name, values, public)
        names, unknown = self._with_other(words)
        block, has_unknown = one_hot_block(values, names, unknown)
        dropped = has_unknown & (unknown == "refused")
        return InputColumn(column.name, "words", tuple(names), unknown), block, dropped

    def _numbers(
        self, column: Column, values: Any, public: np.ndarray
    ) -> tuple[InputColumn, np.ndarray, np.ndarray]:
        """Returns the inputs of a column of numbers or booleans, as `_block` does.

        Args:
            column: the column as it is in the file.
            values: its values with their type; other text is null.
            public: positions of the public rows.
        """
        if column.text and is_date(values.type):
            raise _is_dates(column.name, values)
        block = number_block(values, column.name)
        kind: Kind = "truth" if types.is_boolean(values.type) else "number"
        # Public rows have numbers here. `typed` turned private cells with other text into null.
        not_numbers = values.is_null().to_numpy() & column.values.is_valid().to_numpy()
        # Without public rows a column of text counts as numbers, whatever private rows hold.
        list_is_public = column.name in self.settings.public_words
        if not_numbers.any() and not len(public) and not list_is_public:
            raise _no_public_words(column.name)
        if not_numbers.any() and self.settings.missing == "error":
            raise DataError(
                "it holds numbers, but some rows have other text in this column",
                place=f"feature column '{column.name}'",
                cure="set missing = 'drop' or 'mean', or name it in drop_columns",
            )
        drops = self.settings.missing == "drop"
        return InputColumn(column.name, kind), block, not_numbers & drops

    def _dates(
        self, column: Column, public: np.ndarray
    ) -> tuple[InputColumn, np.ndarray, np.ndarray]:
        """Returns the inputs of a column of dates, as `_block` does."""
        dates = local(column.values)
        parts = parts_of(dates.take(pa.array(public)))
        asked = self.settings.type_of(column.name)
        form = asked.form if asked is not None else None
        learned = InputColumn(column.name, "date", parts=parts, form=form)
        return learned, date_block(dates, parts), np.zeros(len(dates), dtype=bool)

    def _words(self, name: str, values: Any, public: np.ndarray) -> list[str]:
        """Returns the words of a column, from the recipe or from the rows that may define them."""
        if name in self.settings.words:
            return list(self.settings.words[name])
        if name in self.settings.public_words:
            seen = values
        elif len(public):
            seen = values.take(pa.array(public))
        else:
            raise _no_public_words(name)
        known = seen.drop_null()
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
        count, first = column.stray_texts(public)
        texts = column.values.take(pa.array(public))
        if not 0 < count <= MOST_STRAY * (len(texts) - texts.null_count):
            return
        # Quoted, because the row is public.
        raise DataError(
            f"it holds numbers, but {place_of(first, self.settings)} has the text "
            f"'{str(column.values[first].as_py())[:40]}'",
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
    numbers: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return numbers.astype(np.float32)[:, None]
