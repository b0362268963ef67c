import pytest
import torch

from fedpress.codecs import Key
from fedpress.codecs.dithered import DitheredQuantizer
from fedpress.wire.packing import shrunk_size


@pytest.mark.recipe
@pytest.mark.parametrize("rate", [0.488, 1.0, 2.0])
@pytest.mark.parametrize("zeros", ["anywhere", "in runs"])
def test_a_large_vector_of_many_zeros_keeps_to_its_rate(rate, zeros):
    size = 400_000
    chance = torch.Generator().manual_seed(0)
    kept = torch.rand(size if zeros == "anywhere" else size // 50, generator=chance) < 0.4
    if zeros == "in runs":
        kept = kept.repeat_interleave(50)
    x = torch.randn(size, generator=chance) * kept
    codec = DitheredQuantizer(size, 32, rate)
    key = Key(0, 1, "c0")
    coded = codec.encode(x, key)
    found = 8 * sum(shrunk_size(t) for t in (coded.values, *coded.side.values())) / size
    assert 0.9 * rate < found < 1.03 * rate
    # Unbiased: the error of a mean over 32 keys falls to 18%, and to 24% if they draw few phases.
    once = codec.decode(coded, key) - x
    many = [Key(0, number, "c0") for number in range(32)]
    mean = sum(codec.decode(codec.encode(x, one), one) for one in many) / len(many) - x
    assert float(mean.norm() / once.norm()) < 0.24
