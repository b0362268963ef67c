"""Correlated noise that nearly cancels over rounds (DP-FTRL, matrix factorisation).

The model is the sum of all updates so far, so the noise in the model is a prefix sum: the noise of
all rounds so far. With independent noise it grows with every round. Matrix factorisation (Kairouz
et al. 2021, arXiv:2103.00039; Denisov et al. 2022, arXiv:2202.08312) draws one Gaussian vector z_t
per round. The noise of round t is a weighted sum of the p newest vectors, sum_{j<p} w_j z_{t-j},
with weights for which prefix sums nearly cancel.

Let g be the sums of all rounds, W the banded Toeplitz matrix of w, and C = W^-1. The noised sums
are g + W z = C^-1 (C g + z). This is one Gaussian mechanism for the whole run, with the sensitivity
of g -> C g (banded inverse: Kalinin et al. 2025, arXiv:2505.12128). Only the keys (seeds) of the p
newest random vectors are stored, because each z can be recomputed from its key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedpress.errors import RecipeError
from fedpress.privacy.accounting.events import GaussianEvent

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# numpy, scipy and torch are imported where they are used: the command line must answer quickly.

MAX_BANDS = 64
"""Largest number of weights. More do not lower the error, and each costs a draw in every round."""


@dataclass(frozen=True)
class Factorization:
    """The weights of correlated noise for one run; make it with `Factorization.plan`.

    Attributes:
        rounds: number of rounds of the whole run.
        participations: maximum number of rounds in which one client takes part.
        min_separation: minimum distance in rounds between two participations of one client.
        coefficients: weights w [p]; w[0] = 1 is the weight of the newest random vector.
        sensitivity: L2 sensitivity of C g to one client with contributions of norm 1.
        rmse: root mean square over rounds of the noise in a prefix sum, for noise multiplier 1 and
            clip norm 1.
    """

    rounds: int
    participations: int
    min_separation: int
    coefficients: tuple[float, ...]
    sensitivity: float
    rmse: float

    @classmethod
    def plan(
        cls, rounds: int, *, participations: int, min_separation: int = 1, bands: int = 16
    ) -> Factorization:
        """Returns the weights with the least noise in prefix sums, at equal privacy.

        The search takes up to about a second.

        Args:
            rounds: number of rounds of the whole run.
            participations: maximum number of rounds in which one client takes part.
            min_separation: minimum distance in rounds between two participations of one client.
            bands: number of weights, 1 to `MAX_BANDS`, but never more than `rounds`; 1 is
                independent noise.

        Raises:
            RecipeError: if an argument is out of range, or no client can take part so often.

        >>> f = Factorization.plan(100, participations=1, bands=8)
        >>> f.coefficients[0], len(f.coefficients), round(f.gain, 2)
        (1.0, 8, 0.33)
        """
        checked = {
            "rounds": rounds,
            "participations": participations,
            "min_separation": min_separation,
            "bands": bands,
        }
        for name, value in checked.items():
            if value < 1 or value != int(value):
                raise RecipeError(f"got {value}, expected a whole number >= 1", place=name)
        if bands > MAX_BANDS:
            raise RecipeError(
                f"got {bands}, expected at most {MAX_BANDS}",
                place="bands",
                cure="take fewer; more do not lower the error",
            )
        possible = most_participations(rounds, min_separation)
        if participations > possible:
            raise RecipeError(
                (
                    f"got {participations}, but {min_separation} rounds apart a client takes part "
                    f"at most {possible} times in {rounds}"
                ),
                place="participations",
                cure="lower participations or min_separation",
            )
        return _optimized(rounds, participations, min_separation, min(bands, rounds))

    @property
    def gain(self) -> float:
        """`rmse` / rmse of independent noise at equal privacy; below 1 if correlation helps."""
        # Independent noise has sensitivity sqrt(participations), and a prefix sum of t rounds has
        # variance t; the mean of t over the rounds is (rounds + 1) / 2.
        return self.rmse / math.sqrt(self.participations * (self.rounds + 1) / 2)

    def fresh_std(self, *, noise_multiplier: float, clip_norm: float) -> float:
        """Returns the standard deviation of each z, for contributions of norm `clip_norm`."""
        return noise_multiplier * clip_norm * self.sensitivity

    def noise(self, draws: Sequence[Tensor]) -> Tensor:
        """Returns the noise of a round, [d].

        Args:
            draws: the vectors z [d] of this round and of earlier rounds, newest first. Their
                standard deviation is `fresh_std`. If the vectors have standard deviation 1 instead,
                the caller multiplies the result by `sensitivity` and passes it to
                `mechanism.add_noise`.
        """
        import torch

        total = torch.zeros_like(draws[0])
        # Not strict: round t < p has only t draws, and later rounds may have more than p.
        for weight, draw in zip(self.coefficients, draws, strict=False):
            total.add_(draw, alpha=weight)
        return total

    def event(self, noise_multiplier: float) -> GaussianEvent:
        """Returns the accountant's event of the whole run; charge it before the first round."""
        # All rounds are one mechanism, so there is one step.
        return GaussianEvent(1.0, noise_multiplier, 1)


def most_participations(rounds: int, min_separation: int) -> int:
    """Returns the maximum number of participations of one client in `rounds` rounds.

    >>> most_participations(10, 3)
    4
    """
    return -(-rounds // min_separation)


def sensitivity(
    coefficients: Sequence[float], rounds: int, participations: int, min_separation: int
) -> float:
    """Returns the L2 sensitivity of C g to one client with contributions of norm 1.

    If the first column of the Toeplitz matrix C is decreasing and not negative, the worst case is a
    client with equal contributions in the rounds 0, s, 2s, ... The result is then the norm of the
    sum of these columns (Kalinin & Lampert 2024, arXiv:2405.13763).

    Args:
        coefficients: weights w [p], the band of W = C^-1.
        rounds: number of rounds.
        participations: maximum number of rounds in which the client takes part.
        min_separation: minimum distance s in rounds between two participations.

    Independent noise and four participations:

    >>> sensitivity([1.0], 10, 4, 2)
    2.0
    """
    import numpy as np

    column = inverse_column(coefficients, rounds)
    # Searched coefficients need not give a decreasing column. Its absolute values are replaced by
    # the smallest decreasing column above them, whose sensitivity is at least as large.
    above = np.maximum.accumulate(np.abs(column)[::-1])[::-1]
    total = np.zeros(rounds)
    for start in range(0, min(participations * min_separation, rounds), min_separation):
        total[start:] += above[: rounds - start]
    return float(np.linalg.norm(total))


def inverse_column(coefficients: Sequence[float], rounds: int) -> np.ndarray:
    """Returns the first column [rounds] of the Toeplitz matrix C = W^-1."""
    import numpy as np
    from scipy.signal import lfilter

    impulse = np.zeros(rounds)
    impulse[0] = 1.0
    # The impulse response of the filter 1 / w(x) is the power series of 1 / w(x).
    return np.asarray(lfilter([1.0], np.asarray(coefficients), impulse))


def prefix_rmse(coefficients: Sequence[float], rounds: int) -> float:
    """Returns the root mean square over rounds of the noise in prefix sums, if z has std 1."""
    import numpy as np

    padded = np.pad(np.asarray(coefficients, float), (0, rounds - len(coefficients)))
    column = np.cumsum(padded)
    # `column[j]`, the sum of the coefficients 0 to j, is a factor in `rounds` - j of the prefix
    # sums.
    return math.sqrt(float((rounds - np.arange(rounds)) @ column**2) / rounds)


def square_root_coefficients(bands: int) -> list[float]:
    """Returns the first coefficients of the power series of (1 - x)^(1/2).

    They are the first column of the inverse square root of the prefix-sum matrix.

    >>> square_root_coefficients(3)
    [1.0, -0.5, -0.125]
    """
    found = [1.0]
    for j in range(1, bands):
        found.append(found[-1] * (j - 1.5) / j)
    return found


@lru_cache(maxsize=32)
def _optimized(rounds: int, participations: int, min_separation: int, bands: int) -> Factorization:
    import numpy as np

    def log_error(free: np.ndarray) -> float:
        w = [1.0, *free.tolist()]
        # If a step of the search is too long, C overflows.
        with np.errstate(over="ignore", invalid="ignore"):
            moved = sensitivity(w, rounds, participations, min_separation)
        if not math.isfinite(moved):
            return 1e9
        return math.log(moved * prefix_rmse(w, rounds))

    candidates = [np.zeros(0)]
    if bands > 1:
        half = _optimized(rounds, participations, min_separation, bands // 2)
        candidates = _search(log_error, half.coefficients[1:], bands)
    best = min(candidates, key=log_error)
    w = (1.0, *(float(x) for x in best))
    moved = sensitivity(w, rounds, participations, min_separation)
    rmse = moved * prefix_rmse(w, rounds)
    return Factorization(rounds, participations, min_separation, w, moved, rmse)


def _search(
    log_error: Callable[[np.ndarray], float], half: tuple[float, ...], bands: int
) -> list[np.ndarray]:
    """Returns candidates for w[1:]: two starting points, and the optimum found from each.

    The starting points are `square_root_coefficients`, and the weights of the plan with half as
    many bands. Since both are candidates too, the result is never worse than this plan.
    """
    import numpy as np
    from scipy.optimize import minimize

    starts = [
        np.array(square_root_coefficients(bands)[1:]),
        np.pad(half, (0, bands - 1 - len(half))),
    ]
    options = {"maxiter": 60, "maxfun": 6000}
    found = list(starts)
    for start in starts:
        found.append(minimize(log_error, start, method="L-BFGS-B", options=options).x)
    return found
