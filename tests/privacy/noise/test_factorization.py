import math
import time
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from fedpress.core.random_source import AesCtrRandom, TorchRandom
from fedpress.errors import RecipeError
from fedpress.privacy.accounting.accountant import epsilon, noise_multiplier
from fedpress.privacy.noise.factorization import (
    Factorization,
    inverse_column,
    most_participations,
    prefix_rmse,
    sensitivity,
    square_root_coefficients,
)
from fedpress.privacy.noise.mechanism import add_noise, noise_grid
from fedpress.privacy.plan import PrivacyPlan


def toeplitz(column):
    n = len(column)
    return np.array([[column[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])


def brute_force(coefficients, rounds, participations, separation):
    """The largest norm over all patterns and all signs of contributions, from the matrix itself."""
    c = np.linalg.inv(toeplitz(np.pad(coefficients, (0, rounds - len(coefficients)))))
    gram, largest = np.abs(c.T @ c), 0.0
    for k in range(1, participations + 1):
        for pattern in combinations(range(rounds), k):
            if all(b - a >= separation for a, b in pairwise(pattern)):
                largest = max(largest, gram[np.ix_(pattern, pattern)].sum())
    return math.sqrt(largest)


CASES = [(8, 1, 1), (8, 3, 2), (9, 2, 4), (10, 3, 3), (6, 6, 1)]


@pytest.mark.parametrize(("rounds", "participations", "separation"), CASES)
@pytest.mark.parametrize("bands", [1, 2, 4])
def test_sensitivity_is_the_maximum_over_all_patterns(rounds, participations, separation, bands):
    root = square_root_coefficients(bands)
    exact = brute_force(root, rounds, participations, separation)
    assert sensitivity(root, rounds, participations, separation) == pytest.approx(exact)
    got = Factorization.plan(
        rounds, participations=participations, min_separation=separation, bands=bands
    )
    exact = brute_force(got.coefficients, rounds, participations, separation)
    assert exact * (1 - 1e-12) <= got.sensitivity <= exact * 1.01


@pytest.mark.parametrize(
    "coefficients", [[1.0, 0.8], [1.0, -0.2, 0.7], [1.0, 0.3, -0.9, 0.5], [1.0, -1.3]]
)
def test_sensitivity_is_never_below_the_maximum_for_any_coefficients(coefficients):
    for rounds, participations, separation in CASES:
        exact = brute_force(coefficients, rounds, participations, separation)
        assert sensitivity(coefficients, rounds, participations, separation) >= exact * (1 - 1e-12)


def test_the_inverse_and_the_error_are_those_of_the_matrices():
    w, rounds = square_root_coefficients(4), 12
    matrix = toeplitz(np.pad(w, (0, rounds - 4)))
    assert inverse_column(w, rounds) == pytest.approx(np.linalg.inv(matrix)[:, 0])
    prefix = np.tril(np.ones((rounds, rounds))) @ matrix
    assert prefix_rmse(w, rounds) == pytest.approx(np.linalg.norm(prefix) / math.sqrt(rounds))
    root = toeplitz(square_root_coefficients(rounds))
    assert np.linalg.inv(root @ root) == pytest.approx(np.tril(np.ones((rounds, rounds))), abs=1e-9)


def test_the_noise_of_all_rounds_has_the_planned_covariance():
    rounds, size = 6, 60_000
    got = Factorization.plan(rounds, participations=2, min_separation=3, bands=3)
    chance, std = (
        TorchRandom(torch.Generator().manual_seed(0)),
        got.fresh_std(noise_multiplier=2.0, clip_norm=0.5),
    )
    draws, noises = [], []
    for _ in range(rounds):
        draws = [std * chance.normal(size), *draws]
        noises.append(got.noise(draws))
    noise = torch.stack(noises).numpy()
    w = toeplitz(np.pad(got.coefficients, (0, rounds - 3)))
    planned = std**2 * w @ w.T
    assert noise @ noise.T / size == pytest.approx(planned, abs=0.03 * planned.max())
    assert np.abs(noise.mean(1)).max() < 5 * math.sqrt(planned.max() / size)
    assert std == pytest.approx(got.sensitivity)
    prefix = np.cumsum(noise, 0)
    assert math.sqrt((prefix**2).mean()) == pytest.approx(got.rmse, rel=0.01)


def test_correlated_noise_can_be_exact_as_well():
    got = Factorization.plan(10, participations=2, min_separation=5, bands=3)
    private = PrivacyPlan("client", clip_norm=0.5, sampling_prob=1.0, noise_multiplier=2.0)
    draws = [AesCtrRandom(bytes([i]) * 32).normal(50_000) for i in range(3)]
    total = torch.linspace(-1, 1, 50_000)
    exact, plain = (
        add_noise(total, private, got.sensitivity * got.noise(draws), exact=exact).double()
        for exact in (True, False)
    )
    steps = exact / noise_grid(private)
    assert torch.equal(steps, steps.round())
    assert torch.allclose(exact, plain, atol=1e-5)
    planned = private.noise_std * got.sensitivity * math.hypot(*got.coefficients)
    assert float((exact - total).std()) == pytest.approx(planned, rel=0.02)


def test_only_the_last_draws_are_used():
    got = Factorization.plan(10, participations=1, bands=3)
    draws = [torch.full((4,), float(i), dtype=torch.float64) for i in range(10)]
    assert torch.equal(got.noise(draws), got.noise(draws[:3]))
    assert torch.equal(got.noise(draws[:1]), draws[0])


# rounds, participations, the error as a share of that of independent noise at equal privacy
GAINS = [(100, 1, 0.34), (100, 10, 0.44), (500, 1, 0.20), (500, 10, 0.24)]


@pytest.mark.recipe
@pytest.mark.parametrize(("rounds", "participations", "most"), GAINS)
def test_correlated_noise_leaves_a_fraction_of_the_error(rounds, participations, most):
    start = time.process_time()
    got = Factorization.plan(
        rounds, participations=participations, min_separation=rounds // participations
    )
    assert time.process_time() - start < 8  # under a second on an idle core
    assert 0.1 < got.gain < most
    root = square_root_coefficients(16)
    plain = sensitivity(root, rounds, participations, rounds // participations) * prefix_rmse(
        root, rounds
    )
    assert got.rmse <= plain


def test_one_band_is_independent_noise_and_more_bands_are_never_worse():
    gains = [
        Factorization.plan(20, participations=10, min_separation=2, bands=b).gain
        for b in (1, 2, 4, 8, 16)
    ]
    assert gains[0] == pytest.approx(1.0)
    assert all(b <= a for a, b in pairwise(gains))


def test_clients_that_take_part_in_every_round_gain_nothing():
    got = Factorization.plan(30, participations=30, min_separation=1, bands=4)
    assert 0.9 < got.gain <= 1


def test_the_whole_run_is_one_gaussian_mechanism():
    got = Factorization.plan(100, participations=4, min_separation=25)
    z = noise_multiplier(epsilon=4.0, delta=1e-5, sampling_prob=1.0, steps=1)
    assert 3.999 < epsilon([got.event(z)], delta=1e-5) <= 4.0


@pytest.mark.parametrize(
    "changed",
    [
        {"rounds": 0},
        {"participations": 0},
        {"participations": 4},
        {"min_separation": 1.5},
        {"bands": 65},
    ],
)
def test_plans_that_cannot_be_are_refused_by_name(changed):
    settings = {"rounds": 9, "participations": 3, "min_separation": 3, **changed}
    assert most_participations(9, 3) == 3
    with pytest.raises(RecipeError, match=f"^{next(iter(changed))}: got"):
        Factorization.plan(settings.pop("rounds"), **settings)
