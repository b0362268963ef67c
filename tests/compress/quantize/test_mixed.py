import copy
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, kl_divergence

from fedpress.compress.quantize import (
    BitChoice,
    choose_bits,
    layer_bytes,
    measure_choices,
    quantizable,
    quantize_,
    stored_bytes,
)
from fedpress.errors import DataError, ModelError, RecipeError
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import quantize_layers_
from fedpress.tasks import Binary, Classification, Multilabel, Poisson, Regression

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


INT = QuantizationScheme(weights=WeightQuantization())


def rounded_(model, bits):
    """Rounds the layers of `model`, each to its number of bits."""
    quantize_(model, {name: QuantizationScheme(weights=WeightQuantization(bits=each))
                      for name, each in bits.items()}, correct_bias=False)  # fmt: skip
    return model


@pytest.mark.parametrize("named", [Classification(("a", "b", "c")), None])
def test_the_harm_of_a_classifier_is_the_divergence_of_its_probabilities(named):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(40, 6)
    found = measure_choices(model, {"0": INT}, (2, 4, 8), [x[:25], x[25:]], named)["0"]
    before = Categorical(logits=model(x))
    for choice in found:
        after = Categorical(logits=rounded_(copy.deepcopy(model), {"0": choice.bits})(x))
        expected = float(kl_divergence(before, after).mean())
        assert choice.divergence == pytest.approx(expected, rel=1e-3, abs=1e-8)


class Branches(nn.Module):
    """Two layers of equal size, of which one does far more to the only output."""

    def __init__(self):
        super().__init__()
        self.quiet, self.loud = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        return (self.loud(x) + 0.01 * self.quiet(x)).sum(1, keepdim=True)


ONE_OUTPUT = {
    "binary": Binary(("no", "yes")),
    "regression": Regression(("target",)),
    "poisson": Poisson(("count",)),
    "multilabel": Multilabel(("ill",)),
    "unknown": None,
}


@pytest.mark.parametrize("kind", ONE_OUTPUT)
def test_a_sensitive_layer_gets_more_bits_also_with_one_output(kind):
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(64, 16)
    table = {"quiet": INT, "loud": INT}
    choices = measure_choices(model, table, (2, 4, 8), [x], ONE_OUTPUT[kind])
    both = sum(layer_bytes(model.quiet, WeightQuantization(bits=bits)) for bits in (2, 8))
    assert choose_bits(choices, both) == {"quiet": 2, "loud": 8}


class Heads(nn.Module):
    """Two outputs in different units, one in a list."""

    def __init__(self, unit=1.0):
        super().__init__()
        self.first, self.second, self.unit = nn.Linear(6, 4), nn.Linear(6, 4), unit

    def forward(self, x):
        return {"first": self.first(x), "more": [self.unit * self.second(x)]}


def test_several_outputs_count_alike_whatever_their_units():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(50, 6)
    table = {"first": INT, "second": INT}
    plain = measure_choices(model, table, (2, 4), [x[:20], x[20:]])
    model.unit = 1000.0
    for name, rows in measure_choices(model, table, (2, 4), [x[:20], x[20:]]).items():
        assert [c.divergence for c in rows] == pytest.approx([c.divergence for c in plain[name]])
    # A plain twin: the squared error of one head as a share of the variance of its outputs.
    model.unit = 1.0
    before = model(x)["first"]
    after = rounded_(copy.deepcopy(model), {"first": 2})(x)["first"]
    share = (after - before).square().mean() / before.var(0, correction=0).mean()
    assert plain["first"][0].divergence == pytest.approx(float(share), rel=1e-3)


class Broken(nn.Module):
    """Its layer's output is divided by 0 if the weights are rounded, or always."""

    def __init__(self, always):
        super().__init__()
        self.layer, self.always = nn.Linear(3, 3), always
        self.register_buffer("was", self.layer.weight.detach().clone())

    def forward(self, x):
        changed = bool((self.layer.weight != self.was).any())
        return self.layer(x) / (0 if self.always or changed else 1)


def test_outputs_that_are_not_finite_are_refused_or_the_worst_choice():
    x = torch.randn(5, 3)
    with pytest.raises(
        ModelError, match=r"model: gives outputs which are NaN or infinite; .* mixed"
    ):
        measure_choices(Broken(True), {"layer": INT}, (4,), [x])
    found = measure_choices(Broken(False), {"layer": INT}, (4,), [x])
    assert found["layer"][0].divergence == float("inf")


def target(x):
    return (x[:, 0] * x[:, 1] + torch.sin(2 * x[:, 2]) + 0.3 * x[:, 3:].sum(1))[:, None]


def trained_regression(seed):
    """Returns a network with one output, and public and test inputs."""
    torch.manual_seed(seed)
    sizes = (8, 48, 32, 16, 12, 1)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(800):
        x = torch.randn(64, 8)
        loss = (model(x) - target(x)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval(), torch.randn(256, 8), torch.randn(2000, 8)


@pytest.mark.recipe
@pytest.mark.parametrize("seed", range(3))
def test_mixed_bits_of_a_regression_beat_random_bits_of_the_same_size(seed):
    model, public, x = trained_regression(seed)
    table, _ = quantizable(model, INT)
    offered = (2, 3, 4, 6, 8)
    sizes = {name: {bits: layer_bytes(model.get_submodule(name), WeightQuantization(bits=bits))
                    for bits in offered} for name in table}  # fmt: skip
    most = sum(of[8] for of in sizes.values()) // 2
    task = Regression(("target",))
    chosen = choose_bits(measure_choices(model, table, offered, [public], task), most)

    @torch.no_grad()
    def error(bits):
        return float((rounded_(copy.deepcopy(model), bits)(x) - target(x)).square().mean())

    ways = [dict(zip(table, way, strict=True)) for way in product(offered, repeat=len(table))]
    close = [w for w in ways if 0.97 * most < sum(sizes[n][b] for n, b in w.items()) <= most]
    chance = torch.Generator().manual_seed(seed)
    drawn = [close[i] for i in torch.randperm(len(close), generator=chance)[:40]]
    others = sorted(error(bits) for bits in drawn)
    assert error(chosen) < others[len(others) // 4]


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
