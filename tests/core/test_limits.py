import json

import pytest
import torch
from torch import nn

from fedpress.core import limits
from fedpress.errors import ModelError, RecipeError
from fedpress.models import ModelSpec


@pytest.mark.parametrize("text", ["", "0", "-1", "1e9", "many", "1.5", "٣", "9" * 19])
def test_a_limit_is_a_whole_number(monkeypatch, text):
    monkeypatch.setenv("FEDPRESS_MAX_VALUES", text)
    with pytest.raises(
        RecipeError, match=r"FEDPRESS_MAX_VALUES: got .* expected a whole number above 0"
    ):
        limits.limit("values")


def test_the_declared_size_is_that_of_the_network_and_takes_no_memory():
    def build(width):
        return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    known = sum(t.numel() for t in (*build(7).parameters(), *build(7).buffers()))
    assert limits.count_values(build, {"width": 7}) == known
    assert limits.count_values(build, {"width": 10**7}) > 10**14


@pytest.mark.recipe
def test_depth_is_found_without_recursion():
    tree = []
    for _ in range(100_000):
        tree = [tree]
    assert limits.depth(tree) == 100_001
    with pytest.raises(
        ModelError,
        match=r"here: 100,001 lists and tables inside each other.*FEDPRESS_MAX_DEPTH=100001",
    ):
        limits.check_tree(tree, "here")


def test_building_within_limits_changes_no_number(monkeypatch):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, 6), nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 1)), nn.GRU(3, 4)
        )

    plain = net().state_dict()
    with limits.limited_building("x"):
        watched = net().state_dict()
    assert all(torch.equal(watched[name], value) for name, value in plain.items())
    monkeypatch.setenv("FEDPRESS_MAX_VALUES", "20")
    with (
        pytest.raises(ModelError, match=r"x: at least 30 values.*FEDPRESS_MAX_VALUES=40 or more"),
        limits.limited_building("x"),
    ):
        net()
    net()  # outside the block nothing is watched


def layers(**more):
    table = {"": {"layer": "Sequential"}} | {str(i): about for i, about in enumerate(more.values())}
    return json.dumps(
        {"architecture": "torch-layers", "arguments": {"layers": table}, "input_shape": [1, 4, 4]}
    )


@pytest.mark.parametrize(
    "about",
    [
        {"layer": "ZeroPad2d", "padding": 2**20},
        {"layer": "Upsample", "scale_factor": 1e4},
        {"layer": "AdaptiveAvgPool2d", "output_size": [30_000, 30_000]},
        {
            "layer": "Conv2d",
            "in_channels": 1,
            "out_channels": 1,
            "kernel_size": 1,
            "padding": 2**20,
        },
        {
            "layer": "ConvTranspose2d",
            "in_channels": 1,
            "out_channels": 1,
            "kernel_size": 1,
            "stride": 2**20,
        },
        {"layer": "LocalResponseNorm", "size": 2**30},
    ],
    ids=lambda about: about["layer"],
)
def test_a_small_network_that_would_fill_the_memory_when_it_runs_is_refused(about):
    spec = ModelSpec.of_file(layers(a={"layer": "ReLU"}, b=about))
    with pytest.raises(
        ModelError, match=r"values of one tensor inside a network.*FEDPRESS_MAX_ACTIVATIONS="
    ):
        spec.build_within_limits()


def test_a_network_runs_within_its_limit_and_one_that_does_not_run_is_no_matter_of_size(
    monkeypatch,
):
    pad = {"layer": "ZeroPad2d", "padding": 2}
    spec = ModelSpec.of_file(layers(a=pad))
    assert spec.build_within_limits()(spec.example(1)).shape == (1, 1, 8, 8)
    monkeypatch.setenv("FEDPRESS_MAX_ACTIVATIONS", "63")
    with pytest.raises(ModelError, match="FEDPRESS_MAX_ACTIVATIONS=64"):
        spec.build_within_limits()
    unfit = {"layer": "Linear", "in_features": 3, "out_features": 1}
    ModelSpec.of_file(layers(a=unfit)).build_within_limits()


@pytest.mark.recipe
def test_layers_inside_one_layer_and_sequences_inside_each_other_have_limits(monkeypatch):
    many = {"layer": "LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 9_000}
    with pytest.raises(
        ModelError,
        match=r"num_layers: 9,000 layers inside one recurrent.*FEDPRESS_MAX_RECURRENT=9000",
    ):
        ModelSpec.of_file(layers(a=many))
    some = {
        f"a{i}": {"layer": "LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 100}
        for i in range(30)
    }
    monkeypatch.setenv("FEDPRESS_MAX_LAYERS", "1000")
    with pytest.raises(ModelError, match=r"modules of a network.*FEDPRESS_MAX_LAYERS="):
        ModelSpec.of_file(layers(**some))
    deep = {".".join(["a"] * n): {"layer": "Sequential"} for n in range(1, 50)}
    text = {
        "architecture": "torch-layers",
        "arguments": {"layers": {"": {"layer": "Sequential"}} | deep},
    }
    with pytest.raises(
        ModelError, match=r"33 lists and tables inside each other.*FEDPRESS_MAX_DEPTH=33"
    ):
        ModelSpec.of_file(json.dumps(text | {"input_shape": [4]}))


@pytest.mark.parametrize("key", [{"device": "meta"}, {"dtype": "float64"}])
def test_a_file_does_not_say_where_the_numbers_of_a_layer_lie(key):
    linear = {"layer": "Linear", "in_features": 4, "out_features": 1} | key
    with pytest.raises(ModelError, match=f"'{next(iter(key))}' may not be set by a file"):
        ModelSpec.of_file(layers(a=linear)).build_within_limits()
