"""Shamir's secret sharing over GF(2^16): `threshold` shares give the secret, fewer reveal nothing.

A secret is a row of bytes. Each pair of bytes is the value at 0 of a random polynomial of degree
threshold - 1. A share is the polynomial's value at a point from 1 to 65535. In this field, addition
is XOR, and multiplication adds logarithms, which are looked up in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np

from fedpress.core.random import keystream

ORDER = 65535
"""Order of the multiplicative group; logarithms are modulo this."""

POLYNOMIAL = 0x1100B
"""x^16 + x^12 + x^3 + x + 1, which defines the field; x generates its multiplicative group."""

MAX_TRIES = 300
"""Largest number of random sets of share holders that are tried to recover one secret."""


@cache
def field_tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables (exp, log) of the field, uint16 [4 * ORDER + 1] and int32 [ORDER + 1].

    Zero has no logarithm. The table log contains 2 * ORDER for it, and the table exp is 0 from
    2 * ORDER on. So a product with 0 needs no special case.
    """
    exp = np.zeros(4 * ORDER + 1, np.uint16)
    log = np.full(ORDER + 1, 2 * ORDER, np.int32)
    value = 1
    for power in range(ORDER):
        # exp has two periods, so that a sum of two logarithms needs no reduction.
        exp[power] = value
        exp[power + ORDER] = value
        log[value] = power
        value <<= 1
        if value > ORDER:
            value ^= POLYNOMIAL
    return exp, log


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the elementwise products of field elements, uint16 of the shape of `a` and `b`."""
    exp, log = field_tables()
    product: np.ndarray = exp.take(log.take(a) + log.take(b))
    return product


def share_secrets(
    secrets: np.ndarray, points: Sequence[int], threshold: int, key: bytes
) -> np.ndarray:
    """Returns a share of every secret for every point.

    Args:
        secrets: uint8 [secrets, bytes], an even number of bytes.
        points: different numbers from 1 to 65535; the value at 0 is the secret itself.
        threshold: number of shares that give the secret.
        key: 32 secret bytes from which the polynomials are drawn. Never use a key for two different
            inputs: with the same polynomials, the XOR of two shares is the XOR of the two secrets.

    Returns:
        uint8 [points, secrets, bytes].
    """
    exp, log = field_tables()
    # Little-endian on every machine, because shares are sent to other machines.
    constant = np.ascontiguousarray(secrets).view("<u2")
    random_bytes = keystream(key, secrets.size * (threshold - 1))
    drawn = random_bytes.view("<u2").reshape(threshold - 1, *constant.shape)
    log_points = log.take(np.asarray(points, np.uint16))[:, None, None]
    value = np.zeros((len(points), *constant.shape), np.uint16)
    # Horner's method, with the highest power first.
    for coefficients in (*drawn, constant):
        value = exp.take(log.take(value) + log_points)
        value ^= coefficients
    return value.view(np.uint8)


def interpolate(
    shares: np.ndarray, points: Sequence[int] | np.ndarray, *, at: int = 0
) -> np.ndarray:
    """Returns the values at `at` of the polynomials through `shares`; at 0 these are the secrets.

    Args:
        shares: uint8 [points, secrets, bytes].
        points: the point of each share.
        at: point at which the polynomials are evaluated; must not be one of `points`.

    Returns:
        uint8 [secrets, bytes].
    """
    exp, log = field_tables()
    weights = _log_weights(np.asarray(points, np.int64), at)
    words = np.ascontiguousarray(shares).view("<u2")
    total = np.zeros(words.shape[1:], np.uint16)
    # A weight's logarithm is below ORDER, so the index is within the table even for a share of 0.
    for weight, row in zip(weights.tolist(), words, strict=True):
        total ^= exp.take(log.take(row) + weight)
    return total.view(np.uint8)


def recover_secrets(
    shares: np.ndarray, points: Sequence[int], threshold: int, right: Callable[[int, bytes], bool]
) -> tuple[np.ndarray, list[int]]:
    """Recovers secrets from shares of which some may be wrong.

    First the shares of the first `threshold` holders are combined. If a secret is wrong, random
    sets of `threshold` holders are tried until the secret is right. Holders whose shares do not lie
    on the right polynomial are put last in the order for all further secrets.

    Args:
        shares: uint8 [holders, secrets, bytes] of at least `threshold` holders.
        points: the point of each holder.
        threshold: number of shares that give a secret.
        right: (number of a secret, its bytes) -> whether the secret is correct.

    Returns:
        The secrets, uint8 [secrets, bytes], and the numbers of the secrets that were not recovered.
    """
    order = list(range(len(points)))
    place = np.asarray(points)
    # The choice of holders need not be secret, so a fixed seed is fine.
    rng = np.random.default_rng(0)
    chosen = order[:threshold]
    found = interpolate(shares[chosen], place[chosen])
    lost: list[int] = []
    wrong = [number for number, row in enumerate(found) if not right(number, row.tobytes())]
    while wrong:
        one = shares[:, wrong[:1]]
        fit = _search(one, place, threshold, partial(right, wrong[0]), rng)
        if fit is None:
            lost.append(wrong.pop(0))
            continue
        # A holder with one wrong share probably has more, so it is used last from here on.
        trusted: list[int] = []
        doubted: list[int] = []
        for k in order:
            on_polynomial = (interpolate(one[fit], place[fit], at=place[k]) == one[k]).all()
            if k in fit or on_polynomial:
                trusted.append(k)
            else:
                doubted.append(k)
        order = trusted + doubted
        found[wrong[0]] = interpolate(one[fit], place[fit])[0]
        wrong = wrong[1:]
        if wrong:
            chosen = order[:threshold]
            found[wrong] = interpolate(shares[np.ix_(chosen, wrong)], place[chosen])
            wrong = [number for number in wrong if not right(number, found[number].tobytes())]
    return found, sorted(lost)


def _search(
    one: np.ndarray,
    place: np.ndarray,
    threshold: int,
    right: Callable[[bytes], bool],
    rng: np.random.Generator,
) -> list[int] | None:
    """Returns `threshold` holders whose shares give the right secret; None if no set is found.

    Args:
        one: shares of one secret, uint8 [holders, 1, bytes].
        place: the point of each holder.
        threshold: number of shares that give a secret.
        right: returns whether given bytes are the right secret.
        rng: chooses the holders.
    """
    # Then there is only one set of holders, and the caller has tried it.
    if threshold == len(place):
        return None
    for _ in range(MAX_TRIES):
        chosen = sorted(rng.choice(len(place), threshold, replace=False).tolist())
        if right(interpolate(one[chosen], place[chosen]).tobytes()):
            return chosen
    return None


def _log_weights(points: np.ndarray, at: int) -> np.ndarray:
    """Returns the logarithms of Lagrange's weights for the value at `at`."""
    _, log = field_tables()
    above = log.take(points ^ at).astype(np.int64)
    between = points[:, None] ^ points[None, :]
    # Lagrange's product has no factor for the point itself. So this factor is 1, with logarithm 0.
    np.fill_diagonal(between, 1)
    below = log.take(between).astype(np.int64).sum(1)
    logarithms: np.ndarray = (above.sum() - above - below) % ORDER
    return logarithms
