"""Renyi accounting at integer orders, for Skellam noise and for quick upper bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from fedpress.privacy.accounting.events import MechanismEvent, SkellamEvent
from fedpress.privacy.noise import skellam

if TYPE_CHECKING:
    import numpy as np

# numpy and scipy are imported where they are used: the command line must answer quickly.

ORDERS = (*range(2, 301), 320, 352, 384, 448, 512, 640, 768, 1024, 1536, 2048)
"""Integer orders, because the theorem on Skellam noise is proven for integer orders only. Large
orders are needed for small epsilons."""


def epsilon(events: Iterable[MechanismEvent], *, delta: float) -> float:
    """Returns the epsilon of all `events` together at `delta`, by Renyi accounting.

    Renyi divergences are converted to epsilon as in Canonne, Kamath & Steinke 2020
    (arXiv:2004.00010, Proposition 12). With integer orders the result is slightly larger if the
    best order is small: in the example, real orders would give 5.42.

    Args:
        events: the mechanisms and their steps. Their `failure` (the probability that a sensitivity
            bound fails) is ignored; the caller subtracts it from `delta` before.
        delta: probability with which the guarantee may fail.

    >>> from fedpress.privacy.accounting.events import GaussianEvent
    >>> round(epsilon([GaussianEvent(1.0, 5.0, 50)], delta=1e-3), 2)
    5.5
    """
    import numpy as np

    # Renyi divergences of independent mechanisms add up, order by order.
    total = np.zeros(len(ORDERS))
    for event in events:
        # The divergences of one step are cached, and then serve every number of steps.
        total = total + event.steps * divergences(replace(event, steps=1))

    orders = np.array(ORDERS, float)
    at_each_order = total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    # If almost nothing is spent, the conversion gives a negative number.
    return max(0.0, float(np.min(at_each_order)))


@lru_cache(maxsize=64)
def divergences(event: MechanismEvent) -> np.ndarray:
    """Returns the Renyi divergence of one step at each of `ORDERS`."""
    import numpy as np

    if event.sampling_prob == 1:
        return _unsampled(event, np.array(ORDERS))
    # The formula for sampling needs the divergence at every integer order up to the largest. It
    # does not use orders 0 and 1; their zeros keep the index equal to the order.
    each = np.concatenate([[0.0, 0.0], _unsampled(event, np.arange(2, ORDERS[-1] + 1))])
    return _sampled(each, event.sampling_prob)


def _unsampled(event: MechanismEvent, orders: np.ndarray) -> np.ndarray:
    """Returns the Renyi divergence at `orders` of one step in which every unit takes part."""
    import numpy as np

    if isinstance(event, SkellamEvent):
        return skellam.rdps(orders, l2=event.l2, l1=event.l1, variance=event.variance)
    if event.noise_multiplier == 0:
        return np.full(orders.shape, math.inf)
    return orders / (2 * event.noise_multiplier**2)


def _sampled(each: np.ndarray, q: float) -> np.ndarray:
    """Returns the Renyi divergence at `ORDERS` over a Poisson sample with probability `q`.

    Let P be the output density if the unit takes part, and Q if not. The data set with the unit has
    the density (1-q) Q + q P, the data set without it has Q. The moment of the ratio of these two
    densities at order a is exactly the sum over l of C(a, l) (1-q)^(a-l) q^l e^((l-1) each[l]).

    The divergence in the other direction is not larger if a reflection swaps P and Q (Mironov,
    Talwar & Zhang 2019, arXiv:1908.10530, Theorem 5). This holds here, because Gaussian and Skellam
    noise are symmetric. The bound for general mechanisms (Zhu & Wang 2019) has terms three times as
    large, which would double epsilon.

    Args:
        each: Renyi divergence of the mechanism without sampling at the orders 0, 1, 2, ...
        q: sampling probability, below 1.
    """
    import numpy as np

    weights, term, starts = _binomial_weights(q)
    logs = weights + np.where(term > 1, (term - 1) * each[term], 0.0)
    # The terms reach e^1000 and more, so each order is summed relative to its largest term.
    tops = np.maximum.reduceat(logs, starts)
    sums = np.add.reduceat(np.exp(logs - np.repeat(tops, np.array(ORDERS) + 1)), starts)
    found = (tops + np.log(sums)) / (np.array(ORDERS) - 1)
    # Sampling never increases the divergence, so the divergence without sampling is a bound too.
    bound: np.ndarray = np.minimum(found, each[list(ORDERS)])
    return bound


@lru_cache(maxsize=8)
def _binomial_weights(q: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns log C(a, l) (1-q)^(a-l) q^l for all orders a and l = 0..a, in one flat array.

    Returns:
        The weights, the l of each weight, and where the weights of each order begin.
    """
    import numpy as np
    from scipy.special import gammaln

    counts = np.array(ORDERS) + 1
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    a = np.repeat(counts - 1, counts)
    term = np.arange(counts.sum()) - np.repeat(starts, counts)
    log_choose = gammaln(a + 1) - gammaln(term + 1) - gammaln(a - term + 1)
    weights = log_choose + (a - term) * math.log1p(-q) + term * math.log(q)
    return weights, term, starts
