"""The mask graph: a random graph of clients, in which two neighbours share a mask.

A mask that two neighbours share cancels in the sum. If one of them drops out, its masks are
revealed to remove them from the sum. The server reports drop-outs after it has seen the graph. So a
malicious server could report all honest neighbours of one client as dropped out: all masks of this
client would be revealed, and its vector with them.

Therefore the committee (the clients that help to unmask a sum) opens a sum only if each client in
the sum has at least `least` neighbours that are in the sum as well. `risk` bounds the probability
that some choice of drop-outs still separates honest clients from each other (SecAgg+: Bell et al.
2020, section 3).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fedpress.core.random import keystream

MAX_RISK = 2.0**-64
"""Allowed probability that a round's graph or committee is insecure. A server that tries 2^24
cohorts still succeeds with probability 2^-40 at most."""

COMPLETE_COHORT = 32
"""Cohorts of up to this many clients use the complete graph: it costs little, and its risk is 0."""

MAX_MISS = 2.0**-10
"""Allowed probability that a round fails by chance with no more drop-outs than planned."""


@lru_cache(maxsize=4)
def edges(seed: bytes, size: int, edge_prob: float) -> np.ndarray:
    """Draws the random graph; the same arguments always give the same graph.

    Args:
        seed: 32 public bytes.
        size: number of clients.
        edge_prob: probability that two clients are neighbours.

    Returns:
        Symmetric bool matrix [size, size], read only: whether two clients are neighbours.
    """
    coins = keystream(seed, 4 * (size * (size - 1) // 2)).view("<u4")
    upper = np.zeros((size, size), bool)
    drawn: np.ndarray | bool = True
    # For probability 1 the threshold would be 2^32, which does not fit into 32 bits.
    if edge_prob < 1:
        drawn = coins < round(edge_prob * 2**32)
    upper[np.triu_indices(size, 1)] = drawn
    graph = upper | upper.T
    # Read-only, because all callers share the cached array.
    graph.flags.writeable = False
    return graph


@lru_cache(maxsize=64)
def sparsest(cohort: int, dropped: int, corrupt: int) -> tuple[float, int]:
    """Returns the sparsest graph that is safe and reliable.

    Safe: `MAX_RISK` bounds the probability that any choice of drop-outs breaks privacy. Reliable:
    `MAX_MISS` bounds the probability that a round fails if the planned number of clients drops out
    at random.

    Args:
        cohort: number of clients of a round.
        dropped: number of clients that may drop out.
        corrupt: number of clients that may collude with the server.

    Returns:
        Probability of an edge, and `least`: the number of neighbours in the sum that the committee
        requires of every client in the sum.
    """
    alive = cohort - dropped
    # In the complete graph every reporting client is a neighbour.
    complete = 1.0, alive - 1
    if cohort <= COMPLETE_COHORT:
        return complete
    # At most a hundred degrees are tried: a slightly denser graph than necessary costs little.
    step = max(1, cohort // 100)
    for degree in range(step, cohort - 1, step):
        edge_prob = degree / (cohort - 1)
        least = _reliable_neighbours(edge_prob, alive)
        if least and risk(cohort, dropped, corrupt, edge_prob, least) <= MAX_RISK:
            # Require as few neighbours as possible, so that fewer rounds fail.
            while risk(cohort, dropped, corrupt, edge_prob, least - 1) <= MAX_RISK:
                least -= 1
            return edge_prob, least
    return complete


def _reliable_neighbours(edge_prob: float, alive: int) -> int:
    """Returns the largest k such that each of `alive` clients has at least k neighbours among them.

    The probability that a client has fewer is at most `MAX_MISS` (a union bound over the clients).
    """
    # Logarithms: the binomial coefficients of thousands of clients overflow a float.
    below = 0.0
    for number in range(alive):
        log = _log_choose(alive - 1, number) + number * math.log(edge_prob)
        below += math.exp(log + (alive - 1 - number) * math.log1p(-edge_prob))
        if alive * below > MAX_MISS:
            return number
    return alive - 1


def risk(cohort: int, dropped: int, corrupt: int, edge_prob: float, least: int) -> float:
    """Bounds the probability that some choice of drop-outs splits the honest clients in the sum.

    Let S be the smaller of two parts of the honest clients in the sum, s its size, and r the size
    of the other part. The result is the sum over all s of the smaller of two union bounds:

    - over all S and all choices of up to `dropped` honest drop-outs: S has no edge to the r clients
      of the other part, with probability (1-p)^(s r);
    - over all S: each client in S has `least` neighbours among S and the corrupt clients together
      (Chernoff). The committee requires this number, and the client has no neighbour in the other
      part.

    Args:
        cohort: number of clients of a round.
        dropped: number of clients that may drop out.
        corrupt: number of clients that may collude with the server.
        edge_prob: probability p of an edge.
        least: neighbours in the sum that the committee requires of every client in the sum.
    """
    if edge_prob >= 1:
        return 0.0
    # Logarithms throughout: the numbers of choices overflow a float.
    honest = cohort - corrupt
    log_factorial = _log_factorial(honest)
    s = np.arange(1, honest // 2 + 1)[:, None]
    away = np.arange(dropped + 1)[None, :]
    rest = honest - s - away

    # Logarithms of the numbers of choices of S, and of the drop-outs among the other clients.
    parts = log_factorial[honest] - log_factorial[s] - log_factorial[honest - s]
    named = log_factorial[honest - s] - log_factorial[np.minimum(away, honest - s)]
    named = named - log_factorial[np.maximum(rest, 0)]

    # S is the smaller part, so the other part must not be smaller than s.
    no_edge = np.where(rest >= s, named + s * rest * math.log1p(-edge_prob), -np.inf)
    no_edges = parts[:, 0] + np.logaddexp.reduce(no_edge, axis=1)

    # Chernoff's bound holds for every tilt; the smallest of 120 is taken. An edge inside S is a
    # neighbour for both its ends, hence the factor 2.
    tilt = np.linspace(0.05, 6, 120)[None, :]
    inside = s * (s - 1) / 2 * np.log1p(edge_prob * np.expm1(2 * tilt))
    towards = s * corrupt * np.log1p(edge_prob * np.expm1(tilt))
    crowded = parts[:, 0] + (inside + towards - tilt * s * least).min(1)
    # A client of S has at most s - 1 + corrupt neighbours in S and among the corrupt clients.
    crowded[s[:, 0] + corrupt <= least] = -np.inf

    both = np.minimum(np.minimum(no_edges, crowded), 0.0)
    return float(np.exp(both).sum())


@lru_cache(maxsize=8)
def _log_factorial(top: int) -> np.ndarray:
    """Returns log(n!) for n from 0 to `top`."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, top + 1)))])


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
