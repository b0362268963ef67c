import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpress.compress import check_parity, parameters, plan, remove_, score, trace
from fedpress.compress.prune.plan import make_plan
from fedpress.compress.sparse import find_weights
from fedpress.compress.sparse.l0 import (
    SMALLEST_GATE,
    DensityController,
    balance,
    channel_gates,
    expected_gate,
    open_probability,
    sample,
    weight_gates,
)
from fedpress.errors import ModelError
from fedpress.models.resnet import resnet_small
from tests.chance import generator


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def gates_for(model, **how):
    chosen = find_weights(model, keep_first=False, keep_last=False).chosen
    return chosen, weight_gates(chosen, generator=generator(0, "gates"), **how)


def channels(width=8):
    torch.manual_seed(1)
    model = resnet_small(width=width).eval()
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    return model, graph, channel_gates(model, graph, generator=generator(0, "gates"))


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 0.7, 3.0])
def test_the_probability_of_an_open_gate_is_what_counting_gives(log_alpha):
    u = torch.rand(200_000, generator=generator(0, "u"))
    share = float((sample(torch.tensor(log_alpha), u) > 0).float().mean())
    told = float(open_probability(torch.tensor(log_alpha)))
    assert abs(share - told) < 5 * math.sqrt(told * (1 - told) / 200_000) + 1e-6


@given(st.floats(-40, 40), st.floats(1e-7, 1 - 1e-6))
def test_gates_lie_between_0_and_1(log_alpha, u):
    a = torch.tensor(log_alpha, requires_grad=True)
    z = sample(a, torch.tensor(u))
    z.backward()
    assert 0 <= float(z.detach()) <= 1
    assert a.grad.isfinite()
    assert 0 <= float(expected_gate(a.detach())) <= 1
    assert 0 <= float(open_probability(a.detach())) <= 1


def test_a_gate_is_open_where_its_sample_is_above_0():
    """P(z > 0) = P(u > u0), with u0 where the stretched concrete variable crosses 0."""
    log_alpha = 0.3
    u0 = 1 / (1 + math.exp(log_alpha - (2 / 3) * math.log(0.1 / 1.1)))
    a = torch.tensor(log_alpha)
    assert float(sample(a, torch.tensor(u0 - 1e-4))) == 0
    assert float(sample(a, torch.tensor(u0 + 1e-4))) > 0
    assert float(open_probability(a)) == pytest.approx(1 - u0, rel=1e-6)


def test_the_expected_density_is_what_drawing_gives():
    model = network()
    chosen, gates = gates_for(model)
    with torch.no_grad():
        for a in gates.log_alphas:
            a.normal_(generator=generator(1, "alphas"))
    gates.generator = generator(0, "draw")
    total = sum(w.size for w in chosen)
    shares = [sum(int((f > 0).sum()) for f in gates.draw().values()) / total for _ in range(400)]
    spread = torch.tensor(shares).std() / 20
    assert abs(sum(shares) / 400 - float(gates.density().detach())) < 5 * float(spread)


def test_the_gradient_of_the_density_is_that_of_its_definition():
    _, gates = gates_for(network())
    gates.density().backward()
    for a in gates.log_alphas:
        p = open_probability(a.detach())
        torch.testing.assert_close(a.grad, p * (1 - p) / sum(a.numel() for a in gates.log_alphas))


def test_gates_leave_no_trace():
    model = network()
    names, before = [n for n, _ in model.named_parameters()], copy.deepcopy(model.state_dict())
    keys = set(model.__dict__)
    _, gates = gates_for(model)
    with gates.applied_to(model):
        model.train()(torch.ones(2, 6)).sum().backward()
        assert [n for n, _ in model.named_parameters()] == names
        assert all(isinstance(p, nn.Parameter) for p in model[0]._parameters.values())
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 5))
        assert all(isinstance(p, nn.Parameter) for p in model[0]._parameters.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert set(model.__dict__) == keys
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 6)), model(torch.ones(1, 6)))


def test_gates_in_training_are_those_drawn_and_get_their_gradient():
    model = network().train()
    chosen, gates = gates_for(model)
    x = torch.randn(5, 6, generator=generator(0, "x"))
    gates.generator = generator(3, "step")
    with gates.applied_to(model):
        loss = model(x).square().sum()
    loss.backward()
    gates.generator = generator(3, "step")
    twin = {w.name: w.value.detach() for w in chosen}
    alphas = [a.detach().clone().requires_grad_(True) for a in gates.log_alphas]
    uniform = [torch.rand(a.shape, generator=gates.generator) for a in alphas]
    values = {
        w.name: twin[w.name] * sample(a, u) for w, a, u in zip(chosen, alphas, uniform, strict=True)
    }
    wanted = torch.func.functional_call(model, values, (x,)).square().sum()
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for a, b in zip(gates.log_alphas, alphas, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_settled_gates_give_the_network_that_was_evaluated():
    model = network().eval()
    _, gates = gates_for(model)
    with torch.no_grad():
        for a in gates.log_alphas:
            a.uniform_(
                -1, 4, generator=generator(1, "alphas")
            )  # all open by more than SMALLEST_GATE
    assert all(float(expected_gate(a.detach()).min()) > SMALLEST_GATE for a in gates.log_alphas)
    x = torch.randn(5, 6, generator=generator(0, "x"))
    with gates.applied_to(model), torch.inference_mode():
        wanted = model(x)
    gates.materialize_(model)
    torch.testing.assert_close(model(x), wanted)


def test_an_earlier_mask_stays_closed_whatever_is_learned():
    model = network().train()
    chosen = find_weights(model, keep_first=False, keep_last=False).chosen
    within = {
        w.name: torch.rand(w.value.shape, generator=generator(0, w.name)) < 0.5 for w in chosen
    }
    gates = weight_gates(chosen, generator=generator(0, "gates"), within=within)
    optimizer = torch.optim.Adam(gates.parameters(), 1.0)
    for _ in range(5):
        with gates.applied_to(model):
            (model(torch.ones(2, 6)).sum() - gates.density()).backward()
        optimizer.step()
    factors = gates.draw()
    assert all(factors[name][~mask].eq(0).all() for name, mask in within.items())
    assert all(a.isfinite().all() for a in gates.log_alphas)


def test_a_shared_weight_has_one_gate_everywhere():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            assert self.one.weight is self.two.weight
            return self.two(self.one(x))

    model = Net().train()
    _, gates = gates_for(model)
    with gates.applied_to(model):
        gated = model(torch.ones(1, 4))
    assert model.one.weight is model.two.weight
    assert not torch.equal(gated, model(torch.ones(1, 4)))


def test_a_recurrent_layer_uses_its_gates():
    torch.manual_seed(0)
    model = nn.GRU(3, 4).eval()
    chosen, gates = gates_for(model)
    with torch.no_grad():
        for a in gates.log_alphas:
            a.fill_(-1e4)
    closed = copy.deepcopy(model)
    with torch.no_grad():
        for w in find_weights(closed, keep_first=False, keep_last=False).chosen:
            w.value.zero_()
    x = torch.randn(5, 2, 3, generator=generator(0, "x"))
    before = model(x)[0]
    with gates.applied_to(model):
        torch.testing.assert_close(model(x)[0], closed(x)[0])
    torch.testing.assert_close(model(x)[0], before)
    assert len(chosen) == 2


@pytest.mark.parametrize("name", ["classic", "dense", "separable", "gated", "vit-fused", "lstm"])
def test_closed_channels_are_absent_channels(traced, name):
    model, x, graph = traced(name)
    model = copy.deepcopy(model).eval()
    gates = channel_gates(model, graph, generator=generator(0, "gates"))
    scores = [
        torch.rand(layer.channels, generator=generator(0, layer.name)) for layer in graph.groups
    ]
    kept = [max(1, layer.channels // 2) for layer in graph.groups]
    with torch.no_grad():
        for a, s, n in zip(gates.log_alphas, scores, kept, strict=True):
            a.fill_(-1e4)
            a[s.argsort(descending=True)[:n]] = 1e4
    small = copy.deepcopy(model)
    remove_(small, make_plan(model, graph, scores, kept))
    with gates.applied_to(model), torch.no_grad():
        torch.testing.assert_close(model(x), small(x), rtol=1e-4, atol=1e-5)
    assert float(gates.density().detach()) == pytest.approx(
        parameters(small) / parameters(model), rel=1e-5
    )


def test_a_channel_gate_scales_what_is_read_whatever_norm_comes_before():
    model, graph, gates = channels()
    with torch.no_grad():
        for a in gates.log_alphas:
            a.uniform_(-1, 1, generator=generator(0, "alphas"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gates.materialize_(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    read = {s.tensor for layer in graph.groups for s in layer.slices_with_role("read")}
    assert changed == read
    assert all("weight" in n for n in changed)


@pytest.mark.recipe
def test_settled_channels_are_removed_without_a_change():
    model, graph, gates = channels()
    with torch.no_grad():
        for a in gates.log_alphas:
            a.uniform_(-3, 3, generator=generator(0, "alphas"))
    gates.materialize_(model)
    scores = [open_probability(a.detach()) for a in gates.log_alphas]
    cut = plan(model, graph, scores, keep_params=0.4, round_to=1)
    small = copy.deepcopy(model)
    remove_(small, cut)
    assert check_parity(model, small, cut, torch.zeros(2, 3, 8, 8)) < 1e-5
    assert parameters(small) == cut.parameters_after


@pytest.mark.recipe
def test_the_expected_parameters_of_channels_are_what_drawing_gives():
    _, graph, gates = channels()
    with torch.no_grad():
        for a in gates.log_alphas:
            a.normal_(generator=generator(2, "alphas"))
    chance, total = (
        generator(0, "draw"),
        graph.parameters([layer.channels for layer in graph.groups]),
    )
    shares = []
    for _ in range(400):
        open_ = [
            int((sample(a.detach(), torch.rand(a.shape, generator=chance)) > 0).sum())
            for a in gates.log_alphas
        ]
        shares.append(graph.parameters(open_) / total)
    spread = float(torch.tensor(shares).std()) / 20
    assert abs(sum(shares) / 400 - float(gates.density().detach())) < 5 * spread


def test_a_model_without_channels_is_told_to_use_weights():
    model = nn.Linear(3, 2)
    with pytest.raises(ModelError, match="unit = 'weights'"):
        channel_gates(model, trace(model, torch.zeros(2, 3)), generator=generator(0, "gates"))


def test_balance_is_where_both_pull_alike():
    model = network().train()
    _, gates = gates_for(model)
    gates.generator = generator(0, "step")
    with gates.applied_to(model):
        logits = model(torch.randn(8, 6, generator=generator(0, "x")))
    loss, density = F.cross_entropy(logits, torch.arange(8) % 3), gates.density()
    lambda_ = balance(loss, density, gates)
    pulls = []
    for value in (loss, lambda_ * density):
        pulls.append(
            sum(
                g.abs().sum()
                for g in torch.autograd.grad(value, list(gates.log_alphas), retain_graph=True)
            )
        )
    assert float(pulls[0]) == pytest.approx(float(pulls[1]), rel=1e-5)


@pytest.mark.recipe
@pytest.mark.parametrize("wanted", [0.5, 0.1])
def test_the_controller_leads_a_network_to_the_wanted_density(wanted):
    model = network().train()
    x = torch.randn(64, 6, generator=generator(0, "x"))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    _, gates = gates_for(model)
    gates.generator = generator(0, "steps")
    steps, controller = 300, None
    weights_ = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    optimizer = torch.optim.Adam(gates.parameters(), 20 / (0.6 * steps), (0.9, 0.99), 1e-16)
    with gates.applied_to(model):
        for step in range(steps):
            loss, density = F.cross_entropy(model(x), y), gates.density()
            controller = controller or DensityController(balance(loss, density, gates))
            target = wanted ** min(1, step / (0.6 * steps))
            (loss + controller.step_(float(density.detach()), target) * density).backward()
            for one in (weights_, optimizer):
                one.step()
                one.zero_grad()
    assert float(gates.density().detach()) == pytest.approx(wanted, abs=0.01)
    with gates.applied_to(model), torch.no_grad():
        assert float((model.eval()(x).argmax(1) == y).float().mean()) > 0.8


def test_scores_of_channels_are_unchanged_by_gates_that_are_off():
    model, graph, gates = channels()
    before = score(model, graph, "l1")
    with gates.applied_to(model):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, score(model, graph, "l1"), strict=True))
