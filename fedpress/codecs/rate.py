"""Quantizes an update (biased) to a given number of bits per value, and finds the grid step.

The bits are counted after packing, the lossless entropy coding of a message (`fedpress.wire`).
"""

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
    checked_levels,
    side_floats,
    smallest_type,
    stratified_positions,
)
from fedpress.errors import WireError
from fedpress.wire.packing import SizeEstimator

RUN_LENGTH = 512
"""Number of neighbouring values that are sampled together."""

NUM_RUNS = 256
"""Number of such runs of neighbours in the sample from which the packed size is estimated."""

FULL_SIZE = 1 << 18
"""Up to this size the search for a step sees the whole vector, from there on a sample."""

ROUNDING = 0.48
"""Added to |x| / step before the fraction is dropped. 0.5 would round to nearest. With 0.48 a few
more values become zero, which saves more bits than it costs precision."""

FLOAT_MIN = float(np.finfo(np.float32).smallest_subnormal)
"""Smallest float32 above 0."""

MAX_LEVEL = 1 << 30
"""Largest level of a grid."""

SLACK = 0.004
"""The search aims at most this many bits per value below the rate, because it only sees a sample
and the whole vector may take more bits. At low rates it aims 0.6% below."""

TOLERANCE = 0.004
"""The search ends at most this many bits per value below its aim."""


@dataclass(frozen=True)
class RateQuantizer:
    """Quantizes to `rate` bits per value; biased.

    The grid is uniform. Each level is decoded to its centroid: the mean of the values that were
    rounded to this level. The centroid is nearer to zero than the grid point.

    Attributes:
        size: number of values.
        rate: bits per value after packing.
    """

    size: int
    rate: float
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns the level of each value, and the side tensor `levels`: [step, *offsets].

        The offset of level k is how many steps its centroid lies below k. Example: [0.01, 0.1]
        decodes level 1 to 0.009.
        """
        values, peak = as_array(x, self.size)
        # All values are zero, so any step is right.
        if not peak:
            return Encoded(torch.zeros(self.size, dtype=torch.int8), {"levels": torch.ones(1)})
        step, offsets = _step_of(values, peak, self.rate)
        q = to_levels(values, scaled_step(step, peak), smallest_type(1 / step + 1))
        grid = torch.tensor([scaled_step(step, peak), *offsets], dtype=torch.float32)
        return Encoded(torch.from_numpy(q), {"levels": grid})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]."""
        q = checked_levels(x, (self.size,), ("levels",))
        levels = side_floats(x, "levels", None, least=1)
        step, offsets = levels[0], levels[1:]
        # The encoder sends at most 7 offsets. The limit stops a malicious sender from filling the
        # memory.
        if step <= 0 or len(offsets) > 64 or np.abs(offsets).max(initial=0) > 1:
            raise WireError(
                f"got step {step} with offsets {offsets[:4]}",
                place="update.levels",
                cure="expected a positive step",
            )
        centroids = np.arange(len(offsets) + 1, dtype=np.float64)
        centroids[1:] -= offsets
        return torch.from_numpy(dequantize_levels(q, float(step), centroids))


def _step_of(values: Floats, peak: float, rate: float) -> tuple[float, list[float]]:
    """Returns the step / `peak` at which `values` [n] take `rate` bits each, and its offsets."""
    # Values are divided by the largest one, so that the search for steps has the same range for
    # tiny and huge updates.
    sample = _sample(values) / peak
    share = sample.size / values.size
    estimator = SizeEstimator(share=share)

    def levels(step: float) -> Ints:
        return to_levels(sample, step, smallest_type(1 / step + 1))

    def bits(step: float) -> float:
        return estimator.bits(levels(step))

    target = bit_budget(rate, values.size) * share
    step = find_step(bits, target, 4 * 2.0**-rate * rms(sample), sample.size)
    if share < 1:
        # The whole vector takes more or fewer bits than the sample predicted. A second search takes
        # that ratio into account.
        q = to_levels(values, scaled_step(step, peak), smallest_type(1 / step + 1))
        target /= estimator.ratio(q, levels(step))
    else:
        estimator.forget()
    step = find_step(bits, target, step, sample.size)
    # Decoding to centroids lowers the error, and sending them costs at most 7 floats.
    return step, level_offsets(sample, step)


def find_step(
    bits: Callable[[float], float], target: float, start: float, size: int, most: float = 2.0
) -> float:
    """Returns the step at which values take `target` bits or slightly less.

    It uses the secant method until the target lies between two steps, then false position.

    Args:
        bits: step -> bits of the packed values. They usually fall as the step grows.
        target: largest number of bits.
        start: first step to try.
        size: number of values.
        most: largest step to try, at which all values are rounded to zero. The smallest step that
            is tried keeps the levels within `MAX_LEVEL`.
    """
    # The search is over the logarithm of the step, in which bits are nearly linear: halving the
    # step takes about one bit more per value.
    low = math.log2(4 / MAX_LEVEL)
    high = math.log2(most)
    # `many` are the bits at step `low`, above the target; `few` those at step `high`, within it.
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
            # The next step keeps a distance from both ends, so that the interval always shrinks.
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
    """Estimates how many bits are saved if the step doubles.

    Args:
        last: (logarithm of the step, bits) of the try before; None at the first try.
        at: logarithm of the present step.
        now: bits at the present step.
        size: number of values.
    """
    if last is not None and (last[1] - now) * (at - last[0]) > 0:
        return float((last[1] - now) / (at - last[0]))
    # The first slope is a guess: one bit per value, and fewer if most values are zero.
    return 0.9 * min(max(now, 0.02 * size), size)


def _scan(bits: Callable[[float], float], target: float, start: float, most: float) -> float:
    """Finds the step with the most bits up to `target`, by trying steps one after another.

    It is needed if bits do not fall steadily as the step grows, for example because the values
    were rounded before. The search in `find_step` would then round all values to zero.
    """
    best: tuple[float, float] | None = None
    for tries in range(math.ceil(8 * math.log2(most / start)) + 16):
        step = most * 2.0 ** (-tries / 8)
        spent = bits(step)
        if spent <= target and (best is None or (spent, step) > best):
            best = spent, step
    return most if best is None else best[1]


def bit_budget(rate: float, size: int, side: int = 0) -> float:
    """Returns the bits that remain for the packed values of an update; at least half of all bits.

    Args:
        rate: bits per value, with the side tensors included.
        size: number of values.
        side: bytes of the side tensors.
    """
    # Frame and header of the message (about 80 bytes) are not subtracted: for a small update no
    # bits would remain.
    aim = (rate - min(SLACK, 0.006 * rate)) * size
    return max(aim - 8 * side, 0.5 * rate * size)


def to_levels(values: Floats, step: float, dtype: type[np.signedinteger]) -> Ints:
    """Rounds values [n] to integer levels on a grid of width `step`, slightly towards zero."""
    q = np.empty(values.shape, dtype)
    scratch = np.empty(CHUNK, np.float32)
    for at in range(0, values.size, CHUNK):
        part = values[at : at + CHUNK]
        y = np.divide(part, np.float32(step), out=scratch[: part.size])
        y += np.copysign(np.float32(ROUNDING), part)
        # The conversion to integers drops the fraction, that is, it rounds towards zero.
        q[at : at + CHUNK] = y
    return q


def scaled_step(step: float, peak: float) -> float:
    """Returns `step` * `peak`, clamped to the range of float32."""
    return min(max(step * peak, FLOAT_MIN), FLOAT_MAX)


def level_offsets(sample: Floats, step: float) -> list[float]:
    """Returns the offsets of levels 1, 2, ...: how many steps each centroid lies below its level.

    The n lowest levels have an offset. n is how many of the levels 1 to 7 occur at least 32 times
    in the sample: the mean of fewer values would be noisy.
    """
    top = 8
    sizes = np.abs(sample)
    levels = np.minimum(to_levels(sizes, step, np.int32), top).astype(np.intp)
    counts = np.bincount(levels, minlength=top + 1)
    # Each value lies level - size / step below its level.
    sums = np.arange(top + 1) * counts - np.bincount(levels, sizes, minlength=top + 1) / step
    number = int(np.count_nonzero(counts[1:top] >= 32))
    # The constant avoids 0 / 0 for levels without values, whose means are not used.
    means = sums / (counts + 1e-9)
    return [float(np.clip(mean, -0.5, 0.5)) for mean in means[1 : number + 1]]


def dequantize_levels(q: Ints, step: float, centroids: NDArray[np.float64]) -> Floats:
    """Returns the value of each level, float32 in the shape of `q`.

    Args:
        q: levels.
        step: width of a step.
        centroids: decoded values of the levels 0, 1, ..., in steps. Higher levels are shifted as
            far as the last of these.
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
        out = np.empty(q.shape, np.float32)
        for at in range(0, q.size, CHUNK):
            # numpy reads a table fastest at positions of type intp.
            positions = q[at : at + CHUNK].view(np.uint8).astype(np.intp)
            table.take(positions, out=out[at : at + CHUNK], mode="clip")
        return out
    out = np.empty(q.shape, np.float32)
    for at in range(0, q.size, CHUNK):
        out[at : at + CHUNK] = values(q[at : at + CHUNK].astype(np.float64))
    return out


def rms(values: Floats) -> float:
    """Returns the root of the mean square, at least 1e-9."""
    return max(float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))), 1e-9)


def _sample(values: Floats) -> Floats:
    """Returns a sample whose packed bits per value are about those of all `values`."""
    return values if values.size <= FULL_SIZE else values[sample_positions(values)]


def sample_positions(values: Floats) -> NDArray[np.intp]:
    """Returns the positions of a sample of more than `FULL_SIZE` values.

    The sample consists of runs of neighbours, because the entropy coder profits from neighbours of
    similar size. Small and large runs are as frequent as in the whole vector.
    """
    runs = values[: values.size // RUN_LENGTH * RUN_LENGTH].reshape(-1, RUN_LENGTH)
    magnitudes = np.abs(runs) @ np.ones(RUN_LENGTH, np.float32)
    chosen = stratified_positions(magnitudes, NUM_RUNS)
    return (chosen[:, None] * RUN_LENGTH + np.arange(RUN_LENGTH)).reshape(-1)
