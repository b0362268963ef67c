import math

import pytest
import torch
from torch import nn

from fedpress.nn.dropout import dropout, quick_dropout


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("p", [0.03, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_p_is_dropped_and_the_others_are_scaled_as_torch_does(p, dtype):
    n = 400_003
    x = torch.ones(n, dtype=dtype)
    found = dropout(x, p)
    kept = found != 0
    # Five standard deviations of a binomial.
    assert abs(int(kept.sum()) - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))
    ours, theirs = found[kept].unique(), torch.dropout(x, p, train=True).unique()[-1]
    assert len(ours) == 1
    # Within the rounding of p to 16 bits, and one rounding of bfloat16.
    torch.testing.assert_close(
        ours[0], theirs, rtol=1e-4 if dtype == torch.float32 else 8e-3, atol=0
    )


def test_decisions_do_not_depend_on_those_beside_them():
    kept = (dropout(torch.ones(400_000), 0.5) != 0).double() - 0.5
    for lag in (1, 2, 3, 4, 5, 8, 624):
        correlation = 4 * float((kept[lag:] * kept[:-lag]).mean())
        assert abs(correlation) < 5 / math.sqrt(400_000), lag


def test_the_expected_value_is_exact():
    # With p off the grid of 2^-16 the scale follows the rounded p: E[out] = 1 with error 1/sqrt(n).
    out = dropout(torch.ones(1_000_000, dtype=torch.float64), 1 / 3)
    threshold = round(65536 / 3)
    assert float(out.max()) == pytest.approx(65536 / (65536 - threshold), rel=1e-12)
    assert float(out.mean()) == pytest.approx(1, abs=5 * math.sqrt(0.5 / 1_000_000))


def test_the_gradient_is_the_mask():
    x = torch.randn(3, 4, 5, requires_grad=True)
    out = dropout(x, 0.4)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_images_in_channels_last_keep_their_format():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    out = dropout(x, 0.5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    kept = out != 0
    assert 0 < int(kept.sum()) < x.numel()
    torch.testing.assert_close(out[kept], 2 * x[kept])


@pytest.mark.parametrize(
    "x", [torch.ones(7).expand(5, 7), torch.ones(6, 8)[:, ::2], torch.ones(())]
)
def test_views_are_dropped_value_by_value(x):
    out = torch.stack([dropout(x, 0.5) for _ in range(200)])
    assert out.shape[1:] == x.shape
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out.mean(0) > 0.5).all()


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-9])
@pytest.mark.parametrize("shape", [(4,), (0, 3)])
def test_the_ends_are_as_in_torch(p, shape):
    x = torch.ones(shape, requires_grad=True)
    out = dropout(x, p)
    out.sum().backward()
    value = 0.0 if p == 1 else 1.0
    assert torch.equal(out, torch.full(shape, value))
    assert torch.equal(x.grad, torch.full(shape, value))


class Own(nn.Dropout):
    pass


def test_inside_the_block_training_modules_use_it_and_afterwards_they_are_as_before():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(Own(0.5)), nn.Dropout(0.5, inplace=True))
    x = torch.ones(64)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(3)
    expected = dropout(x, 0.5)
    torch.manual_seed(3)
    with quick_dropout(model):
        found = model[0](x)
        assert torch.equal(model.eval()[0](x), x)
        model.train()
        assert "forward" not in vars(model[1][0])
        assert "forward" not in vars(model[2])
    assert torch.equal(found, expected)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_an_error_inside_the_block_restores_the_modules_too():
    model = nn.Sequential(nn.Dropout(0.5))
    with pytest.raises(KeyError), quick_dropout(model):
        raise KeyError
    assert "forward" not in vars(model[0])
