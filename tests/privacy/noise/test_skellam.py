import math
import time

import numpy as np
import pytest
import torch
from scipy import special, stats

from fedpress.core.random_source import AesCtrRandom, TorchRandom
from fedpress.errors import PrivacyError
from fedpress.privacy.noise import skellam

KEY = bytes(range(32))
MODES = {
    "seeded": lambda: TorchRandom(torch.Generator().manual_seed(0)),
    "cipher": lambda: AesCtrRandom(KEY),
}


def reference_epsilon(bits, size, *, clients=10, rounds=50, noise=5.0, delta=1e-3):
    """Epsilon with the scale that lets four standard deviations of the sum fit into `bits` (Agarwal et al. 2021)."""
    k, each = 4, noise / math.sqrt(clients)
    scale = math.sqrt(2 ** (2 * bits) * size - clients * k**2 * size)
    scale /= 2 * k * math.sqrt(clients**2 + clients * size * each**2)
    l2 = skellam.rounded_sensitivity(scale, size)
    spent = {
        "l2": l2,
        "l1": skellam.l1_sensitivity(l2, size),
        "variance": clients * (scale * each) ** 2,
    }
    return min(
        rounds * skellam.rdp(a, **spent) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a in range(2, 301)
    )


@pytest.mark.parametrize(
    ("bits", "size", "expected"),
    [
        (12, 2**24, 808),
        (16, 2**24, 10.19),
        (18, 2**24, 5.79),
        (20, 2**24, 5.52),
        (12, 2**22, 208),
        (16, 2**22, 6.67),
        (18, 2**22, 5.57),
    ],
)
def test_epsilon_of_a_secret_sum_is_that_of_the_reference(bits, size, expected):
    assert reference_epsilon(bits, size) == pytest.approx(expected, rel=0.0015)


def test_much_noise_makes_a_skellam_sum_a_gaussian_one():
    for alpha in (2, 7, 100):
        assert skellam.rdp(alpha, l2=1.0, l1=1.0, variance=1e8) == pytest.approx(
            alpha / 2e8, rel=1e-6
        )
        assert skellam.rdp(alpha, l2=5.0, l1=9.0, variance=3.0) > alpha * 25 / 6
    assert skellam.rdp(2, l2=1.0, l1=1.0, variance=0.0) == math.inf


@pytest.mark.parametrize("alpha", [1, 0, -3, 2.5])
def test_orders_without_a_proof_are_refused(alpha):
    with pytest.raises(ValueError, match="whole number"):
        skellam.rdp(alpha, l2=1.0, l1=1.0, variance=1.0)


@pytest.mark.parametrize("variance", [0.3, 4.0, 50.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_the_bound_is_never_below_the_true_divergence(variance, shift):
    k = np.arange(-400, 401)
    p, q = special.ive(np.abs(k), variance), special.ive(np.abs(k - shift), variance)
    for alpha in (2, 3, 8, 20):
        inside = (p > 1e-290) & (q > 1e-290)
        powers = alpha * np.log(p[inside]) + (1 - alpha) * np.log(q[inside])
        true = special.logsumexp(powers) / (alpha - 1)
        assert true <= skellam.rdp(alpha, l2=shift, l1=shift, variance=variance) * (1 + 1e-9)


@pytest.mark.parametrize("norm", [0.0, 0.1, 3.0, 100.0])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_rounding_is_rarely_longer_than_its_bound(norm, size):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=gen, dtype=torch.float64)
    x *= norm / x.norm()
    norms = torch.stack(
        [
            (x + torch.rand(size, generator=gen, dtype=torch.float64)).floor().norm()
            for _ in range(400)
        ]
    )
    for beta in (skellam.RETRY_BETA, 0.05):
        bound = skellam.rounded_sensitivity(norm, size, beta)
        assert bound <= norm + math.sqrt(size)
        assert float((norms > bound * (1 + 1e-12)).double().mean()) <= beta
    assert skellam.l1_sensitivity(bound, size) <= bound**2


@pytest.mark.parametrize("variance", [0.01, 1.0, 100.0, 9999.9, 1e4, 1e6])
def test_the_table_of_probabilities_is_that_of_bessel_functions(variance):
    p = skellam.probabilities(variance)
    p = (p / (p[0] + 2 * p[1:].sum())).astype(float)
    k = np.flatnonzero(p > 1e-25)
    assert p[k] == pytest.approx(
        special.ive(k, variance), rel=1e-11, abs=0
    )  # ive itself loses digits with variance
    assert p[-1] < 2**-64


def test_recurrence_and_expansion_meet_to_fifteen_digits():
    below, above = skellam.probabilities(np.nextafter(1e4, 0)), skellam.probabilities(1e4)
    ratio = (below / below[0]) / (above / above[0])
    assert np.abs(ratio - 1).max() < 1e-14


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variance", [0.4, 7.0, 900.0])
def test_samples_are_skellam_distributed(mode, variance):
    drawn = skellam.sample(200_000, variance, MODES[mode]())
    assert drawn.dtype == torch.int64
    values, counts = np.unique(drawn.numpy(), return_counts=True)
    expected = stats.skellam.pmf(values, variance / 2, variance / 2) * 200_000
    many = expected > 20
    rest = 200_000 - expected[many].sum()
    observed, wanted = np.append(counts[many], counts[~many].sum()), np.append(expected[many], rest)
    assert stats.chisquare(observed, wanted).pvalue > 0.001


@pytest.mark.parametrize("clients", [1, 3, 10])
def test_the_noise_of_clients_sums_to_the_calibrated_noise(clients):
    total, size = 5000.0, 100_000
    parts = [
        skellam.sample(size, total / clients, AesCtrRandom(bytes([i]) * 32)) for i in range(clients)
    ]
    noise = torch.stack(parts).sum(0)
    assert float(noise.double().var()) == pytest.approx(total, rel=0.015)  # 3 standard errors
    assert abs(float(noise.double().mean())) < 5 * math.sqrt(total / size)
    smooth = noise.double() + TorchRandom(torch.Generator().manual_seed(1)).uniform(size) - 0.5
    assert stats.kstest(smooth.numpy() / math.sqrt(total + 1 / 12), "norm").pvalue > 0.001


def test_a_tail_is_passed_more_rarely_than_promised():
    for variance in (0.5, 30.0, 1e5):
        for chance in (1e-2, 1e-9):
            t = skellam.tail(100, variance, chance)
            true = 200 * (
                stats.skellam.sf(math.ceil(t) - 1, variance / 2, variance / 2)
                if variance < 1e4
                else stats.norm.sf(t / math.sqrt(variance))
            )
            assert true <= chance
            assert t < 1.6 * math.sqrt(2 * variance * math.log(200 / chance)) + math.log(
                200 / chance
            )
    assert skellam.tail(10, 0.0, 1e-9) == 0


def test_no_variance_is_no_noise_and_a_wrong_one_is_refused():
    assert skellam.sample(5, 0.0, AesCtrRandom(KEY)).tolist() == [0] * 5
    assert skellam.sample(0, 3.0, AesCtrRandom(KEY)).shape == (0,)
    for variance in (-1.0, math.nan, 2.0**41):
        with pytest.raises(PrivacyError, match="fewer bits"):
            skellam.sample(2, variance, AesCtrRandom(KEY))


def test_drawing_is_fast_enough_for_millions_of_values():
    chance = AesCtrRandom(KEY)
    skellam.sample(10, 1e6, chance)
    start = time.process_time()
    skellam.sample(1_000_000, 1e6, chance)
    assert time.process_time() - start < 0.5  # 0.03 s on an idle core
