"""Quantizing to a rate in bits per packed value: the biased quantizer, and how steps are found."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    side_floats,
    smallest_type,
    spread_by_key,
    whole_levels,
)
from fedpress.errors import WireError
from fedpress.wire.packing import estimate_bits

SAMPLE_RUN = 256
"""Neighbouring values that are sampled together."""

SAMPLE_RUNS = 1024
"""Runs of neighbours in a sample, from which bits are estimated."""

ROUNDING = 0.48
"""Added before cutting off towards zero. Below 1/2, so a few more values become zero, which saves
more bits than it costs precision."""

FLOAT_MIN = float(np.finfo(np.float32).smallest_subnormal)

LARGEST = 1 << 30
"""Largest level."""

SLACK = 0.004
"""Bits per value below the target that are aimed at, since the search looks at a sample."""

TOLERANCE = 0.004
"""Bits per value below what is aimed at where the search for the step ends."""

SPARSE_RATE = 0.2
"""Below this rate few values are not zero, and a sample alone misjudges them."""


@dataclass(frozen=True)
class Centroids:
    """The biased quantizer at a rate.

    A uniform grid, decoded to the mean of the values that were rounded to each level.

    Attributes:
        size: number of values.
        rate: bits per value after packing.
    """

    size: int
    rate: float
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the level of each value, and `levels` beside them.

        These are the step, and for the lowest levels how far their mean lies below the multiple of
        the step.
        """
        values, peak = as_array(x, self.size)
        # All values are zero, which any step gives back.
        if not peak:
            return Encoded(torch.zeros(self.size, dtype=torch.int8), {"levels": torch.ones(1)})
        # Relative to the peak, so that steps are within float32's range whatever the update's size.
        sample = _sample(values) / peak
        share = sample.size / self.size

        def bits(step: float) -> float:
            return estimate_bits(to_levels(sample, step, np.int32), share=share)

        target = bits_for(self.rate, self.size) * share
        step = find_step(bits, target, 4 * 2.0**-self.rate * rms(sample), sample.size)
        q = to_levels(values, step_width(step, peak), smallest_type(1 / step + 1))
        if self.rate < SPARSE_RATE and share < 1:
            # All values took more or fewer bits than the sample said: correct the target by that.
            correction = bits(step) / (estimate_bits(q) * share)
            step = find_step(bits, target * correction, step, sample.size)
            q = to_levels(values, step_width(step, peak), smallest_type(1 / step + 1))
        # Decoding to the mean of a level lowers the error at no more than a few floats.
        levels = level_offsets(sample, step)
        grid = torch.tensor([step_width(step, peak), *levels], dtype=torch.float32)
        return Encoded(torch.from_numpy(q), {"levels": grid})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]."""
        q = whole_levels(x, (self.size,), ("levels",))
        levels = side_floats(x, "levels", None, least=1)
        step, offsets = levels[0], levels[1:]
        # The encoder sends at most 7 offsets; a sender must not choose a table of any length.
        if step <= 0 or len(offsets) > 64 or np.abs(offsets).max(initial=0) > 1:
            raise WireError(
                f"got step {step} with offsets {offsets[:4]}",
                place="update.levels",
                cure="expected a positive step",
            )
        centroids = np.arange(len(offsets) + 1, dtype=np.float64)
        centroids[1:] -= offsets
        return torch.from_numpy(dequantize_levels(q, float(step), centroids))


def find_step(
    bits: Callable[[float], float], target: float, start: float, size: int, most: float = 2.0
) -> float:
    """Returns the step at which values take just below `target` bits.

    The secant method until the target lies between two steps, then false position between them.

    Args:
        bits: step -> bits of the values, which mostly fall as the step grows.
        target: bits that must not be exceeded.
        start: where to begin.
        size: number of values.
        most: the largest step, at which all values count as zero. The smallest step keeps levels
            within `LARGEST`.
    """
    # All in the logarithm of the step: halving it takes about one bit more per value.
    low = math.log2(4 / LARGEST)
    high = math.log2(most)
    few = 0.0
    many = math.inf
    at = min(max(math.log2(start), low), high)
    slack = min(TOLERANCE * size, 0.01 * target)
    aim = target - slack / 2
    last: tuple[float, float] | None = None
    for _ in range(24):
        now = bits(2.0**at)
        if now > target:
            low = at
            many = now
        else:
            high = at
            few = now
        if target - slack <= now <= target or high - low < 1e-3:
            break
        if many < math.inf and few > 0:
            # Not too near an end, so that the interval shrinks in every turn.
            share = min(max((many - aim) / (many - few), 0.02), 0.98)
            at = low + (high - low) * share
        else:
            slope = _slope(last, at, now, size)
            last = at, now
            at = min(max(at + min(max((now - aim) / slope, -3.0), 3.0), low), high)
    if few > 0:
        return float(2.0**high)
    return _scan(bits, target, start, most)


def _slope(last: tuple[float, float] | None, at: float, now: float, size: int) -> float:
    """Returns by how many bits the values get shorter where the step doubles.

    Args:
        last: (logarithm of the step, bits) before, if any.
        at: logarithm of the step now.
        now: bits now.
        size: number of values.
    """
    if last is not None and (last[1] - now) * (at - last[0]) > 0:
        return float((last[1] - now) / (at - last[0]))
    # One bit a value for each halving of the step, fewer where most values are zero.
    return 0.9 * min(max(now, 0.02 * size), size)


def _scan(bits: Callable[[float], float], target: float, start: float, most: float) -> float:
    """Returns the step whose bits come nearest below `target`, by trying steps one after another.

    For values whose bits do not fall as the step grows, such as those of an earlier rounding, which
    have no tails. Without this all of them would become zero.
    """
    best: tuple[float, float] | None = None
    for tries in range(math.ceil(8 * math.log2(most / start)) + 16):
        step = most * 2.0 ** (-tries / 8)
        spent = bits(step)
        if spent <= target and (best is None or (spent, step) > best):
            best = spent, step
    return most if best is None else best[1]


def bits_for(rate: float, size: int, side: int = 0) -> float:
    """Returns the bits that packed values may take, so that the update keeps to `rate`.

    Args:
        rate: bits per value, of all that is sent.
        size: number of values.
        side: bytes of the side tensors.
    """
    # Frame and header of the message, about 80 bytes, are not subtracted: they would leave nothing
    # of a small update.
    aim = (rate - min(SLACK, 0.006 * rate)) * size
    return max(aim - 8 * side, 0.5 * rate * size)


def to_levels(values: Floats, step: float, dtype: type[np.signedinteger]) -> Ints:
    """Returns the levels of values [n] on a grid of width `step`, rounded a little towards zero."""
    q = np.empty(values.shape, dtype)
    scratch = np.empty(CHUNK, np.float32)
    for at in range(0, values.size, CHUNK):
        part = values[at : at + CHUNK]
        y = np.divide(part, np.float32(step), out=scratch[: part.size])
        y += np.copysign(np.float32(ROUNDING), part)
        # The conversion to an integer cuts off towards zero.
        q[at : at + CHUNK] = y
    return q


def step_width(step: float, peak: float) -> float:
    """Returns the width of a `step` that is given in units of `peak`, within float32's range."""
    return min(max(step * peak, FLOAT_MIN), FLOAT_MAX)


def level_offsets(sample: Floats, step: float) -> list[float]:
    """Returns by how many steps the mean of the values on levels 1, 2, ... lies below the level.

    Only for the lowest levels that at least 32 values of the sample have; at most 7.
    """
    q = np.abs(to_levels(sample, step, np.int32))
    top = 8
    capped = np.minimum(q, top)
    counts = np.bincount(capped, minlength=top + 1)
    offsets = q - np.abs(sample, dtype=np.float64) / step
    sums = np.bincount(capped, offsets, minlength=top + 1)
    number = int(np.count_nonzero(counts[1:top] >= 32))
    # The constant avoids a division by 0 for levels without values, which are not used.
    means = sums / (counts + 1e-9)
    return [float(np.clip(mean, -0.5, 0.5)) for mean in means[1 : number + 1]]


def dequantize_levels(q: Ints, step: float, centroids: NDArray[np.float64]) -> Floats:
    """Returns the value of each level, float32 of the shape of `q`.

    Args:
        q: levels.
        step: width of a step.
        centroids: the values of the levels 0, 1, ... in steps. Larger levels are shifted like the
            last of these.
    """
    last = len(centroids) - 1
    shift = last - centroids[last]

    def values(levels: NDArray[np.float64]) -> Floats:
        sizes = np.abs(levels)
        known = centroids[np.minimum(sizes, last).astype(np.intp)]
        steps = np.where(sizes > last, sizes - shift, known)
        return np.clip(np.copysign(steps, levels) * step, -FLOAT_MAX, FLOAT_MAX).astype(np.float32)

    # A table of all 256 levels is faster than computing each value.
    if q.dtype == np.int8:
        table = values(np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64))
        return table[q.view(np.uint8)]
    out = np.empty(q.shape, np.float32)
    for at in range(0, q.size, CHUNK):
        out[at : at + CHUNK] = values(q[at : at + CHUNK].astype(np.float64))
    return out


def rms(values: Floats) -> float:
    """Returns the root of the mean square, at least 1e-9."""
    return max(float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))), 1e-9)


def _sample(values: Floats) -> Floats:
    """Returns a sample that packs like all `values`.

    Runs of neighbours, since packing uses what these have in common, with magnitudes distributed
    like those of all runs.
    """
    if values.size <= SAMPLE_RUN * SAMPLE_RUNS:
        return values
    runs = values[: values.size // SAMPLE_RUN * SAMPLE_RUN].reshape(-1, SAMPLE_RUN)
    magnitudes = np.abs(runs) @ np.ones(SAMPLE_RUN, np.float32)
    return runs[spread_by_key(magnitudes, SAMPLE_RUNS)].reshape(-1)
