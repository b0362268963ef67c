"""Columns of a table to tensors: labels to class numbers, clients to owners, numbers and words to features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import types
from torch import Tensor

from fedpress.data.examples import Encoder
from fedpress.errors import DataError

MOST_WORDS = 100


def codes(column: Any, name: str, role: str) -> tuple[Tensor, tuple[str, ...]]:
    """Returns int64 [n] and the sorted values that they stand for: whole numbers or words.

    Raises:
        DataError: if a value is missing, or is neither a whole number nor a word.
    """
    column = _plain(column)
    where = f"{role} column '{name}'"
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(f"{where}: row {row} has no value; fill it, or set missing = 'drop'")
    if types.is_floating(column.type):
        values = column.to_numpy()
        broken = values[~(np.isfinite(values) & (values == np.round(values)))]
        if len(broken):
            raise DataError(f"{where}: holds {broken[0]}; expected whole numbers or words: cut it into classes first")
        column = pa.chunked_array([pa.array(values.astype(np.int64))])
    if not (types.is_integer(column.type) or _is_word(column.type) or types.is_boolean(column.type)):
        raise DataError(f"{where}: holds {column.type}; expected whole numbers or words")
    values, positions = np.unique(column.to_numpy(), return_inverse=True)
    return torch.from_numpy(positions.astype(np.int64)), tuple(str(value) for value in values)


@dataclass(frozen=True)
class Features:
    """Features `x` float32 [n, d]; a missing value is NaN.

    Attributes:
        x: one column per number, and one per word of a column of words (1 where the row has that word).
        of_words: bool [d], which columns stand for a word.
    """

    x: Tensor
    of_words: Tensor

    def fit(self, public: Tensor) -> Encoder:
        """Learns from public rows [m, d]: which words there are, and what fills a gap (the mean).

        A word that no public row has gets no column: the shape of the input must not tell what private rows hold.
        Without public rows all columns stay.
        """
        seen = torch.nan_to_num(public).abs().sum(0) > 0
        keep = torch.ones_like(self.of_words) if len(public) == 0 else seen | ~self.of_words
        fill = torch.nan_to_num(public.nanmean(0))

        def encode(x: Tensor) -> Tensor:
            gaps = x.isnan()
            if len(public) == 0 and bool(gaps.any()):
                raise DataError(
                    "data.missing: 'mean' needs public rows to take the mean of; give public_share or "
                    "public_clients, or set missing = 'drop'"
                )
            return torch.where(gaps, fill, x)[:, keep]

        return encode


def features(table: Any, names: list[str]) -> Features:
    """Turns the columns `names` into numbers.

    Raises:
        DataError: if a column holds neither numbers nor words, or too many different words.
    """
    blocks = [_feature(_plain(table[name]), name) for name in names]
    of_words = [np.full(block.shape[1], is_words) for block, is_words in blocks]
    x = np.concatenate([block for block, _ in blocks], axis=1)
    return Features(torch.from_numpy(x), torch.from_numpy(np.concatenate(of_words)))


def _feature(column: Any, name: str) -> tuple[np.ndarray, bool]:
    """Returns float32 [n, k], and whether the k columns stand for words."""
    kind = column.type
    if _is_word(kind):
        return _one_hot(column, name), True
    if types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_null(kind)):
        raise DataError(f"feature column '{name}': holds {kind}; expected numbers or words: name it in drop_columns")
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float32)[:, None], False


def _one_hot(column: Any, name: str) -> np.ndarray:
    words = sorted(column.unique().drop_null().to_pylist())
    if len(words) > MOST_WORDS:
        raise DataError(
            f"feature column '{name}': {len(words)} different words, at most {MOST_WORDS} can be coded; "
            "name it in drop_columns"
        )
    missing = column.is_null().to_numpy()
    positions = pc.index_in(column, pa.array(words, column.type)).fill_null(0).to_numpy()
    block = np.zeros((len(column), len(words)), dtype=np.float32)
    block[np.arange(len(column)), positions] = 1.0
    block[missing] = np.nan
    return block


def _plain(column: Any) -> Any:
    """Returns the column with its dictionary coding undone."""
    return column.cast(column.type.value_type) if types.is_dictionary(column.type) else column


def _is_word(kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))
