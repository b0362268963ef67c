"""Where private noise draws from: a seeded generator for science, a cipher's stream for deployment."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedpress.core.random import keystream


class RandomSource(Protocol):
    """A stream of random numbers; every call goes on where the last one ended.

    `exact` asks mechanisms for outputs whose floating-point bits say nothing about the secret.
    """

    @property
    def exact(self) -> bool:
        """Whether noise must come out on a public grid."""
        ...

    def normal(self, size: int) -> Tensor:
        """Returns standard normals [size], float64."""
        ...

    def uniform(self, size: int) -> Tensor:
        """Returns numbers [size] in [0, 1), float64."""
        ...

    def words(self, size: int) -> np.ndarray:
        """Returns 64 random bits each as uint64 [size]."""
        ...


class TorchRandom:
    """The stream of a torch generator: the same bits from the same seed, on the generator's device.

    It is no cryptographic generator: good for experiments, not for data that somebody wants to see.

    >>> TorchRandom(torch.Generator().manual_seed(1)).normal(2).dtype
    torch.float64
    """

    exact = False

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, size: int) -> Tensor:
        """Returns standard normals [size]; a float32 normal would come from 24 bits and end at 5.8."""
        return torch.randn(
            size, generator=self.generator, device=self.generator.device, dtype=torch.float64
        )

    def uniform(self, size: int) -> Tensor:
        """Returns numbers [size]; the 24 bits of a float32 draw would bias small probabilities."""
        return torch.rand(
            size, generator=self.generator, device=self.generator.device, dtype=torch.float64
        )

    def words(self, size: int) -> np.ndarray:
        """Returns uint64 [size]."""
        at = self.generator.device
        drawn = torch.empty(size, dtype=torch.int64, device=at).random_(
            -(2**63), None, generator=self.generator
        )
        return drawn.cpu().numpy().view(np.uint64)


class AesCtrRandom:
    """The AES-256-CTR stream of a secret 32-byte `key`: who does not hold the key cannot tell it from coin flips.

    All draws are made of `words`, so two calls for 3 and 5 words give what one call for 8 gives.

    >>> AesCtrRandom(bytes(32)).words(1).tolist() == AesCtrRandom(bytes(32)).words(2).tolist()[:1]
    True
    """

    exact = True

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(
                f"key: got {len(key)} bytes, expected 32; make one with fedpress.core.random.secret_key"
            )
        self._key = key
        self._drawn = 0

    def normal(self, size: int) -> Tensor:
        """Returns standard normals [size]: a sign and 63 bits of the lower half of the distribution function.

        Both tails are precise that way: the smallest probability is 2^-64, at 9 standard deviations.
        """
        from scipy.special import ndtri

        bits = self.words(size)
        half = ((bits >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
        below = ndtri(half)
        return torch.from_numpy(np.where(bits & np.uint64(1), -below, below))

    def uniform(self, size: int) -> Tensor:
        """Returns numbers [size] with 53 random bits each."""
        return torch.from_numpy((self.words(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def words(self, size: int) -> np.ndarray:
        """Returns uint64 [size], little-endian bytes of the stream."""
        skip = self._drawn % 2  # a block of the cipher holds two words
        stream = keystream(self._key, 8 * (size + skip), start=8 * (self._drawn - skip))
        self._drawn += size
        return stream.view("<u8")[skip:].astype(np.uint64, copy=False)


Source: TypeAlias = RandomSource | torch.Generator
"""What private functions draw from; a bare generator counts as `TorchRandom`."""


def chance_of(source: Source) -> RandomSource:
    """Returns `source` as a RandomSource."""
    return TorchRandom(source) if isinstance(source, torch.Generator) else source
