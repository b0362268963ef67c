import math

import pytest
import torch

from fedpress.codecs import VALUES, Bound, Lossless, TopK, bind_chain, decode_chain, encode_chain
from fedpress.errors import RecipeError, WireError
from fedpress.wire import Message, pack, unpack
from tests.federation.federation import key


def travelled(x, *before):
    chain, _ = bind_chain([*before, Lossless()], Bound(len(x)))
    data = pack(Message("update", {}, encode_chain(chain, x, key())))
    return decode_chain(chain, unpack(data).tensors, key()), 8 * len(data) / max(1, len(x))


def gauss(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e-3


@pytest.mark.parametrize("size", [0, 1, 2, 17, 1000, 5003])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.97, 1.0])
def test_every_bit_comes_back(size, share):
    x = torch.where(torch.linspace(0, 1, size) < share, 0.0, gauss(size))
    special = torch.tensor([-0.0, math.nan, -math.inf, 1e-45, 3.4e38])
    x[: len(special)] = special[:size]
    y, _ = travelled(x)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))


def test_a_dense_update_takes_a_sixth_less_and_zeros_take_nothing():
    x = gauss(200_000)
    assert travelled(x)[1] < 26.8
    assert travelled(torch.zeros(200_000))[1] < 0.01
    sparse, bits = travelled(x, TopK(density=0.01))
    assert int((sparse != 0).sum()) == 2000
    assert bits < 0.36  # 0.08 bits for the positions, 26.6 for each of 1% of the values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({VALUES: torch.zeros(4, 9, dtype=torch.uint8)}, "got 9 values, expected 10"),
        ({VALUES: torch.zeros(3, 10, dtype=torch.uint8)}, "expected torch.uint8"),
        ({VALUES: torch.zeros(4, 10)}, "expected torch.uint8"),
        ({"0.nonzero": torch.zeros(10, dtype=torch.uint8)}, "marks 0 of 10"),
        ({"0.nonzero": torch.full((10,), 2, dtype=torch.uint8)}, "expected 0 and 1"),
        ({"0.nonzero": torch.ones(9, dtype=torch.uint8)}, "expected 0 and 1"),
        ({"0.more": torch.ones(9)}, "no transform reads"),
    ],
)
def test_what_it_cannot_have_made_is_refused(change, words):
    chain, _ = bind_chain([Lossless()], Bound(10))
    good = encode_chain(chain, gauss(10), key())
    with pytest.raises(WireError, match=words):
        decode_chain(chain, good | change, key())


def test_integers_need_no_lossless():
    with pytest.raises(RecipeError, match="leave 'lossless' out"):
        Lossless().bind(Bound(10, integer=True))
