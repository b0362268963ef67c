import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpress.core.random import keystream
from fedpress.secagg.keys import derive
from fedpress.secagg.masks import CHUNK, add_masks_, centred, to_tensor, to_words, word_type


@pytest.mark.parametrize("bits", [2, 16, 17, 32, 33, 62])
@pytest.mark.parametrize("size", [1, 7, CHUNK + 5])
def test_masks_cancel_and_single_ones_do_not(bits, size):
    words = np.arange(size).astype(word_type(bits))
    both = words.copy()
    add_masks_(both, [(b"a", True), (b"b", True)])
    assert (both != words).any()
    add_masks_(both, [(b"b", False), (b"a", False)])
    assert (both == words).all()


def test_a_mask_is_the_key_stream_whatever_the_chunks():
    words = np.zeros(CHUNK + 5, np.uint32)
    add_masks_(words, [(b"a", True)])
    assert (words == keystream(derive(b"a", "mask"), 4 * len(words)).view(np.uint32)).all()


@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), bits=st.integers(2, 62))
def test_words_are_values_modulo_a_power_of_two(values, bits):
    words = to_words(torch.tensor(values), bits)
    half = 1 << (bits - 1)
    signed = [(value + half) % (2 * half) - half for value in values]
    assert to_tensor(words, bits).tolist() == centred(words, bits).tolist() == signed
