"""Who masks with whom: a random graph so dense that no choice of drop-outs splits the honest clients.

The server names the drop-outs, after it has seen the graph, so it could name all honest neighbours of one client and
would see that client alone. Hence the committee helps only if every client that reported has at least `least`
neighbours that reported. `risk` bounds the probability that the honest ones fall apart all the same.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fedpress.core.random import keystream

RISK = (
    2.0**-64
)  # that a round's graph or committee is bad; after 2^24 tries of a server that is still 2^-40
SMALL = 32  # up to this cohort the complete graph costs little, and needs no argument
MISS = (
    2.0**-10
)  # that a round stays closed by chance although no more clients vanished than planned


@lru_cache(maxsize=4)
def edges(seed: bytes, size: int, edge_prob: float) -> np.ndarray:
    """Returns the symmetric bool matrix [size, size] of the graph that the public 32-byte `seed` draws; read only."""
    coins = keystream(seed, 4 * (size * (size - 1) // 2)).view("<u4")
    upper = np.zeros((size, size), bool)
    upper[np.triu_indices(size, 1)] = coins < round(edge_prob * 2**32) if edge_prob < 1 else True
    graph = upper | upper.T
    graph.flags.writeable = False
    return graph


@lru_cache(maxsize=64)
def density(cohort: int, dropped: int, corrupt: int) -> tuple[float, int]:
    """Returns the smallest edge probability and the `least` number of reporting neighbours that keep both promises.

    `RISK` holds whoever is named a drop-out, `MISS` if as many as planned vanish at random.
    A cohort too small for a sparse graph gets the complete one, where every reporting client is a neighbour.
    """
    alive = cohort - dropped
    if cohort <= SMALL:
        return 1.0, alive - 1
    step = max(1, cohort // 100)
    for degree in range(step, cohort - 1, step):
        edge_prob = degree / (cohort - 1)
        least = _most(edge_prob, alive)
        if least and risk(cohort, dropped, corrupt, edge_prob, least) <= RISK:
            while risk(cohort, dropped, corrupt, edge_prob, least - 1) <= RISK:
                least -= 1  # ask no more than is needed: fewer rounds stay closed
            return edge_prob, least
    return 1.0, alive - 1


def _most(edge_prob: float, alive: int) -> int:
    """Returns the largest number that all `alive` clients have as neighbours, up to the probability `MISS`."""
    below = 0.0
    for number in range(alive):
        log = _log_choose(alive - 1, number) + number * math.log(edge_prob)
        below += math.exp(log + (alive - 1 - number) * math.log1p(-edge_prob))
        if alive * below > MISS:
            return number
    return alive - 1


def risk(cohort: int, dropped: int, corrupt: int, edge_prob: float, least: int) -> float:
    """Bounds the probability that drop-outs can be named such that the honest clients in the sum fall apart.

    The sum over the sizes s of the smaller part S of the smaller of two union bounds, where m clients are honest:

    - over S and up to `dropped` honest drop-outs, no edge goes from S to the r others: (1-p)^(s r);
    - over S, all of S have `least` neighbours in S or among the corrupt, as nobody else is left (Chernoff).
    """
    if edge_prob >= 1:
        return 0.0
    honest = cohort - corrupt
    s = np.arange(1, honest // 2 + 1)[:, None]
    away = np.arange(dropped + 1)[None, :]
    rest = honest - s - away
    ways = (
        _log_factorial(honest)[honest]
        - _log_factorial(honest)[s]
        - _log_factorial(honest)[honest - s]
    )
    named = (
        _log_factorial(honest)[honest - s] - _log_factorial(honest)[np.minimum(away, honest - s)]
    )
    named = named - _log_factorial(honest)[np.maximum(rest, 0)]
    cut = np.where(rest >= s, named + s * rest * math.log1p(-edge_prob), -np.inf)
    cuts = ways[:, 0] + np.logaddexp.reduce(cut, axis=1)
    tilt = np.linspace(0.05, 6, 120)[None, :]
    inside = s * (s - 1) / 2 * np.log1p(edge_prob * np.expm1(2 * tilt))
    towards = s * corrupt * np.log1p(edge_prob * np.expm1(tilt))
    crowds = ways[:, 0] + (inside + towards - tilt * s * least).min(1)
    crowds[s[:, 0] + corrupt <= least] = -np.inf  # S and the corrupt together are too few
    return float(np.exp(np.minimum(np.minimum(cuts, crowds), 0.0)).sum())


@lru_cache(maxsize=8)
def _log_factorial(top: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, top + 1)))])


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
