from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from fedpress.compress import SCORES, check_parity, plan, prune_single_channel, remove_, score
from fedpress.compress.scores import raw_scores
from fedpress.errors import ModelError, RecipeError
from fedpress.seeds import generator

LABELS = torch.tensor([0, 3])


def evidence(model, x):
    return {
        "losses": lambda: (F.cross_entropy(model(batch), LABELS) for batch in (x, x.flip(0), -x)),
        "generator": generator(0, "scores"),
    }


def by_name(graph, values, name):
    return next(v for layer, v in zip(graph.layers, values, strict=True) if layer.name == name)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_score_prunes_one_shot_and_one_by_one(traced, name):
    model, x, graph = traced("residual")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    more = evidence(model, x)
    scores = score(model, graph, name, **more)
    assert all(v.shape == (layer.channels,) for v, layer in zip(scores, graph.layers, strict=True))
    assert all(v.abs().mean() == pytest.approx(1, abs=1e-5) for v in scores)
    settings = {"keep_params": 0.4, "round_to": 1, "tolerance": 0.01}
    plans = [
        plan(model, graph, scores, **settings),
        prune_single_channel(model, graph, name, every=5, **settings, **more),
    ]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for choice in plans:
        small = deepcopy(model)
        remove_(small, choice)
        assert abs(choice.parameters_after / choice.parameters_before - 0.4) <= 0.01
        assert check_parity(model, small, choice, x) <= 1e-5


def test_magnitudes_sum_all_weights_that_write_the_channel(traced):
    model, _, graph = traced("residual")
    weights = [model.stem.weight, model.blocks[0].b.weight]
    l1, l2 = (by_name(graph, raw_scores(model, graph, name), "stem") for name in ("l1", "l2"))
    torch.testing.assert_close(l1, sum(w.detach().abs().sum((1, 2, 3)) for w in weights))
    torch.testing.assert_close(l2, sum(w.detach().square().sum((1, 2, 3)) for w in weights).sqrt())
    scale = by_name(graph, raw_scores(model, graph, "bn_scale"), "stem")
    torch.testing.assert_close(scale, (model.norm.weight.abs() + model.blocks[0].nb.weight.abs()).detach())


def test_taylor_is_the_derivative_of_a_gate_on_the_channel(traced):
    model, x, graph = traced("plain")
    ours = by_name(graph, raw_scores(model, graph, "taylor", losses=evidence(model, x)["losses"]), "a")
    gated, total = deepcopy(model).eval(), torch.zeros(16)
    for batch in (x, x.flip(0), -x):
        gate = torch.ones(16, requires_grad=True)
        hook = gated.b.register_forward_pre_hook(lambda _, args, g=gate: args[0] * g.view(1, -1, 1, 1))
        total += torch.autograd.grad(F.cross_entropy(gated(batch), LABELS), gate)[0].abs()
        hook.remove()
    torch.testing.assert_close(ours, total / 3)


def test_taylor_works_on_frozen_weights_and_leaves_them_frozen(traced):
    model, x, graph = traced("plain")
    frozen = deepcopy(model).train().requires_grad_(False)
    scores = raw_scores(frozen, graph, "taylor", losses=evidence(frozen, x)["losses"])
    for ours, theirs in zip(scores, raw_scores(model, graph, "taylor", **evidence(model, x)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())


def slow_single_channel(model, graph, target):
    """The plain twin: mask, count, score everything again, for each single channel."""
    alive = [torch.ones(layer.channels, dtype=torch.bool) for layer in graph.layers]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    gone = []
    while graph.parameters([int(a.sum()) for a in alive]) > target:
        best = None
        for i, layer in enumerate(graph.layers):
            sums = sum(
                weights[s.tensor].abs().transpose(0, s.axis).flatten(1).sum(1)[s.index].sum(1)
                for s in layer.role("write")
            )
            for c, value in enumerate((sums / sums.mean()).tolist()):
                if alive[i][c] and alive[i].sum() > 1 and (best is None or value < best[0]):
                    best = (value, i, c)
        _, i, c = best
        alive[i][c] = False
        gone.append((i, c))
        for s in graph.layers[i].role("read"):
            weights[s.tensor].index_fill_(s.axis, s.index[c], 0)
    return alive


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_single_channel_removes_what_its_slow_twin_removes(traced, name):
    model, _, graph = traced(name)
    settings = {"round_to": 1, "min_keep": 0.0, "tolerance": 0.05}
    choice = prune_single_channel(model, graph, "l1", keep_params=0.5, **settings)
    alive = slow_single_channel(model, graph, choice.parameters_after)
    for layer, on in zip(graph.layers, alive, strict=True):
        s = layer.role("write")[0]
        kept = choice.keep[s.tensor][s.axis]
        difference = set(kept) ^ set(on.nonzero().flatten().tolist())
        assert len(difference) <= 1, "only the last corrections may differ"


def test_what_a_score_lacks_is_named(traced):
    model, _, graph = traced("flat")
    with pytest.raises(RecipeError, match=r"no such score 'tailor'; did you mean 'taylor'\?"):
        score(model, graph, "tailor")
    with pytest.raises(ModelError, match="needs `losses`"):
        score(model, graph, "taylor")
    with pytest.raises(ModelError, match="no batches"):
        score(model, graph, "taylor", losses=lambda: [])
    with pytest.raises(ModelError, match="needs a batch norm after 'a'"):
        score(model, graph, "bn_scale")
    with pytest.raises(ModelError, match="needs a `generator`"):
        score(model, graph, "random")
    with pytest.raises(RecipeError, match=r"prune\.every: got 0"):
        prune_single_channel(model, graph, "l1", every=0)
    broken = deepcopy(model)
    broken.b.weight.data[3, 0] = float("nan")
    for prune in (score, prune_single_channel):
        with pytest.raises(ModelError, match="'l2' of 'b' is not finite"):
            prune(broken, graph, "l2")


def test_scores_of_zero_weights_are_zero_and_equal_scores_keep_the_first(traced):
    model, _, graph = traced("mlp")
    empty = deepcopy(model)
    with torch.no_grad():
        for p in empty.parameters():
            p.zero_()
    scores = score(empty, graph, "l1")
    assert all(v.eq(0).all() for v in scores)
    choice = plan(empty, graph, scores, keep_params=0.5, tolerance=0.05)
    assert choice.keep["1.weight"][0] == tuple(range(len(choice.keep["1.weight"][0])))
