"""Texts of three writers for tests of a private vocabulary, and the recipe that reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

LETTERS = "etaoinshrd"
"""The letters that are written, the most frequent one first."""
KEPT = 6
ASKING = """
[[stage]]
kind = "statistics"
privacy = { unit = "sample", epsilon = 4.0, delta = 1e-3 }
"""
TRAINING = """
[[stage]]
kind = "federate"
num_rounds = 2
batch_size = 20
privacy = { unit = "sample", epsilon = 8.0, delta = 1e-3 }
"""


class Keyboard(nn.Module):
    """Predicts the next token from the last one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 8)
        self.out = nn.Linear(8, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embedding(tokens)).transpose(1, 2)


def text_of(seed: int, length: int = 3000) -> str:
    """Returns letters, each less frequent than the one before in `LETTERS`."""
    shares = np.array([0.6**at for at in range(len(LETTERS))])
    drawn = np.random.default_rng(seed).choice(list(LETTERS), length, p=shares / shares.sum())
    # Spaces, so that there are words, too.
    return " ".join("".join(drawn[at : at + 100]) for at in range(0, length, 100))


def written(folder: Path, keys: str = "") -> str:
    """Writes the texts, and returns the tables [data] and [model] of a recipe for them."""
    folder.mkdir()
    for at in range(3):
        (folder / f"c{at}.txt").write_text(text_of(at))
    return f"""
name = "texts"
[data]
source = "text"
path = "{folder}"
statistics = "private"
{keys}
[data.text]
length = 10
vocabulary = {KEPT}
[model]
architecture = "tests.stages.statistics.texts:Keyboard"
arguments = {{ num_classes = {KEPT + 1} }}
"""
