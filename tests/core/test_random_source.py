import math
import tracemalloc

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher as Aes
from cryptography.hazmat.primitives.ciphers import algorithms, modes
from scipy import stats

from fedpress.core.random_source import (
    BLOCK,
    AesCtrRandom,
    PhiloxRandom,
    TorchRandom,
    as_random_source,
    private_stream,
    public_stream,
    seed_generators_,
    seed_torch_,
)
from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.noise.mechanism import noise_grid, noise_sum, noised_mean, poisson_batches
from fedpress.privacy.per_example.sgd import private_steps
from fedpress.privacy.plan import PrivacyPlan

KEY = bytes(range(32))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plan(noise=1.5, clip_norm=0.4, unit="client"):
    return PrivacyPlan(unit, clip_norm=clip_norm, sampling_prob=1.0, noise_multiplier=noise)


MODES = {
    "torch": lambda: TorchRandom(seeded()),
    "public": lambda: PhiloxRandom(7),
    "cipher": lambda: AesCtrRandom(KEY),
}


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
def test_whole_numbers_orders_and_subsets_are_uniform(mode):
    chance = MODES[mode]()
    counts = torch.bincount(chance.integers(7, 300, 100).flatten(), minlength=7)
    assert counts.shape == (7,)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001
    firsts = torch.stack([chance.permutation(5) for _ in range(3000)])
    assert torch.equal(firsts.sort(dim=1).values, torch.arange(5).expand(3000, 5))
    for place in range(5):
        assert stats.chisquare(firsts[:, place].bincount(minlength=5).numpy()).pvalue > 0.001
    sets = [tuple(chance.subset(5, 2).tolist()) for _ in range(3000)]
    assert all(one < other for one, other in sets)
    assert len(set(sets)) == 10
    assert stats.chisquare([sets.count(one) for one in set(sets)]).pvalue > 0.001
    assert [chance.subset(3, n).tolist() for n in (0, 3)] == [[], [0, 1, 2]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_types_are_as_asked_and_a_uniform_is_below_one(mode, dtype):
    chance = MODES[mode]()
    normal, uniform = chance.normal(3, 4, dtype=dtype), chance.uniform(2, 50_000, dtype=dtype)
    assert (normal.shape, normal.dtype) == ((3, 4), dtype)
    assert (uniform.shape, uniform.dtype) == ((2, 50_000), dtype)
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert chance.normal().shape == chance.uniform().shape == chance.integers(3).shape == ()
    assert chance.permutation(0).tolist() == []


@pytest.mark.parametrize("mode", ["public", "cipher"])
def test_what_cannot_be_drawn_is_refused(mode):
    chance = MODES[mode]()
    for high in (0, -1, 2**63 + 1):
        with pytest.raises(RecipeError, match="high: got"):
            chance.integers(high, 3)
    with pytest.raises(RecipeError, match="count: got -1; give 0 or more"):
        chance.subset(5, -1)


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


def test_a_public_stream_is_numpys_philox_however_it_is_asked():
    expected = np.random.Philox(key=7).random_raw(30)
    chance = PhiloxRandom(7)
    assert np.array_equal(np.concatenate([chance.words(n) for n in (1, 2, 5, 0, 3, 19)]), expected)


def test_streams_are_the_same_in_every_version():
    public, private = public_stream(1, "a", 2), private_stream(1, "a", 2)
    assert [int(word) for word in public.words(2)] == [16552731669457294631, 18317866633633973478]
    assert [int(word) for word in private.words(2)] == [6297171961623696223, 17259397733585561711]
    assert public.permutation(5).tolist() == [4, 0, 3, 2, 1]
    assert public.subset(9, 3).tolist() == [1, 2, 6]
    assert public.integers(1000, 3).tolist() == [284, 643, 256]
    assert public.uniform(2).tolist() == [0.7527134300278068, 0.6154407684357538]
    assert public.normal(2).tolist() == pytest.approx(
        [-0.7810449890007467, 0.416092346787053], rel=1e-12
    )


def test_a_stream_hangs_on_all_of_its_name_and_begins_anew():
    for stream in (public_stream, private_stream):
        first, again, *others = (
            stream(seed, *words).words(4).tolist()
            for seed, *words in ((5, "a"), (5, "a"), (5 + 2**32, "a"), (5, "b"), (5, "a", 0))
        )
        assert first == again
        assert first not in others
    assert public_stream(5, "a").words(4).tolist() != private_stream(5, "a").words(4).tolist()


def test_streams_do_not_touch_the_global_generators():
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    public_stream(3, "a").normal(8)
    private_stream(3, "a").normal(8)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)


def test_generators_are_seeded_as_torch_seeds_them():
    for seed in (0, 7, 2**40 + 1, 2**63 - 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wanted = torch.rand(9)
            seed_generators_(seed)
            assert torch.equal(torch.rand(9), wanted)


def test_torch_is_seeded_with_more_bits_than_a_seed_of_its_own_holds():
    def drawn(**changed):
        words = AesCtrRandom(KEY).words(313)
        for place, value in changed.items():
            words[int(place.removeprefix("at_"))] ^= np.uint64(value)
        chance = AesCtrRandom(KEY)
        chance.words = lambda size: np.array([words[0]]) if size == 1 else words[1:]
        with torch.random.fork_rng():
            seed_torch_(chance)
            return torch.rand(1000)

    assert torch.equal(drawn(), drawn())
    assert stats.kstest(drawn().numpy(), "uniform").pvalue > 0.001
    for place in (1, 100, 312):  # bits far from the seed
        assert not torch.equal(drawn(), drawn(**{f"at_{place}": 1 << 40}))


def test_streams_of_other_keys_are_others():
    assert not np.isin(AesCtrRandom(KEY).words(1000), AesCtrRandom(bytes(32)).words(1000)).any()
    with pytest.raises(RecipeError, match="key: got 5 bytes, expected 32"):
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
    assert as_random_source(cipher) is cipher


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


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_long_vector_has_the_numbers_of_its_parts_and_takes_little_memory(kind):
    size = 3 * BLOCK + 5
    for make in (lambda: PhiloxRandom(1), lambda: AesCtrRandom(bytes(32))):
        whole, parts = make(), make()
        whole.words(1)  # AES then starts inside of a block
        parts.words(1)
        tracemalloc.start()
        drawn = getattr(whole, kind)(size, dtype=torch.float32)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        pieces = [getattr(parts, kind)(count, dtype=torch.float32) for count in (7, BLOCK, 2)]
        rest = getattr(parts, kind)(size - BLOCK - 9, dtype=torch.float32)
        assert torch.equal(drawn, torch.cat([*pieces, rest]))
        assert np.array_equal(whole.words(2), parts.words(2))
        # torch's memory is not traced: this is what the words and steps of one block take.
        assert most < 60 * BLOCK
