import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher as Aes
from cryptography.hazmat.primitives.ciphers import algorithms, modes
from scipy import stats

from fedpress.core.random_source import AesCtrRandom, TorchRandom, chance_of
from fedpress.errors import PrivacyError
from fedpress.privacy.noise.mechanism import noise_grid, noise_sum, noised_mean, poisson_batches
from fedpress.privacy.per_example.sgd import private_steps
from fedpress.privacy.plan import PrivacyPlan

KEY = bytes(range(32))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plan(noise=1.5, clip_norm=0.4, unit="client"):
    return PrivacyPlan(unit, clip_norm=clip_norm, sampling_prob=1.0, noise_multiplier=noise)


MODES = {"seeded": lambda: TorchRandom(seeded()), "cipher": lambda: AesCtrRandom(KEY)}


@pytest.mark.parametrize("mode", MODES)
def test_normals_uniforms_and_words_have_their_distributions(mode):
    chance = MODES[mode]()
    normal, uniform, words = chance.normal(100_000), chance.uniform(100_000), chance.words(100_000)
    assert normal.dtype == uniform.dtype == torch.float64
    assert words.dtype == np.uint64
    assert float(normal.std()) == pytest.approx(1, rel=0.01)
    assert stats.kstest(normal.numpy(), "norm").pvalue > 0.001
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.001
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    ones = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / math.sqrt(100_000)
    assert [len(draw(0)) for draw in (chance.normal, chance.uniform, chance.words)] == [0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_goes_on_and_is_the_same_again(mode):
    first, again = MODES[mode](), MODES[mode]()
    assert np.array_equal(first.words(7), again.words(7))
    later = first.words(7)
    assert np.array_equal(later, again.words(7))
    assert not np.array_equal(later, MODES[mode]().words(7))


def test_a_cipher_stream_is_that_of_aes_counter_mode_however_it_is_asked():
    aes = Aes(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor()
    expected = np.frombuffer(aes.update(bytes(8 * 30)), "<u8")
    chance = AesCtrRandom(KEY)
    assert np.array_equal(np.concatenate([chance.words(n) for n in (1, 2, 5, 0, 3, 19)]), expected)


def test_streams_of_other_keys_are_others():
    assert not np.isin(AesCtrRandom(KEY).words(1000), AesCtrRandom(bytes(32)).words(1000)).any()
    with pytest.raises(ValueError, match="expected 32"):
        AesCtrRandom(b"short")


def test_both_tails_of_a_cipher_normal_reach_nine_deviations():
    chance = AesCtrRandom(KEY)
    chance.words = lambda size: np.array([0, 1, 2**64 - 1, 2**64 - 2], np.uint64)
    low, high, middle, other = chance.normal(4).tolist()
    assert low == -high == pytest.approx(stats.norm.ppf(2.0**-65))
    assert abs(middle) < 1e-15
    assert abs(other) < 1e-15


def test_a_bare_generator_counts_as_seeded():
    total = torch.linspace(-1, 1, 1000)
    assert torch.equal(
        noise_sum(total, plan(), seeded(3)), noise_sum(total, plan(), TorchRandom(seeded(3)))
    )
    cipher = AesCtrRandom(KEY)
    assert chance_of(cipher) is cipher


@pytest.mark.parametrize("mode", MODES)
def test_noise_has_the_planned_size_from_every_source(mode):
    total = torch.linspace(-3, 3, 300_000)
    noise = (noise_sum(total, plan(), MODES[mode]()) - total).double()
    assert float(noise.std()) == pytest.approx(0.6, rel=0.01)
    assert stats.kstest(noise[:50_000].numpy() / 0.6, "norm").pvalue > 0.001
    mean = noised_mean(total, plan(), expected=10, generator=MODES[mode]())
    assert float((mean - total / 10).std()) == pytest.approx(0.06, rel=0.01)


@pytest.mark.parametrize(
    "values", [[0.0], [1e-30, -1e30 * 1e-25, math.pi], [2.0**-149, 5e4], [-0.0] * 3]
)
@pytest.mark.parametrize("noise", [0.3, 1.0, 77.7])
def test_exact_noise_lies_on_the_public_grid_whatever_the_sum(values, noise):
    private, total = plan(noise), torch.tensor(values, dtype=torch.float64)
    grid = noise_grid(private)
    assert math.log2(grid) == math.floor(math.log2(private.noise_std)) - 30
    for number in range(50):
        steps = noise_sum(total, private, AesCtrRandom(bytes([number]) * 32)).double() / grid
        assert torch.equal(steps, steps.round())


def test_exact_noise_depends_on_the_rounded_sum_alone():
    private = plan()
    grid = noise_grid(private)
    total = torch.tensor([0.1, -0.7, 3.0], dtype=torch.float64)
    near = (total / grid).round() * grid + grid * torch.tensor(
        [0.49, -0.49, 0.3], dtype=torch.float64
    )
    assert not torch.equal(total, near)
    assert torch.equal(
        noise_sum(total, private, AesCtrRandom(KEY)), noise_sum(near, private, AesCtrRandom(KEY))
    )


def test_exact_noise_makes_up_for_the_rounding_of_the_sum():
    private, size = (
        plan(noise=2.0**20, clip_norm=1.0),
        2**16,
    )  # so much noise that the grid is coarse: g sqrt(d) = 1/4
    noise = noise_sum(torch.zeros(size), private, AesCtrRandom(KEY)).double()
    plain = AesCtrRandom(KEY).normal(size) * private.noise_std
    assert float((noise / plain).median()) == pytest.approx(1.25, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_exact_noise_refuses_a_sum_that_was_not_clipped(value):
    with pytest.raises(PrivacyError, match="clip every contribution"):
        noise_sum(torch.tensor([0.0, value]), plan(), AesCtrRandom(KEY))


def test_batches_and_private_steps_draw_from_a_cipher():
    batches = list(poisson_batches(1000, 0.3, 20, AesCtrRandom(KEY)))
    assert sum(map(len, batches)) == pytest.approx(6000, rel=0.05)
    x, y = torch.randn(40, 3, generator=seeded()), torch.randint(2, (40,), generator=seeded())

    def trained(key):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        private = PrivacyPlan("sample", clip_norm=1.0, sampling_prob=0.5, noise_multiplier=1.0)
        list(
            private_steps(
                model,
                torch.nn.functional.cross_entropy,
                x,
                y,
                plan=private,
                steps=3,
                lr=0.1,
                generator=AesCtrRandom(key),
            )
        )
        return model.weight.detach()

    assert torch.equal(trained(KEY), trained(KEY))
    assert not torch.equal(trained(KEY), trained(bytes(32)))
