import pytest
import torch
from torch import nn

from fedpress import limits
from fedpress.errors import ModelError, RecipeError


@pytest.mark.parametrize("text", ["", "0", "-1", "1e9", "many", "1.5", "٣", "9" * 19])
def test_a_limit_is_a_whole_number(monkeypatch, text):
    monkeypatch.setenv("FEDPRESS_MAX_VALUES", text)
    with pytest.raises(RecipeError, match=r"FEDPRESS_MAX_VALUES: got .* expected a whole number above 0"):
        limits.limit("values")


def test_the_declared_size_is_that_of_the_network_and_takes_no_memory():
    def build(width):
        return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    known = sum(t.numel() for t in (*build(7).parameters(), *build(7).buffers()))
    assert limits.declared(build, {"width": 7}) == known
    assert limits.declared(build, {"width": 10**7}) > 10**14


def test_depth_is_found_without_recursion():
    tree = []
    for _ in range(100_000):
        tree = [tree]
    assert limits.depth(tree) == 100_001
    with pytest.raises(
        ModelError, match=r"here: 100,001 lists and tables inside each other.*FEDPRESS_MAX_DEPTH=100001"
    ):
        limits.check_tree(tree, "here")


def test_building_within_limits_changes_no_number(monkeypatch):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 1)), nn.GRU(3, 4))

    plain = net().state_dict()
    with limits.building("x"):
        watched = net().state_dict()
    assert all(torch.equal(watched[name], value) for name, value in plain.items())
    monkeypatch.setenv("FEDPRESS_MAX_VALUES", "20")
    with (
        pytest.raises(ModelError, match=r"x: at least 30 values.*FEDPRESS_MAX_VALUES=40 or more"),
        limits.building("x"),
    ):
        net()
    net()  # outside the block nothing is watched
