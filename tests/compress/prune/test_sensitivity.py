from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpress.compress import (
    SensitivityPoint,
    channel_units,
    check_parity,
    macs_target,
    mask_,
    parameter_target,
    plan,
    remove_,
    score,
    sensitivity,
    weight_unit,
)
from fedpress.compress.prune.plan import make_plan
from fedpress.compress.prune.sensitivity import SensitivityUnit, growth_by_channel, loss_curves
from fedpress.errors import ModelError, RecipeError


def measure_of(model, x):
    labels = torch.arange(len(x)) % 5

    def measure():
        with torch.no_grad():
            logits = model.eval()(x)
        return F.cross_entropy(logits, labels).item(), (
            logits.argmax(1) == labels
        ).float().mean().item()

    return measure


@pytest.mark.parametrize("name", ["plain", "residual", "waves"])
def test_each_point_is_the_loss_of_a_copy_with_that_layer_masked(traced, name):
    model, x, graph = traced(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    scores = score(model, graph, "l1")
    points = list(
        sensitivity(channel_units(model, graph, scores), measure_of(model, x), (0.25, 0.6))
    )
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [(p.layer, p.density) for p in points] == [
        (la.name, d) for la in graph.groups for d in (1.0, 0.6, 0.25)
    ]
    for point in points:
        widths = [
            max(1, round(point.density * la.channels)) if la.name == point.layer else la.channels
            for la in graph.groups
        ]
        copy = deepcopy(model)
        mask_(copy, make_plan(model, graph, scores, widths))
        assert (point.loss, point.score) == measure_of(copy, x)()


def test_a_tensor_that_one_layer_touches_along_two_axes_comes_back(traced):
    model, _, graph = traced("waves")
    assert any(
        len({s.tensor for s in la.slices}) < len(la.slices) for la in graph.groups
    )  # its tied weight
    before = deepcopy(model.state_dict())
    for unit in channel_units(model, graph, score(model, graph, "l2")):
        with unit.at_density(0.1):
            assert any(not torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_tensors_come_back_also_after_an_error(traced):
    model, _, graph = traced("plain")
    before = deepcopy(model.state_dict())
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the machine is on fire")
        return 1.0, None

    with pytest.raises(RuntimeError, match="on fire"):
        list(sensitivity(channel_units(model, graph, score(model, graph, "l1")), breaks))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_known_points_are_not_measured_again(traced):
    model, x, graph = traced("plain")
    units, measure = channel_units(model, graph, score(model, graph, "l1")), measure_of(model, x)
    whole = list(sensitivity(units, measure, (0.5,)))
    again = []

    def counting():
        again.append(1)
        return measure()

    assert list(sensitivity(units, counting, (0.5,), known=whole[:3])) == whole
    assert len(again) == 1


def test_weights_can_be_pruned_entry_by_entry():
    torch.manual_seed(0)
    model = nn.Linear(5, 8)
    unit = weight_unit("weight", model.weight, model.weight.detach().abs())
    before = model.weight.detach().clone()
    with unit.at_density(0.25):
        assert int(model.weight.count_nonzero()) == 10
        assert (
            model.weight.abs()[model.weight != 0].min()
            >= before.abs().flatten().topk(10).values.min()
        )
    assert torch.equal(model.weight, before)
    (one, half) = sensitivity(
        [unit], lambda: (float(model.weight.detach().abs().sum()), None), (0.5,)
    )
    assert one.density == 1
    assert half.loss < one.loss


def test_wrong_densities_and_a_broken_model_are_refused(traced):
    model, _, graph = traced("plain")
    units = channel_units(model, graph, score(model, graph, "l1"))
    for densities in ((0.5, 0.0), (1.0,), (float("nan"),), ()):
        with pytest.raises(RecipeError, match=r"densities: got"):
            list(sensitivity(units, lambda: (1.0, None), densities))
    with pytest.raises(ModelError, match="loss of the whole model is not finite"):
        list(sensitivity(units, lambda: (float("nan"), None)))


losses = st.lists(
    st.floats(0, 10) | st.just(float("nan")) | st.just(float("inf")), min_size=4, max_size=4
)


@given(lines=st.lists(losses, min_size=1, max_size=4), base=st.floats(0.1, 3))
def test_curves_never_fall_as_density_falls_and_begin_at_nothing(lines, base):
    points = [SensitivityPoint(str(i), 1.0, base) for i in range(len(lines))]
    points += [
        SensitivityPoint(str(i), d, v)
        for i, line in enumerate(lines)
        for d, v in zip((0.2, 0.4, 0.6, 0.8), line, strict=True)
    ]
    for density, height in loss_curves(points).values():
        assert density == sorted(density)
        assert height == sorted(height, reverse=True)
        assert height[-1] == 0
        assert all(0 <= h < float("inf") for h in height)


def falling(graph, steepness):
    """Made-up curves: the loss of layer i grows as steepness[i] * (1 - density)^2."""
    return [
        SensitivityPoint(layer.name, d, 1 + s * (1 - d) ** 2)
        for layer, s in zip(graph.groups, steepness, strict=True)
        for d in (1.0, 0.8, 0.6, 0.4, 0.2)
    ]


@pytest.mark.parametrize("make", [parameter_target, macs_target])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_widths_are_those_of_a_slow_search_for_the_water_level(traced, make, share):
    """The twin: raise the level in small steps, give each layer its least width, stop at the target."""
    model, _, graph = traced("residual")
    scores = score(model, graph, "l1")
    points = falling(graph, [0.2 + i for i in range(len(graph.groups))])
    known, target = loss_curves(points), make(graph, share)

    def increase(name, density):
        xs, ys = known[name]
        most = max(heights[0] for _, heights in known.values())
        xs, ys = [0.0, *xs], [max(most, ys[0] + (ys[0] - ys[1]) / (xs[1] - xs[0]) * xs[0]), *ys]
        i = next(i for i in range(1, len(xs)) if density <= xs[i])
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (density - xs[i - 1]) / (xs[i] - xs[i - 1])

    level, widths = 0.0, [la.channels for la in graph.groups]
    while target.cost(widths) > target.wanted:
        level += 0.002
        widths = [
            min(
                (
                    n
                    for n in range(1, la.channels + 1)
                    if increase(la.name, n / la.channels) <= level
                ),
                default=la.channels,
            )
            for la in graph.groups
        ]
        widths = [max(n, -(-la.channels // 10)) for n, la in zip(widths, graph.groups, strict=True)]
    choice = plan(
        model, graph, scores, target=target, scope="sensitivity", points=points, round_to=1
    )
    for change, layer, n in zip(choice.layers, graph.groups, widths, strict=True):
        assert abs(change.after // layer.unit - n) <= 1, layer.name


def test_sensitive_layers_keep_more_and_the_best_channels_stay(traced):
    model, x, graph = traced("plain")
    scores = score(model, graph, "l1")
    shares = []
    for steepness in ([0.1, 5.0], [5.0, 0.1]):
        points = falling(graph, steepness)
        choice = plan(model, graph, scores, keep_params=0.5, scope="sensitivity", points=points, round_to=1,
                      tolerance=0.03)  # fmt: skip
        shares.append([c.after / c.before for c in choice.layers])
        small = deepcopy(model)
        remove_(small, choice)
        assert check_parity(model, small, choice, x) <= 1e-5
        kept = choice.keep["a.weight"][0]
        assert set(kept) == set(scores[0].topk(len(kept)).indices.tolist())
    assert shares[0][0] < shares[0][1]
    assert shares[1][0] > shares[1][1]


def test_levels_rise_with_the_scores_also_where_curves_are_flat(traced):
    _, _, graph = traced("plain")
    scores = [
        torch.rand(la.channels, generator=torch.Generator().manual_seed(1)) for la in graph.groups
    ]
    for steepness in ([0.0, 0.0], [1.0, 0.0]):
        for level, values in zip(
            growth_by_channel(graph, scores, falling(graph, steepness)), scores, strict=True
        ):
            assert torch.equal(level.argsort(), values.argsort())
            assert len(level.unique()) == len(level)


def test_layers_that_were_not_measured_are_named(traced):
    model, _, graph = traced("plain")
    scores = score(model, graph, "l1")
    points = falling(graph, [1.0, 1.0])
    with pytest.raises(RecipeError, match="sensitivity of 'b' was not measured"):
        plan(model, graph, scores, scope="sensitivity", points=points[:5])
    with pytest.raises(RecipeError, match="'a' has no point at density 1"):
        plan(model, graph, scores, scope="sensitivity", points=points[1:])


def test_a_unit_is_anything_with_a_context():
    from contextlib import contextmanager

    dial = [1.0]

    @contextmanager
    def at_density(density):
        dial[0] = density
        yield
        dial[0] = 1.0

    assert [
        p.loss
        for p in sensitivity(
            [SensitivityUnit("dial", at_density)], lambda: (2 - dial[0], None), (0.5, 0.25)
        )
    ] == [
        1,
        1.5,
        1.75,
    ]
