from hashlib import shake_256

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedpress.core.random import derive, fingerprint, generator, secret_generator

WORDS = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4)


@given(st.integers(), WORDS, st.integers(), WORDS)
def test_two_names_are_one_stream_only_if_they_are_the_same(seed, words, other_seed, other):
    same = (seed, words) == (other_seed, other) and [*map(type, words)] == [*map(type, other)]
    assert (derive(seed, *words) == derive(other_seed, *other)) is same


@given(st.integers(), WORDS)
def test_a_seed_is_one_that_every_generator_takes(seed, words):
    assert 0 <= derive(seed, *words) < 2**63
    torch.Generator().manual_seed(derive(seed, *words))
    np.random.default_rng(derive(seed, *words))


@pytest.mark.parametrize(
    ("one", "two"), [(("a", "bc"), ("ab", "c")), (("1",), (1,)), ((), ("",)), (("a",), ("a", 0))]
)
def test_the_borders_and_types_of_words_count(one, two):
    assert derive(0, *one) != derive(0, *two)


def test_words_of_numpy_are_the_same_words():
    assert derive(np.int64(1), np.str_("c"), np.int64(2)) == derive(1, "c", 2)


def test_streams_are_the_same_in_every_version():
    assert derive(0) == 2631537505891389924
    assert derive(1, "round", 2) == 4586561927009146609
    assert torch.randint(0, 1000, (4,), generator=generator(0, "a")).tolist() == [
        271,
        379,
        262,
        450,
    ]


def test_generators_of_one_stream_start_alike_and_do_not_touch_the_global_one():
    before = torch.get_rng_state()
    first, again, other = (torch.rand(8, generator=generator(3, word)) for word in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_secret_stream_is_filled_from_all_of_its_name():
    def draw(*words):
        return torch.randint(0, 2**32, (700,), generator=secret_generator(*words)).tolist()

    digest = shake_256(b"(3, 'noise', 1)").digest(4 * 624)
    twin = np.random.MT19937()  # an independent implementation of the generator
    twin.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.frombuffer(digest, np.uint32), "pos": 624},
    }
    pairs = twin.random_raw(1400).reshape(-1, 2)
    assert draw(3, "noise", 1) == pairs[:, 1].tolist()
    assert draw(3, "noise", 2) != draw(3, "noise", 1) == draw(3, "noise", 1)


def test_secret_streams_differ_where_the_low_32_bits_of_their_seeds_are_equal(monkeypatch):
    def plain(seed):
        return torch.rand(4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(plain(5), plain(5 + 2**32))  # why there are secret streams
    monkeypatch.setattr(
        "fedpress.core.random.derive", lambda seed, *words: 5
    )  # no 63-bit seed is in the way
    one, two = (torch.rand(4, generator=secret_generator(seed)) for seed in (5, 5 + 2**32))
    assert not torch.equal(one, two)


def test_normals_of_secret_streams_are_normal():
    normals = torch.cat(
        [
            torch.randn(5000, generator=secret_generator(1, i), dtype=torch.float64)
            for i in range(10)
        ]
    )
    assert stats.kstest(normals.numpy(), "norm").pvalue > 0.001


def test_a_fingerprint_knows_types_shapes_bytes_and_borders_but_no_addresses():
    a = torch.arange(6.0)
    others = [
        a.view(2, 3),
        a.double(),
        a + 1,
        a.to(torch.bfloat16),
        a[:5],
        torch.tensor(0.0),
        torch.zeros(0),
    ]
    assert len({fingerprint(t) for t in [a, *others]}) == 8
    assert fingerprint(a.view(2, 3).T) == fingerprint(a.view(2, 3).T.contiguous())
    assert fingerprint(object(), 1) == fingerprint(object(), 1) != fingerprint(object(), 2)
