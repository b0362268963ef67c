import math

import pytest
import torch

from fedpress.codecs import Bound, Rotate
from fedpress.codecs.rotate import hadamard
from tests.federation.federation import key


def slow(x):
    """The textbook butterfly, one block."""
    values, step = x.double().tolist(), 1
    while step < len(values):
        for start in range(0, len(values), 2 * step):
            for at in range(start, start + step):
                a, b = values[at], values[at + step]
                values[at], values[at + step] = a + b, a - b
        step *= 2
    return torch.tensor(values, dtype=torch.float64) / math.sqrt(len(values))


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 128])
def test_the_fast_transform_equals_the_butterfly_and_undoes_itself(order):
    x = torch.randn(3 * order, generator=torch.Generator().manual_seed(0))
    fast = hadamard(x, order)
    assert torch.allclose(
        fast.double(), torch.cat([slow(part) for part in x.split(order)]), atol=1e-5
    )
    assert torch.allclose(hadamard(fast, order), x, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 64, 100, 1000])
def test_rotation_keeps_norms_sizes_and_comes_back(size):
    rotate, bound = Rotate(block=64).bind(Bound(size, l2=1.0))
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    turned = rotate.encode(x, key()).values
    assert turned.shape == (bound.size,) == (size,)
    assert float(turned.norm()) == pytest.approx(float(x.norm()), rel=1e-5)
    assert torch.allclose(rotate.decode(rotate.encode(x, key()), key()), x, atol=1e-5)


def test_one_large_value_is_spread_wherever_it_stands():
    size = 1000
    rotate, bound = Rotate(block=64).bind(Bound(size, l2=1.0))
    for at in range(0, size, 37):
        x = torch.zeros(size)
        x[at] = 1.0
        assert float(rotate.encode(x, key()).values.abs().max()) <= 5 * bound.spread


def test_clients_of_a_round_turn_alike_and_rounds_differ():
    rotate, _ = Rotate(block=64).bind(Bound(128))
    x = torch.randn(128, generator=torch.Generator().manual_seed(2))
    turned = [rotate.encode(x, k).values for k in (key("a"), key("b"), key("a", 2))]
    assert torch.equal(turned[0], turned[1])
    assert not torch.equal(turned[0], turned[2])
