"""Streams of random numbers: one kind that everybody may know, one that privacy rests on, and torch's own.

The first two are made of 64-bit words by the arithmetic below and not by the samplers of numpy or torch, which may
change with a version: two machines must draw the same signs and places.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedpress.core.random import keystream, name_of, secret_key


class RandomSource(Protocol):
    """A stream of random numbers; every call goes on where the last one ended.

    `exact` asks mechanisms for outputs whose floating-point bits say nothing about the secret.
    """

    @property
    def exact(self) -> bool:
        """Whether noise must come out on a public grid."""
        ...

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns standard normals [shape]."""
        ...

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns numbers [shape] in [0, 1)."""
        ...

    def integers(self, high: int, *shape: int) -> Tensor:
        """Returns int64 [shape] from 0 to `high` - 1."""
        ...

    def permutation(self, size: int) -> Tensor:
        """Returns the numbers from 0 to `size` - 1 in random order, int64 [size]."""
        ...

    def subset(self, size: int, count: int) -> Tensor:
        """Returns `count` of the numbers from 0 to `size` - 1, each set as likely as any other, rising, int64."""
        ...

    def words(self, size: int) -> np.ndarray:
        """Returns 64 random bits each as uint64 [size]."""
        ...


class WordStream(ABC):
    """Random numbers made of a stream of 64-bit words."""

    @abstractmethod
    def words(self, size: int) -> np.ndarray:
        """Returns uint64 [size]: what each stream must have."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns standard normals [shape]: a sign and 63 bits of the lower half of the distribution function.

        Both tails are precise that way: the smallest probability is 2^-64, at 9 standard deviations.
        """
        from scipy.special import ndtri

        bits = self.words(math.prod(shape))
        half = ((bits >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
        below = ndtri(half)
        signed = np.where(bits & np.uint64(1), -below, below)
        return torch.from_numpy(signed).view(shape).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns numbers [shape] with as many random bits as the significand of `dtype` holds: 53, 24, 11 or 8."""
        digits = 1 - int(math.log2(torch.finfo(dtype).eps))
        whole = self.words(math.prod(shape)) >> np.uint64(64 - digits)
        return torch.from_numpy(whole.astype(np.float64) * 2.0**-digits).view(shape).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Returns int64 [shape] from 0 to `high` - 1; each is right to `high` / 2^64 of its probability."""
        if not 0 < high <= 2**63:
            raise ValueError(f"high: got {high}, expected a number from 1 to 2^63")
        drawn = self.words(math.prod(shape)) % np.uint64(high)
        return torch.from_numpy(drawn.astype(np.int64)).view(shape)

    def permutation(self, size: int) -> Tensor:
        """Returns int64 [size]: the order of as many words, all different but for a chance of size^2 / 2^65."""
        return torch.from_numpy(np.argsort(self.words(size), kind="stable").astype(np.int64))

    def subset(self, size: int, count: int) -> Tensor:
        """Returns int64 [count], rising: where the smallest of `size` words are; all of them if `count` is more."""
        if count < 0:
            raise ValueError(f"count: got {count}, expected 0 or more")
        drawn = self.words(size)
        if not 0 < count < size:
            return torch.arange(size)[:count]
        places = np.argpartition(drawn, count - 1)[:count]
        return torch.from_numpy(np.sort(places).astype(np.int64))


class PhiloxRandom(WordStream):
    """The Philox 4x64 stream of a 128-bit `key` (Salmon et al. 2011), for what everybody may know.

    Names of streams are hashed to the key, so that two of 2^32 streams are one with a chance below 2^-64. It is no
    cryptographic generator.

    >>> PhiloxRandom(1).words(1).tolist() == PhiloxRandom(1).words(2).tolist()[:1]
    True
    """

    exact = False

    def __init__(self, key: int) -> None:
        self._bits = np.random.Philox(key=key)

    def words(self, size: int) -> np.ndarray:
        """Returns uint64 [size]."""
        drawn: np.ndarray = self._bits.random_raw(size)
        return drawn


class AesCtrRandom(WordStream):
    """The AES-256-CTR stream of a secret 32-byte `key`: who does not hold the key cannot tell it from coin flips.

    All draws are made of `words`, so two calls for 3 and 5 words give what one call for 8 gives.

    Args:
        key: as secret as what is drawn.
        exact: whether noise must come out on a public grid; needless where the key is not secret, as in experiments.

    >>> AesCtrRandom(bytes(32)).words(1).tolist() == AesCtrRandom(bytes(32)).words(2).tolist()[:1]
    True
    """

    def __init__(self, key: bytes, *, exact: bool = True) -> None:
        if len(key) != 32:
            raise ValueError(
                f"key: got {len(key)} bytes, expected 32; make one with fedpress.core.random.secret_key"
            )
        self.exact = exact
        self._key = key
        self._drawn = 0

    def words(self, size: int) -> np.ndarray:
        """Returns uint64 [size], little-endian bytes of the stream."""
        skip = self._drawn % 2  # a block of the cipher holds two words
        stream = keystream(self._key, 8 * (size + skip), start=8 * (self._drawn - skip))
        self._drawn += size
        return stream.view("<u8")[skip:].astype(np.uint64, copy=False)


class TorchRandom:
    """The stream of a torch generator that somebody brings, on its device; without one, torch's global stream.

    It is no cryptographic generator: good for experiments, not for data that somebody wants to see.

    >>> TorchRandom(torch.Generator().manual_seed(1)).normal(2).dtype
    torch.float64
    """

    exact = False

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self._device = "cpu" if generator is None else generator.device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns standard normals [shape]; a float32 normal comes from 24 bits and ends at 5.8."""
        return torch.randn(shape, generator=self.generator, device=self._device, dtype=dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns numbers [shape]; the 24 bits of a float32 draw would bias small probabilities."""
        return torch.rand(shape, generator=self.generator, device=self._device, dtype=dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Returns int64 [shape]."""
        return torch.randint(high, shape, generator=self.generator, device=self._device)

    def permutation(self, size: int) -> Tensor:
        """Returns int64 [size]."""
        return torch.randperm(size, generator=self.generator, device=self._device)

    def subset(self, size: int, count: int) -> Tensor:
        """Returns int64 [count], rising."""
        return self.permutation(size)[:count].sort().values

    def words(self, size: int) -> np.ndarray:
        """Returns uint64 [size]."""
        drawn = torch.empty(size, dtype=torch.int64, device=self._device)
        drawn.random_(-(2**63), None, generator=self.generator)
        return drawn.cpu().numpy().view(np.uint64)


Source: TypeAlias = RandomSource | torch.Generator | None
"""What functions draw from; a bare generator counts as `TorchRandom`, None as torch's global one."""


def seed_torch_(chance: RandomSource) -> None:
    """Starts torch's global generators anew from `chance`, for draws inside a network such as dropout.

    `torch.manual_seed` keeps 32 bits of a seed on the CPU, few enough to try them all. So all 624 words of the
    Mersenne Twister's state are replaced. It stays no cryptographic generator, and with MKL one call of dropout hangs
    on 32 of its bits: masks are hidden by the noise on what is made with them, not by this alone.
    """
    torch.manual_seed(int(chance.words(1)[0] >> np.uint64(1)))
    state, words = torch.get_rng_state(), chance.words(312).astype("<u8").view("<u4")
    state.view(torch.int64)[3:627] = torch.from_numpy(words.astype(np.int64))
    torch.set_rng_state(state)


def chance_of(source: Source) -> RandomSource:
    """Returns `source` as a RandomSource."""
    if source is None or isinstance(source, torch.Generator):
        return TorchRandom(source)
    return source


def public_stream(seed: int, *words: str | int) -> PhiloxRandom:
    """Returns the stream named by `words` under `seed`, for what everybody may know; it begins anew at every call.

    >>> public_stream(1, "a").permutation(3).tolist() == public_stream(1, "a").permutation(3).tolist()
    True
    """
    digest = blake2b(name_of(seed, words), digest_size=16, person=b"public").digest()
    return PhiloxRandom(int.from_bytes(digest, "little"))


def private_stream(seed: int, *words: str | int, exact: bool = False) -> AesCtrRandom:
    """Returns the stream named by `words` under `seed`, as secret as `seed`, for what privacy rests on."""
    return AesCtrRandom(secret_key(seed, *words), exact=exact)
