"""Random inputs of tests."""

import torch

from fedpress.core.random import derive


def generator(seed: int, *words: str | int) -> torch.Generator:
    """A torch generator for the inputs named by `words`."""
    return torch.Generator().manual_seed(derive(seed, *words))
