"""Shortens the vocabulary of texts to the tokens that a private query has found frequent.

Until the answer is there, each candidate of the vocabulary has a number
(`FederatedData.awaits_statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.data.dataset import FederatedData
from fedpress.data.preparation import Preparation
from fedpress.data.preparation_parts import TextPart
from fedpress.errors import DataError
from fedpress.tasks import Language
from fedpress.tasks.base import IGNORED

CHARACTERS = tuple(
    "\t\n" + "".join(map(chr, [*range(0x20, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]))
)
"""Candidates if neither the recipe nor public texts name any: the printable characters of Latin-1,
tabulator and line break."""


def text_part(about: Preparation) -> TextPart:
    """Returns how texts become examples; `about` must be of the kind "text"."""
    assert isinstance(about.part, TextPart)
    return about.part


def shortened(about: Preparation, ranked: Sequence[str]) -> Preparation:
    """Returns a preparation whose vocabulary are the first tokens of `ranked`.

    Args:
        about: the preparation with all candidates, and the number of tokens to keep.
        ranked: candidates without the token 0, which is always kept; the most frequent ones first.
    """
    part = text_part(about)
    kept = set(ranked[: part.settings.vocabulary])
    unknown, *candidates = part.vocabulary
    names = (unknown, *(name for name in candidates if name in kept))
    settings = part.settings.model_copy(update={"vocabulary": None})
    return replace(about, part=replace(part, settings=settings, vocabulary=names))


def with_vocabulary(data: FederatedData, about: Preparation) -> FederatedData:
    """Returns the data with the vocabulary of `about`; other tokens become token 0.

    Raises:
        DataError: if the vocabulary has a token that is no candidate.
    """
    assert data.preparation is not None
    before, after = text_part(data.preparation), text_part(about)
    position = {name: at for at, name in enumerate(after.vocabulary)}
    if not position.keys() <= set(before.vocabulary):
        raise DataError(
            "the vocabulary of the model has tokens that are no candidates of these data",
            place="classes",
            cure="give the candidates with which the model was trained",
        )
    number = torch.tensor([position.get(name, 0) for name in before.vocabulary])

    def targets(y: Tensor) -> Tensor:
        found = number[y.clamp(min=0)]
        # As in training without a query: an unknown token is not asked for, unless it is a class.
        ignored = (y == IGNORED) | ((found == 0) & (not before.learns_unknown))
        return torch.where(ignored, IGNORED, found)

    def part(arrays: Arrays) -> Arrays:
        assert isinstance(arrays.x, Tensor)
        return Arrays(number[arrays.x], targets(arrays.y))

    public = part(data.public)
    assert isinstance(data.task, Language), "checked by the query"
    fitted = Language.fit(after.vocabulary, public.y)
    task = fitted.smoothed(data.task.label_smoothing)
    told = about.with_standardisation(data.preprocess, after.vocabulary, task.to_json())
    return replace(
        data,
        clients={name: part(arrays) for name, arrays in data.clients.items()},
        public=public,
        validation=part(data.validation),
        test=part(data.test),
        num_classes=len(after.vocabulary),
        class_names=after.vocabulary,
        task=task,
        preparation=told,
        awaits_statistics=False,
    )
