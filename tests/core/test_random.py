import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpress.core.random import derive, fingerprint, secret_key

WORDS = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4)


@given(st.integers(), WORDS, st.integers(), WORDS)
def test_two_names_are_one_stream_only_if_they_are_the_same(seed, words, other_seed, other):
    same = (seed, words) == (other_seed, other) and [*map(type, words)] == [*map(type, other)]
    assert (derive(seed, *words) == derive(other_seed, *other)) is same
    assert (secret_key(seed, *words) == secret_key(other_seed, *other)) is same


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


@pytest.mark.parametrize("name", [(1, 1.5), (1.5, 1), (1, None)])
def test_a_name_is_made_of_texts_and_whole_numbers(name):
    with pytest.raises(TypeError, match="integer"):
        derive(*name)


def test_words_of_numpy_are_the_same_words():
    assert derive(np.int64(1), np.str_("c"), np.int64(2)) == derive(1, "c", 2)


def test_seeds_are_the_same_in_every_version():
    assert derive(0) == 5621864261735219286
    assert derive(1, "round", 2) == 2581086214088346132
    assert secret_key(2**256 - 1, "ü", -1).hex()[:16] == "97640dac3a6da00c"


def test_a_fingerprint_knows_types_shapes_bytes_and_borders():
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


def test_a_fingerprint_hangs_on_no_name_of_a_class_and_on_no_order_of_keys():
    @dataclass
    class Before:
        size: int
        norm: float

    @dataclass
    class After:
        size: int
        norm: float

    assert fingerprint(Before(1, 2.0)) == fingerprint(After(1, 2.0)) != fingerprint(After(1, 2.5))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(json.dumps({"a": 1})) != fingerprint({"a": 1})
    with pytest.raises(TypeError, match="no canonical JSON"):
        fingerprint(object())
