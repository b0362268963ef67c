"""The quantize stage: what it says before the run is what comes out, and everything lies on its grid to the bit."""

import pytest
import torch
from pydantic import ValidationError

from fedpress.compress.quantize import quantize_
from fedpress.errors import FedpressError, ModelError, RecipeError
from fedpress.models import load_model
from fedpress.nn.quantized import kept_entries, quantized_layers
from fedpress.pipeline import run as runs
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.recipe import load
from fedpress.pipeline.start import load_data
from fedpress.stages.quantize import QuantizeStage
from fedpress.storage import pack, unpack
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import StageFinished
from tests.harness import told

RECIPE = """
name = "bits"
[data]
source = "digits"
num_clients = 3
examples_per_client = 60
public_share = 0.3
validation = 60
[model]
architecture = "resnet-small"
arguments = { in_channels = 1, width = 8 }
[[stage]]
kind = "train"
epochs = 3
batch_size = 32
lr = 0.1
[[stage]]
kind = "quantize"
calibration = 128
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the recipe, whose trained network other runs take over."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    finish(load(RECIPE), folder)
    return RunFolder.open(folder)


def finish(recipe, folder, earlier=None):
    """Checks and runs; returns what check said of the last stage, and its result."""
    data = load_data(recipe)
    told = check_recipe(recipe, data)[-1]
    events = [
        *runs.execute(
            recipe, RunFolder.create(folder, RECIPE, settings_of(recipe)), data, reuse=earlier
        )
    ]
    return told, [e.result for e in events if isinstance(e, StageFinished)]


@pytest.mark.parametrize(
    ("changes", "bits", "points"),
    [
        ([], 8, 0.01),
        (['stage.1.inputs="dynamic"'], 8, 0.02),
        pytest.param(["stage.1.observer=entropy"], 8, 0.05, marks=pytest.mark.recipe),
        pytest.param(["stage.1.bits=4"], 4, 0.05, marks=pytest.mark.recipe),
        (["stage.1.bits=4", "stage.1.group=8"], 4, 0.05),
        pytest.param(
            ["stage.1.weights=cluster", "stage.1.bits=4"], 4, 0.05, marks=pytest.mark.recipe
        ),
        pytest.param(
            [
                "stage.1.weights=ternary",
                "stage.1.epochs=4",
                "stage.1.teacher=before",
                "stage.1.lr=0.05",
            ],
            2,
            0.1,
            marks=pytest.mark.recipe,
        ),
        pytest.param(
            [
                "stage.1.weights=binary",
                "stage.1.epochs=12",
                "stage.1.teacher=before",
                "stage.1.lr=0.1",
            ],
            1,
            0.35,
            marks=pytest.mark.recipe,
        ),
        (["stage.1.bits=3", "stage.1.epochs=2"], 3, 0.06),
    ],
)
def test_what_check_says_comes_out_and_little_accuracy_is_lost(
    trained, tmp_path, changes, bits, points
):
    told, results = finish(load(RECIPE, changes), tmp_path / "run", trained)
    before, after = results
    assert told["bits_per_weight"] == after["bits_per_weight"] == bits
    assert (told["left"], told["quantized_layers"]) == (after["left"], after["quantized_layers"])
    assert after["accuracy"] >= before["accuracy"] - points
    assert after["file_bytes"] < before["file_bytes"] * (bits / 32 + 0.28)
    spec, model = load_model(RunFolder.open(tmp_path / "run").stage(1, "quantize", "quantize").path)
    assert set(spec.quantized) == {name for name, _ in quantized_layers(model)}
    for _, layer in quantized_layers(model):
        assert torch.equal(layer.weight, layer.dequantize(layer.quantize()))


@pytest.mark.recipe
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_binary_inputs_are_within_ten_points_of_binary_weights_alone(tmp_path, seed):
    """Behind a ReLU every value has the sign +1: without a middle such a network is no better than chance."""
    dense = [
        "data.public_share=0.8",
        "stage.0.epochs=10",
        f"seed={seed}",
        "stage.1.lr=0.05",
        "stage.1.epochs=12",
    ]
    changes = [*dense, "stage.1.weights=binary", "stage.0.batch_size=64", "stage.1.batch_size=64"]
    weights = finish(load(RECIPE, changes), tmp_path / "weights")[1][-1]["accuracy"]
    earlier = RunFolder.open(tmp_path / "weights")
    for inputs in ("static", "dynamic"):
        more = [f"stage.1.inputs={inputs}", "stage.1.input_bits=1"]
        both = finish(load(RECIPE, [*changes, *more]), tmp_path / inputs, earlier)[1][-1]
        assert both["accuracy"] > weights - 0.1
        _, model = load_model(tmp_path / inputs / "stages" / "1-quantize")
        assert all(layer.input_middle.abs().max() > 0 for _, layer in quantized_layers(model))


@pytest.mark.recipe
def test_the_share_that_stays_float_is_said(trained, tmp_path):
    keep = 'stage.1.keep=["stages.2.0.conv2"]'
    told, lines = finish(load(RECIPE, [keep]), tmp_path / "run", trained)
    assert 0.3 < told["float_share"] < 0.6
    assert told["float_share"] == lines[-1]["float_share"]
    assert lines[-1]["mostly_float"][0] == "stages.2.0.conv2"
    assert finish(load(RECIPE), tmp_path / "all", trained)[1][-1]["float_share"] < 0.05


SPARSE = """
[[stage]]
kind = "sparsify"
density = 0.9
[[stage]]
kind = "quantize"
calibration = 128
bits = 2
inputs = "float"
"""


def dense_first(more):
    return RECIPE.partition('[[stage]]\nkind = "quantize"')[0] + more


@pytest.mark.recipe
def test_training_moves_kept_weights_that_rounding_made_zero_and_no_pruned_ones(trained, tmp_path):
    text = dense_first(
        SPARSE
        + "epochs = 4\nlr = 0.2\n"
        + '[[stage]]\nkind = "train"\nname = "more"\nepochs = 1\nlr = 0.02\n'
    )
    finish(load(text), tmp_path / "run", trained)
    _, cut = load_model(tmp_path / "run/stages/1-sparsify")
    spec, rounded = load_model(tmp_path / "run/stages/2-quantize")
    last, model = load_model(tmp_path / "run/stages/3-more")
    first, after = dict(cut.named_parameters()), dict(model.named_parameters())
    table = {
        n.removesuffix(".weight"): spec.quantized[n.removesuffix(".weight")] for n in spec.sparse
    }
    quantize_(cut, table, correct_bias=False)
    frozen = moved = 0
    for name in spec.sparse:
        pruned = ~kept_entries(model, [name])[name]
        assert not after[name][pruned].any()
        assert torch.equal(pruned, ~kept_entries(rounded, [name])[name])
        at_first = (first[name] == 0) & ~pruned
        frozen += int(at_first.sum())
        moved += int((after[name][at_first] != 0).sum())
    assert frozen > 3000  # kept entries that first became 0
    assert moved > 0.01 * frozen
    assert set(last.kept_zeros) <= set(spec.sparse)
    assert last.kept_zeros
    sizes = [int((~kept_entries(model, [n])[n]).sum()) for n in spec.sparse]
    total = sum(after[n].numel() for n in spec.sparse)
    assert sum(sizes) == total - round(0.9 * total)
    # A packed file and the next stage know them too.
    pack(last, model, tmp_path / "m.fpk")
    back = unpack(tmp_path / "m.fpk")[1]
    assert all(
        torch.equal(kept_entries(back, [n])[n], kept_entries(model, [n])[n]) for n in spec.sparse
    )


@pytest.mark.recipe
def test_clients_train_the_kept_weights_of_a_sparse_network_on_two_bits(trained, tmp_path):
    more = '[[stage]]\nkind = "federate"\nnum_rounds = 3\nlr = 0.5\nepochs = 2\nbatch_size = 16\nweight_decay = 1e-3\n'
    told, lines = finish(load(dense_first(SPARSE + more)), tmp_path / "run", trained)
    spec, rounded = load_model(tmp_path / "run/stages/2-quantize")
    last, model = load_model(tmp_path / "run/stages/3-federate")
    masks, after = kept_entries(rounded, spec.sparse), kept_entries(model, last.sparse)
    assert all(torch.equal(masks[n], after[n]) for n in spec.sparse)
    dense = sum(
        p.numel() for n, p in rounded.named_parameters() if n not in spec.sparse and p.requires_grad
    )
    assert (
        told["trained_values"]
        == lines[-1]["trained_values"]
        == dense + sum(int(m.sum()) for m in masks.values())
    )
    was, now = dict(rounded.named_parameters()), dict(model.named_parameters())
    assert sum(int(((was[n] == 0) & masks[n] & (now[n] != 0)).sum()) for n in spec.sparse) > 0


@pytest.mark.recipe
def test_layers_that_stay_float_are_listed_with_the_reason(trained, tmp_path):
    told, results = finish(
        load(RECIPE, ["stage.1.weights=binary", 'stage.1.keep=["head"]']), tmp_path / "run", trained
    )
    assert told["left"] == results[-1]["left"] == {"head": "asked for by `keep`"}


@pytest.mark.recipe
def test_mixed_bits_meet_their_budget_and_give_more_to_what_is_sensitive(trained, tmp_path):
    changes = ["stage.1.mixed=[2, 4, 8]", "stage.1.max_bytes=14000"]
    _, results = finish(load(RECIPE, changes), tmp_path / "run", trained)
    rows = next(r["quantized"] for r in told(tmp_path / "run") if "quantized" in r)
    _, model = load_model(RunFolder.open(tmp_path / "run").stage(1, "quantize", "quantize").path)
    size = sum(-(-row["weights"] * row["bits"] // 8) for row in rows)
    scales = sum(4 * len(layer.weight_scale) for _, layer in quantized_layers(model))
    assert size + scales <= 14000
    assert len({row["bits"] for row in rows}) > 1
    assert results[-1]["accuracy"] >= results[0]["accuracy"] - 0.1
    with pytest.raises(RecipeError, match=r"recipe\.stage\[1\].max_bytes: .* the least is"):
        finish(load(RECIPE, ["stage.1.mixed=[4, 8]", "stage.1.max_bytes=900"]), tmp_path / "small")


@pytest.mark.recipe
def test_a_killed_stage_goes_on_to_the_same_bits(trained, tmp_path, left):
    recipe = load(RECIPE, ["stage.1.bits=4", "stage.1.epochs=3", "stage.1.teacher=before"])
    finish(recipe, tmp_path / "whole", trained)
    folder = RunFolder.create(tmp_path / "killed", RECIPE, settings_of(recipe))
    data, seen = load_data(recipe), 0
    for event in runs.execute(recipe, folder, data, reuse=trained):
        seen += getattr(event, "note", "").startswith("epoch 2/3")
        if seen:
            break
    folder = RunFolder.resume(tmp_path / "killed", settings_of(recipe))
    assert [*runs.execute(recipe, folder, data, reuse=trained)]
    assert left(tmp_path / "killed" / "stages") == left(tmp_path / "whole" / "stages")


@pytest.mark.recipe
def test_zeros_survive_clustering_and_eight_bits(trained, tmp_path):
    text = RECIPE.replace(
        '[[stage]]\nkind = "quantize"',
        '[[stage]]\nkind = "sparsify"\ndensity = 0.3\n[[stage]]\nkind = "quantize"\n'
        'name = "shared"\nweights = "cluster"\nbits = 3\n[[stage]]\nkind = "quantize"',
    )
    recipe = load(text)
    data = load_data(recipe)
    check_recipe(recipe, data)
    folder = RunFolder.create(tmp_path / "run", text, settings_of(recipe))
    assert [*runs.execute(recipe, folder, data, reuse=trained)]
    sparse, shared, last = (
        load_model(next((tmp_path / "run" / "stages").glob(f"{i}*"))) for i in (1, 2, 3)
    )
    assert sparse[0].sparse == shared[0].sparse == last[0].sparse != ()
    for name in sparse[0].sparse:
        weights = [dict(model.named_parameters())[name] for _, model in (sparse, shared, last)]
        assert not any((later[weights[0] == 0] != 0).any() for later in weights[1:])
        assert len(weights[1].unique()) <= 8
        assert len(weights[2].unique()) <= len(weights[1].unique())


@pytest.mark.recipe
def test_training_after_it_stays_on_the_grids(trained, tmp_path):
    text = RECIPE + '[[stage]]\nkind = "train"\nname = "tune"\nepochs = 1\nlr = 0.01\n'
    recipe = load(text, ["stage.1.bits=4"])
    data = load_data(recipe)
    check_recipe(recipe, data)
    folder = RunFolder.create(tmp_path / "run", text, settings_of(recipe))
    results = [
        e.result
        for e in runs.execute(recipe, folder, data, reuse=trained)
        if isinstance(e, StageFinished)
    ]
    _, model = load_model(next((tmp_path / "run" / "stages").glob("2*")))
    assert results[-1]["accuracy"] > 0.8
    assert results[2]["file_bytes"] == pytest.approx(results[1]["file_bytes"], rel=0.02)
    assert results[2]["file_bytes"] < results[0]["file_bytes"] / 3, "4 bits a weight, in torch too"
    for _, layer in quantized_layers(model):
        assert torch.equal(layer.weight, layer.dequantize(layer.quantize()))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"weights": "binary", "bits": 4}, "binary weights have 1 bits; leave bits out"),
        ({"bits": 1}, 'bits: got 1, .* give weights="binary"'),
        ({"weights": "cluster", "group": 8}, "leave group out"),
        ({"mixed": [2, 4]}, "mixed: .* give max_bytes="),
        ({"mixed": [2, 9], "max_bytes": 100}, "mixed: got .* expected bits from 2 to 8"),
        ({"distill": {"temperature": 2}}, "distill: it needs a teacher"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(given, says):
    with pytest.raises(ValidationError, match=says):
        QuantizeStage(kind="quantize", **given)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (['stage.1.keep=["hed"]'], ModelError, "no layer 'hed'; did you mean 'head'"),
        (["data.public_share=0", "data.validation=0", "stage.0.epochs=0"], FedpressError, "public"),
        (["stage.1.teacher=dense", "stage.1.epochs=1"], RecipeError, "teacher"),
    ],
)
def test_what_would_stop_the_run_is_said_before_it(changes, error, says):
    recipe = load(RECIPE, changes)
    with pytest.raises(error, match=says):
        check_recipe(recipe, load_data(recipe))


FEDERATE = """
[[stage]]
kind = "federate"
num_rounds = 2
epochs = 1
batch_size = 20
lr = 0.05
"""


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        (["stage.1.bits=4"], ""),
        pytest.param(["stage.1.weights=cluster", "stage.1.bits=4"], "", marks=pytest.mark.recipe),
        (
            ["stage.1.bits=4", "stage.2.num_rounds=1"],
            'privacy = { unit = "sample", epsilon = 50.0, delta = 1e-3, clip_norm = 1.0 }',
        ),
    ],
)
def test_clients_train_the_weights_behind_the_grids_and_what_comes_out_lies_on_them(
    trained, tmp_path, changes, more
):
    text = RECIPE + FEDERATE + more
    recipe = load(text, changes)
    data = load_data(recipe)
    check_recipe(recipe, data)
    folder = RunFolder.create(tmp_path / "run", text, settings_of(recipe))
    results = [
        e.result
        for e in runs.execute(recipe, folder, data, reuse=trained)
        if isinstance(e, StageFinished)
    ]
    before, after = (load_model(next((tmp_path / "run" / "stages").glob(f"{i}*"))) for i in (1, 2))
    assert after[0] == before[0]
    assert any(
        not torch.equal(a, b)
        for a, b in zip(after[1].parameters(), before[1].parameters(), strict=True)
    )
    assert results[-1]["accuracy"] > 0.6
    for _, layer in quantized_layers(after[1]):
        assert torch.equal(layer.weight, layer.dequantize(layer.quantize()))


def test_a_cut_after_it_is_refused(trained):
    recipe = load(RECIPE + '[[stage]]\nkind = "prune"\n')
    with pytest.raises(
        RecipeError, match=r"recipe.stage\[2\]: .* quantized already; put this stage before"
    ):
        check_recipe(recipe, load_data(recipe))
