import math

import pytest
import scipy.stats
import torch

from fedpress.codecs import Bound, Key, Noise

SIZE = 200_000


@pytest.mark.parametrize("secret", [None, 77])
@pytest.mark.parametrize("std", [0.01, 3.0])
def test_noise_on_floats_is_gaussian_of_the_asked_size(std, secret):
    noise, bound = Noise(std=std).bind(Bound(SIZE, l2=1.0))
    drawn = noise.encode(torch.zeros(SIZE), Key(1, 1, "c", secret)).values.double().numpy() / std
    assert drawn.std() == pytest.approx(1.0, rel=0.01)
    assert scipy.stats.kstest(drawn, "norm").pvalue > 1e-3
    assert bound.l2 == math.inf


@pytest.mark.parametrize("secret", [None, 77])
@pytest.mark.parametrize("std", [1.5, 300.0])
def test_noise_on_whole_numbers_is_skellam_of_the_asked_size(std, secret):
    noise, _ = Noise(std=std).bind(Bound(SIZE, integer=True))
    drawn = noise.encode(torch.zeros(SIZE, dtype=torch.int64), Key(1, 1, "c", secret)).values
    assert drawn.dtype == torch.int64
    assert float(drawn.double().std()) == pytest.approx(std, rel=0.01)
    edges = torch.arange(-6, 7) * max(1, round(std / 3))
    counts = torch.bucketize(drawn, edges).bincount(minlength=14).double()
    below = [0.0, *scipy.stats.skellam.cdf(edges.numpy(), std**2 / 2, std**2 / 2), 1.0]
    expected = torch.tensor(below).diff() * SIZE
    keep = expected > 20
    chi2 = float(((counts - expected)[keep] ** 2 / expected[keep]).sum())
    assert scipy.stats.chi2.sf(chi2, int(keep.sum()) - 1) > 1e-4


def test_noise_hangs_on_what_it_hides_and_on_the_secret():
    noise, _ = Noise(std=1.0).bind(Bound(1000, l2=1.0))
    x, other = torch.zeros(1000), torch.full((1000,), 1e-6)

    def drawn(vector, secret=None):
        return noise.encode(vector, Key(1, 1, "c", secret)).values - vector

    assert torch.equal(drawn(x), drawn(x))
    for again in (drawn(other), drawn(x, 5), drawn(x, 6)):
        assert abs(float(torch.corrcoef(torch.stack([drawn(x), again]))[0, 1])) < 0.15
