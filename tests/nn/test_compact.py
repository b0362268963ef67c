import copy

import pytest
import torch
from torch import nn

from fedpress.compress.sparse import apply_masks_, find_weights, masks_from_scores
from fedpress.compress.sparse.patterns import Pattern
from fedpress.core import parameters
from fedpress.errors import ModelError
from fedpress.nn.compact import compact_, expand_
from fedpress.privacy.per_example.gradients import METHODS, choose_method, clipped_gradient_sum
from tests.chance import generator


def sparse_network(density=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    chosen = find_weights(model).chosen
    scores = {w.name: w.value.detach().abs() for w in chosen}
    apply_masks_(
        chosen, masks_from_scores(chosen, scores, Pattern("unstructured"), density=density)
    )
    return model, [w.name for w in chosen]


X = torch.randn(4, 2, 6, 6, generator=generator(0, "x"))
Y = torch.arange(4) % 3


def test_a_compact_model_computes_the_same_with_fewer_parameters():
    model, names = sparse_network()
    plain = copy.deepcopy(model)
    compact_(model, names)
    zeros = sum(int((dict(plain.named_parameters())[n] == 0).sum()) for n in names)
    assert parameters.Layout.of(model).size == parameters.Layout.of(plain).size - zeros
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))


def test_expanding_gives_the_plain_model_back():
    model, names = sparse_network()
    plain = copy.deepcopy(model)
    expand_(compact_(model, names))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())


def test_the_gradient_is_that_of_the_kept_values_and_zeros_stay():
    model, names = sparse_network()
    plain = copy.deepcopy(model)
    compact_(model, names)
    for one in (model, plain):
        nn.functional.cross_entropy(one(X), Y).backward()
    masks = {n: dict(plain.named_parameters())[n].detach() != 0 for n in names}
    wanted = torch.cat([
        p.grad[masks[n]] if n in masks else p.grad.flatten() for n, p in plain.named_parameters()
    ])  # fmt: skip
    by_layer = {
        n.replace("parametrizations.weight.original", "weight"): p.grad
        for n, p in model.named_parameters()
    }
    got = torch.cat([by_layer[n].flatten() for n, _ in plain.named_parameters()])
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    expand_(model)
    for n, mask in masks.items():
        assert torch.equal(dict(model.named_parameters())[n] != 0, mask)


@pytest.mark.parametrize("method", METHODS)
def test_clipped_gradients_of_a_compact_model_are_those_of_the_plain_loop(method):
    model, names = sparse_network()
    compact_(model, names)
    loss = nn.functional.cross_entropy
    wanted, _ = clipped_gradient_sum(model, loss, X, Y, clip_norm=0.1)
    if method == "ghost":  # it has no rule for such a layer, and nobody may choose it
        assert choose_method(model, loss, X, Y) != "ghost"
        return
    got, _ = clipped_gradient_sum(model, loss, X, Y, clip_norm=0.1, method=method)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_frozen_weights_stay_as_they_are():
    model, names = sparse_network()
    model[2].weight.requires_grad_(False)
    before = model[2].weight
    compact_(model, names)
    assert model[2].weight is before


def test_a_shared_weight_stays_shared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    plain, x = copy.deepcopy(model), torch.ones(1, 4)
    compact_(model, ["0.weight"])
    assert parameters.Layout.of(model).size == 8 + 8
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    expand_(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, plain[0].weight)


def test_names_of_another_model_and_empty_weights_are_refused():
    model, _ = sparse_network()
    with pytest.raises(ModelError, match="no parameter 'x'"):
        compact_(model, ["x"])
    with torch.no_grad():
        model[4].weight.zero_()
    with pytest.raises(ModelError, match=r"'4\.weight' has no value left"):
        compact_(model, ["4.weight"])


def test_kept_entries_that_a_grid_rounds_to_zero_train_on():
    from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
    from fedpress.nn.quantized import kept_entries, materialize_, note_kept_zeros_, quantize_layers_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.GRUCell(10, 6))
    names = ["0.weight", "2.weight_hh"]
    with torch.no_grad():
        for name in names:
            p = dict(model.named_parameters())[name]
            p.masked_fill_(torch.rand_like(p) < 0.1, 0)
    wanted = kept_entries(model, names)
    quantize_layers_(
        model, dict.fromkeys(["0", "2"], QuantizationScheme(weights=WeightQuantization(bits=2)))
    )
    materialize_(model)
    assert note_kept_zeros_(model, wanted) == tuple(names)
    assert int((model[0].weight == 0).sum()) > 2 * int((~wanted["0.weight"]).sum())
    for name, mask in kept_entries(model, names).items():
        assert torch.equal(mask, wanted[name])
    values = {n: int(m.sum()) for n, m in wanted.items()}
    compact_(model, names)
    sizes = {n: p.numel() for n, p in model.named_parameters() if "parametrizations" in n}
    assert sorted(sizes.values()) == sorted(values.values())
    x, state = torch.randn(8, 20), torch.randn(8, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model[2](model[1](model[0](x)), state).square().sum().backward()
        optimizer.step()
    expand_(model)
    for name, mask in wanted.items():
        weight = dict(model.named_parameters())[name]
        assert not weight[~mask].any()
        assert int((weight[mask] != 0).sum()) > 0.9 * int(mask.sum())
