"""Quantize: few levels instead of floats, at a number of bits per value that packing then reaches.

`rate` is a target in bits per value *after* packing: a uniform grid so coarse that entropy coding ends up there. At
every rate that takes fewer bits than a fixed number of levels; at high rates it is 0.25 bits above Shannon's limit
(Gish and Pierce 1968). The unbiased form adds dither that both sides draw from the key and the reader subtracts
(Roberts 1962; Zamir and Feder 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedpress import seeds
from fedpress.errors import RecipeError, WireError
from fedpress.federate.transforms.base import Bound, Encoded, Key, Transform
from fedpress.wire.packing import estimate_bits

Floats = NDArray[np.float32]
Ints = NDArray[np.signedinteger]

CHUNK = 1 << 16  # values at a time: what stays in the cache is several times as fast
SAMPLE_RUN, SAMPLE_RUNS = 256, 1024
SIDE_BYTES = 40  # of the scales of the unbiased form, besides their content
ROUNDING = 0.48  # below 1/2: a few values more become zero, which saves more bits than it costs precision
FLOAT_MAX = float(np.finfo(np.float32).max)
FLOAT_MIN = float(np.finfo(np.float32).smallest_subnormal)
LARGEST = 1 << 30  # largest level
DTYPES = {torch.int8: 1 << 7, torch.int16: 1 << 15, torch.int32: 1 << 31}
SLACK = 0.004  # bits a value below the target that are aimed at, since the search looks at a sample
TOLERANCE = 0.004  # bits a value below what is aimed at where the search for the step ends
SPARSE_RATE = 0.2  # below it few values are not zero, and a sample alone misjudges them
HALVES = 24  # block scales reach 2**(-12) to 2**12 times the median


class Quantize(BaseModel):
    """Rounds an update to a grid: `rate` bits per value after packing, or `bits` bits with a scale for each block.

    >>> Quantize(rate=1.0).bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["quantize"] = "quantize"
    rate: float | None = Field(default=None, ge=0.05, le=8, allow_inf_nan=False)
    bits: int | None = Field(default=None, ge=2, le=16)
    unbiased: bool = False
    block: int = Field(default=256, ge=16, le=1 << 20)

    @model_validator(mode="after")
    def _one_of_two(self) -> Quantize:
        if (self.rate is None) == (self.bits is None):
            raise ValueError("give either rate (bits per value after packing) or bits (levels of a fixed grid)")
        return self

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Promises whole numbers; their norm is in units of a step that depends on the update."""
        size, after = _bound(self.kind, bound)
        if self.bits is not None:
            return _Grid(size, self.block, (1 << (self.bits - 1)) - 1, self.unbiased), after
        assert self.rate is not None
        if self.unbiased:
            return _Dithered(size, self.block, self.rate), after
        return _Centroids(size, self.rate), after


class Sign(BaseModel):
    """One bit a value: its sign, times the mean absolute value of its block (Bernstein et al. 2018).

    >>> Sign().bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sign"] = "sign"
    block: int = Field(default=4096, ge=16, le=1 << 20)

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Promises whole numbers."""
        size, after = _bound(self.kind, bound)
        return _Sign(size, self.block), after


class Ternary(BaseModel):
    """Minus one, zero or one, times a scale for each block.

    Biased: zero below 0.7 times the mean absolute value (Li, Zhang, Liu 2016). Unbiased: one with probability |x| over
    the block's maximum (Wen et al. 2017, TernGrad).

    >>> Ternary().bind(Bound(size=3))[1].integer
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ternary"] = "ternary"
    block: int = Field(default=4096, ge=16, le=1 << 20)
    unbiased: bool = False

    def bind(self, bound: Bound) -> tuple[Transform, Bound]:
        """Promises whole numbers."""
        size, after = _bound(self.kind, bound)
        return (_Grid(size, self.block, 1, True) if self.unbiased else _Ternary(size, self.block)), after


def _bound(kind: str, bound: Bound) -> tuple[int, Bound]:
    if bound.integer:
        raise RecipeError(f"transforms.{kind}: the values before it are whole numbers already; put '{kind}' first")
    return bound.size, Bound(size=bound.size, integer=True)


@dataclass(frozen=True)
class _Centroids:
    """The biased quantizer at a rate: a uniform grid, read back at the mean of what fell on each level."""

    size: int
    rate: float
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        values, peak = _numpy(x, self.size)
        if not peak:
            return Encoded(torch.zeros(self.size, dtype=torch.int8), {"levels": torch.ones(1)})
        sample = _sample(values) / peak
        share = sample.size / self.size

        def bits(step: float) -> float:
            return estimate_bits(_rounded(sample, step, np.int32), share=share)

        target = _target(self.rate, self.size) * share
        step = _search(bits, target, 4 * 2.0**-self.rate * _rms(sample), sample.size)
        q = _rounded(values, _width(step, peak), _dtype(1 / step + 1))
        if self.rate < SPARSE_RATE and share < 1:
            step = _search(bits, target * bits(step) / (estimate_bits(q) * share), step, sample.size)
            q = _rounded(values, _width(step, peak), _dtype(1 / step + 1))
        levels = _levels(sample, step)
        grid = torch.tensor([_width(step, peak), *levels], dtype=torch.float32)
        return Encoded(torch.from_numpy(q), {"levels": grid})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        q = _whole(x, (self.size,), ("levels",))
        levels = _floats(x, "levels", None, least=1)
        step, offsets = levels[0], levels[1:]
        if step <= 0 or len(offsets) > 64 or np.abs(offsets).max(initial=0) > 1:
            raise WireError(f"update.levels: got step {step} with offsets {offsets[:4]}; expected a positive step")
        near = np.arange(len(offsets) + 1, dtype=np.float64)
        near[1:] -= offsets
        return torch.from_numpy(_read(q, float(step), near))


@dataclass(frozen=True)
class _Grid:
    """`top` levels on each side of zero and a scale for each block; unbiased by rounding at random."""

    size: int
    block: int
    top: int
    unbiased: bool
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        values, _ = _numpy(x, self.size)
        peaks = _over_blocks(np.maximum, np.abs(values), self.block)
        scales = (peaks / np.float32(self.top)).astype(np.float32)
        scales[scales * np.float64(self.top) < peaks] = np.nextafter(
            scales[scales * np.float64(self.top) < peaks], np.float32(np.inf)
        )
        q = np.empty(self.size, _dtype(self.top))
        noise = _uniform(key, self.size) if self.unbiased else None
        for at, end, scale in _chunks(self.size, self.block, scales):
            part = np.divide(values[at:end], scale, out=np.zeros(end - at, np.float32), where=scale > 0)
            if noise is None:
                np.rint(part, out=part)
            else:
                part += noise[at:end]
                np.floor(part, out=part)
            q[at:end] = np.clip(part, -self.top, self.top)
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        return torch.from_numpy(_scaled(x, self.size, self.block, self.top))


@dataclass(frozen=True)
class _Sign:
    """The sign of each value and the mean absolute value of each block."""

    size: int
    block: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        values, _ = _numpy(x, self.size)
        scales = _block_means(np.abs(values), self.block)
        q = np.where(np.signbit(values), np.int8(-1), np.int8(1))
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        return torch.from_numpy(_scaled(x, self.size, self.block, 1))


@dataclass(frozen=True)
class _Ternary:
    """Zero below a threshold; the others become the mean of their absolute values."""

    size: int
    block: int
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        values, _ = _numpy(x, self.size)
        sizes = np.abs(values)
        threshold = np.float32(0.7) * _block_means(sizes, self.block)
        q = np.zeros(self.size, np.int8)
        for at, end, limit in _chunks(self.size, self.block, threshold):
            q[at:end] = np.sign(values[at:end]) * (sizes[at:end] > limit)
        kept = _block_means(sizes * np.abs(q), self.block).astype(np.float64)
        share = _block_means(np.abs(q).astype(np.float32), self.block)
        scales = np.divide(kept, share, out=np.zeros_like(kept), where=share > 0).astype(np.float32)
        return Encoded(torch.from_numpy(q), {"scales": torch.from_numpy(scales)})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        return torch.from_numpy(_scaled(x, self.size, self.block, 1))


@dataclass(frozen=True)
class _Dithered:
    """The unbiased quantizer at a rate.

    At low rates one value of every `group` is kept, drawn from the key, and counts `group` times. Each block has a step
    of its own: where the values are small a coarse step would cost no bits but its noise counts. And the dither has a
    coarse part, the phase, that depends on the place: values of one phase stand in one row, whose frequency table then
    knows the phase.
    """

    size: int
    block: int
    rate: float
    additive = False

    @property
    def group(self) -> int:
        """Of how many values one is kept."""
        return max(1, round(0.85 / self.rate))

    @property
    def kept(self) -> int:
        """Number of kept values."""
        return -(-self.size // self.group)

    @property
    def rows(self) -> int:
        """Number of phases: few where their tables would cost too much."""
        return next(rows for rows, least in ((8, 1 << 15), (4, 1 << 13), (2, 1 << 10), (1, 0)) if self.kept >= least)

    def encode(self, x: Tensor, key: Key) -> Encoded:
        values, peak = _numpy(x, self.size)
        if np.count_nonzero(values) * 2 <= self.size:
            return self._encode_sparse(values, peak, key)
        picked = self._pick(values, key)
        phases = self.rows
        y = np.zeros(-(-len(picked) // phases) * phases, np.float32)
        np.divide(picked, peak, out=y[: len(picked)])
        spread = np.sqrt(_block_means(y * y, self.block).astype(np.float64))
        middle = float(np.float32(max(np.median(spread), 1e-6)))
        with np.errstate(divide="ignore"):
            halves = np.clip(np.rint(2 * np.log2(spread / middle)), -HALVES, HALVES).astype(np.int8)
        u = self._dither(len(y), key)
        at = self._sampled(spread, len(y))
        some, some_u = y[at], u[at]
        some_halves = halves[at // self.block].astype(np.intp) + HALVES
        share = some.size / len(y)

        def bits(root: float) -> float:
            steps = _steps(middle, root * root).astype(np.float32)[some_halves]
            q = np.rint(some / steps + some_u).astype(np.int32)
            return estimate_bits(self._to_rows(q, key).reshape(-1), rows=self.rows, share=share)

        budget = _target(self.rate, self.size, SIDE_BYTES + int(estimate_bits(halves)) // 8)
        noise = 1 / (4.0 ** max(self.rate * self.group - 0.25, 0.1) - 1)  # of a Gaussian, over its variance
        root = _search(bits, budget * share, math.sqrt(noise * (noise + 1)), some.size, 1024.0)
        level = float(np.float32(root * root))
        steps = _steps(middle, level)[halves.astype(np.intp) + HALVES].astype(np.float32)
        q = np.empty(len(y), _dtype(float(np.abs(y).max() / steps.min()) + 1))
        for start, end, step in _chunks(len(y), self.block, steps):
            part = y[start:end] / step
            part += u[start:end]
            q[start:end] = np.rint(part, out=part)
        side = {"scales": torch.from_numpy(halves), "grid": torch.tensor([peak, middle, level], dtype=torch.float32)}
        return Encoded(torch.from_numpy(self._to_rows(q, key)), side)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        if x.values.ndim == 1:
            return torch.from_numpy(self._decode_sparse(x, key))
        phases = self.rows
        columns = -(-self.kept // phases)
        q = _whole(x, (phases, columns), ("scales", "grid"))
        grid = _floats(x, "grid", 3)
        halves = x.side["scales"]
        if halves.dtype != torch.int8 or halves.shape != (-(-columns * phases // self.block),):
            raise WireError(f"update.scales: got {halves.dtype} {tuple(halves.shape)}; expected int8, one for a block")
        if int(halves.abs().max()) > HALVES or halves.min() < -HALVES:
            raise WireError(f"update.scales: expected -{HALVES} to {HALVES}")
        if grid.min() <= 0:
            raise WireError(f"update.grid: got {grid.tolist()}; expected positive numbers")
        peak, middle, level = map(float, grid)
        steps = _steps(middle, level)[halves.numpy().astype(np.intp) + HALVES].astype(np.float32)
        u = self._dither(columns * phases, key)
        natural = self._from_rows(q, key)
        y = np.empty(columns * phases, np.float32)
        for start, end, step in _chunks(len(y), self.block, steps):
            part = natural[start:end] - u[start:end]
            part *= step
            y[start:end] = part
        y *= np.float32(self.group)
        limit = FLOAT_MAX / max(peak, 1.0)
        out = np.clip(y[: self.kept], -limit, limit) * np.float32(peak)
        return torch.from_numpy(self._put_back(out, key))

    def _sampled(self, spread: NDArray[np.float64], size: int) -> NDArray[np.intp]:
        """Places in blocks as loud and as quiet as all are; each run of them begins with the first phase."""
        whole = size // self.block
        if size <= SAMPLE_RUN * SAMPLE_RUNS or whole < 2:
            return np.arange(size)
        blocks = _evenly(spread[:whole], max(min(SAMPLE_RUN * SAMPLE_RUNS // self.block, whole), 1))
        starts = blocks * self.block // self.rows * self.rows
        return (starts[:, None] + np.arange(self.block // self.rows * self.rows)).reshape(-1)

    def _encode_sparse(self, values: Floats, peak: float, key: Key) -> Encoded:
        """Zeros stay zero and have level 0 for themselves: what rounds to 0 or more moves up by one."""
        full = np.flatnonzero(values)
        if not len(full):
            return Encoded(torch.zeros(self.size, dtype=torch.int8), {"grid": torch.ones(1)})
        y = values[full] / np.float32(peak)
        u = self._dither(self.size, key)[full]

        def levels(step: float) -> Ints:
            q = np.zeros(self.size, _dtype(1 / step + 2))
            rounded = np.rint(y / np.float32(step) + u)
            q[full] = rounded + (rounded >= 0)
            return q

        def bits(step: float) -> float:
            return estimate_bits(levels(step))

        step = float(np.float32(_search(bits, _target(self.rate, self.size), _rms(y), self.size, 4.0)))
        return Encoded(
            torch.from_numpy(levels(step)), {"grid": torch.tensor([_width(step, peak)], dtype=torch.float32)}
        )

    def _decode_sparse(self, x: Encoded, key: Key) -> Floats:
        q = _whole(x, (self.size,), ("grid",))
        step = float(_floats(x, "grid", 1)[0])
        if step <= 0:
            raise WireError(f"update.grid: got {step}; expected a positive step")
        full = np.flatnonzero(q)
        level = q[full].astype(np.float64)
        level -= level > 0
        out = np.zeros(self.size, np.float32)
        out[full] = np.clip((level - self._dither(self.size, key)[full]) * step, -FLOAT_MAX, FLOAT_MAX)
        return out

    def _dither(self, size: int, key: Key) -> Floats:
        """Uniform on [-1/2, 1/2) in steps of 2**-16; the phase of place i is (i + a random shift) modulo phases."""
        bits = _random_words(key, "dither", size)
        phases = self.rows
        low = 16 - (phases.bit_length() - 1)
        bits &= np.uint16((1 << low) - 1)
        whole = size // phases * phases
        pattern = ((np.arange(phases) + self._shift(key)) % phases << low).astype(np.uint16)
        bits[:whole].reshape(-1, phases)[:] |= pattern
        bits[whole:] |= pattern[: size - whole]
        u = bits.astype(np.float32)
        u += np.float32(0.5)
        u *= np.float32(2**-16)
        u -= np.float32(0.5)
        return u

    def _shift(self, key: Key) -> int:
        return int(torch.randint(self.rows, (1,), generator=key.own("dither", "shift")))

    def _to_rows(self, q: Ints, key: Key) -> Ints:
        return np.ascontiguousarray(np.roll(q.reshape(-1, self.rows).T, self._shift(key), axis=0))

    def _from_rows(self, rows: Ints, key: Key) -> Ints:
        return np.ascontiguousarray(np.roll(rows, -self._shift(key), axis=0).T).reshape(-1)

    def _places(self, key: Key) -> NDArray[np.intp]:
        """One place of each group of `group` values; the last group may be cut short, then its place may not exist."""
        words = _random_words(key, "kept", self.kept).astype(np.intp)
        return np.arange(self.kept) * self.group + (words * self.group >> 16)

    def _pick(self, values: Floats, key: Key) -> Floats:
        if self.group == 1:
            return values
        places = self._places(key)
        picked = np.zeros(self.kept, np.float32)
        there = places < self.size
        picked[there] = values[places[there]]
        return picked

    def _put_back(self, picked: Floats, key: Key) -> Floats:
        if self.group == 1:
            return picked[: self.size]
        places = self._places(key)
        out = np.zeros(self.size, np.float32)
        there = places < self.size
        out[places[there]] = picked[there]
        return out


def _steps(middle: float, level: float) -> NDArray[np.float64]:
    """The step of each half octave of block spread, for noise D with D (D + s**2) = level * middle**2 * s**2.

    Unbiased coding of spread s with noise D takes log2(1 + s**2 / D) / 2 bits; equal slopes of all blocks give this D.
    """
    halves = np.arange(-HALVES, HALVES + 1)
    spread = np.ldexp(np.where(halves % 2, math.sqrt(2), 1.0), halves // 2)
    square = spread * spread
    noise = 2 * level * square / (square + np.sqrt(square * square + 4 * level * square))
    return np.maximum(middle * np.sqrt(12 * noise), 4 / LARGEST)


def _search(bits: Callable[[float], float], target: float, start: float, size: int, most: float = 2.0) -> float:
    """Returns the step at which `bits` of `size` values, which fall as the step grows, come to just below `target`.

    The secant method until the target lies between two steps, then false position between them. At `most` all is
    taken to be zero; the smallest leaves levels within `LARGEST`.
    """
    low, high = math.log2(4 / LARGEST), math.log2(most)
    few, many = 0.0, math.inf
    at, slack = min(max(math.log2(start), low), high), min(TOLERANCE * size, 0.01 * target)
    aim, last = target - slack / 2, None
    for _ in range(24):
        now = bits(2.0**at)
        if now > target:
            low, many = at, now
        else:
            high, few = at, now
        if target - slack <= now <= target or high - low < 1e-3:
            break
        if many < math.inf and few > 0:
            at = low + (high - low) * min(max((many - aim) / (many - few), 0.02), 0.98)
        else:
            if last is None or (last[1] - now) * (at - last[0]) <= 0:
                # one bit a value for each halving of the step, fewer where most values are zero
                slope = 0.9 * min(max(now, 0.02 * size), size)
            else:
                slope = (last[1] - now) / (at - last[0])
            last = at, now
            at = min(max(at + min(max((now - aim) / slope, -3.0), 3.0), low), high)
    return 2.0**high if few > 0 else _scan(bits, target, start, most)


def _scan(bits: Callable[[float], float], target: float, start: float, most: float) -> float:
    """Returns the step whose bits come nearest below `target`, where bits do not fall as the step grows.

    So it is with values without tails, such as what an earlier rounding left: without this they would all become zero.
    """
    steps = [most * 2.0 ** (-tries / 8) for tries in range(math.ceil(8 * math.log2(most / start)) + 16)]
    found = [(spent, step) for step in steps if (spent := bits(step)) <= target]
    return max(found)[1] if found else most


def _target(rate: float, size: int, side: int = 0) -> float:
    """Bits that the packed values may take so that they, with `side` bytes beside, keep to `rate`.

    A message has about 80 bytes more, whatever its size; taken off here, they would leave nothing of a small update.
    """
    aim = (rate - min(SLACK, 0.006 * rate)) * size
    return max(aim - 8 * side, 0.5 * rate * size)


def _rounded(values: Floats, step: float, dtype: type[np.signedinteger]) -> Ints:
    """Rounds [n] to the grid of width `step`, a little towards zero."""
    q = np.empty(values.shape, dtype)
    scratch = np.empty(CHUNK, np.float32)
    for at in range(0, values.size, CHUNK):
        part = values[at : at + CHUNK]
        y = np.divide(part, np.float32(step), out=scratch[: part.size])
        y += np.copysign(np.float32(ROUNDING), part)
        q[at : at + CHUNK] = y  # the conversion cuts towards zero
    return q


def _width(step: float, peak: float) -> float:
    """Returns `step` in units of `peak` as a width that float32 can hold."""
    return min(max(step * peak, FLOAT_MIN), FLOAT_MAX)


def _levels(sample: Floats, step: float) -> list[float]:
    """How far, in steps, the mean of what fell on levels 1, 2, ... lies below them; few where they are rare."""
    q = np.abs(_rounded(sample, step, np.int32))
    top = 8
    counts = np.bincount(np.minimum(q, top), minlength=top + 1)
    sums = np.bincount(np.minimum(q, top), q - np.abs(sample, dtype=np.float64) / step, minlength=top + 1)
    number = int(np.count_nonzero(counts[1:top] >= 32))
    means = sums / (counts + 1e-9)
    return [float(np.clip(m, -0.5, 0.5)) for m in means[1 : number + 1]]


def _read(q: Ints, step: float, near: NDArray[np.float64]) -> Floats:
    """Turns levels into values: `near` steps for the levels 0, 1, ..., and the last offset for all beyond."""
    last = len(near) - 1
    shift = last - near[last]

    def values(levels: NDArray[np.float64]) -> Floats:
        sizes = np.abs(levels)
        steps = np.where(sizes > last, sizes - shift, near[np.minimum(sizes, last).astype(np.intp)])
        return np.clip(np.copysign(steps, levels) * step, -FLOAT_MAX, FLOAT_MAX).astype(np.float32)

    if q.dtype == np.int8:
        table = values(np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64))
        return table[q.view(np.uint8)]
    out = np.empty(q.shape, np.float32)
    for at in range(0, q.size, CHUNK):
        out[at : at + CHUNK] = values(q[at : at + CHUNK].astype(np.float64))
    return out


def _scaled(x: Encoded, size: int, block: int, top: int) -> Floats:
    q = _whole(x, (size,), ("scales",))
    scales = _floats(x, "scales", -(-size // block))
    if q.size and (int(q.max()) > top or int(q.min()) < -top):
        raise WireError(f"update.values: got a level beyond {top}")
    if scales.min(initial=0) < 0:
        raise WireError("update.scales: got a negative scale")
    out = np.empty(size, np.float32)
    for at, end, scale in _chunks(size, block, scales):
        with np.errstate(over="ignore"):
            out[at:end] = q[at:end] * scale
    return np.clip(out, -FLOAT_MAX, FLOAT_MAX)


def _whole(x: Encoded, shape: tuple[int, ...], side: tuple[str, ...]) -> Ints:
    """Returns the levels after checking their type and shape, and that exactly the tensors `side` came along."""
    if x.values.dtype not in DTYPES or x.values.shape != shape:
        raise WireError(
            f"update.values: got {x.values.dtype} {tuple(x.values.shape)}; expected small whole numbers {shape}"
        )
    if set(x.side) != set(side):
        raise WireError(f"update.{min(set(x.side) ^ set(side))}: expected exactly {', '.join(side)} beside the values")
    values: Ints = x.values.contiguous().numpy()
    return values


def _floats(x: Encoded, name: str, size: int | None, least: int = 0) -> Floats:
    tensor = x.side[name]
    if tensor.dtype != torch.float32 or tensor.ndim != 1 or len(tensor) < least or size not in (None, len(tensor)):
        raise WireError(f"update.{name}: got {tensor.dtype} {tuple(tensor.shape)}; expected float32 [{size or 'n'}]")
    values: Floats = tensor.numpy()
    if not np.isfinite(values).all():
        raise WireError(f"update.{name}: got a number that is not finite")
    return values


def _numpy(x: Tensor, size: int) -> tuple[Floats, float]:
    """Returns the values and the largest absolute value, which is finite."""
    if x.shape != (size,):
        raise ValueError(f"update: got shape {tuple(x.shape)}, expected ({size},)")
    values: Floats = x.detach().to("cpu", torch.float32).contiguous().numpy()
    peak = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    if not math.isfinite(peak):
        raise ValueError("update: got a value that is not finite; leave such an update out")
    return values, peak


def _rms(values: Floats) -> float:
    return max(float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))), 1e-9)


def _sample(values: Floats) -> Floats:
    """Runs of neighbours, since packing profits from what they have in common, as loud and as quiet as all are."""
    if values.size <= SAMPLE_RUN * SAMPLE_RUNS:
        return values
    runs = values[: values.size // SAMPLE_RUN * SAMPLE_RUN].reshape(-1, SAMPLE_RUN)
    return runs[_evenly(np.abs(runs) @ np.ones(SAMPLE_RUN, np.float32), SAMPLE_RUNS)].reshape(-1)


def _evenly(keys: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Returns `count` places whose keys are spread as all `keys` are: every so many in the order of the keys."""
    order = np.argsort(keys, kind="stable")
    return np.sort(order[((np.arange(count) + 0.5) * (len(order) / count)).astype(np.intp)])


def _dtype(largest: float) -> type[np.signedinteger]:
    return np.int8 if largest < 1 << 7 else np.int16 if largest < 1 << 15 else np.int32


def _over_blocks(function: np.ufunc, values: Floats, block: int) -> Floats:
    if not values.size:
        return np.zeros(0, np.float32)
    out: Floats = function.reduceat(values, np.arange(0, values.size, block))
    return out


def _block_means(values: Floats, block: int) -> Floats:
    if not values.size:
        return np.zeros(0, np.float32)
    starts = np.arange(0, values.size, block)
    sums = np.add.reduceat(values, starts, dtype=np.float64)
    return (sums / np.diff(starts, append=values.size)).astype(np.float32)


def _chunks(size: int, block: int, scales: Floats) -> list[tuple[int, int, Floats]]:
    """Pieces of whole blocks with the scale of each of their values."""
    step = max(CHUNK // block, 1) * block
    return [
        (
            at,
            min(at + step, size),
            np.repeat(scales[at // block : -(-min(at + step, size) // block)], block)[: size - at],
        )
        for at in range(0, size, step)
    ]


def _uniform(key: Key, size: int) -> Floats:
    """Uniform on [0, 1) in steps of 2**-16."""
    return _random_words(key, "dither", size).astype(np.float32) * np.float32(2**-16)


def _random_words(key: Key, word: str, size: int) -> NDArray[np.uint16]:
    """Uniform 16-bit numbers of this client and round, equal on every machine."""
    secret = torch.randint(256, (32,), generator=key.own(word), dtype=torch.uint8).numpy().tobytes()
    words: NDArray[np.uint16] = seeds.keystream(secret, 2 * size).view("<u2")
    return words
