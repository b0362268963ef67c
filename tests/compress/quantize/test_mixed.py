from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedpress.compress.quantize import (
    BitChoice,
    choose_bits,
    measure_choices,
    quantizable,
    stored_bytes,
)
from fedpress.errors import DataError, RecipeError
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_

layers = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 100)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@settings(max_examples=80)
@given(layers, st.integers(1, 250))
def test_the_choice_is_the_best_of_all(given_layers, budget):
    choices = {
        f"layer{i}": [BitChoice(b, size, harm / 7) for b, (size, harm) in enumerate(layer, 2)]
        for i, layer in enumerate(given_layers)
    }
    ways = [w for w in product(*choices.values()) if sum(c.size for c in w) <= budget]
    if not ways:
        with pytest.raises(RecipeError, match=r"max_bytes: .* the least is"):
            choose_bits(choices, budget)
        return
    bits = choose_bits(choices, budget)
    ours = [next(c for c in choices[name] if c.bits == b) for name, b in bits.items()]
    assert sum(c.size for c in ours) <= budget
    assert sum(c.divergence for c in ours) == pytest.approx(
        min(sum(c.divergence for c in w) for w in ways)
    )


def test_large_budgets_are_met_and_nearly_used():
    chance = torch.Generator().manual_seed(0)
    sizes = torch.randint(1000, 400_000, (20,), generator=chance).tolist()
    choices = {
        f"layer{i}": [
            BitChoice(b, n * b // 8, float(torch.rand((), generator=chance)) * 4.0**-b)
            for b in (2, 3, 4, 6, 8)
        ]
        for i, n in enumerate(sizes)
    }
    budget = sum(sizes) // 2
    bits = choose_bits(choices, budget)
    used = sum(n * bits[f"layer{i}"] // 8 for i, n in enumerate(sizes))
    assert 0.98 * budget < used <= budget


@pytest.mark.parametrize(
    "grid",
    [
        WeightQuantization(),
        WeightQuantization(bits=3),
        WeightQuantization(bits=4, group=5),
        WeightQuantization(kind="codebook"),
    ],
)
def test_the_bytes_are_those_of_codes_and_scales(grid):
    layer = nn.Conv2d(3, 5, 3)
    quantize_layers_(nn.Sequential(layer), {"0": QuantizationScheme(weights=grid)})
    own = layer.codebook if grid.kind == "codebook" else layer.weight_scale
    assert (
        stored_bytes(layer.weight, grid)
        == -(-layer.weight.numel() * grid.bits // 8) + 4 * own.numel()
    )


def test_the_harm_is_the_divergence_of_one_layer_rounded_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    table, _ = quantizable(model, QuantizationScheme(weights=WeightQuantization()))
    before = {n: p.clone() for n, p in model.named_parameters()}
    x = torch.randn(40, 6)
    found = measure_choices(model, table, (2, 4, 8), [x[:25], x[25:]])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    for rows in found.values():
        assert [c.bits for c in rows] == [2, 4, 8]
        assert rows[0].divergence > rows[1].divergence > rows[2].divergence >= 0
        assert rows[0].size < rows[1].size < rows[2].size
    p = model(x).softmax(1)
    scale = model[0].weight.detach().abs().amax(1, keepdim=True) / 127
    model[0].weight.data = (model[0].weight.data / scale).round() * scale
    by_hand = torch.nn.functional.kl_div(model(x).log_softmax(1), p, reduction="batchmean")
    assert found["0"][2].divergence == pytest.approx(by_hand.item(), rel=0.3, abs=1e-6)


def test_no_examples_and_other_grids_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(DataError, match=r"batches: .* at least one batch"):
        measure_choices(
            model, quantizable(model, QuantizationScheme(weights=WeightQuantization()))[0], (4,), []
        )
    with pytest.raises(RecipeError, match=r"table: '0' is not quantized to integers"):
        measure_choices(
            model,
            {"0": QuantizationScheme(weights=WeightQuantization(kind="ternary"))},
            (4,),
            [torch.zeros(1, 2)],
        )
