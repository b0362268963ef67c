"""The unbiased quantizer at a rate: dither that both sides draw, blocks with steps of their own, phases in rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.codecs.base import Encoded, Key
from fedpress.codecs.levels import (
    FLOAT_MAX,
    Floats,
    Ints,
    as_array,
    block_means,
    chunks,
    evenly,
    random_words,
    side_floats,
    smallest_type,
    whole_levels,
)
from fedpress.codecs.rate import LARGEST, SAMPLE_RUN, SAMPLE_RUNS, bits_for, find_step, rms, width
from fedpress.errors import WireError
from fedpress.wire.packing import estimate_bits

SIDE_BYTES = 40  # of the scales of the unbiased form, besides their content
HALVES = 24  # block scales reach 2**(-12) to 2**12 times the median


@dataclass(frozen=True)
class Dithered:
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
        return next(
            rows
            for rows, least in ((8, 1 << 15), (4, 1 << 13), (2, 1 << 10), (1, 0))
            if self.kept >= least
        )

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns levels in rows of one phase each with the steps of their blocks, or flat if most of `x` is zero."""
        values, peak = as_array(x, self.size)
        if np.count_nonzero(values) * 2 <= self.size:
            return self._encode_sparse(values, peak, key)
        picked = self._pick(values, key)
        phases = self.rows
        y = np.zeros(-(-len(picked) // phases) * phases, np.float32)
        np.divide(picked, peak, out=y[: len(picked)])
        spread = np.sqrt(block_means(y * y, self.block).astype(np.float64))
        middle = float(np.float32(max(np.median(spread), 1e-6)))
        with np.errstate(divide="ignore"):
            halves = np.clip(np.rint(2 * np.log2(spread / middle)), -HALVES, HALVES).astype(np.int8)
        u = self.dither(len(y), key)
        at = self._sampled(spread, len(y))
        some, some_u = y[at], u[at]
        some_halves = halves[at // self.block].astype(np.intp) + HALVES
        share = some.size / len(y)

        def bits(root: float) -> float:
            steps = _steps(middle, root * root).astype(np.float32)[some_halves]
            q = np.rint(some / steps + some_u).astype(np.int32)
            return estimate_bits(self._to_rows(q, key).reshape(-1), rows=self.rows, share=share)

        budget = bits_for(self.rate, self.size, SIDE_BYTES + int(estimate_bits(halves)) // 8)
        noise = 1 / (
            4.0 ** max(self.rate * self.group - 0.25, 0.1) - 1
        )  # of a Gaussian, over its variance
        root = find_step(bits, budget * share, math.sqrt(noise * (noise + 1)), some.size, 1024.0)
        level = float(np.float32(root * root))
        steps = _steps(middle, level)[halves.astype(np.intp) + HALVES].astype(np.float32)
        q = np.empty(len(y), smallest_type(float(np.abs(y).max() / steps.min()) + 1))
        for start, end, step in chunks(len(y), self.block, steps):
            part = y[start:end] / step
            part += u[start:end]
            q[start:end] = np.rint(part, out=part)
        side = {
            "scales": torch.from_numpy(halves),
            "grid": torch.tensor([peak, middle, level], dtype=torch.float32),
        }
        return Encoded(torch.from_numpy(self._to_rows(q, key)), side)

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size], `x` of the encoder in expectation over the keys."""
        if x.values.ndim == 1:
            return torch.from_numpy(self._decode_sparse(x, key))
        phases = self.rows
        columns = -(-self.kept // phases)
        q = whole_levels(x, (phases, columns), ("scales", "grid"))
        grid = side_floats(x, "grid", 3)
        halves = x.side["scales"]
        if halves.dtype != torch.int8 or halves.shape != (-(-columns * phases // self.block),):
            raise WireError(
                f"got {halves.dtype} {tuple(halves.shape)}",
                place="update.scales",
                cure="expected int8, one for a block",
            )
        if int(halves.abs().max()) > HALVES or halves.min() < -HALVES:
            raise WireError(f"expected -{HALVES} to {HALVES}", place="update.scales")
        if grid.min() <= 0:
            raise WireError(
                f"got {grid.tolist()}", place="update.grid", cure="expected positive numbers"
            )
        peak, middle, level = map(float, grid)
        steps = _steps(middle, level)[halves.numpy().astype(np.intp) + HALVES].astype(np.float32)
        u = self.dither(columns * phases, key)
        natural = self._from_rows(q, key)
        y = np.empty(columns * phases, np.float32)
        for start, end, step in chunks(len(y), self.block, steps):
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
        blocks = evenly(spread[:whole], max(min(SAMPLE_RUN * SAMPLE_RUNS // self.block, whole), 1))
        starts = blocks * self.block // self.rows * self.rows
        return (starts[:, None] + np.arange(self.block // self.rows * self.rows)).reshape(-1)

    def _encode_sparse(self, values: Floats, peak: float, key: Key) -> Encoded:
        """Zeros stay zero and have level 0 for themselves: what rounds to 0 or more moves up by one."""
        full = np.flatnonzero(values)
        if not len(full):
            return Encoded(torch.zeros(self.size, dtype=torch.int8), {"grid": torch.ones(1)})
        y = values[full] / np.float32(peak)
        u = self.dither(self.size, key)[full]

        def levels(step: float) -> Ints:
            q = np.zeros(self.size, smallest_type(1 / step + 2))
            rounded = np.rint(y / np.float32(step) + u)
            q[full] = rounded + (rounded >= 0)
            return q

        def bits(step: float) -> float:
            return estimate_bits(levels(step))

        step = float(
            np.float32(find_step(bits, bits_for(self.rate, self.size), rms(y), self.size, 4.0))
        )
        return Encoded(
            torch.from_numpy(levels(step)),
            {"grid": torch.tensor([width(step, peak)], dtype=torch.float32)},
        )

    def _decode_sparse(self, x: Encoded, key: Key) -> Floats:
        q = whole_levels(x, (self.size,), ("grid",))
        step = float(side_floats(x, "grid", 1)[0])
        if step <= 0:
            raise WireError(f"got {step}", place="update.grid", cure="expected a positive step")
        full = np.flatnonzero(q)
        level = q[full].astype(np.float64)
        level -= level > 0
        out = np.zeros(self.size, np.float32)
        out[full] = np.clip(
            (level - self.dither(self.size, key)[full]) * step, -FLOAT_MAX, FLOAT_MAX
        )
        return out

    def dither(self, size: int, key: Key) -> Floats:
        """Uniform on [-1/2, 1/2) in steps of 2**-16; the phase of place i is (i + a random shift) modulo phases."""
        bits = random_words(key, "dither", size)
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
        return int(key.client_stream("dither", "shift").integers(self.rows))

    def _to_rows(self, q: Ints, key: Key) -> Ints:
        return np.ascontiguousarray(np.roll(q.reshape(-1, self.rows).T, self._shift(key), axis=0))

    def _from_rows(self, rows: Ints, key: Key) -> Ints:
        return np.ascontiguousarray(np.roll(rows, -self._shift(key), axis=0).T).reshape(-1)

    def _places(self, key: Key) -> NDArray[np.intp]:
        """One place of each group of `group` values; the last group may be cut short, then its place may not exist."""
        words = random_words(key, "kept", self.kept).astype(np.intp)
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
    steps: NDArray[np.float64] = np.maximum(middle * np.sqrt(12 * noise), 4 / LARGEST)
    return steps
