"""Helpers of all quantizers: block scales, checks of received levels, shared random numbers.

A level is the integer that is sent for a value. Example: with step 0.1 the value 0.32 has level 3.
"""

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
"""An array of float32 values."""
Ints = NDArray[np.signedinteger]
"""An array of signed integers, such as levels."""

CHUNK = 1 << 16
"""Number of values processed at a time. So few fit into the processor's cache, which is faster."""

FLOAT_MAX = float(np.finfo(np.float32).max)
"""Largest finite float32."""
# The types of levels; an encoder sends the smallest one that holds its levels.
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
            cure="encode one vector of the size that the codec was made for",
        )
    values: Floats = x.detach().to("cpu", torch.float32).contiguous().numpy()
    peak = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    # A NaN makes maximum and minimum NaN, so this check also finds a NaN.
    if not math.isfinite(peak):
        raise DivergedError(
            "got a value that is not finite",
            place="update",
            cure="lower the learning rate, or leave such an update out",
        )
    return values, peak


def checked_levels(x: Encoded, shape: tuple[int, ...], side: tuple[str, ...]) -> Ints:
    """Returns the levels that an untrusted client sent, after a check.

    Args:
        x: levels and side tensors.
        shape: expected shape of the levels.
        side: names of the expected side tensors. Example: ("scales", "grid").

    Raises:
        WireError: if type, shape or names of the side tensors are not the expected ones.
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
    """Returns a side tensor of floats that an untrusted client sent, after a check.

    Args:
        x: levels and side tensors.
        name: name of the side tensor.
        size: expected number of floats; None if any number is valid.
        least: smallest valid number of floats.

    Raises:
        WireError: if the tensor is not float32 of this size, or contains NaN or infinity.
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


def dequantize_blocks(x: Encoded, size: int, block: int, top: int) -> Floats:
    """Returns each level times the scale of its block, float32 [size].

    Args:
        x: the received levels, with the side tensor `scales`.
        size: number of values.
        block: number of values that share one scale.
        top: the largest valid level.

    Raises:
        WireError: if number, type or range of levels or scales is invalid.
    """
    q = checked_levels(x, (size,), ("scales",))
    scales = side_floats(x, "scales", -(-size // block))
    if q.size and (int(q.max()) > top or int(q.min()) < -top):
        raise WireError(
            f"got a level beyond {top}", place="update.values", cure=f"expected {-top} to {top}"
        )
    if scales.min(initial=0) < 0:
        raise WireError("got a negative scale, expected 0 or more", place="update.scales")
    out = np.empty(size, np.float32)
    for at, end, scale in chunks(size, block, scales):
        # Overflow gives infinity here, which is clipped below.
        with np.errstate(over="ignore"):
            out[at:end] = q[at:end] * scale
    # A malicious sender can choose scales whose products overflow, and one infinite value would
    # make the whole mean infinite.
    return np.clip(out, -FLOAT_MAX, FLOAT_MAX)


def smallest_type(largest: float) -> type[np.signedinteger]:
    """Returns the smallest integer type that holds levels up to `largest`."""
    if largest < 1 << 7:
        return np.int8
    if largest < 1 << 15:
        return np.int16
    return np.int32


def reduce_blocks(function: np.ufunc, values: Floats, block: int) -> Floats:
    """Reduces each block of `values` [n] to one value, such as its maximum.

    Args:
        function: the reduction, for example `np.maximum`.
        values: [n].
        block: size of a block; the last one may be shorter.
    """
    if not values.size:
        return np.zeros(0, np.float32)
    out: Floats = function.reduceat(values, np.arange(0, values.size, block))
    return out


def block_means(values: Floats, block: int, *, squares: bool = False) -> Floats:
    """Returns the mean of each block of `values` [n]; the last block may be shorter.

    With `squares`, it returns the mean of the squared values.
    """
    if not values.size:
        return np.zeros(0, np.float32)
    sums = np.empty(-(-values.size // block))
    # In float64: float32 sums over large blocks would lose digits. A chunk at a time, because the
    # float64 copy of all values would leave the processor's cache.
    step = max(CHUNK // block, 1) * block
    for at in range(0, values.size, step):
        part = values[at : at + step]
        if squares:
            part = part * part
        wide = part.astype(np.float64)
        whole = wide.size // block * block
        first = at // block
        sums[first : first + whole // block] = wide[:whole].reshape(-1, block).sum(1)
        if whole < wide.size:
            sums[-1] = wide[whole:].sum()
    sizes = np.full(len(sums), block)
    sizes[-1] = values.size - block * (len(sums) - 1)
    means: Floats = (sums / sizes).astype(np.float32)
    return means


def chunks(size: int, block: int, scales: Floats) -> list[tuple[int, int, Floats]]:
    """Divides values into pieces of whole blocks, each about `CHUNK` values.

    Args:
        size: number of values.
        block: number of values that share one scale.
        scales: the scale of each block.

    Returns:
        (start, end, scale of each value) for each piece.
    """
    # Whole blocks, so that no block is in two pieces.
    step = max(CHUNK // block, 1) * block
    pieces = []
    for at in range(0, size, step):
        end = min(at + step, size)
        of_blocks = scales[at // block : -(-end // block)]
        pieces.append((at, end, np.repeat(of_blocks, block)[: size - at]))
    return pieces


def stratified_positions(keys: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Returns a stratified sample: `count` positions whose keys are distributed like all `keys`.

    They are evenly spaced in the order of the keys.

    >>> stratified_positions(np.array([5.0, 1.0, 3.0, 7.0]), 2).tolist()  # of the keys 3 and 7
    [2, 3]
    """
    order = np.argsort(keys, kind="stable")
    ranks = ((np.arange(count) + 0.5) * (len(order) / count)).astype(np.intp)
    return np.sort(order[ranks])


def uniform(key: Key, size: int) -> Floats:
    """Returns uniform numbers on [0, 1) in steps of 2**-16, float32 [size]; not secret."""
    return random_words(key, "dither", size).astype(np.float32) * np.float32(2**-16)


def random_words(key: Key, word: str, size: int) -> NDArray[np.uint16]:
    """Returns uniform 16-bit numbers of this client and round, uint16 [size]; not secret.

    Client and server draw the same numbers, whatever their machines. Another `word`, such as
    "dither", gives independent numbers.
    """
    # A public key is enough: these numbers only make rounding unbiased. "<u2": same byte order
    # everywhere.
    words: NDArray[np.uint16] = random.keystream(key.client_key(word), 2 * size).view("<u2")
    return words
