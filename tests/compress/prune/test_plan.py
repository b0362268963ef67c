import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpress.compress import ChannelGraph, PruningPlan, plan, score, trace
from fedpress.compress.prune.graph import ChannelGroup, ChannelSlice
from fedpress.compress.prune.plan import allowed_widths
from fedpress.errors import ModelError, RecipeError
from fedpress.models.resnet import resnet18


@pytest.fixture(scope="module")
def big():
    torch.manual_seed(0)
    model = resnet18()
    graph = trace(model, torch.randn(2, 3, 32, 32))
    return model, graph, score(model, graph, "l2")


@pytest.mark.parametrize("share", [1.0, 0.7, 0.3, 0.1])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_resnet18_meets_the_share_within_half_a_point_in_multiples_of_eight(big, share, scope):
    model, graph, scores = big
    choice = plan(model, graph, scores, keep_params=share, scope=scope)
    assert choice.parameters_before == 11_173_962
    assert abs(choice.parameters_after / choice.parameters_before - share) <= 0.005
    assert all(layer.after % 8 == 0 and 0 < layer.after <= layer.before for layer in choice.layers)
    if share == 1.0:
        assert not choice.keep


@pytest.mark.recipe
@pytest.mark.parametrize("share", [0.6, 0.5, 0.4, 0.3])
def test_coarse_widths_of_a_small_network_still_meet_the_share(traced, share):
    model, _, graph = traced("residual")
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        scores = [torch.rand(layer.channels, generator=draw) for layer in graph.groups]
        choice = plan(model, graph, scores, keep_params=share, round_to=4)
        assert abs(choice.parameters_after / choice.parameters_before - share) <= 0.005


def test_the_channels_with_the_highest_scores_stay(traced):
    model, _, graph = traced("plain")
    scores = score(model, graph, "l1")
    choice = plan(model, graph, scores, keep_params=0.5, tolerance=0.05)
    kept = choice.keep["a.weight"][0]
    assert set(kept) == set(scores[0].topk(len(kept)).indices.tolist())
    assert choice.keep["b.weight"][1] == kept == choice.keep["na.running_var"][0]


def test_per_layer_scope_takes_the_same_share_of_each_layer(big):
    model, graph, scores = big
    choice = plan(model, graph, scores, keep_params=0.25, scope="layer")
    shares = [layer.after / layer.before for layer in choice.layers]
    assert all(abs(share - 0.5) <= 0.1 for share in shares)


@given(
    channels=st.integers(1, 600),
    unit=st.sampled_from([1, 2, 3, 4, 8, 16]),
    round_to=st.integers(1, 64),
    least=st.floats(0, 1),
)
def test_allowed_widths_are_whole_or_rounded_and_never_zero(channels, unit, round_to, least):
    index = torch.arange(channels * unit).view(channels, unit)
    widths = allowed_widths(
        ChannelGroup("a", (ChannelSlice("a.weight", 0, "write", index),)), round_to, least
    )
    assert widths[-1] == channels
    assert widths[0] >= max(1, least * channels)
    assert all(width * unit % round_to == 0 for width in widths[:-1])
    assert widths[0] >= min(channels, -(-round_to // unit))


@pytest.mark.parametrize("share", [0.0, -0.3, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(traced, share):
    model, _, graph = traced("plain")
    with pytest.raises(RecipeError, match=r"^keep_params: got .* try 0\.3"):
        plan(model, graph, score(model, graph, "l1"), keep_params=share)


def test_a_share_that_cannot_be_reached_names_the_smallest(traced):
    model, _, graph = traced("plain")
    scores = score(model, graph, "l1")
    with pytest.raises(RecipeError, match="the smallest share of this model is") as caught:
        plan(model, graph, scores, keep_params=0.01)
    least = float(str(caught.value).split("model is ")[1].split()[0])
    choice = plan(model, graph, scores, keep_params=least)
    assert choice.parameters_after / choice.parameters_before == pytest.approx(least, abs=1e-4)
    assert all(layer.after == 8 for layer in choice.layers)


def test_of_a_share_between_two_steps_the_nearest_is_taken_and_told(traced):
    model, _, graph = traced("mlp")
    scores = score(model, graph, "l1")
    choice = plan(model, graph, scores, keep_params=0.9, round_to=16, tolerance=1e-4)
    reached = choice.parameters_after / choice.parameters_before
    widths = [allowed_widths(layer, 16, 0.1) for layer in graph.groups]
    shares = [
        graph.parameters(kept) / choice.parameters_before for kept in itertools.product(*widths)
    ]
    assert reached == min(shares, key=lambda share: abs(share - 0.9))
    assert choice.notes == {
        "keep_params": f"{reached:.4g}, the nearest to 0.9 that the widths allow"
    }
    assert PruningPlan.model_validate_json(choice.model_dump_json()) == choice
    assert not plan(model, graph, scores, keep_params=reached, round_to=16).notes
    with pytest.raises(
        RecipeError, match=r"cannot be met within the tolerance.*round_to.*leave exact out"
    ):
        plan(model, graph, scores, keep_params=0.9, round_to=16, tolerance=1e-4, exact=True)


def test_the_smallest_width_is_the_nearest_to_a_share_a_little_below_it(traced):
    model, _, graph = traced("mlp")
    scores = score(model, graph, "l1")
    least = graph.parameters([16, 16]) / graph.parameters([32, 32])
    choice = plan(model, graph, scores, keep_params=0.8 * least, round_to=16)
    assert f"{least:.4g}, the nearest to" in choice.notes["keep_params"]
    for wrong in ({"keep_params": 0.8 * least, "exact": True}, {"keep_params": 0.4 * least}):
        with pytest.raises(RecipeError, match="the smallest share of this model is"):
            plan(model, graph, scores, round_to=16, **wrong)


@pytest.mark.parametrize("setting", [{"round_to": 0}, {"min_keep": 1.5}, {"scope": "locl"}])
def test_wrong_settings_are_refused_by_name(traced, setting):
    model, _, graph = traced("plain")
    (name,) = setting
    with pytest.raises(RecipeError, match=rf"^{name}: got"):
        plan(model, graph, score(model, graph, "l1"), **setting)


def test_a_model_in_which_nothing_can_go_is_refused_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1))
    graph = trace(model, torch.randn(2, 4))
    with pytest.raises(
        ModelError, match=r"no channel of this model can be removed.*'0'.*mixed across channels"
    ):
        plan(model, graph, [])


def test_parameters_count_each_axis_of_a_tensor(traced):
    _, _, graph = traced("waves")
    assert isinstance(graph, ChannelGraph)
    k = 5  # conv 3k5 + k, slope k, tied k*k, biases 2k, head 5k + 5
    assert graph.parameters([k]) == 15 * k + k + k + k * k + 2 * k + 5 * k + 5
