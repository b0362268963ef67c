"""What the quantizers share: whole numbers and scales of blocks, checked as they arrive, and chance of both sides."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.codecs.base import Encoded, Key
from fedpress.core import random
from fedpress.errors import WireError

Floats = NDArray[np.float32]
Ints = NDArray[np.signedinteger]

CHUNK = 1 << 16  # values at a time: what stays in the cache is several times as fast
FLOAT_MAX = float(np.finfo(np.float32).max)
DTYPES = (torch.int8, torch.int16, torch.int32)


def as_array(x: Tensor, size: int) -> tuple[Floats, float]:
    """Returns the values and the largest absolute value, which is finite."""
    if x.shape != (size,):
        raise ValueError(f"update: got shape {tuple(x.shape)}, expected ({size},)")
    values: Floats = x.detach().to("cpu", torch.float32).contiguous().numpy()
    peak = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    if not math.isfinite(peak):
        raise ValueError("update: got a value that is not finite; leave such an update out")
    return values, peak


def whole_levels(x: Encoded, shape: tuple[int, ...], side: tuple[str, ...]) -> Ints:
    """Returns the levels after checking their type and shape, and that exactly the tensors `side` came along."""
    if x.values.dtype not in DTYPES or x.values.shape != shape:
        raise WireError(
            f"got {x.values.dtype} {tuple(x.values.shape)}",
            place="update.values",
            cure=f"expected small whole numbers {shape}",
        )
    if set(x.side) != set(side):
        raise WireError(
            f"expected exactly {', '.join(side)} beside the values",
            place=f"update.{min(set(x.side) ^ set(side))}",
        )
    values: Ints = x.values.contiguous().numpy()
    return values


def side_floats(x: Encoded, name: str, size: int | None, least: int = 0) -> Floats:
    """Returns the floats that came beside the levels under `name` after checking type, number and finiteness."""
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


def scaled(x: Encoded, size: int, block: int, top: int) -> Floats:
    """Returns levels of at most `top`, each times the scale of its block."""
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
    return np.clip(out, -FLOAT_MAX, FLOAT_MAX)


def smallest_type(largest: float) -> type[np.signedinteger]:
    """Returns the smallest integers that hold levels up to `largest`."""
    return np.int8 if largest < 1 << 7 else np.int16 if largest < 1 << 15 else np.int32


def over_blocks(function: np.ufunc, values: Floats, block: int) -> Floats:
    """Reduces each block of values [n] to one: [n / block], rounded up."""
    if not values.size:
        return np.zeros(0, np.float32)
    out: Floats = function.reduceat(values, np.arange(0, values.size, block))
    return out


def block_means(values: Floats, block: int) -> Floats:
    """Returns the mean of each block of values [n]; the last may be shorter."""
    if not values.size:
        return np.zeros(0, np.float32)
    starts = np.arange(0, values.size, block)
    sums = np.add.reduceat(values, starts, dtype=np.float64)
    return (sums / np.diff(starts, append=values.size)).astype(np.float32)


def chunks(size: int, block: int, scales: Floats) -> list[tuple[int, int, Floats]]:
    """Returns pieces of whole blocks, (start, end, scales), with the scale of each of their values."""
    step = max(CHUNK // block, 1) * block
    return [
        (
            at,
            min(at + step, size),
            np.repeat(scales[at // block : -(-min(at + step, size) // block)], block)[: size - at],
        )
        for at in range(0, size, step)
    ]


def evenly(keys: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Returns `count` places whose keys are spread as all `keys` are: every so many in the order of the keys."""
    order = np.argsort(keys, kind="stable")
    return np.sort(order[((np.arange(count) + 0.5) * (len(order) / count)).astype(np.intp)])


def uniform(key: Key, size: int) -> Floats:
    """Returns numbers uniform on [0, 1) in steps of 2**-16."""
    return random_words(key, "dither", size).astype(np.float32) * np.float32(2**-16)


def random_words(key: Key, word: str, size: int) -> NDArray[np.uint16]:
    """Returns uniform 16-bit numbers of this client and round, equal on every machine."""
    words: NDArray[np.uint16] = random.keystream(key.client_key(word), 2 * size).view("<u2")
    return words
