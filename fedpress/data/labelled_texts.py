"""Reads texts for a language model that was trained on other texts, by its vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch

from fedpress.core.examples import Arrays
from fedpress.data.preparation import Preparation
from fedpress.data.settings import DataSettings
from fedpress.data.text import UNKNOWN, read_text
from fedpress.data.vocabulary import text_part
from fedpress.errors import DataError
from fedpress.tasks.base import Task


def labelled_texts(
    path: Path, about: Preparation, settings: DataSettings, task: Task
) -> tuple[Arrays, int]:
    """Reads the sequences of a text, or of all texts in a folder.

    Takes and returns what `labelled_rows` does. Sequences without a target are left out.

    Raises:
        DataError: if a text cannot be read, is too short, or has no token of the vocabulary.
    """
    part = text_part(about)
    own = DataSettings.model_validate(
        {
            "source": "text",
            "path": path,
            "encoding": settings.encoding,
            "unknown": settings.unknown,
            # The vocabulary is that of the training.
            "classes": tuple(name for name in part.vocabulary if name != UNKNOWN),
            "text": part.settings.model_copy(update={"vocabulary": None}),
        }
    )
    found = read_text(own, None)
    assert found.targets is not None, "a source of texts has both"
    assert found.inputs is not None, "a source of texts has both"
    # No sequence is public, so nothing is learned from one.
    none = torch.arange(0)
    targets = found.targets(none)
    x = found.inputs(none).x
    if not len(x):
        raise DataError("it has no text", place=f"'{path}'", cure="give some")
    return Arrays(x[targets.known], targets.y[targets.known]), int((~targets.known).sum())
