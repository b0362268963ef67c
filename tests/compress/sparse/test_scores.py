import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpress.compress.prune.derivatives import differentiable
from fedpress.compress.sparse import (
    WEIGHT_SCORES,
    Movement,
    Weight,
    WeightScoreInputs,
    find_weights,
    score_weights,
)
from fedpress.compress.sparse.scores import gradients
from fedpress.errors import ModelError, RecipeError
from tests.chance import generator


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


X = torch.randn(12, 2, 4, 4, generator=generator(0, "x"))
Y = torch.randint(0, 3, (12,), generator=generator(0, "y"))


def evidence(model, batch=4, **more):
    chosen = find_weights(model, keep_first=False, keep_last=False).chosen

    def losses():
        return (
            F.cross_entropy(model(x), y)
            for x, y in zip(X.split(batch), Y.split(batch), strict=True)
        )

    return WeightScoreInputs(model, chosen, losses, generator(0, "random"), **more)


def plain_gradients(model, batch, *, train=False):
    """The gradient of each batch, by backward(), by name."""
    out = []
    for x, y in zip(X.split(batch), Y.split(batch), strict=True):
        model.zero_grad()
        model.train(train)
        F.cross_entropy(model(x), y).backward()
        out.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    return out


def assert_close(found, wanted):
    for name in found:
        torch.testing.assert_close(
            found[name].double(), wanted[name].double(), rtol=1e-4, atol=1e-7
        )


def test_magnitude_is_the_absolute_value():
    model = network()
    assert_close(
        score_weights("magnitude", evidence(model)),
        {n: p.abs() for n, p in model.named_parameters()},
    )


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.integers(0, 3))
def test_lamp_is_what_two_loops_give(values, seed):
    one = Weight("w", nn.Parameter(torch.tensor([values])))
    found = score_weights("lamp", WeightScoreInputs(nn.Module(), [one]))["w"].flatten()
    order = sorted(
        range(len(values)), key=lambda i: torch.tensor(values[i]).double().square().item()
    )
    squares = one.value.detach().double().square().flatten().tolist()
    for place, i in enumerate(order):
        rest = sum(squares[j] for j in order[place:])
        assert float(found[i]) == pytest.approx(
            squares[i] / rest if rest > 1e-300 else 0.0, rel=1e-9, abs=1e-12
        )


def test_the_largest_weight_of_each_layer_has_a_lamp_score_of_one():
    scores = score_weights("lamp", evidence(network()))
    assert all(float(s.max()) == pytest.approx(1) for s in scores.values())


def test_taylor_is_the_mean_effect_of_the_batches():
    model = network()
    batches = plain_gradients(model, 4)
    wanted = {
        n: torch.stack([(p.detach() * g[n]).abs() for g in batches]).mean(0)
        for n, p in model.named_parameters()
    }
    assert_close(score_weights("taylor", evidence(model)), wanted)


def test_taylor_tells_how_the_loss_changes_without_a_small_weight():
    model = network().double().eval()
    layer = model[4]
    with torch.no_grad():
        layer.weight[2, 3] = 1e-4
    evidence = WeightScoreInputs(
        model, [Weight("4.weight", layer.weight)], lambda: [F.cross_entropy(model(X.double()), Y)]
    )
    told = float(score_weights("taylor", evidence)["4.weight"][2, 3])
    before = float(F.cross_entropy(model(X.double()), Y).detach())
    with torch.no_grad():
        layer.weight[2, 3] = 0
    assert told == pytest.approx(
        abs(float(F.cross_entropy(model(X.double()), Y).detach()) - before), rel=1e-3
    )


def test_fisher_is_the_mean_square_of_single_gradients():
    model = network()
    batches = plain_gradients(model, 1)
    wanted = {
        n: p.detach().square() * torch.stack([g[n].square() for g in batches]).mean(0) / 2
        for n, p in model.named_parameters()
    }
    assert_close(score_weights("fisher", evidence(model, batch=1)), wanted)


def test_fisher_of_a_linear_model_is_that_of_the_closed_form():
    layer = nn.Linear(3, 1, bias=False)
    x, y = (
        torch.randn(20, 3, generator=generator(0, "x")),
        torch.randn(20, generator=generator(0, "y")),
    )
    evidence = WeightScoreInputs(
        layer,
        [Weight("weight", layer.weight)],
        lambda: ((layer(a[None]).squeeze() - b).square() / 2 for a, b in zip(x, y, strict=True)),
    )
    errors = (x @ layer.weight.detach()[0] - y)[:, None]
    wanted = layer.weight.detach().square() * (errors * x).square().mean(0) / 2
    torch.testing.assert_close(score_weights("fisher", evidence)["weight"], wanted)


def test_snip_is_the_effect_of_the_mean_gradient_in_training_mode():
    model = network()
    batches = plain_gradients(model, 4, train=True)
    wanted = {
        n: (p.detach() * torch.stack([g[n] for g in batches]).mean(0)).abs()
        for n, p in model.named_parameters()
    }
    assert_close(score_weights("snip", evidence(model)), wanted)


def test_snip_is_the_derivative_by_a_gate_on_each_weight():
    model = network()
    with differentiable(model, (), batch_statistics=True):
        gates = {
            n: torch.ones_like(p, requires_grad=True)
            for n, p in model.named_parameters()
            if p.dim() > 1
        }
        values = {
            n: p.detach() * gates[n] if n in gates else p for n, p in model.named_parameters()
        }
        F.cross_entropy(torch.func.functional_call(model, values, (X,)), Y).backward()
    assert_close(
        score_weights("snip", evidence(model, batch=12)),
        {n: g.grad.abs() for n, g in gates.items()},
    )


def test_grasp_of_a_square_is_the_closed_form():
    """L = w'Aw/2 has gradient Aw and Hessian A: the flow w'AAw loses -w A(Aw) to first order in each entry."""
    half = torch.randn(4, 4, generator=generator(0, "a"))
    a = half + half.T
    module = nn.Linear(4, 1, bias=False)
    evidence = WeightScoreInputs(
        module,
        [Weight("weight", module.weight)],
        lambda: [(module.weight @ a @ module.weight.T).squeeze() / 2],
    )
    w = module.weight.detach()
    torch.testing.assert_close(score_weights("grasp", evidence)["weight"], w * (w @ a @ a))


def test_grasp_is_the_slope_of_the_gradient_norm():
    model = network().double()
    layer, name = model[4], "4.weight"
    evidence = evidence_of_all(model, name)
    told = score_weights("grasp", evidence)[name][1, 2]

    def flow():
        with differentiable(model, (), batch_statistics=True):
            loss = F.cross_entropy(model(X.double()), Y)
        return torch.autograd.grad(loss, layer.weight)[0].square().sum() / 2

    w, step = float(layer.weight.detach()[1, 2]), 1e-5
    with torch.no_grad():
        layer.weight[1, 2] = w * (1 + step)
    up = flow()
    with torch.no_grad():
        layer.weight[1, 2] = w * (1 - step)
    assert float(told) == pytest.approx(float((up - flow()) / (2 * step)), rel=1e-4)


def evidence_of_all(model, name):
    weight = dict(model.named_parameters())[name]
    return WeightScoreInputs(
        model, [Weight(name, weight)], lambda: [F.cross_entropy(model(X.double()), Y)]
    )


def test_grasp_of_a_loss_without_curvature_is_zero():
    layer = nn.Linear(3, 1, bias=False)
    evidence = WeightScoreInputs(
        layer, [Weight("weight", layer.weight)], lambda: [layer(torch.ones(3)).sum()]
    )
    assert score_weights("grasp", evidence)["weight"].eq(0).all()


def test_movement_sums_what_plain_steps_give():
    model = network()
    chosen = find_weights(model, keep_first=False, keep_last=False).chosen
    watch, wanted = Movement(chosen), {w.name: torch.zeros_like(w.value) for w in chosen}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch.recording():
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            F.cross_entropy(model(x), y).backward()
            for w in chosen:
                wanted[w.name] -= w.value.detach() * w.value.grad
            optimizer.step()
            optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()  # nobody watches any more
    found = score_weights("movement", WeightScoreInputs(model, chosen, moved=watch.sums))
    for name in wanted:
        assert torch.equal(found[name], wanted[name])


def test_random_scores_are_those_of_the_generator():
    one, two = (score_weights("random", evidence(network())) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(0 <= s.min() <= s.max() < 1 for s in one.values())


@pytest.mark.parametrize("name", sorted(WEIGHT_SCORES))
def test_scoring_leaves_the_model_as_it_was(name):
    model = network().train()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    moved = {w.name: torch.zeros_like(w.value) for w in evidence(model).weights}
    scores = score_weights(name, evidence(model, moved=moved))
    assert all(s.shape == dict(model.named_parameters())[n].shape for n, s in scores.items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["taylor", "fisher", "snip", "grasp"])
def test_a_score_without_what_it_looks_at_says_so(name):
    model = network()
    chosen = find_weights(model).chosen
    with pytest.raises(ModelError, match="losses"):
        score_weights(name, WeightScoreInputs(model, chosen))
    with pytest.raises(ModelError, match="no batches"):
        score_weights(name, WeightScoreInputs(model, chosen, list))


@pytest.mark.parametrize(
    ("name", "missing"), [("random", "generator"), ("movement", "schedule 'gradual'")]
)
def test_random_and_movement_say_what_they_need(name, missing):
    model = network()
    with pytest.raises(ModelError, match=missing):
        score_weights(name, WeightScoreInputs(model, find_weights(model).chosen))


def test_an_unknown_score_is_met_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'magnitude'"):
        score_weights("magnitud", WeightScoreInputs(nn.Module(), []))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(bad):
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = bad
    with pytest.raises(ModelError, match=r"4\.weight"):
        score_weights("magnitude", evidence(model))


def test_gradients_are_the_mean_of_the_losses():
    model = network().eval()
    chosen = evidence(model).weights
    found = gradients(evidence(model, batch=4).losses(), chosen)
    batches = plain_gradients(model, 4)
    assert_close(found, {w.name: torch.stack([g[w.name] for g in batches]).mean(0) for w in chosen})
