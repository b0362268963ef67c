"""The mask graph: a random graph so dense that no choice of drop-outs splits the honest clients.

Two neighbours in the graph add and subtract the same mask. The server names the drop-outs after it
has seen the graph, so it could name all honest neighbours of one client; the sum of the others
would then leave that client's vector alone. Hence the committee helps only if every client that
reported has at least `least` neighbours that reported. `risk` bounds the probability that some
choice of drop-outs still splits the honest clients (SecAgg+: Bell et al. 2020, section 3).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fedpress.core.random import keystream

RISK = 2.0**-64
"""Largest probability that a round's graph or committee is bad. A server that tries 2^24 cohorts
still has a chance of 2^-40 only."""

SMALL = 32
"""Up to this cohort the complete graph is used: it costs little and needs no argument."""

MISS = 2.0**-10
"""Largest probability that a round stays closed by chance with no more drop-outs than planned."""


@lru_cache(maxsize=4)
def edges(seed: bytes, size: int, edge_prob: float) -> np.ndarray:
    """Returns the random graph that the public 32-byte `seed` draws.

    Returns:
        Symmetric bool matrix [size, size], read only.
    """
    coins = keystream(seed, 4 * (size * (size - 1) // 2)).view("<u4")
    upper = np.zeros((size, size), bool)
    # With probability 1 the threshold would be 2^32, which a 32-bit number cannot hold.
    upper[np.triu_indices(size, 1)] = coins < round(edge_prob * 2**32) if edge_prob < 1 else True
    graph = upper | upper.T
    # All callers share the cached array.
    graph.flags.writeable = False
    return graph


@lru_cache(maxsize=64)
def sparsest(cohort: int, dropped: int, corrupt: int) -> tuple[float, int]:
    """Returns (edge probability, `least`) of the sparsest graph that keeps both bounds.

    `RISK` holds whichever clients are named as drop-outs; `MISS` holds if as many as planned drop
    out at random. `least` is the number of reporting neighbours that the committee demands.

    Args:
        cohort: clients of a round.
        dropped: clients that may drop out.
        corrupt: clients that may work for the server.
    """
    alive = cohort - dropped
    # In the complete graph every reporting client is a neighbour.
    complete = 1.0, alive - 1
    if cohort <= SMALL:
        return complete
    # A hundred degrees are tried; a graph a little denser than needed costs little.
    step = max(1, cohort // 100)
    for degree in range(step, cohort - 1, step):
        edge_prob = degree / (cohort - 1)
        least = _reliable_neighbours(edge_prob, alive)
        if least and risk(cohort, dropped, corrupt, edge_prob, least) <= RISK:
            # Demand no more than is needed, so that fewer rounds stay closed.
            while risk(cohort, dropped, corrupt, edge_prob, least - 1) <= RISK:
                least -= 1
            return edge_prob, least
    return complete


def _reliable_neighbours(edge_prob: float, alive: int) -> int:
    """Returns the largest number of neighbours that all `alive` clients have.

    Except with probability `MISS`: a union bound over the clients.
    """
    below = 0.0
    for number in range(alive):
        log = _log_choose(alive - 1, number) + number * math.log(edge_prob)
        below += math.exp(log + (alive - 1 - number) * math.log1p(-edge_prob))
        if alive * below > MISS:
            return number
    return alive - 1


def risk(cohort: int, dropped: int, corrupt: int, edge_prob: float, least: int) -> float:
    """Bounds the probability that some choice of drop-outs splits the honest clients in the sum.

    Let S be the smaller of the two parts, s its size, and m the number of honest clients. For every
    s the smaller of two union bounds is taken, and these are added up:

    - over all S and all choices of up to `dropped` honest drop-outs, no edge goes from S to the r
      other honest clients: probability (1-p)^(s r);
    - over all S, every client in S has `least` neighbours in S or among the corrupt, the only ones
      left (Chernoff).

    Args:
        cohort: clients of a round.
        dropped: clients that may drop out.
        corrupt: clients that may work for the server.
        edge_prob: probability p of an edge.
        least: reporting neighbours that the committee demands of every reporting client.
    """
    if edge_prob >= 1:
        return 0.0
    honest = cohort - corrupt
    log_factorial = _log_factorial(honest)
    s = np.arange(1, honest // 2 + 1)[:, None]
    away = np.arange(dropped + 1)[None, :]
    rest = honest - s - away

    # Logarithms of the number of choices of S, and of the drop-outs among the others.
    parts = log_factorial[honest] - log_factorial[s] - log_factorial[honest - s]
    named = log_factorial[honest - s] - log_factorial[np.minimum(away, honest - s)]
    named = named - log_factorial[np.maximum(rest, 0)]

    # S is the smaller part, so only as many drop-outs count as leave the rest no smaller.
    no_edge = np.where(rest >= s, named + s * rest * math.log1p(-edge_prob), -np.inf)
    no_edges = parts[:, 0] + np.logaddexp.reduce(no_edge, axis=1)

    # Chernoff's bound holds for every tilt; the least of 120 is taken. An edge inside S counts for
    # both its ends, hence the factor 2.
    tilt = np.linspace(0.05, 6, 120)[None, :]
    inside = s * (s - 1) / 2 * np.log1p(edge_prob * np.expm1(2 * tilt))
    towards = s * corrupt * np.log1p(edge_prob * np.expm1(tilt))
    crowded = parts[:, 0] + (inside + towards - tilt * s * least).min(1)
    # A client has at most s - 1 + corrupt neighbours in S and among the corrupt.
    crowded[s[:, 0] + corrupt <= least] = -np.inf

    both = np.minimum(np.minimum(no_edges, crowded), 0.0)
    return float(np.exp(both).sum())


@lru_cache(maxsize=8)
def _log_factorial(top: int) -> np.ndarray:
    """Returns log(n!) for n from 0 to `top`."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, top + 1)))])


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
