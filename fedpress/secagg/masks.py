"""Masks: a short seed becomes as many pseudo-random words as the vector is long, added modulo 2^bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedpress.core.random import keystream
from fedpress.secagg.keys import derive

CHUNK = 1 << 17  # words worked on at a time, so that they stay in the cache


def word(bits: int) -> np.dtype:
    """Returns the unsigned type whose own overflow is a multiple of 2^bits, so that sums need no reduction."""
    return np.dtype("<u2" if bits <= 16 else "<u4" if bits <= 32 else "<u8")


def tensor_type(bits: int) -> torch.dtype:
    """Returns the type in which masked values from 0 to 2^bits - 1 travel."""
    return torch.int32 if bits <= 31 else torch.int64


def add_masks_(words: np.ndarray, seeds: Sequence[tuple[bytes, bool]]) -> None:
    """Adds to `words` [d] the mask of each seed, or subtracts it where the flag is False, in place.

    >>> words = np.zeros(3, np.uint32)
    >>> add_masks_(words, [(b"seed", True), (b"seed", False)])
    >>> words.tolist()
    [0, 0, 0]
    """
    keys = [(derive(seed, "mask"), plus) for seed, plus in seeds]
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK]
        for key, plus in keys:
            mask = keystream(key, part.nbytes, start=start * words.itemsize).view(words.dtype)
            if plus:
                part += mask
            else:
                part -= mask


def to_words(values: Tensor, bits: int) -> np.ndarray:
    """Returns whole numbers [d] modulo a power of two that is a multiple of 2^bits."""
    return values.detach().cpu().numpy().astype(word(bits))


def to_tensor(words: np.ndarray, bits: int) -> Tensor:
    """Returns `words` modulo 2^bits, as they travel."""
    kept = words & word(bits).type((1 << bits) - 1)
    return torch.from_numpy(kept.astype(np.int32 if bits <= 31 else np.int64))


def centred(words: np.ndarray, bits: int) -> Tensor:
    """Returns `words` modulo 2^bits as int64 from -2^(bits-1) to 2^(bits-1) - 1.

    >>> centred(np.array([0, 7, 8, 15], np.uint16), 4).tolist()
    [0, 7, -8, -1]
    """
    kept = (words & word(bits).type((1 << bits) - 1)).astype(np.int64)
    kept[kept >= 1 << (bits - 1)] -= 1 << bits
    return torch.from_numpy(kept)
