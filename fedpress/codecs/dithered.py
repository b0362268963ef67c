"""Quantizes an update without bias to a given number of bits per value, by subtractive dither.

Encoder and decoder draw the same random number u in [-1/2, 1/2) for each value. The encoder sends
round(x / step + u), and the decoder returns (level - u) * step, whose expectation is x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.codecs.base import Encoded, Key
from fedpress.codecs.levels import (
    CHUNK,
    FLOAT_MAX,
    Floats,
    Ints,
    as_array,
    block_means,
    checked_levels,
    chunks,
    random_words,
    side_floats,
    smallest_type,
    stratified_positions,
)
from fedpress.codecs.rate import (
    FULL_SIZE,
    MAX_LEVEL,
    bit_budget,
    find_step,
    rms,
    sample_positions,
    scaled_step,
)
from fedpress.errors import WireError
from fedpress.wire.packing import SizeEstimator, estimate_bits

MIN_SAMPLED = 4096
"""A sample of a vector of zeros has at least so many other values."""

MAX_SPARSE_STEP = 4.0
"""Largest step for values of at most 1, next to zeros that have a level of their own."""

SIDE_BYTES = 40
"""Approximate bytes of the side tensors, without the content of `scales`."""

MAX_EXPONENT = 24
"""Block scales are sent as integers e from -24 to 24: the scale is 2**(e / 2) times the median."""


@dataclass(frozen=True)
class DitheredQuantizer:
    """Quantizes without bias to `rate` bits per value.

    Three things save bits:

    - At rates below 0.57, one value of each `group` is sent, chosen at random and multiplied by the
      size of the group. Example: at rate 0.2 one of every 4 values, times 4.
    - Each block has its own step, which is finer where the values are small. A coarse step would
      save few bits there, but add as much noise as in other blocks.
    - The top bits of the dither, the phase, depend only on the position. Levels of one phase are
      sent as one row of a matrix, and the entropy coder makes a frequency table for each row.

    Attributes:
        size: number of values.
        block: number of sent values that share one step.
        rate: bits per value after packing.
    """

    size: int
    block: int
    rate: float
    additive = False

    @property
    def group(self) -> int:
        """Number of values in a group, of which one is sent; 1 means that all are sent."""
        # So that a sent value has about 0.85 bits at every low rate.
        return max(1, round(0.85 / self.rate))

    @property
    def kept(self) -> int:
        """Number of values that are sent."""
        return -(-self.size // self.group)

    @property
    def rows(self) -> int:
        """Number of phases: fewer for short vectors, where each frequency table costs too much."""
        for rows, least in ((8, 1 << 15), (4, 1 << 13), (2, 1 << 10)):
            if self.kept >= least:
                return rows
        return 1

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns levels [phases, n / phases] and the side tensors `scales` and `grid`.

        `scales` has an exponent for each block (see `MAX_EXPONENT`); `grid` is [largest absolute
        value, median scale, noise level]. If at least half of `x` is zero, see `_encode_sparse`;
        unless the positions of the zeros alone would take more than the rate.
        """
        values, peak = as_array(x, self.size)
        # Comparing first is several times as fast as counting floats that are not zero.
        if np.count_nonzero(values == 0) * 2 >= self.size:
            sparse = self._encode_sparse(values, peak, key)
            if sparse is not None:
                return sparse
        picked = self._pick(values, key)
        phases = self.rows
        # Padded with zeros: the matrix [phases, n / phases] needs a full last column.
        y = np.zeros(-(-len(picked) // phases) * phases, np.float32)
        np.divide(picked, peak, out=y[: len(picked)])
        spread = np.sqrt(block_means(y, self.block, squares=True).astype(np.float64))
        # Rounded to float32, because it is sent as float32: encoder and decoder must compute the
        # same steps.
        middle = float(np.float32(max(np.median(spread), 1e-6)))
        # A block of zeros has spread 0, whose logarithm is clipped to the smallest step.
        with np.errstate(divide="ignore"):
            exponents = np.clip(
                np.rint(2 * np.log2(spread / middle)), -MAX_EXPONENT, MAX_EXPONENT
            ).astype(np.int8)
        words = self._dither_words(len(y), key)
        level = self._noise_level(y, words, spread, middle, exponents, key)
        steps = _steps(middle, level)[exponents.astype(np.intp) + MAX_EXPONENT].astype(np.float32)
        largest = max(float(y.max()), -float(y.min()))
        # The dither moves a value by at most one level.
        q = np.empty(len(y), smallest_type(float(np.float32(largest) / steps.min()) + 1))
        for start, end, step in chunks(len(y), self.block, steps):
            part = y[start:end] / step
            part += _uniform_of(words[start:end])
            q[start:end] = np.rint(part, out=part)
        side = {
            "scales": torch.from_numpy(exponents),
            "grid": torch.tensor([peak, middle, level], dtype=torch.float32),
        }
        return Encoded(torch.from_numpy(self._to_rows(q, key)), side)

    def _noise_level(
        self,
        y: Floats,
        words: NDArray[np.uint16],
        spread: NDArray[np.float64],
        middle: float,
        exponents: NDArray[np.int8],
        key: Key,
    ) -> float:
        """Finds the noise level at which the packed update has `rate` bits per value.

        Args:
            y: the sent values, divided by the largest absolute value.
            words: their dither, see `_dither_words`.
            spread: root mean square of each block.
            middle: the median spread.
            exponents: exponents of the blocks: spread = middle * 2**(exponent / 2).
            key: seeds the random streams.

        Returns:
            The noise level, see `_steps`.
        """
        at = self._sampled(spread, len(y))
        some = y[at]
        some_u = _uniform_of(words[at])
        some_exponents = exponents[at // self.block].astype(np.intp) + MAX_EXPONENT
        share = some.size / len(y)
        estimator = SizeEstimator(self.rows, share)

        def bits(root: float) -> float:
            steps = _steps(middle, root * root).astype(np.float32)[some_exponents]
            # The values are at most 1, and the dither moves them by at most one level.
            q = np.rint(some / steps + some_u).astype(smallest_type(1 / steps.min() + 1))
            return estimator.bits(self._to_rows(q, key).reshape(-1))

        side = SIDE_BYTES + int(_exponent_bits(exponents)) // 8
        budget = bit_budget(self.rate, self.size, side)
        # The search begins at the ratio of noise to variance that a Gaussian has at this rate. It
        # varies the root of the level, because halving the root costs one bit per value, as halving
        # a step does.
        noise = 1 / (4.0 ** max(self.rate * self.group - 0.25, 0.1) - 1)
        start = math.sqrt(noise * (noise + 1))
        root = find_step(bits, budget * share, start, some.size, 1024.0)
        if share == 1:
            estimator.forget()
            root = find_step(bits, budget, root, some.size, 1024.0)
        return float(np.float32(root * root))

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]; its expectation over the keys is what was encoded.

        Raises:
            WireError: if `encode` cannot have produced `x`.
        """
        if x.values.ndim == 1:
            return torch.from_numpy(self._decode_sparse(x, key))
        phases = self.rows
        columns = -(-self.kept // phases)
        q = checked_levels(x, (phases, columns), ("scales", "grid"))
        grid = side_floats(x, "grid", 3)
        exponents = x.side["scales"]
        if exponents.dtype != torch.int8 or exponents.shape != (
            -(-columns * phases // self.block),
        ):
            raise WireError(
                f"got {exponents.dtype} {tuple(exponents.shape)}",
                place="update.scales",
                cure="expected int8, one for each block",
            )
        # Two checks, because in int8 the absolute value of -128 is -128.
        if int(exponents.abs().max()) > MAX_EXPONENT or exponents.min() < -MAX_EXPONENT:
            raise WireError(f"expected -{MAX_EXPONENT} to {MAX_EXPONENT}", place="update.scales")
        if grid.min() <= 0:
            raise WireError(
                f"got {grid.tolist()}", place="update.grid", cure="expected positive numbers"
            )
        peak, middle, level = (float(number) for number in grid)
        steps = _steps(middle, level)[exponents.numpy().astype(np.intp) + MAX_EXPONENT].astype(
            np.float32
        )
        words = self._dither_words(columns * phases, key)
        in_order = self._from_rows(q, key)
        out = np.empty(columns * phases, np.float32)
        # A malicious sender can choose numbers whose products overflow, and one infinite value
        # would make the whole mean infinite.
        limit = np.float32(FLOAT_MAX / max(peak, 1.0))
        for start, end, step in chunks(len(out), self.block, steps):
            part = np.subtract(
                in_order[start:end], _uniform_of(words[start:end]), out=out[start:end]
            )
            part *= step
            # A value is sent with probability 1 / group, so multiplying it by the size of the group
            # gives the right expectation.
            part *= np.float32(self.group)
            np.minimum(part, limit, out=part)
            np.maximum(part, -limit, out=part)
            part *= np.float32(peak)
        out = out[: self.kept]
        return torch.from_numpy(self._put_back(out, key))

    def _sampled(self, spread: NDArray[np.float64], size: int) -> NDArray[np.intp]:
        """Returns the positions of a sample that takes as many bits per value as all values.

        Args:
            spread: root mean square of each block.
            size: number of values.

        Returns:
            Positions in runs, each about one block. The spreads of these blocks are distributed
            like those of all blocks. Each run begins at a multiple of the number of phases.
        """
        whole = size // self.block
        if size <= FULL_SIZE or whole < 2:
            return np.arange(size)
        count = max(min(FULL_SIZE // self.block, whole), 1)
        blocks = stratified_positions(spread[:whole], count)
        starts = blocks * self.block // self.rows * self.rows
        run = np.arange(self.block // self.rows * self.rows)
        return (starts[:, None] + run).reshape(-1)

    def _encode_sparse(self, values: Floats, peak: float, key: Key) -> Encoded | None:
        """Encodes a vector of which at least half of the values are zero, for example after top-k.

        Zeros get level 0 and no dither. Other values must not use that level, so their levels
        0, 1, 2, ... are sent as 1, 2, 3, ... (negative levels stay).

        Returns:
            The levels and the side tensor `grid`; None if the rate is too low for them.
        """
        if not peak:
            return Encoded(torch.zeros(self.size, dtype=torch.int8), {"grid": torch.ones(1)})
        y = values / np.float32(peak)
        # Drawn for all positions and then chosen, because the decoder does the same.
        dither = self.dither(self.size, key)
        whole = sample = _SparseLevels.of(y, dither)
        if self.size > FULL_SIZE:
            at = sample_positions(y)
            # Of a few values a sample would say nothing, and all are coded quickly.
            if np.count_nonzero(y[at]) >= MIN_SAMPLED:
                sample = _SparseLevels.of(y[at], dither[at])
        step = self._sparse_step(whole, sample)
        if step is None:
            # After top-k zeros shall stay zeros, even if their positions take more than the rate.
            if len(whole.nonzero) > self.size // 4:
                return None
            step = MAX_SPARSE_STEP
        grid = torch.tensor([scaled_step(step, peak)], dtype=torch.float32)
        return Encoded(torch.from_numpy(whole(step)), {"grid": grid})

    def _sparse_step(self, whole: _SparseLevels, sample: _SparseLevels) -> float | None:
        """Returns the step at which the levels of `whole` take `rate` bits a value.

        Args:
            whole: the levels of all values.
            sample: those of a part of them; or `whole` itself.

        Returns:
            The step; None if even the largest one, with levels -1, 0 and 1, takes more bits.
        """
        share = sample.size / whole.size
        estimator = SizeEstimator(share=share)

        def bits(step: float) -> float:
            return estimator.bits(sample(step))

        budget = bit_budget(self.rate, whole.size) * share
        if bits(MAX_SPARSE_STEP) > budget:
            return None
        step = find_step(bits, budget, rms(sample.values), sample.size, MAX_SPARSE_STEP)
        for _ in range(2):
            target = budget
            if sample is not whole:
                # As in `RateQuantizer`: the whole takes more or fewer bits than its sample.
                target /= estimator.ratio(whole(step), sample(step))
            estimator.forget()
            step = find_step(bits, target, step, sample.size, MAX_SPARSE_STEP)
        return float(np.float32(step))

    def _decode_sparse(self, x: Encoded, key: Key) -> Floats:
        q = checked_levels(x, (self.size,), ("grid",))
        step = float(side_floats(x, "grid", 1)[0])
        if step <= 0:
            raise WireError(f"got {step}", place="update.grid", cure="expected a positive step")
        nonzero = np.flatnonzero(q)
        levels = q[nonzero].astype(np.float64)
        # Undoes the addition of 1 in `_encode_sparse`.
        levels -= levels > 0
        out = np.zeros(self.size, np.float32)
        u = self.dither(self.size, key)[nonzero]
        out[nonzero] = np.clip((levels - u) * step, -FLOAT_MAX, FLOAT_MAX)
        return out

    def dither(self, size: int, key: Key) -> Floats:
        """Returns the dither of `size` values, uniform on [-1/2, 1/2) in steps of 2**-16, float32.

        Its top bits are the phase, (position + shift) modulo the number of phases. The shift is
        random, so that over the keys the dither of each position is uniform.
        """
        return _uniform_of(self._dither_words(size, key))

    def _dither_words(self, size: int, key: Key) -> NDArray[np.uint16]:
        """Returns the dither of `size` values as whole numbers: u = (word + 1/2) / 2**16 - 1/2."""
        words = random_words(key, "dither", size)
        phases = self.rows
        low = 16 - (phases.bit_length() - 1)
        pattern = ((np.arange(phases) + self._shift(key)) % phases << low).astype(np.uint16)
        # Long enough for one quick pass over each chunk: `phases` divides `CHUNK`.
        tiled = np.tile(pattern, CHUNK // phases)
        for at in range(0, size, CHUNK):
            part = words[at : at + CHUNK]
            part &= np.uint16((1 << low) - 1)
            part |= tiled[: part.size]
        return words

    def _shift(self, key: Key) -> int:
        """Returns the phase of position 0."""
        return int(key.client_stream("dither", "shift").integers(self.rows))

    def _to_rows(self, q: Ints, key: Key) -> Ints:
        """Returns levels [n] as a matrix [phases, n / phases] with one phase in each row."""
        shift = self._shift(key)
        columns = q.reshape(-1, self.rows)
        rows = np.empty((self.rows, len(columns)), q.dtype)
        # In pieces, so that the strided reads of one piece stay in the processor's cache.
        for at in range(0, len(columns), CHUNK):
            for phase in range(self.rows):
                part = columns[at : at + CHUNK, phase]
                rows[(phase + shift) % self.rows, at : at + CHUNK] = part
        return rows

    def _from_rows(self, rows: Ints, key: Key) -> Ints:
        """Undoes `_to_rows`."""
        shift = self._shift(key)
        columns = np.empty((rows.shape[1], self.rows), rows.dtype)
        for at in range(0, len(columns), CHUNK):
            for phase in range(self.rows):
                part = rows[(phase + shift) % self.rows, at : at + CHUNK]
                columns[at : at + CHUNK, phase] = part
        return columns.reshape(-1)

    def _places(self, key: Key) -> NDArray[np.intp]:
        """Draws a position in each group of `group` values.

        If the last group is shorter, its position may be beyond the end of the vector: then nothing
        is sent of this group.
        """
        words = random_words(key, "kept", self.kept).astype(np.intp)
        return np.arange(self.kept) * self.group + (words * self.group >> 16)

    def _pick(self, values: Floats, key: Key) -> Floats:
        """Returns the values that are sent, [kept]; 0 for a position beyond the end."""
        if self.group == 1:
            return values
        places = self._places(key)
        picked = np.zeros(self.kept, np.float32)
        inside = places < self.size
        picked[inside] = values[places[inside]]
        return picked

    def _put_back(self, picked: Floats, key: Key) -> Floats:
        """Returns the sent values at their positions, with zeros elsewhere, [size]."""
        if self.group == 1:
            return picked[: self.size]
        places = self._places(key)
        out = np.zeros(self.size, np.float32)
        inside = places < self.size
        out[places[inside]] = picked[inside]
        return out


@dataclass(frozen=True, eq=False)
class _SparseLevels:
    """The levels of values of which many are zero, for any step.

    Attributes:
        size: number of values.
        nonzero: positions of those that are not zero.
        values: those values.
        dither: their dither.
    """

    size: int
    nonzero: NDArray[np.intp]
    values: Floats
    dither: Floats

    @classmethod
    def of(cls, y: Floats, dither: Floats) -> _SparseLevels:
        """Takes the values [n] and their dither [n]."""
        nonzero = np.flatnonzero(y)
        return cls(len(y), nonzero, y[nonzero], dither[nonzero])

    def __call__(self, step: float) -> Ints:
        """Returns the levels [n]."""
        q = np.zeros(self.size, smallest_type(1 / step + 2))
        rounded = np.rint(self.values / np.float32(step) + self.dither)
        # Level 0 stands for the zeros alone.
        q[self.nonzero] = rounded + (rounded >= 0)
        return q


def _exponent_bits(exponents: NDArray[np.int8]) -> float:
    """Estimates the packed bits of all exponents, of many by their frequencies, which is quicker.

    Neighbours are often equal, so their differences may take fewer bits.
    """
    if len(exponents) < 1 << 12:
        return estimate_bits(exponents)
    options = []
    for values in (exponents, np.diff(exponents, prepend=np.int8(0))):
        counts = np.bincount(values.astype(np.intp) + 2 * MAX_EXPONENT)
        occurring = counts[counts > 0]
        options.append(float(occurring @ np.log2(len(values) / occurring)))
    return min(options)


def _uniform_of(words: NDArray[np.uint16]) -> Floats:
    """Returns (word + 1/2) / 2**16 - 1/2 of each word, float32: uniform on [-1/2, 1/2)."""
    u = words.astype(np.float32)
    # The constants are powers of two, so all but the last sum are exact.
    u += np.float32(0.5)
    u *= np.float32(2**-16)
    u -= np.float32(0.5)
    return u


def _steps(middle: float, level: float) -> NDArray[np.float64]:
    """Returns the step for each exponent from -MAX_EXPONENT to MAX_EXPONENT.

    Unbiased coding of values with standard deviation s and noise variance D takes
    log2(1 + s**2 / D) / 2 bits. At a given number of bits, the total noise is smallest if one more
    bit would reduce the noise equally in every block. Setting these derivatives equal gives
    D (D + s**2) = level * middle**2 * s**2, which is solved for D.

    Args:
        middle: the median scale of the blocks.
        level: the noise level, free of units; a larger one takes fewer bits.
    """
    exponents = np.arange(-MAX_EXPONENT, MAX_EXPONENT + 1)
    spread = np.ldexp(np.where(exponents % 2, math.sqrt(2), 1.0), exponents // 2)
    square = spread * spread
    # The root of the quadratic equation in a form without cancellation. A step of width w has noise
    # of variance w**2 / 12, hence the 12 below.
    noise = 2 * level * square / (square + np.sqrt(square * square + 4 * level * square))
    steps: NDArray[np.float64] = np.maximum(middle * np.sqrt(12 * noise), 4 / MAX_LEVEL)
    return steps
