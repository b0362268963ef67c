import math

import pytest
import torch

from fedpress.codecs import Bound, Powers, decode_chain, encode_chain
from fedpress.errors import WireError
from tests.federation.federation import key


def twin(values, k):
    """The nearest exponent, one value at a time."""
    top = max(map(abs, values))
    found = []
    for value in values:
        exponent = round(math.log2(abs(value) / top)) if value else -math.inf
        found.append(math.copysign(top * 2.0**exponent, value) if exponent >= -k else 0.0)
    return found


@pytest.mark.parametrize("k", [0, 3, 7, 60])
def test_values_become_the_nearest_power_of_two_of_the_largest(k):
    bound, _ = Powers(k=k).bind(Bound(500))
    x = torch.randn(500, generator=torch.Generator().manual_seed(k)) ** 5
    x[::50] = 0
    sent = encode_chain([bound], x, key())
    assert sent["values"].dtype == torch.int8
    back = decode_chain([bound], sent, key())
    torch.testing.assert_close(back, torch.tensor(twin(x.tolist(), k)))
    assert bool((back.abs() <= 2**0.5 * x.abs() * (1 + 1e-6)).all())


@pytest.mark.parametrize(
    "bad",
    [
        {"values": torch.tensor([5, 0], dtype=torch.int8)},
        {"values": torch.tensor([-128, 0], dtype=torch.int8)},
        {"0.scale": torch.tensor([-1.0])},
        {"0.scale": torch.tensor([math.inf])},
        {"0.scale": torch.ones(2)},
        {"0.more": torch.ones(1)},
    ],
)
def test_what_no_client_can_have_made_is_refused(bad):
    bound, _ = Powers(k=3).bind(Bound(2))
    sent = encode_chain([bound], torch.tensor([1.0, 0.5]), key())
    with pytest.raises(WireError, match="powers"):
        decode_chain([bound], sent | bad, key())
