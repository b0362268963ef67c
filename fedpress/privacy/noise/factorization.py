"""Noise that cancels itself from round to round: client privacy without sampling, at a fraction of the error.

The model is a sum of all rounds so far, so what counts is the noise of prefix sums. Matrix factorisation (DP-FTRL:
Kairouz et al. 2021; Denisov et al. 2022, arXiv:2202.08312) adds in round t the noise sum_{j<p} w_j z_{t-j} of p fresh
draws, whose prefix sums nearly cancel. With W the banded Toeplitz matrix of w and C = W^-1, that is C^-1 (C g + z): one
Gaussian mechanism for the whole run, with the sensitivity of g -> C g (banded inverse: Kalinin et al. 2025,
arXiv:2505.12128). Only p keys are kept, since each z can be drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedpress.errors import RecipeError
from fedpress.privacy.accounting.events import GaussianEvent

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# numpy, scipy and torch are imported where they are used, as everywhere near the accountant.

MAX_BANDS = 64


@dataclass(frozen=True)
class Factorization:
    """A bound plan of correlated noise; make it with `Factorization.plan`.

    Attributes:
        rounds: of the whole run, T.
        participations: in how many of them one client takes part at most.
        min_separation: two participations of one client are at least so many rounds apart.
        coefficients: w [p] with w[0] = 1, the newest draw first.
        sensitivity: how far one client with contributions of norm 1 can move C g in L2.
        rmse: root mean square over rounds of the noise in a prefix sum, for a noise multiplier and a clip norm of 1.
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
        """Returns the factorisation of `bands` coefficients with the least error of prefix sums at equal privacy.

        The search starts from the square root of the prefix-sum matrix and takes about a second at most.

        Raises:
            RecipeError: if an argument is out of range, or nobody can take part so often.

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
                cure="more gain nothing",
            )
        if participations > most_participations(rounds, min_separation):
            raise RecipeError(
                (
                    f"got {participations}, but {min_separation} rounds apart a client takes part "
                    f"at most {most_participations(rounds, min_separation)} times in {rounds}"
                ),
                place="participations",
                cure="lower one of them",
            )
        return _planned(rounds, participations, min_separation, min(bands, rounds))

    @property
    def gain(self) -> float:
        """`rmse` divided by that of independent noise at equal privacy; below 1 the correlation helps.

        Independent noise has sensitivity sqrt(participations), and a prefix sum of t rounds has variance t.
        """
        return self.rmse / math.sqrt(self.participations * (self.rounds + 1) / 2)

    def fresh_std(self, *, noise_multiplier: float, clip_norm: float) -> float:
        """Returns the standard deviation of each fresh draw z on a sum of contributions of norm `clip_norm`."""
        return noise_multiplier * clip_norm * self.sensitivity

    def noise(self, draws: Sequence[Tensor]) -> Tensor:
        """Returns the noise of a round from the draws z of this and earlier rounds, newest first, all there are.

        Each z [d] has `fresh_std`; or is standard, and the result times `sensitivity` goes to `mechanism.add_noise`.
        Draws older than the coefficients are ignored; in round t < p there are only t.
        """
        import torch

        total = torch.zeros_like(draws[0])
        for weight, draw in zip(self.coefficients, draws, strict=False):
            total.add_(draw, alpha=weight)
        return total

    def phase(self, noise_multiplier: float) -> GaussianEvent:
        """Returns what the whole run is to the accountant: one Gaussian mechanism, charged before the first round."""
        return GaussianEvent(1.0, noise_multiplier, 1)


def most_participations(rounds: int, min_separation: int) -> int:
    """Returns how often one client can take part at most.

    >>> most_participations(10, 3)
    4
    """
    return -(-rounds // min_separation)


def sensitivity(
    coefficients: Sequence[float], rounds: int, participations: int, min_separation: int
) -> float:
    """Returns the largest L2 norm by which one client's contributions of norm 1 can move C g, with C = W^-1 Toeplitz.

    Where the first column of C falls and is nowhere negative, the worst pattern is the earliest and densest one, with
    equal contributions: the norm of the sum of columns 0, s, 2s, ... (Kalinin & Lampert 2024, arXiv:2405.13763). Any
    other column is replaced by the smallest falling one above its absolute values, which moves no less.

    >>> sensitivity([1.0], 10, 4, 2)  # independent noise
    2.0
    """
    import numpy as np

    column = inverse(coefficients, rounds)
    above = np.maximum.accumulate(np.abs(column)[::-1])[::-1]
    total = np.zeros(rounds)
    for start in range(0, min(participations * min_separation, rounds), min_separation):
        total[start:] += above[: rounds - start]
    return float(np.linalg.norm(total))


def inverse(coefficients: Sequence[float], rounds: int) -> np.ndarray:
    """Returns the first column [rounds] of C = W^-1."""
    import numpy as np
    from scipy.signal import lfilter

    impulse = np.zeros(rounds)
    impulse[0] = 1.0
    return np.asarray(lfilter([1.0], np.asarray(coefficients), impulse))


def prefix_rmse(coefficients: Sequence[float], rounds: int) -> float:
    """Returns the root mean square over rounds of the noise in prefix sums, for draws of standard deviation 1."""
    import numpy as np

    column = np.cumsum(np.pad(np.asarray(coefficients, float), (0, rounds - len(coefficients))))
    return math.sqrt(float((rounds - np.arange(rounds)) @ column**2) / rounds)


def square_root(bands: int) -> list[float]:
    """Returns the first coefficients of (1 - x)^(1/2): the inverse square root of the prefix-sum matrix.

    >>> square_root(3)
    [1.0, -0.5, -0.125]
    """
    found = [1.0]
    for j in range(1, bands):
        found.append(found[-1] * (j - 1.5) / j)
    return found


@lru_cache(maxsize=32)
def _planned(rounds: int, participations: int, min_separation: int, bands: int) -> Factorization:
    import numpy as np
    from scipy.optimize import minimize

    def log_error(free: np.ndarray) -> float:
        w = [1.0, *free.tolist()]
        with np.errstate(over="ignore", invalid="ignore"):  # a step too far makes C explode
            moved = sensitivity(w, rounds, participations, min_separation)
        if not math.isfinite(moved):
            return 1e9
        return math.log(moved * prefix_rmse(w, rounds))

    if bands == 1:
        ends = [np.zeros(0)]
    else:  # from the square root, and from the plan with half as many bands, which is never worsened
        half = _planned(rounds, participations, min_separation, bands // 2).coefficients[1:]
        starts = [np.array(square_root(bands)[1:]), np.pad(half, (0, bands - 1 - len(half)))]
        options = {"maxiter": 60, "maxfun": 6000}
        ends = [
            *starts,
            *(minimize(log_error, s, method="L-BFGS-B", options=options).x for s in starts),
        ]
    best = min(ends, key=log_error)
    w = (1.0, *(float(x) for x in best))
    moved = sensitivity(w, rounds, participations, min_separation)
    return Factorization(
        rounds, participations, min_separation, w, moved, moved * prefix_rmse(w, rounds)
    )
