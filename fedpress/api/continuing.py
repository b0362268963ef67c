"""Continues texts with a language model: the most probable next token, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpress.api.predictors import Predictor
from fedpress.data import Preparation
from fedpress.data.preparation_parts import TextPart
from fedpress.data.raw_inputs import RawInputs, Table
from fedpress.data.raw_texts import last_tokens
from fedpress.errors import DataError


def next_logits(outputs: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """Returns the logits [n, vocabulary] of the token after each text.

    Args:
        outputs: logits at each position, [n, vocabulary, length].
        texts: the tokens of each text, at most `length`.
    """
    last = torch.tensor([len(tokens) - 1 for tokens in texts])
    return outputs[torch.arange(len(texts)), :, last]


def continuations(
    predictor: Predictor, raw: RawInputs, about: Preparation, logits: Tensor, count: int
) -> Table:
    """Returns a table with the next token of each text, its probability, and a continuation.

    Args:
        predictor: the language model.
        raw: the texts.
        about: the preparation of the model.
        logits: logits of the token after each text, [n, vocabulary].
        count: number of tokens of a continuation.

    Raises:
        DataError: if `count` is not above 0.
    """
    part = about.part
    assert isinstance(part, TextPart), "texts are prepared by it"
    if count < 1:
        raise DataError(f"got {count}, expected a number above 0", place="tokens", cure="give 20")
    length = part.settings.length
    texts = [list(tokens) for tokens in raw.tokens]
    added: list[list[str]] = [[] for _ in texts]
    best = logits.softmax(1).max(1)
    following = best.indices
    for number in range(count):
        for text, words, token in zip(texts, added, following.tolist(), strict=True):
            text.append(token)
            words.append(part.vocabulary[token])
        if number + 1 < count:
            texts = [text[-length:] for text in texts]
            outputs, _ = predictor.outputs(last_tokens(texts, length), raw=True)
            following = next_logits(outputs, texts).argmax(1)
    # Words are joined by spaces, which are no tokens.
    between = "" if part.settings.tokens == "characters" else " "
    columns = [
        *raw.names.values(),
        [words[0] for words in added],
        best.values.tolist(),
        [between.join(words) for words in added],
    ]
    header = [*raw.names, "next", "probability", "continuation"]
    return header, [list(row) for row in zip(*columns, strict=True)]
