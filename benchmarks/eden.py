"""The rivals: EDEN (random rotation, the best levels for a Gaussian), uniform levels with zstd, and NNCodec.

S. Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated Learning"
(ICML 2022): any rate by a mix of two numbers of bits, below one bit by sending a random part of the rotated values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import zstandard
from numpy.typing import NDArray
from scipy.stats import norm

Floats = NDArray[np.float32]
BLOCK = 1 << 13  # values rotated together: larger ones change nothing but what is padded


@cache
def centroids(bits: int) -> NDArray[np.float64]:
    """Returns the 2**bits Lloyd-Max levels of a standard Gaussian."""
    levels = norm.ppf((np.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(20_000):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = np.diff(norm.cdf(edges))
        new = -np.diff(norm.pdf(edges)) / mass
        if np.abs(new - levels).max() < 1e-9:
            break
        levels = new
    return new


def rotate_(x: Floats) -> Floats:
    """Applies the orthonormal Hadamard transform to each row of `x` [n, power of two], in place."""
    width = 1
    while width < x.shape[1]:
        pairs = x.reshape(x.shape[0], -1, 2, width)
        left, right = pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]
        pairs[:, :, 0], pairs[:, :, 1] = left, right
        width *= 2
    x /= np.float32(np.sqrt(x.shape[1]))
    return x


@dataclass(frozen=True)
class Eden:
    """EDEN at `rate` bits a value: unbiased, or with the scale of the least error."""

    rate: float
    unbiased: bool

    def encode(self, x: Floats, seed: int) -> bytes:
        """Returns levels of fixed numbers of bits, then one float32 scale a block."""
        signs, taken, fine = self._shared(x.size, seed)
        rows = np.zeros(-(-x.size // BLOCK) * BLOCK, np.float32)
        rows[: x.size] = x
        rows = rotate_((rows * signs).reshape(-1, BLOCK))
        norms = np.sqrt(np.square(rows, dtype=np.float64).sum(1))
        unit = rows * (np.sqrt(BLOCK) / np.maximum(norms, 1e-30))[:, None].astype(np.float32)
        low = max(int(self.rate), 1)
        out, read = [], np.zeros_like(unit)
        for bits, here in ((low, taken & ~fine), (low + 1, fine)):
            if not here.any():
                continue
            levels = centroids(bits)
            index = np.searchsorted(((levels[1:] + levels[:-1]) / 2).astype(np.float32), unit[here])
            read[here] = levels[index]
            out += [np.packbits(index >> at & 1).tobytes() for at in range(bits)]
        product = np.einsum("ij,ij->i", unit, read, dtype=np.float64)
        square = np.einsum("ij,ij->i", read, read, dtype=np.float64)
        # unbiased over which values are taken: their part of the squared norm is counted at its expectation
        kept = np.einsum("ij,ij->i", unit * taken, unit, dtype=np.float64)
        part = taken.sum(1) / BLOCK
        scale = kept / product / part if self.unbiased else product / square
        scales = (scale * norms / np.sqrt(BLOCK)).astype("<f4")
        return b"".join(out) + scales.tobytes()

    def decode(self, data: bytes, size: int, seed: int) -> Floats:
        """Undoes `encode`."""
        signs, taken, fine = self._shared(size, seed)
        blocks = -(-size // BLOCK)
        read = np.zeros((blocks, BLOCK), np.float32)
        low, at = max(int(self.rate), 1), 0
        for bits, here in ((low, taken & ~fine), (low + 1, fine)):
            count = int(here.sum())
            if not count:
                continue
            index = np.zeros(count, np.intp)
            for plane in range(bits):
                packed = np.frombuffer(data, np.uint8, -(-count // 8), at)
                index |= np.unpackbits(packed, count=count).astype(np.intp) << plane
                at += packed.size
            read[here] = centroids(bits)[index]
        read *= np.frombuffer(data, "<f4", blocks, at)[:, None]
        return (rotate_(read).reshape(-1) * signs)[:size]

    def _shared(self, size: int, seed: int) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
        """Signs, which rotated values are sent, and which of them with one bit more."""
        chance = np.random.default_rng(seed)
        shape = (-(-size // BLOCK), BLOCK)
        signs = chance.integers(0, 2, shape[0] * BLOCK, np.int8).astype(np.float32) * 2 - 1
        drawn = chance.random(shape, np.float32) if self.rate % 1 else np.zeros(shape, np.float32)
        if self.rate < 1:
            return signs, drawn < self.rate, np.zeros(shape, bool)
        return signs, np.ones(shape, bool), (drawn < self.rate % 1) & (self.rate % 1 > 0)


@dataclass(frozen=True)
class UniformZstd:
    """Uniform levels of which zstd at its default level makes `rate` bits a value; the step is found by trying."""

    rate: float

    def encode(self, x: Floats, seed: int) -> bytes:
        """Returns a float32 step and the compressed levels, one or two bytes each."""
        del seed
        low, high = 1e-4, 16.0  # in standard deviations
        spread = float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
        some = (
            x
            if x.size < 1 << 19
            else x[: x.size // 512 * 512].reshape(-1, 512)[:: x.size >> 18].reshape(-1)
        )
        for _ in range(18):
            step = (low * high) ** 0.5
            if 8 * len(self._coded(some, step * spread)) > self.rate * some.size:
                low = step
            else:
                high = step
        return self._coded(x, high * spread)

    def decode(self, data: bytes, size: int, seed: int) -> Floats:
        """Undoes `encode`."""
        del seed
        step = np.frombuffer(data, "<f4", 1)[0]
        levels = zstandard.ZstdDecompressor().decompress(data[4:])
        return (
            np.frombuffer(levels, np.int8 if len(levels) == size else np.int16).astype(np.float32)
            * step
        )

    @staticmethod
    def _coded(x: Floats, step: float) -> bytes:
        levels = np.clip(np.rint(x / np.float32(step)), -32767, 32767)
        small = np.abs(levels).max(initial=0) < 128
        coded = zstandard.ZstdCompressor(level=3).compress(
            levels.astype(np.int8 if small else np.int16).tobytes()
        )
        return np.float32(step).astype("<f4").tobytes() + coded


@dataclass(frozen=True)
class Nncodec:
    """The quantizer and arithmetic coder of NNCodec 2 (ISO/IEC 15938-17) at `rate` bits a value, as rows of 512 values.

    `trellis` is its dependent quantization. It comes without its other dependencies: `pip install --no-deps nncodec`.
    """

    rate: float
    trellis: bool
    width = 512
    density = 4  # steps in an octave: two to this power

    def encode(self, x: Floats, seed: int) -> bytes:
        """Returns the index of the step, the spread, and the stream of the smallest step that keeps to the rate."""
        del seed
        spread = np.float32(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
        rows = np.zeros((-(-x.size // self.width), self.width), np.float32)
        rows.reshape(-1)[: x.size] = x / spread
        low, high = -96, 80
        while high - low > 1:
            step = (low + high) // 2
            if 8 * len(self._coded(rows, step)) > self.rate * x.size:
                low = step
            else:
                high = step
        return np.array([high], "<i4").tobytes() + spread.tobytes() + self._coded(rows, high)

    def _coded(self, rows: Floats, step: int) -> bytes:
        from nncodec.extensions.deepCABAC import Encoder, HdspMode

        levels, none = np.zeros(rows.shape, np.int32), np.array([], np.int8)
        encoder = Encoder()
        encoder.initCtxModels(10, 0)
        encoder.quantLayer(rows, levels, self.trellis, self.density, step, 0.0, 10, 0, 0)
        encoder = Encoder()
        encoder.initCtxModels(11, 0)
        skip = np.zeros(len(rows), np.int32)
        encoder.encodeLayer(levels, self.trellis, 0, 0, 0, 0, skip, HdspMode.AlwaysOff, none, 0, 0)
        return bytes(encoder.finish().tobytes())

    def decode(self, data: bytes, size: int, seed: int) -> Floats:
        """Undoes `encode`."""
        from nncodec.extensions.deepCABAC import Decoder, HdspMode

        del seed
        step, spread = int(np.frombuffer(data, "<i4", 1)[0]), np.frombuffer(data, "<f4", 1, 4)[0]
        shape = (-(-size // self.width), self.width)
        levels, read = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        decoder = Decoder()
        decoder.setStream(np.frombuffer(data, np.uint8, offset=8).copy())
        decoder.initCtxModels(11)
        decoder.decodeLayer(
            levels, self.trellis, 0, 0, 0, HdspMode.AlwaysOff, np.array([], np.int8), 0, 0
        )
        decoder.dequantLayer(read, levels, self.density, step, 0)
        return read.reshape(-1)[:size] * spread
