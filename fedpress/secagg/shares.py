"""Shamir's secret sharing over GF(2^16): any `threshold` shares give the secret, fewer say nothing about it.

A secret is a row of bytes; every two bytes are the value at 0 of their own random polynomial of degree threshold - 1,
and a share is the value at a point from 1 to 65535. Addition is XOR, multiplication goes through tables of logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np

from fedpress.core.random import keystream

ORDER = 65535  # of the multiplicative group
POLYNOMIAL = 0x1100B  # x^16 + x^12 + x^3 + x + 1, of which x is a generator
TRIES = 300  # random choices of share holders before a secret counts as lost


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns (exp, log) of the field; log(0) points behind the end, where exp is 0."""
    exp = np.zeros(4 * ORDER + 1, np.uint16)
    log = np.full(ORDER + 1, 2 * ORDER, np.int32)
    value = 1
    for power in range(ORDER):
        exp[power] = exp[power + ORDER] = value
        log[value] = power
        value <<= 1
        if value > ORDER:
            value ^= POLYNOMIAL
    return exp, log


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the products of field elements (uint16)."""
    exp, log = tables()
    product: np.ndarray = exp.take(log.take(a) + log.take(b))
    return product


def split(secrets: np.ndarray, points: Sequence[int], threshold: int, coin: bytes) -> np.ndarray:
    """Returns one share of every secret for every point.

    Args:
        secrets: uint8 [secrets, bytes], an even number of bytes.
        points: different numbers from 1 to 65535.
        threshold: how many shares give the secret.
        coin: 32 secret bytes that the polynomials come from; never use them for other secrets.

    Returns:
        uint8 [points, secrets, bytes].
    """
    exp, log = tables()
    constant = np.ascontiguousarray(secrets).view("<u2")
    drawn = (
        keystream(coin, secrets.size * (threshold - 1))
        .view("<u2")
        .reshape(threshold - 1, *constant.shape)
    )
    at = log.take(np.asarray(points, np.uint16))[:, None, None]
    value = np.zeros((len(points), *constant.shape), np.uint16)
    for coefficients in (*drawn, constant):  # Horner, highest power first
        value = exp.take(log.take(value) + at)
        value ^= coefficients
    return value.view(np.uint8)


def join(shares: np.ndarray, points: Sequence[int] | np.ndarray, *, at: int = 0) -> np.ndarray:
    """Returns the value at `at` of the polynomials through `shares` [points, secrets, bytes]: the secrets, at 0."""
    exp, log = tables()
    weights = _log_weights(np.asarray(points, np.int64), at)
    words = np.ascontiguousarray(shares).view("<u2")
    total = np.zeros(words.shape[1:], np.uint16)
    for weight, row in zip(weights.tolist(), words, strict=True):
        total ^= exp.take(log.take(row) + weight)
    return total.view(np.uint8)


def recover(
    shares: np.ndarray, points: Sequence[int], threshold: int, right: Callable[[int, bytes], bool]
) -> tuple[np.ndarray, list[int]]:
    """Joins shares of which some may be wrong, as long as the right ones can be told by their secret.

    The first `threshold` holders are tried; where the result is not right, random others are, until one choice fits:
    then whoever is off its polynomial is not asked again.

    Args:
        shares: uint8 [holders, secrets, bytes] of at least `threshold` holders.
        points: the point of each holder.
        threshold: how many shares give a secret.
        right: says of (number of the secret, its bytes) whether it is the right one.

    Returns:
        The secrets, uint8 [secrets, bytes], and the numbers of those that no choice gave.
    """
    order = list(range(len(points)))
    place = np.asarray(points)
    rng = np.random.default_rng(0)  # which holders to try is no secret
    chosen = order[:threshold]
    found = join(shares[chosen], place[chosen])
    lost: list[int] = []
    wrong = [number for number, row in enumerate(found) if not right(number, row.tobytes())]
    while wrong:
        one = shares[:, wrong[:1]]
        fit = _search(one, place, threshold, partial(right, wrong[0]), rng)
        if fit is None:
            lost.append(wrong.pop(0))
            continue
        liars = {
            k
            for k in order
            if k not in fit and (join(one[fit], place[fit], at=place[k]) != one[k]).any()
        }
        order = [k for k in order if k not in liars] + [k for k in order if k in liars]
        found[wrong[0]] = join(one[fit], place[fit])[0]
        wrong = wrong[1:]
        if wrong:
            chosen = order[:threshold]
            found[wrong] = join(shares[np.ix_(chosen, wrong)], place[chosen])
            wrong = [number for number in wrong if not right(number, found[number].tobytes())]
    return found, sorted(lost)


def _search(
    one: np.ndarray,
    place: np.ndarray,
    threshold: int,
    right: Callable[[bytes], bool],
    rng: np.random.Generator,
) -> list[int] | None:
    """Returns `threshold` holders whose shares of the secret `one` [holders, 1, bytes] give a right one."""
    if threshold == len(place):
        return None
    for _ in range(TRIES):
        chosen = sorted(rng.choice(len(place), threshold, replace=False).tolist())
        if right(join(one[chosen], place[chosen]).tobytes()):
            return chosen
    return None


def _log_weights(points: np.ndarray, at: int) -> np.ndarray:
    """Returns the logarithms of Lagrange's weights for the value at `at`, which is none of the points."""
    _, log = tables()
    above = log.take(points ^ at).astype(np.int64)
    between = points[:, None] ^ points[None, :]
    np.fill_diagonal(between, 1)  # log(1) = 0: leaves the point itself out
    below = log.take(between).astype(np.int64).sum(1)
    logarithms: np.ndarray = (above.sum() - above - below) % ORDER
    return logarithms
