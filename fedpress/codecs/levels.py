"""What quantizers share: scales of blocks, checks of levels, random numbers that both sides draw."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.codecs.base import Encoded, Key
from fedpress.core import random
from fedpress.errors import DivergedError, WireError

Floats = NDArray[np.float32]
Ints = NDArray[np.signedinteger]

CHUNK = 1 << 16
"""Values worked on at a time: several times as fast, since they stay in the processor's cache."""

FLOAT_MAX = float(np.finfo(np.float32).max)
DTYPES = (torch.int8, torch.int16, torch.int32)


def as_array(x: Tensor, size: int) -> tuple[Floats, float]:
    """Returns the values, float32 [size], and the largest absolute value.

    Raises:
        WireError: if `x` has another shape.
        DivergedError: if a value is not finite.
    """
    if x.shape != (size,):
        raise WireError(
            f"got shape {tuple(x.shape)}, expected ({size},)",
            place="update",
            cure="encode one vector of the size that the codec was bound to",
        )
    values: Floats = x.detach().to("cpu", torch.float32).contiguous().numpy()
    peak = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    # A NaN makes both of them NaN, so one check finds it.
    if not math.isfinite(peak):
        raise DivergedError(
            "got a value that is not finite",
            place="update",
            cure="lower the learning rate, or leave such an update out",
        )
    return values, peak


def whole_levels(x: Encoded, shape: tuple[int, ...], side: tuple[str, ...]) -> Ints:
    """Returns the levels of `x`, whose sender is not trusted.

    Args:
        x: what was sent.
        shape: the shape that the levels must have.
        side: names of the tensors that must come with them; no others may.

    Raises:
        WireError: if the levels have another type or shape, or other tensors come with them.
    """
    if x.values.dtype not in DTYPES or x.values.shape != shape:
        raise WireError(
            f"got {x.values.dtype} {tuple(x.values.shape)}",
            place="update.values",
            cure=f"expected int8, int16 or int32 of shape {shape}",
        )
    if set(x.side) != set(side):
        raise WireError(
            f"expected exactly {', '.join(side)} beside the values",
            place=f"update.{min(set(x.side) ^ set(side))}",
        )
    values: Ints = x.values.contiguous().numpy()
    return values


def side_floats(x: Encoded, name: str, size: int | None, least: int = 0) -> Floats:
    """Returns the floats that came beside the levels under `name`.

    Args:
        x: what was sent.
        name: name of the tensor.
        size: how many there must be; None takes any number.
        least: fewest that there must be.

    Raises:
        WireError: if they are of another type or number, or not finite.
    """
    tensor = x.side[name]
    if (
        tensor.dtype != torch.float32
        or tensor.ndim != 1
        or len(tensor) < least
        or size not in (None, len(tensor))
    ):
        raise WireError(
            f"got {tensor.dtype} {tuple(tensor.shape)}",
            place=f"update.{name}",
            cure=f"expected float32 [{size or 'n'}]",
        )
    values: Floats = tensor.numpy()
    if not np.isfinite(values).all():
        raise WireError("got NaN or infinity, expected finite numbers", place=f"update.{name}")
    return values


def times_scales(x: Encoded, size: int, block: int, top: int) -> Floats:
    """Returns each level times the scale of its block, float32 [size].

    Args:
        x: what was sent: levels, and `scales` beside them.
        size: number of values.
        block: values with one scale.
        top: the largest level.

    Raises:
        WireError: if levels or scales are of another number or type, or out of range.
    """
    q = whole_levels(x, (size,), ("scales",))
    scales = side_floats(x, "scales", -(-size // block))
    if q.size and (int(q.max()) > top or int(q.min()) < -top):
        raise WireError(
            f"got a level beyond {top}", place="update.values", cure=f"expected {-top} to {top}"
        )
    if scales.min(initial=0) < 0:
        raise WireError("got a negative scale, expected 0 or more", place="update.scales")
    out = np.empty(size, np.float32)
    for at, end, scale in chunks(size, block, scales):
        with np.errstate(over="ignore"):
            out[at:end] = q[at:end] * scale
    # A sender can choose scales whose products overflow: decoded updates must be finite.
    return np.clip(out, -FLOAT_MAX, FLOAT_MAX)


def smallest_type(largest: float) -> type[np.signedinteger]:
    """Returns the smallest integer type that holds levels up to `largest`."""
    if largest < 1 << 7:
        return np.int8
    if largest < 1 << 15:
        return np.int16
    return np.int32


def over_blocks(function: np.ufunc, values: Floats, block: int) -> Floats:
    """Returns one value for each block of `values` [n], reduced by `function`.

    The last block may be shorter.
    """
    if not values.size:
        return np.zeros(0, np.float32)
    out: Floats = function.reduceat(values, np.arange(0, values.size, block))
    return out


def block_means(values: Floats, block: int) -> Floats:
    """Returns the mean of each block of `values` [n]; the last block may be shorter."""
    if not values.size:
        return np.zeros(0, np.float32)
    starts = np.arange(0, values.size, block)
    sums = np.add.reduceat(values, starts, dtype=np.float64)
    return (sums / np.diff(starts, append=values.size)).astype(np.float32)


def chunks(size: int, block: int, scales: Floats) -> list[tuple[int, int, Floats]]:
    """Returns pieces of whole blocks: (start, end, the scale of each of their values).

    Args:
        size: number of values.
        block: values with one scale.
        scales: the scale of each block.
    """
    # Whole blocks, so that no scale belongs to two pieces.
    step = max(CHUNK // block, 1) * block
    pieces = []
    for at in range(0, size, step):
        end = min(at + step, size)
        of_blocks = scales[at // block : -(-end // block)]
        pieces.append((at, end, np.repeat(of_blocks, block)[: size - at]))
    return pieces


def spread_by_key(keys: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Returns `count` positions, in rising order, whose keys are distributed like all `keys`.

    They are evenly spaced in the order of the keys.
    """
    order = np.argsort(keys, kind="stable")
    ranks = ((np.arange(count) + 0.5) * (len(order) / count)).astype(np.intp)
    return np.sort(order[ranks])


def uniform(key: Key, size: int) -> Floats:
    """Returns public numbers uniform on [0, 1) in steps of 2**-16, float32 [size]."""
    return random_words(key, "dither", size).astype(np.float32) * np.float32(2**-16)


def random_words(key: Key, word: str, size: int) -> NDArray[np.uint16]:
    """Returns public uniform 16-bit numbers of this client and round, the same on every machine."""
    # From a public key: these numbers make rounding unbiased and hide nothing.
    words: NDArray[np.uint16] = random.keystream(key.client_key(word), 2 * size).view("<u2")
    return words
