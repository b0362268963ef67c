"""Every network that can be pruned can be folded and rounded, or says which of its layers cannot."""

import copy

import pytest
import torch
import zoo

from fedpress.compress.quantize import find_folds, fold_, quantizable, quantize_
from fedpress.errors import ModelError
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import QUANTIZED_CLASSES, quantized_layers

FOLDED = {
    "plain": 2,
    "residual": 8,
    "padded": 7,
    "classic": 7,
    "separable": 2,
    "inverted": 10,
    "halves": 2,
    "parts": 1,
}
FLOAT = {
    "waves": "its weight is shared with 'one'",
    "vit-torch": "ViT computes in its own way",
    "words": "its weight is shared with 'out'",
}
BYTES = QuantizationScheme(weights=WeightQuantization(), inputs=InputQuantization())


def error(model, wanted, x):
    given = [y.detach() for y in zoo.outputs(model, x)]
    return max(
        float((a - b).square().mean() / b.square().mean())
        for a, b in zip(given, wanted, strict=True)
    )


@pytest.mark.parametrize("name", [*FOLDED, "dense"])
def test_folding_leaves_the_outputs_as_they_were(name):
    model, x = zoo.make(name)
    wanted = [y.detach() for y in zoo.outputs(model.eval(), x)]
    folds, left = find_folds(model, x)
    assert len(folds) == FOLDED.get(name, 0)
    assert left.keys() == ({"norm"} if name == "dense" else set())
    fold_(model, folds)
    assert error(model, wanted, x) < 1e-11


@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n != "normed"])
def test_eight_bits_come_near_to_the_float_network(name):
    model, x = zoo.make(name)
    wanted = [y.detach() for y in zoo.outputs(model.eval(), x)]
    table, left = quantizable(model, BYTES)
    assert FLOAT.get(name, "") in " ".join(left.values())
    assert {
        n for n, m in model.named_modules() if type(m) in QUANTIZED_CLASSES
    } <= table.keys() | left.keys()
    assert quantize_(model, table, [x], correct_bias=False) == {}
    assert [*table] == [n for n, _ in quantized_layers(model)]
    assert 0 < error(model, wanted, x) < 2e-3


def test_weights_under_a_parametrization_are_refused_with_the_way_out():
    model, _ = zoo.make("normed")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ModelError, match=r"'a': its weight is computed from other parameters; make it plain first"
    ):
        quantizable(model, BYTES)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
