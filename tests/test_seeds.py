import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpress.seeds import derive, generator

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


@pytest.mark.parametrize(("one", "two"), [(("a", "bc"), ("ab", "c")), (("1",), (1,)), ((), ("",)), (("a",), ("a", 0))])
def test_the_borders_and_types_of_words_count(one, two):
    assert derive(0, *one) != derive(0, *two)


def test_words_of_numpy_are_the_same_words():
    assert derive(np.int64(1), np.str_("c"), np.int64(2)) == derive(1, "c", 2)


def test_streams_are_the_same_in_every_version():
    assert derive(0) == 2631537505891389924
    assert derive(1, "round", 2) == 4586561927009146609
    assert torch.randint(0, 1000, (4,), generator=generator(0, "a")).tolist() == [271, 379, 262, 450]


def test_generators_of_one_stream_start_alike_and_do_not_touch_the_global_one():
    before = torch.get_rng_state()
    first, again, other = (torch.rand(8, generator=generator(3, word)) for word in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
