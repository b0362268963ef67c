from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.prune import custom_from_mask

from fedpress.compress import (
    SCORES,
    check_parity,
    plan,
    prune_single_channel,
    remove_,
    score,
    trace,
)
from fedpress.compress.prune.scores import raw_scores
from fedpress.errors import ModelError, RecipeError
from tests.chance import generator

LABELS = torch.tensor([0, 3])


def evidence(model, x):
    return {
        "losses": lambda: (F.cross_entropy(model(batch), LABELS) for batch in (x, x.flip(0), -x)),
        "generator": generator(0, "scores"),
    }


def by_name(graph, values, name):
    return next(v for layer, v in zip(graph.groups, values, strict=True) if layer.name == name)


@pytest.mark.recipe
@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_score_prunes_one_shot_and_one_by_one(traced, name):
    model, x, graph = traced("residual")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    more = evidence(model, x)
    scores = score(model, graph, name, **more)
    assert all(v.shape == (layer.channels,) for v, layer in zip(scores, graph.groups, strict=True))
    assert all(v.abs().mean() == pytest.approx(1, abs=1e-5) for v in scores)
    settings = {"keep_params": 0.4, "round_to": 1, "tolerance": 0.01}
    plans = [
        plan(model, graph, scores, **settings),
        prune_single_channel(model, graph, name, every=10, **settings, **more),
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
    torch.testing.assert_close(
        scale, (model.norm.weight.abs() + model.blocks[0].nb.weight.abs()).detach()
    )


def test_taylor_is_the_derivative_of_a_gate_on_the_channel(traced):
    model, x, graph = traced("plain")
    ours = by_name(
        graph, raw_scores(model, graph, "taylor", losses=evidence(model, x)["losses"]), "a"
    )
    gated, total = deepcopy(model).eval(), torch.zeros(16)
    for batch in (x, x.flip(0), -x):
        gate = torch.ones(16, requires_grad=True)
        hook = gated.b.register_forward_pre_hook(
            lambda _, args, g=gate: args[0] * g.view(1, -1, 1, 1)
        )
        total += torch.autograd.grad(F.cross_entropy(gated(batch), LABELS), gate)[0].abs()
        hook.remove()
    torch.testing.assert_close(ours, total / 3)


def gate_slopes(model, module, channels, loss):
    """The derivative of `loss(model)` by a gate on the input channels of `module`, straight from autograd."""
    gate = torch.ones(channels, requires_grad=True)
    hook = module.register_forward_pre_hook(lambda _, args: args[0] * gate.view(1, -1, 1, 1))
    (slope,) = torch.autograd.grad(loss(model), gate)
    hook.remove()
    return slope


def test_fisher_is_half_the_mean_square_of_a_gate_over_single_examples(traced):
    model, x, graph = traced("plain")
    gated = deepcopy(model).eval()
    slopes = [
        gate_slopes(
            gated, gated.b, 16, lambda m, i=i: F.cross_entropy(m(x[i : i + 1]), LABELS[i : i + 1])
        )
        for i in (0, 1)
    ]
    ours = raw_scores(
        model, graph, "fisher",
        losses=lambda: (F.cross_entropy(model(x[i : i + 1]), LABELS[i : i + 1]) for i in (0, 1)),
    )  # fmt: skip
    torch.testing.assert_close(by_name(graph, ours, "a"), sum(s.square() for s in slopes) / 4)


def test_obd_sums_the_squares_of_single_weights_in_a_slow_loop(traced):
    model, x, graph = traced("plain")
    ours = by_name(graph, raw_scores(model, graph, "obd", **evidence(model, x)), "a")
    slow = torch.zeros(16)
    for batch in (x, x.flip(0), -x):
        (g,) = torch.autograd.grad(F.cross_entropy(model.eval()(batch), LABELS), model.b.weight)
        for c in range(16):
            slow[c] += (
                sum(float(v) ** 2 for v in (model.b.weight * g).detach()[:, c].flatten()) / 2 / 3
            )
    torch.testing.assert_close(ours, slow)


def test_obd_foretells_the_loss_of_a_removal_where_the_hessian_is_diagonal():
    """Least squares with noise of variance 1, where the Fisher information is the Hessian: without the channel it is
    w^2 h^2 / 2 more, in the mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.Linear(6, 1, bias=False)).double()
    graph, x = trace(model, torch.randn(2, 3).double()), torch.randn(400, 3).double()
    hidden = model[0](x).detach()
    noise = torch.randn(400, 1).double()
    target = (
        hidden @ model[1].weight.detach().T + noise
    )  # Gauss-Newton: the Fisher is that of noise of variance 1

    def losses():
        return ((model(x[i]) - target[i]).square().sum() / 2 for i in range(400))

    whole = noise.square().mean() / 2
    rises = []
    for c in range(6):
        gone = (hidden[:, c] * model[1].weight[0, c]).detach()[:, None]
        rises.append(((noise + gone).square().mean() / 2 - whole - (noise * gone).mean()).item())
    assert raw_scores(model, graph, "obd", losses=losses)[0].tolist() == pytest.approx(
        rises, rel=0.35
    )


def test_geometric_median_sums_distances_in_a_slow_loop(traced):
    model, _, graph = traced("residual")
    ours = by_name(graph, raw_scores(model, graph, "fpgm"), "stem")
    rows = (
        torch.cat([model.stem.weight.flatten(1), model.blocks[0].b.weight.flatten(1)], 1)
        .detach()
        .double()
    )
    slow = [sum((a - b).square().sum().sqrt().item() for b in rows) for a in rows]
    assert ours.tolist() == pytest.approx(slow, rel=1e-6)


def test_geometric_median_takes_twins_first_however_large_they_are():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data = torch.tensor([[5.0, 5.0], [5.0, 5.0], [5.0, 5.1], [-1.0, 0.0]])
    graph = trace(model, torch.randn(2, 2))
    assert raw_scores(model, graph, "fpgm")[0].argmax() == 3
    assert raw_scores(model, graph, "l2")[0].argmin() == 3


def in_training(model):
    """A copy whose norms take the statistics of the batch."""
    twin = deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return twin


def test_snip_is_the_size_of_the_mean_slope_of_a_gate_at_initialisation(traced):
    model, x, graph = traced("plain")
    before = {n: b.clone() for n, b in model.named_buffers()}
    ours = by_name(graph, raw_scores(model, graph, "snip", **evidence(model, x)), "a")
    twin = in_training(model)
    slopes = [
        gate_slopes(twin, twin.b, 16, lambda m, b=b: F.cross_entropy(m(b), LABELS))
        for b in (x, x.flip(0), -x)
    ]
    torch.testing.assert_close(ours, (sum(slopes) / 3).abs())
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())


def test_grasp_is_the_change_of_the_gradient_flow_when_a_channel_shrinks():
    """The finite difference of |g|^2 / 2 as the weights that read the channel shrink, in double."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5)
    ).double()
    x = torch.randn(2, 6).double()
    graph = trace(model, x)
    reading = [s for layer in graph.groups for s in layer.slices_with_role("read")]
    owned = dict(model.named_parameters())
    weights = list({s.tensor: owned[s.tensor] for s in reading}.values())

    def flow():
        grads = torch.autograd.grad(F.cross_entropy(model(x), LABELS), weights)
        return sum(g.square().sum() for g in grads).item() / 2

    ours = raw_scores(model, graph, "grasp", losses=lambda: [F.cross_entropy(model(x), LABELS)])
    for layer, values in zip(graph.groups, ours, strict=True):
        (s,) = layer.slices_with_role("read")
        weight = owned[s.tensor]
        for c in range(0, layer.channels, 7):
            keep, sides = weight.detach().clone(), []
            for step in (1e-4, -1e-4):
                weight.data = keep.clone()
                weight.data.index_copy_(
                    s.axis, s.index[c], keep.index_select(s.axis, s.index[c]) * (1 + step)
                )
                sides.append(flow())
            weight.data = keep
            assert values[c].item() == pytest.approx(
                (sides[0] - sides[1]) / 2e-4, rel=1e-3, abs=1e-7
            )


def test_taylor_comes_nearer_to_the_truth_than_chance(traced):
    """Remove each channel alone and measure the loss: what a score is for."""
    model, x, graph = traced("plain")
    twin, losses = deepcopy(model).eval(), evidence(model, x)["losses"]

    def loss():
        with torch.no_grad():
            return sum(F.cross_entropy(twin(b), LABELS).item() for b in (x, x.flip(0), -x)) / 3

    base, rises, reader = loss(), [], twin.b.weight
    for c in range(16):
        kept = reader.data[:, c].clone()
        reader.data[:, c] = 0
        rises.append(abs(loss() - base))
        reader.data[:, c] = kept
    order = torch.tensor(rises)
    taylor = by_name(graph, raw_scores(model, graph, "taylor", losses=losses), "a")
    ranks = torch.stack([order.argsort().argsort(), taylor.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.5


@pytest.mark.parametrize(
    "normalise", [parametrizations.weight_norm, weight_norm], ids=["parametrization", "hook"]
)
def test_magnitudes_of_a_computed_weight_are_those_of_what_acts(normalise):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )
    x = torch.randn(2, 3, 8, 8)
    plain_graph = trace(model, x)
    computed = deepcopy(model)
    normalise(computed[0]), normalise(computed[2])
    direction = next(
        p for n, p in computed[0].named_parameters() if n.endswith(("original1", "weight_v"))
    )
    direction.data *= torch.linspace(1, 9, 8).view(
        8, 1, 1, 1
    )  # the direction's length means nothing
    graph = trace(computed, x)
    for name in ("l1", "l2", "fpgm"):
        for a, b in zip(
            raw_scores(model, plain_graph, name), raw_scores(computed, graph, name), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    losses = {"losses": lambda: [computed(x).logsumexp(1).mean()]}
    for name, row in SCORES.items():
        if row.needs == "losses":
            assert all(v.isfinite().all() for v in score(computed, graph, name, **losses))


def test_masked_weights_count_as_zero():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    mask = torch.ones(6, 4)
    mask[2] = 0
    custom_from_mask(model[0], "weight", mask)
    model[0].weight_orig.data[2] = 100
    graph = trace(model, torch.randn(2, 4))
    assert raw_scores(model, graph, "l1")[0].argmin() == 2
    assert raw_scores(model, graph, "l1")[0][2] == 0


def test_taylor_works_on_frozen_weights_and_leaves_them_frozen(traced):
    model, x, graph = traced("plain")
    frozen = deepcopy(model).train().requires_grad_(False)
    scores = raw_scores(frozen, graph, "taylor", losses=evidence(frozen, x)["losses"])
    for ours, theirs in zip(
        scores, raw_scores(model, graph, "taylor", **evidence(model, x)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())


def slow_single_channel(model, graph, target):
    """The plain twin: mask, count, score everything again, for each single channel."""
    alive = [torch.ones(layer.channels, dtype=torch.bool) for layer in graph.groups]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    gone = []
    while graph.parameters([int(a.sum()) for a in alive]) > target:
        best = None
        for i, layer in enumerate(graph.groups):
            sums = sum(
                weights[s.tensor].abs().transpose(0, s.axis).flatten(1).sum(1)[s.index].sum(1)
                for s in layer.slices_with_role("write")
            )
            for c, value in enumerate((sums / sums.mean()).tolist()):
                if alive[i][c] and alive[i].sum() > 1 and (best is None or value < best[0]):
                    best = (value, i, c)
        _, i, c = best
        alive[i][c] = False
        gone.append((i, c))
        for s in graph.groups[i].slices_with_role("read"):
            weights[s.tensor].index_fill_(s.axis, s.index[c], 0)
    return alive


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_single_channel_removes_what_its_slow_twin_removes(traced, name):
    model, _, graph = traced(name)
    settings = {"round_to": 1, "min_keep": 0.0, "tolerance": 0.05}
    choice = prune_single_channel(model, graph, "l1", keep_params=0.5, **settings)
    alive = slow_single_channel(model, graph, choice.parameters_after)
    for layer, on in zip(graph.groups, alive, strict=True):
        s = layer.slices_with_role("write")[0]
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
    with pytest.raises(RecipeError, match=r"every: got 0"):
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
