"""The privacy accountant, for one mechanism that is repeated."""

from __future__ import annotations

from fedpress.privacy.accounting import accountant


def epsilon(*, sampling_prob: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Returns the epsilon that `steps` noised sums spend at `delta` (add-or-remove neighbours).

    It is never below the true one: privacy loss distributions, rounded upward (Koskela et al. 2020,
        dp-accounting).

    Args:
        sampling_prob: the chance that one unit takes part in a step, in (0, 1].
        noise_multiplier: standard deviation of the Gaussian noise, divided by the sensitivity of
            the sum.
        steps: the number of sums.
        delta: the chance with which the promise may fail, in (0, 1).

    Raises:
        RecipeError: if an argument is out of range.

    >>> import fedpress
    >>> round(fedpress.epsilon(sampling_prob=0.04, noise_multiplier=1.0, steps=500, delta=1e-5), 2)
    5.88
    """
    event = accountant.GaussianEvent(sampling_prob, noise_multiplier, steps)
    return accountant.epsilon([event], delta=delta)
