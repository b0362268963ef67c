"""Masks: pseudo-random vectors, expanded from 16-byte seeds, and added modulo 2^bits.

Two clients with the same seed have the same mask. One adds it and the other subtracts it, so the
mask cancels in the sum of their vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedpress.core.random import keystream
from fedpress.secagg.keys import derive

CHUNK = 1 << 17
"""Number of values in a chunk. All masks are added to one chunk, then to the next: a chunk stays in
the processor's cache."""


def word_type(bits: int) -> np.dtype:
    """Returns the smallest of uint16, uint32 and uint64 that has at least `bits` bits.

    Arithmetic in this type wraps around at a multiple of 2^bits, so intermediate sums need no
    reduction modulo 2^bits.
    """
    # Little-endian on every machine, because masks must be equal on all of them.
    if bits <= 16:
        return np.dtype("<u2")
    if bits <= 32:
        return np.dtype("<u4")
    return np.dtype("<u8")


def tensor_type(bits: int) -> torch.dtype:
    """Returns the type in which masked values are sent; see `to_tensor`."""
    return torch.int32 if bits <= 32 else torch.int64


def add_masks_(words: np.ndarray, seeds: Sequence[tuple[bytes, bool]]) -> None:
    """Adds masks to `words` [d] in place.

    Args:
        words: unsigned numbers of the type `word_type(bits)`.
        seeds: the seed of each mask, and whether the mask is added (True) or subtracted (False).

    >>> words = np.zeros(3, np.uint32)
    >>> add_masks_(words, [(b"seed", True), (b"seed", False)])
    >>> words.tolist()
    [0, 0, 0]
    """
    keys = [(derive(seed, "mask"), add) for seed, add in seeds]
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK]
        for key, add in keys:
            # `start`, in bytes, must be a multiple of the cipher's block size; `CHUNK` makes it so.
            mask = keystream(key, part.nbytes, start=start * words.itemsize).view(words.dtype)
            if add:
                part += mask
            else:
                part -= mask


def to_words(values: Tensor, bits: int) -> np.ndarray:
    """Converts whole numbers [d] to `word_type(bits)`, that is, modulo a multiple of 2^bits."""
    return values.detach().cpu().numpy().astype(word_type(bits))


def to_tensor(words: np.ndarray, bits: int) -> Tensor:
    """Converts `words` to a tensor for sending: `centred`, in the type `tensor_type`."""
    return centred(words, bits).to(tensor_type(bits))


def centred(words: np.ndarray, bits: int) -> Tensor:
    """Converts `words` modulo 2^bits to signed numbers, from -2^(bits-1) to 2^(bits-1) - 1.

    >>> centred(np.array([0, 7, 8, 15], np.uint16), 4).tolist()
    [0, 7, -8, -1]
    """
    # Shifted to the top of a signed type and back, which repeats the sign bit downwards.
    signed = np.dtype(f"<i{words.itemsize}")
    unused = 8 * words.itemsize - bits
    kept = (words << word_type(bits).type(unused)).view(signed) >> signed.type(unused)
    return torch.from_numpy(kept.astype(np.int64))
