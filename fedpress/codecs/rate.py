"""A rate in bits per packed value: the biased quantizer that keeps to it, and the search for the step of a grid."""

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
    evenly,
    side_floats,
    smallest_type,
    whole_levels,
)
from fedpress.errors import WireError
from fedpress.wire.packing import estimate_bits

SAMPLE_RUN, SAMPLE_RUNS = 256, 1024
ROUNDING = (
    0.48  # below 1/2: a few values more become zero, which saves more bits than it costs precision
)
FLOAT_MIN = float(np.finfo(np.float32).smallest_subnormal)
LARGEST = 1 << 30  # largest level
SLACK = 0.004  # bits a value below the target that are aimed at, since the search looks at a sample
TOLERANCE = 0.004  # bits a value below what is aimed at where the search for the step ends
SPARSE_RATE = 0.2  # below it few values are not zero, and a sample alone misjudges them


@dataclass(frozen=True)
class Centroids:
    """The biased quantizer at a rate: a uniform grid, read back at the mean of what fell on each level."""

    size: int
    rate: float
    additive = False

    def encode(self, x: Tensor, key: Key) -> Encoded:
        """Returns levels [size], and beside them the step and how far the lowest levels lie off their multiples."""
        values, peak = as_array(x, self.size)
        if not peak:
            return Encoded(torch.zeros(self.size, dtype=torch.int8), {"levels": torch.ones(1)})
        sample = _sample(values) / peak
        share = sample.size / self.size

        def bits(step: float) -> float:
            return estimate_bits(to_levels(sample, step, np.int32), share=share)

        target = bits_for(self.rate, self.size) * share
        step = find_step(bits, target, 4 * 2.0**-self.rate * rms(sample), sample.size)
        q = to_levels(values, width(step, peak), smallest_type(1 / step + 1))
        if self.rate < SPARSE_RATE and share < 1:
            step = find_step(
                bits, target * bits(step) / (estimate_bits(q) * share), step, sample.size
            )
            q = to_levels(values, width(step, peak), smallest_type(1 / step + 1))
        levels = level_offsets(sample, step)
        grid = torch.tensor([width(step, peak), *levels], dtype=torch.float32)
        return Encoded(torch.from_numpy(q), {"levels": grid})

    def decode(self, x: Encoded, key: Key) -> Tensor:
        """Returns float32 [size]."""
        q = whole_levels(x, (self.size,), ("levels",))
        levels = side_floats(x, "levels", None, least=1)
        step, offsets = levels[0], levels[1:]
        if step <= 0 or len(offsets) > 64 or np.abs(offsets).max(initial=0) > 1:
            raise WireError(
                f"got step {step} with offsets {offsets[:4]}",
                place="update.levels",
                cure="expected a positive step",
            )
        near = np.arange(len(offsets) + 1, dtype=np.float64)
        near[1:] -= offsets
        return torch.from_numpy(read_levels(q, float(step), near))


def find_step(
    bits: Callable[[float], float], target: float, start: float, size: int, most: float = 2.0
) -> float:
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
    steps = [
        most * 2.0 ** (-tries / 8) for tries in range(math.ceil(8 * math.log2(most / start)) + 16)
    ]
    found = [(spent, step) for step in steps if (spent := bits(step)) <= target]
    return max(found)[1] if found else most


def bits_for(rate: float, size: int, side: int = 0) -> float:
    """Bits that the packed values may take so that they, with `side` bytes beside, keep to `rate`.

    A message has about 80 bytes more, whatever its size; taken off here, they would leave nothing of a small update.
    """
    aim = (rate - min(SLACK, 0.006 * rate)) * size
    return max(aim - 8 * side, 0.5 * rate * size)


def to_levels(values: Floats, step: float, dtype: type[np.signedinteger]) -> Ints:
    """Rounds [n] to the grid of width `step`, a little towards zero."""
    q = np.empty(values.shape, dtype)
    scratch = np.empty(CHUNK, np.float32)
    for at in range(0, values.size, CHUNK):
        part = values[at : at + CHUNK]
        y = np.divide(part, np.float32(step), out=scratch[: part.size])
        y += np.copysign(np.float32(ROUNDING), part)
        q[at : at + CHUNK] = y  # the conversion cuts towards zero
    return q


def width(step: float, peak: float) -> float:
    """Returns `step` in units of `peak` as a width that float32 can hold."""
    return min(max(step * peak, FLOAT_MIN), FLOAT_MAX)


def level_offsets(sample: Floats, step: float) -> list[float]:
    """How far, in steps, the mean of what fell on levels 1, 2, ... lies below them; few where they are rare."""
    q = np.abs(to_levels(sample, step, np.int32))
    top = 8
    counts = np.bincount(np.minimum(q, top), minlength=top + 1)
    sums = np.bincount(
        np.minimum(q, top), q - np.abs(sample, dtype=np.float64) / step, minlength=top + 1
    )
    number = int(np.count_nonzero(counts[1:top] >= 32))
    means = sums / (counts + 1e-9)
    return [float(np.clip(m, -0.5, 0.5)) for m in means[1 : number + 1]]


def read_levels(q: Ints, step: float, near: NDArray[np.float64]) -> Floats:
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


def rms(values: Floats) -> float:
    """Returns the root of the mean square, at least 1e-9."""
    return max(float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))), 1e-9)


def _sample(values: Floats) -> Floats:
    """Runs of neighbours, since packing profits from what they have in common, as loud and as quiet as all are."""
    if values.size <= SAMPLE_RUN * SAMPLE_RUNS:
        return values
    runs = values[: values.size // SAMPLE_RUN * SAMPLE_RUN].reshape(-1, SAMPLE_RUN)
    return runs[evenly(np.abs(runs) @ np.ones(SAMPLE_RUN, np.float32), SAMPLE_RUNS)].reshape(-1)
