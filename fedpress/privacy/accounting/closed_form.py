"""The closed form of Gaussian mechanisms without sampling: epsilon, delta and sensitivity / noise.

`mu` is the sensitivity divided by the noise (Balle & Wang 2018, arXiv:1805.06530, Theorem 8).
"""

from __future__ import annotations

import math

from fedpress.privacy.accounting.events import GaussianEvent
from fedpress.privacy.roots import bracket, safe_root

# scipy is imported where it is used: importing it takes long, and most callers do not need it.


def total_mu(events: tuple[GaussianEvent, ...]) -> float:
    """Returns sensitivity / noise of the Gaussian mechanism that equals all unsampled `events`.

    Gaussian mechanisms without sampling compose exactly: mu^2 = sum of steps / noise^2.
    """
    square = 0.0
    for event in events:
        if event.sampling_prob == 1:
            square += event.steps / event.noise_multiplier**2
    return math.sqrt(square)


def log_delta(mu: float, epsilon: float) -> float:
    """Returns log delta of the Gaussian mechanism with sensitivity / noise = `mu`.

    Balle & Wang 2018 (arXiv:1805.06530), Theorem 8.
    """
    from scipy.special import log_ndtr

    # Logarithms, because both terms underflow if delta is tiny.
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    if second >= first:
        return -math.inf
    return first + math.log(-math.expm1(second - first))


def epsilon_of(mu: float, delta: float) -> float:
    """Returns the epsilon at `delta` of the Gaussian mechanism with sensitivity / noise = `mu`."""
    if mu == 0 or log_delta(mu, 0.0) <= math.log(delta):
        return 0.0
    # log delta is almost linear in epsilon, so Brent's method needs few steps.
    target = math.log(delta)

    def excess(epsilon: float) -> float:
        return log_delta(mu, epsilon) - target

    ends = bracket(excess, 1.0)
    assert ends is not None, "delta falls to 0 as epsilon grows"
    return safe_root(excess, unsafe=ends[0], safe=ends[1])


def largest_mu(epsilon: float, delta: float) -> float:
    """Returns the largest `mu` whose Gaussian mechanism is (epsilon, delta)-private."""
    target = math.log(delta)

    def excess(noise: float) -> float:
        return log_delta(1 / noise, epsilon) - target

    ends = bracket(excess, 1.0)
    assert ends is not None, "delta falls to 0 as the noise grows"
    return 1 / safe_root(excess, unsafe=ends[0], safe=ends[1])
