"""A keyboard that guesses the next character: a small recurrent network."""

from __future__ import annotations

from torch import Tensor, nn


class Keyboard(nn.Module):
    """An embedding, a GRU and a linear layer.

    Args:
        num_classes: number of characters, with the unknown one.
        embedding: numbers that stand for a character.
        hidden: units of the GRU.
    """

    def __init__(self, num_classes: int = 61, embedding: int = 24, hidden: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_classes, embedding)
        self.read = nn.GRU(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps character numbers [n, length] to logits [n, num_classes, length]."""
        states, _ = self.read(self.embed(tokens))
        logits: Tensor = self.head(states).transpose(1, 2)
        return logits
