import pytest
import torch
from torch import nn

from fedpress.compress.prune.sensitivity import (
    DENSITIES,
    SensitivityPoint,
    densities_down_to,
    extended_to_zero,
)
from fedpress.compress.sparse import Weight
from fedpress.compress.sparse.levels import level_densities, lowest_densities
from fedpress.errors import RecipeError


def weight(name, *shape):
    return Weight(name, nn.Parameter(torch.zeros(*shape)))


def line(name, slope):
    """A loss that grows in proportion to what is gone."""
    return [SensitivityPoint(name, d, 1.0 + slope * (1 - d)) for d in (1.0, 0.6, 0.2)]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_straight_curves_meet_at_one_level_of_the_loss(density):
    weights = [weight("a", 10, 10), weight("b", 10, 30)]
    found = level_densities(weights, line("a", 1.0) + line("b", 3.0), density)
    assert (100 * found["a"] + 300 * found["b"]) / 400 == pytest.approx(density, abs=4e-3)
    if found["a"] > max(
        0.2, lowest_densities(weights, density)["a"] + 1e-6
    ):  # as far as it was measured
        assert 1 - found["a"] == pytest.approx(3 * (1 - found["b"]), abs=1e-3)


def test_the_insensitive_weight_loses_more():
    weights = [weight("a", 10, 10), weight("b", 10, 10)]
    found = level_densities(weights, line("a", 0.0) + line("b", 1.0), 0.6)
    assert found["a"] == pytest.approx(
        0.3, abs=1e-3
    )  # half of what an Erdos-Renyi kernel would give it
    assert found["b"] > 0.89


def test_every_weight_keeps_half_of_an_erdos_renyi_kernel_however_flat_its_curve_is():
    weights = [weight("a", 64, 64, 3, 3), weight("b", 8, 16), weight("c", 32, 32, 3, 3)]
    flat = [SensitivityPoint("a", d, 1.0) for d in (1.0, 0.5, 0.1)]
    for density in (0.1, 0.05, 0.03):
        found = level_densities(weights, flat + line("b", 1.0) + line("c", 1.0), density)
        least = lowest_densities(weights, density)
        assert found["a"] >= least["a"] - 1e-9
        total = sum(w.size for w in weights)
        assert sum(found[w.name] * w.size for w in weights) == pytest.approx(
            density * total, rel=0.02
        )
        sides = {w.name: sum(w.value.shape) / w.size for w in weights}
        if least["b"] < 0.5:
            assert least["b"] / least["a"] == pytest.approx(sides["b"] / sides["a"], rel=0.1)


def test_a_curve_that_is_flat_where_it_was_measured_is_not_free_below():
    known = {"a": ([0.1, 0.5, 1.0], [0.0, 0.0, 0.0]), "b": ([0.1, 0.5, 1.0], [2.0, 1.0, 0.0])}
    density, height = extended_to_zero(known["a"], 2.0)
    assert density.tolist() == [0.0, 0.1, 0.5, 1.0]
    assert height.tolist() == [2.0, 0.0, 0.0, 0.0]
    assert extended_to_zero(known["b"], 2.0)[1][0] == pytest.approx(2.25)  # it goes on as it ended


@pytest.mark.parametrize("lowest", [0.2, 0.1, 0.07, 0.004, 1e-5])
def test_curves_are_measured_down_to_what_may_be_left(lowest):
    found = densities_down_to(lowest)
    assert list(found) == sorted(set(found), reverse=True)
    assert found[:5] == DENSITIES
    assert found[-1] <= max(lowest, 0.001)
    assert len(found) == 5 or found[-2] > lowest


@pytest.mark.parametrize("density", [0.01, 1.0])
def test_the_ends_are_reached(density):
    weights = [weight("a", 10, 10), weight("b", 10, 30)]
    found = level_densities(weights, line("a", 1.0) + line("b", 2.0), density)
    assert (100 * found["a"] + 300 * found["b"]) / 400 == pytest.approx(density, abs=0.01)
    assert all(0 < d <= 1 for d in found.values())


def test_a_loss_that_is_no_number_counts_as_the_largest():
    weights = [weight("a", 10, 10), weight("b", 10, 10)]
    broken = [
        SensitivityPoint("a", 1.0, 1.0),
        SensitivityPoint("a", 0.6, 1.1),
        SensitivityPoint("a", 0.2, float("nan")),
    ]
    found = level_densities(weights, broken + line("b", 1.0), 0.5)
    assert found["a"] + found["b"] == pytest.approx(1.0, abs=1e-3)


def test_a_weight_that_was_not_measured_is_named():
    with pytest.raises(RecipeError, match="'b' was not measured"):
        level_densities([weight("a", 2, 2), weight("b", 2, 2)], line("a", 1.0), 0.5)
