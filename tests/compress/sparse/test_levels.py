import pytest
import torch
from torch import nn

from fedpress.compress.sensitivity import Point
from fedpress.compress.sparse import Weight
from fedpress.compress.sparse.levels import level_densities
from fedpress.errors import RecipeError


def weight(name, *shape):
    return Weight(name, nn.Parameter(torch.zeros(*shape)))


def line(name, slope):
    """A loss that grows in proportion to what is gone."""
    return [Point(name, d, 1.0 + slope * (1 - d)) for d in (1.0, 0.6, 0.2)]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_straight_curves_meet_at_one_level_of_the_loss(density):
    weights = [weight("a", 10, 10), weight("b", 10, 30)]
    found = level_densities(weights, line("a", 1.0) + line("b", 3.0), density)
    assert (100 * found["a"] + 300 * found["b"]) / 400 == pytest.approx(density, abs=4e-3)
    if found["a"] > 0.02:
        assert 1 - found["a"] == pytest.approx(3 * (1 - found["b"]), abs=1e-3)


def test_the_insensitive_weight_loses_more():
    weights = [weight("a", 10, 10), weight("b", 10, 10)]
    found = level_densities(weights, line("a", 0.0) + line("b", 1.0), 0.6)
    assert found["a"] < 0.3
    assert found["b"] > 0.9


@pytest.mark.parametrize("density", [0.01, 1.0])
def test_the_ends_are_reached(density):
    weights = [weight("a", 10, 10), weight("b", 10, 30)]
    found = level_densities(weights, line("a", 1.0) + line("b", 2.0), density)
    assert (100 * found["a"] + 300 * found["b"]) / 400 == pytest.approx(density, abs=0.01)
    assert all(0 < d <= 1 for d in found.values())


def test_a_loss_that_is_no_number_counts_as_the_largest():
    weights = [weight("a", 10, 10), weight("b", 10, 10)]
    broken = [Point("a", 1.0, 1.0), Point("a", 0.6, 1.1), Point("a", 0.2, float("nan"))]
    found = level_densities(weights, broken + line("b", 1.0), 0.5)
    assert found["a"] + found["b"] == pytest.approx(1.0, abs=1e-3)


def test_a_weight_that_was_not_measured_is_named():
    with pytest.raises(RecipeError, match="'b' was not measured"):
        level_densities([weight("a", 2, 2), weight("b", 2, 2)], line("a", 1.0), 0.5)
