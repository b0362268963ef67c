import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedpress.nn.observers import BINS, OBSERVERS, Histogram
from fedpress.nn.quant_scheme import InputQuantization, calculate_qparams

BYTE = InputQuantization()


def seen(x):
    histogram = Histogram(float(x.amin()), float(x.amax()))
    histogram.add_(x)
    return histogram


def error(x, low, high, grid):
    scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(high), grid)
    return float(
        (((x / scale).round().clamp(-zero, grid.highest - zero)) * scale - x).square().mean()
    )


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50), st.sampled_from([*OBSERVERS])
)
@example([1.8504341058023753e-15], "percentile")
def test_every_range_lies_inside_of_what_was_seen(values, observer):
    x = torch.tensor(values)
    low, high = OBSERVERS[observer](seen(x), BYTE)
    slack = 1e-5 * (1 + float(x.abs().amax()))
    assert min(0, float(x.amin())) - slack <= low <= high <= max(0, float(x.amax())) + slack


def test_a_histogram_in_parts_is_that_of_the_whole():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, parts = seen(x), Histogram(float(x.amin()), float(x.amax()))
    for part in x.split(130):
        parts.add_(part)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == 1000
    assert len(whole.counts) == BINS
    assert float((whole.centers * whole.counts).sum() / 1000) == pytest.approx(
        float(x.mean()), abs=0.01
    )


def test_percentiles_cut_outliers_off():
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([50.0])])
    low, high = OBSERVERS["percentile"](seen(x), BYTE)
    assert low == pytest.approx(-1, abs=0.05)
    assert high == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("grid", [InputQuantization(bits=2), InputQuantization(bits=4), BYTE])
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
def test_least_squares_ranges_are_the_best_of_a_search(grid, kind):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    x = {"normal": x, "relu": x.relu(), "heavy": x.pow(3)}[kind]
    ours = error(x, *OBSERVERS["mse"](seen(x), grid), grid)
    tried = [
        error(x, float(x.amin()) * t, float(x.amax()) * t, grid)
        for t in torch.linspace(0.02, 1, 197).tolist()
    ]
    assert ours <= 1.05 * min(tried)


def test_entropy_gives_up_outliers_where_bits_are_few_and_keeps_a_plain_range():
    chance = torch.Generator().manual_seed(2)
    relu = torch.randn(50_000, generator=chance).abs()
    outliers = torch.cat([relu, torch.full((20,), 60.0)])
    low, high = OBSERVERS["entropy"](seen(outliers), InputQuantization(bits=4))
    assert low == pytest.approx(0, abs=1e-3)
    assert 2 < high < 20
    even = torch.rand(50_000, generator=chance)
    assert OBSERVERS["entropy"](seen(even), BYTE)[1] > 0.9


@pytest.mark.parametrize("grid", [InputQuantization(bits=4), BYTE])
def test_the_many_zeros_of_a_relu_do_not_move_the_range(grid):
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(50_000, generator=chance).abs()
    many = torch.cat([x, torch.zeros(200_000)])
    few = torch.cat([x, torch.zeros(1)])
    assert OBSERVERS["entropy"](seen(many), grid) == OBSERVERS["entropy"](seen(few), grid)
    assert OBSERVERS["mse"](seen(many), BYTE)[1] > 3
