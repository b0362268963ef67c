"""Completes data whose statistics come from a private query: fills gaps, drops rare words.

Until the answer is there, a data set has the inputs of all words that may occur, and `MISSING` where
a cell is missing (`FederatedData.awaits_statistics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedpress.core.examples import MISSING, Arrays, Preprocess
from fedpress.data.classes import OTHER
from fedpress.data.dataset import FederatedData
from fedpress.data.preparation import InputColumn, Preparation
from fedpress.data.preparation_parts import TextPart
from fedpress.data.vocabulary import shortened, text_part, with_vocabulary


def settled(data: FederatedData, about: Preparation) -> FederatedData:
    """Returns the data as rows or texts that `about` prepares.

    Args:
        data: a table or texts that await their statistics.
        about: the same columns; a column of words, or the vocabulary, may have fewer words.
    """
    if about.kind == TextPart.key:
        return with_vocabulary(data, about)
    assert data.preparation is not None
    pairs = list(zip(data.preparation.columns, about.columns, strict=True))

    def part(arrays: Arrays) -> Arrays:
        assert isinstance(arrays.x, Tensor)
        blocks = arrays.x.split([before.width for before, _ in pairs], dim=1)
        done = [_block(x, *pair) for x, pair in zip(blocks, pairs, strict=True)]
        return Arrays(torch.cat(done, dim=1), arrays.y)

    # Inputs that are left as they are need no standardisation.
    scaled = any(about.mean) or any(std != 1 for std in about.std)
    return replace(
        data,
        clients={name: part(arrays) for name, arrays in data.clients.items()},
        public=part(data.public),
        validation=part(data.validation),
        test=part(data.test),
        preprocess=Preprocess(about.mean, about.std) if scaled else Preprocess(),
        preparation=about,
        awaits_statistics=False,
    )


def _block(x: Tensor, before: InputColumn, after: InputColumn) -> Tensor:
    """Returns the inputs of one column [n, k] with fewer words, and with missing cells filled."""
    missing = x[:, :1] == MISSING
    if before.words != after.words:
        kept = [before.words.index(word) for word in after.words]
        dropped = [at for at, word in enumerate(before.words) if word not in after.words]
        rare = x[:, dropped].sum(1)
        x = x[:, kept]
        if after.unknown == "other":
            x[:, after.words.index(OTHER)] += rare
    if not after.fill:
        return x
    return torch.where(missing, torch.tensor(after.fill), x)


def with_few_words(about: Preparation, words: Mapping[str, int]) -> Preparation:
    """Returns the preparation that a query may give: its widths are right, its numbers are not.

    Args:
        about: the columns of a table that awaits its statistics.
        words: column -> number of words that are kept.
    """
    if about.kind == TextPart.key:
        return shortened(about, text_part(about).vocabulary[1:])
    columns = []
    for column in about.columns:
        kept = column.words
        if column.name in words:
            rest = tuple(word for word in kept if not _is_other(column, word))
            kept = chosen(column, rest[: words[column.name]])
        column = replace(column, words=kept)
        columns.append(replace(column, fill=(0.0,) * column.width if column.fill else ()))
    width = sum(column.width for column in columns)
    return replace(about, columns=tuple(columns), mean=(0.0,) * width, std=(1.0,) * width)


def chosen(column: InputColumn, words: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the words that get inputs, in the column's order; "other" is always among them."""
    return tuple(word for word in column.words if word in words or _is_other(column, word))


def _is_other(column: InputColumn, word: str) -> bool:
    return column.unknown == "other" and word == OTHER
