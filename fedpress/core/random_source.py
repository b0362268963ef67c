"""Draws random numbers: from Philox if they are public, from AES if secret, or from torch.

Philox and AES give 64-bit words, and this file turns the words into normals, uniforms and integers.
The samplers of numpy and torch are not used for Philox and AES: they may change with a version, but
server and clients must draw the same numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedpress.core.random import keystream, secret_key, stream_name
from fedpress.errors import RecipeError

BLOCK = 1 << 16
"""Number of words that are converted at a time. It is even, so that AES starts at a whole block."""


class RandomSource(Protocol):
    """A stream of random numbers; every call continues where the last call ended."""

    @property
    def exact(self) -> bool:
        """Whether noise mechanisms must round value + noise to a public grid.

        Without rounding, the low bits of a floating-point sum may reveal the value (Mironov 2012).
        """
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
        """Returns a uniformly random set of `count` numbers from 0 to `size` - 1, sorted, int64."""
        ...

    def words(self, size: int) -> np.ndarray:
        """Returns words of 64 random bits, uint64 [size]."""
        ...


class WordStream(ABC):
    """Random numbers computed from a stream of 64-bit words."""

    @abstractmethod
    def words(self, size: int) -> np.ndarray:
        """Returns the next words of the stream, uint64 [size]."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns standard normals [shape], by the inverse distribution function.

        One bit of a word is the sign. The other 63 bits are a probability below 1/2, so both tails
        are precise: the smallest probability is 2^-65, at 9.2 standard deviations.
        """
        return self._filled(torch.empty(shape, dtype=dtype), _normals)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns numbers [shape] with as many random bits as `dtype` has.

        These are 53 for float64, 24 for float32, 11 for float16 and 8 for bfloat16.
        """
        digits = 1 - int(math.log2(torch.finfo(dtype).eps))

        def uniforms(words: np.ndarray) -> np.ndarray:
            # More bits than the dtype holds would be rounded, perhaps up to 1, which is not in
            # [0, 1).
            whole: np.ndarray = (words >> np.uint64(64 - digits)).astype(np.float64)
            return whole * 2.0**-digits

        return self._filled(torch.empty(shape, dtype=dtype), uniforms)

    def _filled(self, out: Tensor, convert: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        """Fills `out` with numbers that `convert` makes of words, and returns it.

        It works on `BLOCK` numbers at a time: the words and steps of a whole vector would take
        twelve times the memory of its float32 values.
        """
        for part in out.view(-1).split(BLOCK):
            part.copy_(torch.from_numpy(convert(self.words(len(part)))))
        return out

    def integers(self, high: int, *shape: int) -> Tensor:
        """Returns int64 [shape] from 0 to `high` - 1.

        Each number is a word modulo `high`. So the probability of a number has a relative error of
        up to `high` / 2^64.
        """
        if not 0 < high <= 2**63:
            raise RecipeError(
                f"got {high}", place="high", cure="give a whole number from 1 to 2^63"
            )
        # Rejection sampling would be exact, but would draw a number of words that varies.
        drawn = self.words(math.prod(shape)) % np.uint64(high)
        return torch.from_numpy(drawn.astype(np.int64)).view(shape)

    def permutation(self, size: int) -> Tensor:
        """Returns int64 [size]: the order that sorts `size` random words.

        All orders are equally likely unless two words are equal, which has a probability below
        size^2 / 2^65.
        """
        return torch.from_numpy(np.argsort(self.words(size), kind="stable").astype(np.int64))

    def subset(self, size: int, count: int) -> Tensor:
        """Returns int64 [count], sorted: the positions of the `count` smallest of `size` words.

        If `count` is larger than `size`, it returns all `size` positions.
        """
        if count < 0:
            raise RecipeError(f"got {count}", place="count", cure="give 0 or more")
        # Drawn even if none is needed, so that later draws do not depend on `count`.
        drawn = self.words(size)
        if not 0 < count < size:
            return torch.arange(size)[:count]
        places = np.argpartition(drawn, count - 1)[:count]
        return torch.from_numpy(np.sort(places).astype(np.int64))


def _normals(words: np.ndarray) -> np.ndarray:
    """Returns a standard normal for each word; see `WordStream.normal`."""
    from scipy.special import ndtri

    # + 0.5 takes the middle of each of 2^63 intervals: at 0, ndtri would be infinite.
    probability = ((words >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
    below = ndtri(probability)
    signed: np.ndarray = np.where(words & np.uint64(1), -below, below)
    return signed


class PhiloxRandom(WordStream):
    """The Philox 4x64 stream of a 128-bit `key` (Salmon et al. 2011), for public draws.

    The key is a hash of the stream's name. Among 2^32 streams, two have the same key with a
    probability below 2^-64. Philox is not a cryptographic generator.

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
    """The AES-256-CTR stream of a secret 32-byte `key`, a cryptographic generator.

    A call for 3 words and a call for 5 words give the same words as one call for 8 words.

    Args:
        key: 32 bytes, as secret as the noise must be.
        exact: whether noise must be rounded to a public grid (see `RandomSource.exact`). This is
            not needed if the key is not secret, as in experiments.

    >>> AesCtrRandom(bytes(32)).words(1).tolist() == AesCtrRandom(bytes(32)).words(2).tolist()[:1]
    True
    """

    def __init__(self, key: bytes, *, exact: bool = True) -> None:
        if len(key) != 32:
            raise RecipeError(
                f"got {len(key)} bytes, expected 32",
                place="key",
                cure="make one with fedpress.core.random.secret_key",
            )
        self.exact = exact
        self._key = key
        self._drawn = 0

    def words(self, size: int) -> np.ndarray:
        """Returns uint64 [size], from little-endian bytes of the stream."""
        # A block of AES is two words, and `keystream` can start only at a block.
        skip = self._drawn % 2
        stream = keystream(self._key, 8 * (size + skip), start=8 * (self._drawn - skip))
        self._drawn += size
        return stream.view("<u8")[skip:].astype(np.uint64, copy=False)


class TorchRandom:
    """The stream of a torch generator, drawn on its device; None means torch's global generator.

    It is not a cryptographic generator: use it for experiments, not to protect data.

    >>> TorchRandom(torch.Generator().manual_seed(1)).normal(2).dtype
    torch.float64
    """

    exact = False

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self._device = "cpu" if generator is None else generator.device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns standard normals [shape]; in float32 they have 24 bits and stay within +-5.8."""
        return torch.randn(shape, generator=self.generator, device=self._device, dtype=dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Returns numbers [shape]; float32 has 24 bits, so `u < p` is biased for small p."""
        return torch.rand(shape, generator=self.generator, device=self._device, dtype=dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Returns int64 [shape]."""
        return torch.randint(high, shape, generator=self.generator, device=self._device)

    def permutation(self, size: int) -> Tensor:
        """Returns int64 [size]."""
        return torch.randperm(size, generator=self.generator, device=self._device)

    def subset(self, size: int, count: int) -> Tensor:
        """Returns int64 [count], sorted."""
        return self.permutation(size)[:count].sort().values

    def words(self, size: int) -> np.ndarray:
        """Returns uint64 [size]."""
        drawn = torch.empty(size, dtype=torch.int64, device=self._device)
        # From -2^63 with no upper end, so that all 64 bits are random.
        drawn.random_(-(2**63), None, generator=self.generator)
        return drawn.cpu().numpy().view(np.uint64)


Source: TypeAlias = RandomSource | torch.Generator | None
"""What `as_random_source` takes: a random source, a torch generator, or None for the global one."""


def seed_generators_(seed: int) -> None:
    """Seeds torch's global generators, as `torch.manual_seed` does, with the same numbers drawn.

    `torch.manual_seed` also keeps a request, with the text of the call stack, for each kind of
    accelerator that is not in use: this takes longer than a step of a small network, and the
    requests are never removed. Here only the CPU and accelerators in use are seeded.
    """
    if torch.cuda.is_initialized() or torch.xpu.is_initialized() or torch.backends.mps.is_built():
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)


def seed_torch_(chance: RandomSource) -> None:
    """Seeds torch's global generators from `chance`, for draws inside of a network such as dropout.

    On the CPU `torch.manual_seed` uses only 32 bits of a seed, so an attacker could try all seeds.
    The 624 words of the state of torch's generator (Mersenne Twister) are therefore replaced too.
    The generator is still not cryptographic, and with MKL a call of dropout depends on only 32 of
    its bits. Do not rely on secret dropout masks: the noise on the gradients protects the data.
    """
    seed_generators_(int(chance.words(1)[0] >> np.uint64(1)))
    state = torch.get_rng_state()
    # 312 words of 64 bits are the 624 of 32 bits, which torch stores as int64 from position 3 on.
    words = chance.words(312).astype("<u8").view("<u4")
    state.view(torch.int64)[3:627] = torch.from_numpy(words.astype(np.int64))
    torch.set_rng_state(state)


def as_random_source(source: Source) -> RandomSource:
    """Returns `source` as a RandomSource: torch generators are wrapped in `TorchRandom`."""
    if source is None or isinstance(source, torch.Generator):
        return TorchRandom(source)
    return source


def public_stream(seed: int, *words: str | int) -> PhiloxRandom:
    """Returns the stream named by `words` under `seed`, for public draws.

    Every call returns the stream from its start.

    >>> first, again = public_stream(1, "a"), public_stream(1, "a")
    >>> first.permutation(3).tolist() == again.permutation(3).tolist()
    True
    """
    digest = blake2b(stream_name(seed, words), digest_size=16, person=b"public").digest()
    return PhiloxRandom(int.from_bytes(digest, "little"))


def private_stream(seed: int, *words: str | int, exact: bool = False) -> AesCtrRandom:
    """Returns the stream named by `words` under `seed`, for noise and keys; as secret as `seed`.

    `exact` has the meaning that it has in `AesCtrRandom`.
    """
    return AesCtrRandom(secret_key(seed, *words), exact=exact)
