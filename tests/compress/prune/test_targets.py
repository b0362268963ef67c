from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpress import compress
from fedpress.compress import bytes_target, macs_target, parameter_target, plan, remove_, score
from fedpress.compress.prune.targets import bytes_of, full_widths, next_share
from fedpress.errors import RecipeError


@pytest.mark.parametrize("name", ["plain", "residual", "separable", "waves"])
def test_bytes_of_widths_are_those_of_the_cut_model(traced, name):
    model, _, graph = traced(name)
    choice = plan(
        model, graph, score(model, graph, "l1"), keep_params=0.6, round_to=2, tolerance=0.2
    )
    small = deepcopy(model)
    remove_(small, choice)
    kept = [
        change.after // layer.unit
        for change, layer in zip(choice.layers, graph.groups, strict=True)
    ]
    assert bytes_of(model, graph)(full_widths(graph)) == compress.state_bytes(model)
    assert bytes_of(model, graph)(kept) == compress.state_bytes(small)


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_share_of_the_multiply_adds_is_reached_as_counted_on_the_cut_model(traced, share):
    model, x, graph = traced("residual")
    choice = plan(
        model, graph, score(model, graph, "l1"), target=macs_target(graph, share), round_to=1
    )
    small = deepcopy(model)
    remove_(small, choice)
    assert compress.macs(small, x[:1]) / compress.macs(model, x[:1]) == pytest.approx(
        share, abs=0.006
    )


@pytest.mark.recipe
@pytest.mark.parametrize("share", [0.25, 0.77, 1.5])
def test_a_limit_of_bytes_is_never_passed_and_nearly_used(traced, share):
    model, _, graph = traced("residual")
    limit = int(share * compress.state_bytes(model))
    choice = plan(
        model,
        graph,
        score(model, graph, "l1"),
        target=bytes_target(model, graph, limit),
        round_to=1,
    )
    small = deepcopy(model)
    remove_(small, choice)
    assert 0.985 * min(limit, compress.state_bytes(model)) <= compress.state_bytes(small) <= limit


def test_a_limit_that_coarse_widths_cannot_use_is_kept_all_the_same(traced):
    model, _, graph = traced("plain")
    limit = int(0.8 * compress.state_bytes(model))
    choice = plan(
        model,
        graph,
        score(model, graph, "l1"),
        target=bytes_target(model, graph, limit),
        round_to=12,
    )
    small = deepcopy(model)
    remove_(small, choice)
    assert compress.state_bytes(small) <= limit


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda _, graph: macs_target(graph, 1.5),
            r"^keep_macs: got 1\.5, expected a share .*try 0\.3",
        ),
        (lambda _, graph: parameter_target(graph, float("nan")), r"^keep_params: got nan"),
        (lambda model, graph: bytes_target(model, graph, 0), r"^max_bytes: got 0"),
        (
            lambda _, graph: macs_target(graph, 0.001),
            r"^keep_macs: 0\.001 cannot be reached, .*share",
        ),
        (
            lambda model, graph: bytes_target(model, graph, 400),
            r"^max_bytes: 400 cannot be reached, .*size .*\d",
        ),
    ],
)
def test_targets_out_of_range_or_reach_name_the_setting(traced, make, says):
    model, _, graph = traced("plain")
    with pytest.raises(RecipeError, match=says):
        plan(model, graph, score(model, graph, "l1"), target=make(model, graph))


@given(
    power=st.floats(0.5, 2.0),
    fixed=st.floats(0.0, 0.3),
    wanted=st.floats(0.35, 0.95),
    noise=st.lists(st.floats(-0.02, 0.02), min_size=12, max_size=12),
)
def test_measured_costs_come_down_to_what_is_wanted(power, fixed, wanted, noise):
    """Times that grow with the share in any way, with noise: five tries end below what is wanted and near it."""

    def measure(share, number):
        return (fixed + (1 - fixed) * share**power) * (1 + noise[number]) * 5.0

    tried = [(1.0, measure(1.0, 0))]
    while (share := next_share(tried, wanted * 5)) is not None:
        assert 0 < share < 1
        tried.append((share, measure(share, len(tried))))
    assert len(tried) <= 6
    assert max(cost for _, cost in tried if cost <= wanted * 5) >= 0.85 * wanted * 5


def test_nothing_is_tried_where_the_whole_network_is_fast_enough_or_one_was_near():
    assert next_share([(1.0, 3.0)], 4.0) is None
    assert next_share([(1.0, 8.0), (0.4, 3.9)], 4.0) is None
    assert next_share([(1.0, 8.0)] * 8, 4.0) is None
    assert 0.4 < next_share([(1.0, 8.0), (0.4, 3.0)], 4.0) < 1.0
