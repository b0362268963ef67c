"""Reads texts that are to be predicted: the last tokens of each, as numbers of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedpress.data import raw_rows, text
from fedpress.data.preparation import Preparation
from fedpress.data.preparation_parts import TextPart
from fedpress.data.raw_inputs import RawInputs, UnknownWords, files_of
from fedpress.errors import Argument, DataError, suggestion

TEXT = "text"
"""Name of the column with the texts of a table, if it has several columns."""
ENDINGS = frozenset((".txt",))
"""Endings of text files."""


def read_texts(given: Any, about: Preparation, unknown: UnknownWords) -> RawInputs:
    """Makes sequences of token numbers of texts.

    Args:
        given: a .txt file, a folder of them, a list of texts, or a table with a column "text".
        about: the preparation of the model.
        unknown: what a token does that is not in the vocabulary; with "zeros" it is token 0.

    Raises:
        DataError: if a text cannot be read, is empty, or has an unknown token.
    """
    part = about.part
    assert isinstance(part, TextPart), "checked by the caller"
    names: dict[str, list[Any]]
    ignored: tuple[str, ...] = ()
    if raw_rows.is_table(given):
        texts, places, ignored = _of_table(given, about)
        names = {"row": [*range(1, len(texts) + 1)]}
    elif isinstance(given, list | tuple):
        texts, places = list(map(str, given)), [f"texts[{at}]" for at in range(len(given))]
        names = {"row": [*range(1, len(texts) + 1)]}
    else:
        files, short = files_of(given, ENDINGS, "texts")
        texts = [text.read_file(file, about.encoding) for file in files]
        places, names = [f"'{file}'" for file in files], {"file": short}
    number_of = {token: number for number, token in enumerate(part.vocabulary)}
    found = []
    for one, place in zip(texts, places, strict=True):
        tokens = text.tokens_of(one, part.settings)
        if not tokens:
            raise DataError("it has no token to go on from", place=place, cure="write some text")
        own = tokens[-part.settings.length :]
        if unknown == "error":
            _refuse_unknown(own, one, number_of, part, place)
        found.append(tuple(number_of.get(token, 0) for token in own))
    x = last_tokens(found, part.settings.length)
    return RawInputs(x, ignored, names=names, tokens=tuple(found))


def last_tokens(texts: Sequence[Sequence[int]], length: int) -> Tensor:
    """Returns the last tokens of each text, int64 [n, length]; shorter texts end in zeros.

    >>> last_tokens([[1, 2, 3], [4]], 2).tolist()
    [[2, 3], [4, 0]]
    """
    x = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, tokens in zip(x, texts, strict=True):
        own = torch.tensor(tokens[-length:])
        row[: len(own)] = own
    return x


def _of_table(given: Any, about: Preparation) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Returns the texts of a table, the name of each row in errors, and the other columns."""
    found = raw_rows.read_table(given, about)
    names = list(found.columns)
    name = names[0] if len(names) == 1 else TEXT
    found.refuse_missing([name])
    texts = []
    for at, cell in enumerate(found.columns[name]):
        if not isinstance(cell, str):
            raise DataError(
                f"column '{name}' has no text",
                place=found.place(at),
                cure="write one, or leave the row out",
            )
        texts.append(cell)
    places = [found.place(at) for at in range(len(texts))]
    return texts, places, tuple(other for other in names if other != name)


def _refuse_unknown(
    tokens: list[str], whole: str, number_of: dict[str, int], part: TextPart, place: str
) -> None:
    """Refuses the first token that is not in the vocabulary, and names its line."""
    wrong = next((token for token in tokens if token not in number_of), None)
    if wrong is None:
        return
    if "\n" in whole:
        place = f"line {_line_of(wrong, len(tokens), whole, part)} of {place}"
    unit = part.settings.tokens.removesuffix("s")
    raise DataError(
        f"the {unit} {wrong[:40]!r} is not in the vocabulary of the model",
        place=place,
        cure=(
            suggestion(wrong, part.vocabulary, "write another"),
            ", or give ",
            Argument("unknown", "zeros"),
            " to read unknown tokens as the training does",
        ),
    )


def _line_of(wrong: str, count: int, whole: str, part: TextPart) -> int:
    """Returns the line of the first of the last `count` tokens that equals `wrong`, from 1."""
    starts = list(range(len(whole)))
    if part.settings.tokens == "words":
        starts = [match.start() for match in text.WORD.finditer(whole)]
    tokens = text.tokens_of(whole, part.settings)
    at = tokens.index(wrong, len(tokens) - count)
    return whole.count("\n", 0, starts[at]) + 1
