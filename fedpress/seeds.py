"""Randomness as keys: a seed and some words name one stream, so nothing depends on the order of calls."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *words: str | int) -> int:
    """Returns the 63-bit seed of the stream named by `words` under `seed`; numpy's words count by their value.

    >>> derive(1, "round", 2) == derive(1, "round", 2)
    True
    >>> derive(1, "a", "bc") == derive(1, "ab", "c")
    False
    """
    text = repr((int(seed), *(str(w) if isinstance(w, str) else int(w) for w in words))).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *words: str | int) -> torch.Generator:
    """Returns a fresh CPU generator for the stream named by `words` under `seed`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *words))
