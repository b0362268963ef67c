"""Unbiased quantization to a given number of bits per value, by a dither that both sides draw."""

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
    random_words,
    side_floats,
    smallest_type,
    spread_by_key,
    whole_levels,
)
from fedpress.codecs.rate import (
    LARGEST,
    SAMPLE_RUN,
    SAMPLE_RUNS,
    bits_for,
    find_step,
    rms,
    step_width,
)
from fedpress.errors import WireError
from fedpress.wire.packing import estimate_bits

SIDE_BYTES = 40
"""About how many bytes the side tensors take, not counting the content of `scales`."""

HALVES = 24
"""Block scales are counted in half octaves, from -24 to 24: 2**-12 to 2**12 times the median."""


@dataclass(frozen=True)
class Dithered:
    """Quantizes without bias to `rate` bits per value.

    Three things save bits:

    - At low rates one value of every `group` is kept, drawn from the key, and multiplied by
      `group`.
    - Each block has a step of its own. Where the values are small, a coarse step would save no
      bits, but its noise would count as much as elsewhere.
    - The coarse part of the dither, the phase, depends on the position alone. Values of one phase
      are sent in one row of a matrix, and each row has a frequency table of its own.

    Attributes:
        size: number of values.
        block: how many kept values share one step.
        rate: bits per value after packing.
    """

    size: int
    block: int
    rate: float
    additive = False

    @property
    def group(self) -> int:
        """Size of a group of values, of which one is kept; with 1 all are kept."""
        return max(1, round(0.85 / self.rate))

    @property
    def kept(self) -> int:
        """Number of kept values."""
        return -(-self.size // self.group)

    @property
    def rows(self) -> int:
        """Number of phases: few where their tables would cost too much."""
        for rows, least in ((8, 1 << 15), (4, 1 << 13), (2, 1 << 10)):
            if self.kept >= least:
                return rows
        return 1

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the levels, and how to read them.

        The levels are a matrix with a row for each phase, the steps of the blocks are `scales`, and
        `grid` holds the peak, the median scale and the noise level. If most of `x` is zero, see
        `_encode_sparse`.
        """
        values, peak = as_array(x, self.size)
        if np.count_nonzero(values) * 2 <= self.size:
            return self._encode_sparse(values, peak, key)
        picked = self._pick(values, key)
        phases = self.rows
        # Zeros fill the last column of the matrix.
        y = np.zeros(-(-len(picked) // phases) * phases, np.float32)
        np.divide(picked, peak, out=y[: len(picked)])
        spread = np.sqrt(block_means(y * y, self.block).astype(np.float64))
        # In float32, as the decoder gets it: both must compute the same steps.
        middle = float(np.float32(max(np.median(spread), 1e-6)))
        # A block of zeros has spread 0, whose logarithm is clipped to the smallest step.
        with np.errstate(divide="ignore"):
            halves = np.clip(np.rint(2 * np.log2(spread / middle)), -HALVES, HALVES).astype(np.int8)
        u = self.dither(len(y), key)
        level = self._noise_level(y, u, spread, middle, halves, key)
        steps = _steps(middle, level)[halves.astype(np.intp) + HALVES].astype(np.float32)
        # The dither moves a value by at most one level.
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

    def _noise_level(
        self,
        y: Floats,
        u: Floats,
        spread: NDArray[np.float64],
        middle: float,
        halves: NDArray[np.int8],
        key: Key,
    ) -> float:
        """Returns the noise level at which the update keeps to the rate; see `_steps`.

        Args:
            y: the kept values over their peak.
            u: their dither.
            spread: root mean square of each block.
            middle: the median spread.
            halves: spread of each block over the median one, in half octaves.
            key: names the random streams.
        """
        at = self._sampled(spread, len(y))
        some = y[at]
        some_u = u[at]
        some_halves = halves[at // self.block].astype(np.intp) + HALVES
        share = some.size / len(y)

        def bits(root: float) -> float:
            steps = _steps(middle, root * root).astype(np.float32)[some_halves]
            q = np.rint(some / steps + some_u).astype(np.int32)
            return estimate_bits(self._to_rows(q, key).reshape(-1), rows=self.rows, share=share)

        budget = bits_for(self.rate, self.size, SIDE_BYTES + int(estimate_bits(halves)) // 8)
        # The search begins at the ratio of noise to variance at which a Gaussian takes this rate.
        # It varies the root of the level, since the bits fall with it as they do with a step.
        noise = 1 / (4.0 ** max(self.rate * self.group - 0.25, 0.1) - 1)
        start = math.sqrt(noise * (noise + 1))
        root = find_step(bits, budget * share, start, some.size, 1024.0)
        return float(np.float32(root * root))

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]; its expectation over the keys is what was encoded.

        Raises:
            WireError: if `x` is not what `encode` could have made.
        """
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
                cure="expected int8, one for each block",
            )
        # Both checks, since the absolute value of -128 is -128 in int8.
        if int(halves.abs().max()) > HALVES or halves.min() < -HALVES:
            raise WireError(f"expected -{HALVES} to {HALVES}", place="update.scales")
        if grid.min() <= 0:
            raise WireError(
                f"got {grid.tolist()}", place="update.grid", cure="expected positive numbers"
            )
        peak, middle, level = (float(number) for number in grid)
        steps = _steps(middle, level)[halves.numpy().astype(np.intp) + HALVES].astype(np.float32)
        u = self.dither(columns * phases, key)
        in_order = self._from_rows(q, key)
        y = np.empty(columns * phases, np.float32)
        for start, end, step in chunks(len(y), self.block, steps):
            part = in_order[start:end] - u[start:end]
            part *= step
            y[start:end] = part
        # One value of each group was kept: multiplied by the size of the group, its expectation is
        # right.
        y *= np.float32(self.group)
        # A sender can choose numbers whose products overflow: decoded updates must be finite.
        limit = FLOAT_MAX / max(peak, 1.0)
        out = np.clip(y[: self.kept], -limit, limit) * np.float32(peak)
        return torch.from_numpy(self._put_back(out, key))

    def _sampled(self, spread: NDArray[np.float64], size: int) -> NDArray[np.intp]:
        """Returns positions of a sample that takes about as many bits per value as all values.

        Args:
            spread: root mean square of each block.
            size: number of values.

        Returns:
            Positions in whole blocks whose spreads are distributed like those of all blocks. Each
            run of positions begins with the first phase.
        """
        whole = size // self.block
        if size <= SAMPLE_RUN * SAMPLE_RUNS or whole < 2:
            return np.arange(size)
        count = max(min(SAMPLE_RUN * SAMPLE_RUNS // self.block, whole), 1)
        blocks = spread_by_key(spread[:whole], count)
        starts = blocks * self.block // self.rows * self.rows
        run = np.arange(self.block // self.rows * self.rows)
        return (starts[:, None] + run).reshape(-1)

    def _encode_sparse(self, values: Floats, peak: float, key: Key) -> Encoded:
        """Encodes an update of which most values are zero, such as one after top-k.

        Zeros are not dithered: they are sent as level 0, and nothing else is. So the levels 0, 1,
        ... of other values are sent as 1, 2, ...
        """
        nonzero = np.flatnonzero(values)
        if not len(nonzero):
            return Encoded(torch.zeros(self.size, dtype=torch.int8), {"grid": torch.ones(1)})
        y = values[nonzero] / np.float32(peak)
        # The dither of a position depends on the position alone, so the decoder draws the same.
        u = self.dither(self.size, key)[nonzero]

        def levels(step: float) -> Ints:
            q = np.zeros(self.size, smallest_type(1 / step + 2))
            rounded = np.rint(y / np.float32(step) + u)
            # Level 0 is taken by the zeros.
            q[nonzero] = rounded + (rounded >= 0)
            return q

        def bits(step: float) -> float:
            return estimate_bits(levels(step))

        budget = bits_for(self.rate, self.size)
        step = float(np.float32(find_step(bits, budget, rms(y), self.size, 4.0)))
        grid = torch.tensor([step_width(step, peak)], dtype=torch.float32)
        return Encoded(torch.from_numpy(levels(step)), {"grid": grid})

    def _decode_sparse(self, x: Encoded, key: Key) -> Floats:
        q = whole_levels(x, (self.size,), ("grid",))
        step = float(side_floats(x, "grid", 1)[0])
        if step <= 0:
            raise WireError(f"got {step}", place="update.grid", cure="expected a positive step")
        nonzero = np.flatnonzero(q)
        levels = q[nonzero].astype(np.float64)
        # The levels of the encoder, see `_encode_sparse`.
        levels -= levels > 0
        out = np.zeros(self.size, np.float32)
        u = self.dither(self.size, key)[nonzero]
        out[nonzero] = np.clip((levels - u) * step, -FLOAT_MAX, FLOAT_MAX)
        return out

    def dither(self, size: int, key: Key) -> Floats:
        """Returns the dither of `size` values, uniform on [-1/2, 1/2) in steps of 2**-16, float32.

        Its top bits are the phase: that of position i is (i + a random shift) modulo the number of
        phases. With the shift, the dither of each position is uniform over the keys.
        """
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
        """Returns the phase of position 0."""
        return int(key.client_stream("dither", "shift").integers(self.rows))

    def _to_rows(self, q: Ints, key: Key) -> Ints:
        """Returns levels [n] as a matrix [phases, n / phases] with one phase in each row."""
        return np.ascontiguousarray(np.roll(q.reshape(-1, self.rows).T, self._shift(key), axis=0))

    def _from_rows(self, rows: Ints, key: Key) -> Ints:
        """Undoes `_to_rows`."""
        return np.ascontiguousarray(np.roll(rows, -self._shift(key), axis=0).T).reshape(-1)

    def _places(self, key: Key) -> NDArray[np.intp]:
        """Returns a random position in each group of `group` values.

        If the last group is shorter, its position may be beyond the end.
        """
        words = random_words(key, "kept", self.kept).astype(np.intp)
        return np.arange(self.kept) * self.group + (words * self.group >> 16)

    def _pick(self, values: Floats, key: Key) -> Floats:
        """Returns the values that are kept, [kept]; 0 for a position beyond the end."""
        if self.group == 1:
            return values
        places = self._places(key)
        picked = np.zeros(self.kept, np.float32)
        inside = places < self.size
        picked[inside] = values[places[inside]]
        return picked

    def _put_back(self, picked: Floats, key: Key) -> Floats:
        """Returns the kept values at their positions, with zeros elsewhere, [size]."""
        if self.group == 1:
            return picked[: self.size]
        places = self._places(key)
        out = np.zeros(self.size, np.float32)
        inside = places < self.size
        out[places[inside]] = picked[inside]
        return out


def _steps(middle: float, level: float) -> NDArray[np.float64]:
    """Returns the step for each block scale from -HALVES to HALVES half octaves.

    Unbiased coding of values of spread s with noise D takes log2(1 + s**2 / D) / 2 bits. The noise
    of all blocks together is least where one bit more lowers it equally in every block, which gives
    D (D + s**2) = level * middle**2 * s**2.

    Args:
        middle: the median spread.
        level: the noise level; larger ones take fewer bits.
    """
    halves = np.arange(-HALVES, HALVES + 1)
    spread = np.ldexp(np.where(halves % 2, math.sqrt(2), 1.0), halves // 2)
    square = spread * spread
    # The root of the quadratic equation, written such that nothing cancels; a step of width w has
    # noise w**2 / 12.
    noise = 2 * level * square / (square + np.sqrt(square * square + 4 * level * square))
    steps: NDArray[np.float64] = np.maximum(middle * np.sqrt(12 * noise), 4 / LARGEST)
    return steps
