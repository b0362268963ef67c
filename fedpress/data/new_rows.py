"""Converts raw rows of a table to the input of a network, in the same way as in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fedpress.core.examples import Preprocess
from fedpress.data import dates, features
from fedpress.data.cells import as_text
from fedpress.data.columns import Column
from fedpress.data.preparation import InputColumn, Preparation
from fedpress.errors import Argument, DataError, suggestion


@dataclass(frozen=True)
class Strictness:
    """Which cells are errors although the training found a value for them.

    The training fills a text in a column of numbers as if the cell were empty, and encodes a word
    that is on no list as zeros. In a row to be predicted both are most likely mistakes.

    Attributes:
        texts: whether a text in a column of numbers is an error.
        words: whether a word without an input is an error.
        place: returns where a row is, such as "line 7 of 'new.csv'".
    """

    texts: bool = False
    words: bool = False
    place: Callable[[int], str] = "row {}".format


AS_TRAINED = Strictness()
"""Rows are prepared exactly as the training would have prepared them."""


def prepare(rows: Sequence[Mapping[str, Any]], preparation: Preparation) -> Tensor:
    """Returns standardised float32 [n, d], which the network and its exported file take.

    Args:
        rows: a dictionary for each row, by column name; further columns are ignored. Values are
            text, as `csv.DictReader` returns it, or numbers, booleans and words. A missing cell is
            None, NaN, or one of the texts in `preparation.gaps`.
        preparation: the result of `Preparation.read("preparation.json")`, or the attribute
            `preparation` of a loaded data set.

    Raises:
        DataError: if a row lacks a column, has a missing cell or an unknown word that training did
            not allow, or has a value of a wrong type or an infinite number.

    >>> age = InputColumn("age", "number", fill=(40.0,))
    >>> job = InputColumn("job", "words", ("cook", "nurse"), fill=(0.5, 0.5))
    >>> about = Preparation((age, job), ("",), mean=(30.0, 0.0, 0.0), std=(10.0, 1.0, 1.0))
    >>> prepare([{"age": "", "job": "nurse"}, {"age": 20, "job": "cook"}], about).tolist()
    [[1.0, 0.0, 1.0], [-1.0, 1.0, 0.0]]
    """
    cells: dict[str, list[Any]] = {}
    for column in preparation.columns:
        refuse_rows_without(rows, column.name, AS_TRAINED.place)
        cells[column.name] = [row[column.name] for row in rows]
    x = raw_inputs(cells, preparation, AS_TRAINED)
    # The exported network does not standardise, so it is done here.
    return Preprocess(preparation.mean, preparation.std)(x)


def refuse_rows_without(
    rows: Sequence[Mapping[str, Any]], name: str, place: Callable[[int], str]
) -> None:
    """Checks that each row has a column.

    Args:
        rows: a dictionary for each row.
        name: name of the column.
        place: returns where a row is, for errors.

    Raises:
        DataError: if a row lacks the column.
    """
    for at, row in enumerate(rows):
        if name not in row:
            raise DataError(
                f"there is no column '{name}'",
                place=place(at),
                cure="add the column, with None where it has no value",
            )


def raw_inputs(
    table: Mapping[str, Sequence[Any]], preparation: Preparation, strictness: Strictness
) -> Tensor:
    """Returns the inputs before standardisation, float32 [n, d].

    Args:
        table: name of each column -> its cells, as `prepare` takes them.
        preparation: how the columns become inputs.
        strictness: which cells are errors, and how an error names a row.

    Raises:
        DataError: if a cell cannot become an input.
    """
    blocks = []
    for column in preparation.columns:
        cells = [_cell(value, preparation) for value in table[column.name]]
        blocks.append(_block(cells, column, preparation, strictness))
    return torch.from_numpy(np.concatenate(blocks, axis=1))


def raw_columns(
    table: Mapping[str, Sequence[Any]], preparation: Preparation
) -> dict[str, np.ndarray]:
    """Returns the columns as an exported file takes them that prepares them itself.

    Args:
        table: name of each column -> its cells, as `prepare` takes them.
        preparation: how the columns become inputs; such a file has no dates.

    Returns:
        Name of each column -> float32 [n, 1], with NaN for missing cells; or its words [n, 1], as
        Python's text, which is empty for missing cells.
    """
    found = {}
    for column in preparation.columns:
        cells = [_cell(value, preparation) for value in table[column.name]]
        if column.kind == "words":
            words = _words(cells, column.name, AS_TRAINED).to_pylist()
            texts = ["" if word is None else word for word in words]
            found[column.name] = np.array(texts, dtype=object)[:, None]
        else:
            found[column.name] = _numbers(cells, column, preparation.decimal, AS_TRAINED)
    return found


def _cell(value: Any, preparation: Preparation) -> Any:
    """Returns the value of one cell; None if it is missing."""
    # pandas marks a missing cell by NaN, in columns of words too.
    if isinstance(value, float | np.floating) and math.isnan(value):
        return None
    if isinstance(value, str) and value in preparation.gaps:
        return None
    if isinstance(value, np.datetime64):
        # `item` would give a plain number for nanoseconds.
        return value.astype("datetime64[us]").item()
    return value.item() if isinstance(value, np.generic) else value


def _block(
    cells: list[Any], column: InputColumn, preparation: Preparation, strictness: Strictness
) -> np.ndarray:
    """Returns the inputs of one column, float32 [n, k], with missing cells filled."""
    if column.kind == "words":
        words = _words(cells, column.name, strictness)
        block, unknown = features.one_hot_block(words, column.words, column.unknown)
        if unknown.any():
            _refuse_unknown(words, unknown, column, strictness)
    elif column.kind == "date":
        block = _dates(cells, column, strictness)
    else:
        block = _numbers(cells, column, preparation.decimal, strictness)
    gaps = np.isnan(block)
    if gaps.any() and not column.fill:
        raise DataError(
            (
                f"column '{column.name}' has no value of its kind ({column.kind}), and the "
                "training did not fill such cells"
            ),
            place=strictness.place(int(gaps.any(1).argmax())),
            cure="fill it, or leave the row out",
        )
    return np.where(gaps, np.array(column.fill or (0.0,), dtype=np.float32), block)


def _dates(cells: list[Any], column: InputColumn, strictness: Strictness) -> np.ndarray:
    """Returns float32 [n, k], with NaN for missing cells and for cells that are no date."""
    found = dates.dates_of_cells(cells, column.form)
    known = found.is_valid().to_numpy()
    for at, cell in enumerate(cells):
        if cell is None or known[at] or not strictness.texts:
            continue
        form = column.form or "2024-05-01 or 2024-05-01 12:30"
        raise DataError(
            f"column '{column.name}' has '{str(cell)[:40]}', which is no date",
            place=strictness.place(at),
            cure=f"write it as {form}",
        )
    return dates.date_block(found, column.parts)


def _refuse_unknown(
    words: Any, unknown: np.ndarray, column: InputColumn, strictness: Strictness
) -> None:
    """Refuses words that have no input of their own, if they are errors."""
    first = int(unknown.argmax())
    if column.unknown == "refused":
        raise DataError(
            f"column '{column.name}' has a word that is not on its list",
            place=strictness.place(first),
            cure="leave the row out, as the training did",
        )
    if not strictness.words or column.unknown == "other":
        return
    word = words[first].as_py()
    known = ", ".join(column.words[:8]) + (", ..." if len(column.words) > 8 else "")
    raise DataError(
        f"column '{column.name}' has the unknown word '{str(word)[:40]}' (known: {known})",
        place=strictness.place(first),
        cure=(
            suggestion(str(word), column.words, "correct it"),
            ", or give ",
            Argument("unknown", "zeros"),
            " to encode unknown words as the training does",
        ),
    )


def _words(cells: list[Any], name: str, strictness: Strictness) -> Any:
    words: list[str | None] = []
    for at, cell in enumerate(cells):
        if cell is None or isinstance(cell, str):
            words.append(cell)
            continue
        # As in training: the integer 3 is the word "3", and True is "True".
        try:
            words.append(as_text(pa.array([cell]))[0].as_py())
        except pa.ArrowException as error:
            raise DataError(
                f"column '{name}' holds {type(cell).__name__}",
                place=strictness.place(at),
                cure="expected a word",
            ) from error
    return pa.chunked_array([pa.array(words, pa.string())])


def _numbers(
    cells: list[Any], column: InputColumn, decimal: str, strictness: Strictness
) -> np.ndarray:
    """Returns float32 [n, 1], with NaN for missing cells and for text that is not a number."""
    # Text is converted by the same code as in training; the other cells follow in the loop
    # below.
    texts = [cell if isinstance(cell, str) else None for cell in cells]
    values = pa.chunked_array([pa.array(texts, pa.string())])
    kind = pa.bool_() if column.kind == "truth" else pa.float64()
    typed = Column(column.name, values, text=True, decimal=decimal).cast(kind)
    block = features.number_block(typed, column.name)
    if strictness.texts:
        _refuse_texts(texts, block, column, strictness)
    for at, cell in enumerate(cells):
        if cell is None or isinstance(cell, str):
            continue
        try:
            # A number too large for float32 becomes infinity; the check below reports it.
            with np.errstate(over="ignore"):
                block[at] = np.float32(float(cell))
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"column '{column.name}' holds {type(cell).__name__}",
                place=strictness.place(at),
                cure="expected a number",
            ) from error
    if np.isinf(block).any():
        raise DataError(
            f"column '{column.name}' is infinite",
            place=strictness.place(int(np.isinf(block).argmax())),
            cure="leave the row out",
        )
    return block


def _refuse_texts(
    texts: list[str | None], block: np.ndarray, column: InputColumn, strictness: Strictness
) -> None:
    """Refuses text that is no number, such as "unknown", and names the first such row."""
    for at, text in enumerate(texts):
        if text is None or not math.isnan(block[at, 0]):
            continue
        wanted = "true or false" if column.kind == "truth" else "a number"
        cure = f"write {wanted}, or leave the row out"
        if column.fill:
            cure = (
                f"write {wanted}, or leave the cell empty: then the mean of the training fills it"
            )
        raise DataError(
            f"column '{column.name}' has the text '{text[:40]}', expected {wanted}",
            place=strictness.place(at),
            cure=cure,
        )
