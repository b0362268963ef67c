"""Defines `fedpress.epsilon`, the privacy loss of a repeated Gaussian mechanism."""

from __future__ import annotations

from fedpress.privacy.accounting import accountant


def epsilon(*, sampling_prob: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Returns the epsilon at `delta` of `steps` sums, each with fresh Gaussian noise.

    Neighbouring data sets differ by one unit (an example or a client), which is added or removed.
    The returned epsilon is never below the true one: it is computed with privacy loss distributions
    (Koskela et al. 2020, dp-accounting), whose rounding can only raise it.

    Args:
        sampling_prob: probability that one unit takes part in a step (Poisson sampling), in (0, 1].
        noise_multiplier: standard deviation of the Gaussian noise / sensitivity of the sum.
        steps: number of noised sums.
        delta: the delta of (epsilon, delta)-differential privacy, in (0, 1).

    Raises:
        RecipeError: if an argument is out of range.

    >>> import fedpress
    >>> round(fedpress.epsilon(sampling_prob=0.04, noise_multiplier=1.0, steps=500, delta=1e-5), 2)
    5.88
    """
    event = accountant.GaussianEvent(sampling_prob, noise_multiplier, steps)
    return accountant.epsilon([event], delta=delta)
