"""The prune stage: targets, sensitivity, several cuts with training between, and going on after a kill."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedpress import compress
from fedpress.compress import SCORES, PruningPlan
from fedpress.errors import DataError, ModelError, RecipeError, TrainingError
from fedpress.models import load_model
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.prune.stage import PruneStage
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import StageFinished
from tests.harness import Killed, begun, checked, stages, tiered, told

HEAD = """
name = "cut"
[data]
source = "digits"
num_clients = 2
examples_per_client = 60
public_share = 0.2
validation = 60
[model]
architecture = "resnet-small"
arguments = { in_channels = 1, width = 8 }
[[stage]]
kind = "train"
epochs = 1
batch_size = 64
lr = 0.05
"""
PRUNE = '[[stage]]\nkind = "prune"\nround_to = 2\ncalibration = 64\n'
STEPS = "keep_params = 0.4\nsteps = 2\nfinetune = { epochs = 2, batch_size = 64, lr = 0.05 }\n"
BARE = HEAD.replace("public_share = 0.2\n", "public_share = 0.0\n").replace(
    "validation = 60\n", "validation = 0\n"
)
MLP = 'architecture = "mlp"\narguments = { in_features = 64, hidden = [1600, 1600] }\n'
CNN = 'architecture = "cnn"\narguments = { in_channels = 1, image_size = 8 }\n'
MODEL = HEAD[HEAD.index("architecture") : HEAD.index("[[stage]]")]
WIDE = HEAD[: HEAD.index("[[stage]]")].replace(MODEL, MLP)


def prune(**fields):
    return TypeAdapter(PruneStage).validate_python({"kind": "prune", **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the training alone, whose result the other runs take over."""
    path = tmp_path_factory.mktemp("runs") / "trained"
    stages(HEAD, path)
    return RunFolder.open(path)


def test_every_score_of_the_table_is_a_setting():
    assert set(get_args(PruneStage.model_fields["score"].annotation)) == set(SCORES)


FROM_DATA = [name for name, row in SCORES.items() if row.needs == "losses"]


@pytest.mark.parametrize("name", tiered(FROM_DATA, quick=("taylor", "grasp")))
def test_every_score_from_data_prunes_in_a_run(trained, tmp_path, name):
    _, line = stages(
        HEAD + PRUNE + f'score = "{name}"\nkeep_params = 0.5\n', tmp_path / "run", reuse=trained
    )
    assert line["kept_parameters"] == pytest.approx(0.5, abs=0.005)
    assert line["parity_error"] <= 1e-5
    assert line["restored_examples"] == 64
    assert line["whole_layers"] == {"head": "it is an output of the model"}


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("keep_macs = 0.4\n", lambda dense, cut: cut["macs"] / dense["macs"]),
        ("max_bytes = 36000\n", lambda dense, cut: cut["file_bytes"] / 90_000),
        pytest.param(
            "keep_params = 0.4\nscore = 'taylor'\nstrategy = 'single-channel'\n",
            lambda _, cut: cut["kept_parameters"],
            marks=pytest.mark.recipe,
        ),
        pytest.param(
            "keep_params = 0.4\nscope = 'layer'\n",
            lambda _, cut: cut["kept_parameters"],
            marks=pytest.mark.recipe,
        ),
    ],
)
def test_targets_are_reached_and_foretold(trained, tmp_path, target, kept):
    text = HEAD + PRUNE + target
    dense, line = stages(text, tmp_path / "run", reuse=trained)
    assert kept(dense, line) == pytest.approx(0.4, abs=0.006)
    assert line["file_bytes"] <= 36000 or "max_bytes" not in target
    foretold = checked(text)[1]
    assert foretold["macs" if "macs" in target else "parameters"] == pytest.approx(
        line["macs" if "macs" in target else "parameters"], rel=0.03
    )


@pytest.mark.recipe
def test_latency_is_measured_until_a_cut_is_fast_enough(tmp_path):
    text, path = WIDE + PRUNE + "keep_latency = 0.5\n", tmp_path / "run"
    (line,) = stages(text, path)
    tried = [r["latency"] for r in told(path) if "latency" in r]
    assert 1 <= len(tried) <= 5
    share = line["parameters"] / line["kept_parameters"]  # of the dense network: all of it
    assert min(abs(t["share"] - line["parameters"] / share) for t in tried) <= 0.01
    assert 0.2 < line["kept_parameters"] < 0.8


@pytest.mark.recipe
def test_what_cannot_be_that_fast_is_refused_with_the_fastest(tmp_path):
    text = WIDE + PRUNE + "min_keep = 0.9\nkeep_latency = 0.05\n"
    with pytest.raises(
        RecipeError,
        match=r"keep_latency: got 0\.05, .*the fastest network measured \(.*% of the parameters\) takes",
    ):
        stages(text, tmp_path / "run")


def test_sensitivity_is_recorded_layer_by_layer_and_decides_the_widths(trained, tmp_path):
    path = tmp_path / "run"
    text = HEAD + PRUNE + "keep_params = 0.4\nscope = 'sensitivity'\ndensities = [0.25, 0.75]\n"
    _, line = stages(text, path, reuse=trained)
    points = [r["sensitivity"] for r in told(path) if "sensitivity" in r]
    plan = PruningPlan.model_validate_json((path / "stages" / "1-prune" / "plan.json").read_text())
    layers = [change.name for change in plan.layers]
    assert [(p["layer"], p["density"]) for p in points] == [
        (n, d) for n in layers for d in (1.0, 0.75, 0.25)
    ]
    assert all(0 <= p["accuracy"] <= 1 and p["loss"] > 0 for p in points)
    assert len({(p["loss"], p["accuracy"]) for p in points if p["density"] == 1}) == 1
    assert line["kept_parameters"] == pytest.approx(0.4, abs=0.005)


@pytest.mark.recipe
@pytest.mark.parametrize("more", tiered(["", "rewind = true\n"], quick=["rewind = true\n"]))
def test_several_cuts_go_down_by_equal_factors_and_train_between(trained, tmp_path, more):
    path = tmp_path / "run"
    _, line = stages(HEAD + PRUNE + STEPS + more, path, reuse=trained)
    rows = [r for r in told(path) if r["stage"] == 1]
    cuts = [r for r in rows if "layers" in r]
    assert [(r["step"], r.get("epoch")) for r in rows] == [
        *([(1, 1), (1, 2)] if more else []), (1, None), (2, 1), (2, 2), (2, None)
    ]  # fmt: skip
    stage = path / "stages" / "1-prune"
    plans = [
        PruningPlan.model_validate_json((stage / f"plan-{n}.json").read_text()) for n in (1, 2)
    ]
    assert plans[0].parameters_after == plans[1].parameters_before
    assert plans[0].parameters_after / plans[0].parameters_before == pytest.approx(
        0.4**0.5, abs=0.006
    )
    assert line["kept_parameters"] == pytest.approx(0.4, abs=0.006)
    assert cuts[1]["layers"][0]["before"] == plans[0].layers[0].before
    _, dense = load_model(path / "stages" / "0-train")
    for plan in plans:
        compress.remove_(dense, plan)
    _, model = load_model(stage)
    same = [torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True)]
    assert (
        all(same) if more else not any(same)
    )  # rewound: the surviving weights are those of the beginning


@pytest.mark.parametrize(
    ("more", "gap"),
    [
        pytest.param(STEPS, 1, id="finetune", marks=pytest.mark.recipe),
        pytest.param(STEPS + "rewind = true\n", 1, id="rewind"),
        pytest.param(
            STEPS.replace("epochs = 2", "epochs = 1")
            + "scope = 'sensitivity'\ndensities = [0.5]\n",
            7,
            id="sensitivity",
            marks=pytest.mark.recipe,
        ),
    ],
)
def test_a_killed_stage_goes_on_to_the_same_bits(trained, tmp_path, left, more, gap):
    text = HEAD + PRUNE + more
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    stages(text, whole, reuse=trained)
    stops = 0
    for _ in range(40):
        try:
            before = len(told(killed)) if (killed / "records.jsonl").exists() else 0
            for event in begun(
                text,
                killed,
                resume=killed.exists(),
                **({} if killed.exists() else {"reuse": trained}),
            ):
                if isinstance(event, StageFinished):
                    continue
                if (
                    len(told(killed)) >= max(before, 1) + gap
                ):  # so many records more than at the last start: stop here
                    raise Killed
            break
        except Killed:
            stops += 1
    assert stops >= 3
    assert left(killed) == left(whole)


def test_without_batch_norm_and_losses_no_public_examples_are_needed(tmp_path):
    text = BARE.replace(MODEL, CNN)
    text = text[: text.index("[[stage]]")] + PRUNE + "keep_params = 0.5\n"
    (line,) = stages(text, tmp_path / "run")
    assert line["restored_examples"] == 0
    assert line["kept_parameters"] == pytest.approx(0.5, abs=0.01)
    for needy in (
        text + 'score = "fisher"\n',
        text.replace(CNN, MODEL),
        text + 'scope = "sensitivity"\n',
    ):
        with pytest.raises(
            DataError, match=r"calibration: it needs public examples.*data\.public_share"
        ):
            checked(needy)


def test_a_sensitivity_is_not_measured_on_no_example():
    text = HEAD[: HEAD.index("[[stage]]")] + PRUNE + 'scope = "sensitivity"\n'
    text = text.replace("calibration = 64", "calibration = 0")
    assert checked(text), "the validation set is there to measure on"
    with pytest.raises(DataError, match=r"calibration: got 0, .*calibration = 256"):
        checked(text.replace("validation = 60", "validation = 0"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"keep_params": 0.3, "keep_macs": 0.3},
            "one target, but keep_params and keep_macs are given",
        ),
        ({"keep_macs": 0.0}, "greater than 0"),
        ({"max_bytes": 0}, "greater than or equal to 1"),
        ({"steps": 2}, "steps: .*finetune"),
        ({"rewind": True}, "rewind: .*finetune"),
        ({"finetune": {"epochs": 1}}, "finetune: .* let 'train' follow"),
        ({"strategy": "single-channel", "scope": "sensitivity"}, "leave scope"),
        ({"scope": "sensitivity", "densities": [0.5, 1.0]}, "between 0 and 1"),
        ({"score": "movement"}, "'obd', 'snip'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, says):
    with pytest.raises(ValidationError, match=says):
        prune(**fields)


def test_the_target_is_a_share_of_the_parameters_unless_another_is_given():
    assert prune().target_setting == ("keep_params", 0.3)
    assert prune(max_bytes=1000).target_setting == ("max_bytes", 1000)
    for stage in (prune(), prune(keep_macs=0.5)):
        assert PruneStage.model_validate(stage.model_dump()) == stage


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (
            HEAD + PRUNE + "max_bytes = 100\n",
            RecipeError,
            r"max_bytes: 100 cannot be reached, the smallest size",
        ),
        (HEAD + PRUNE + "keep_macs = 0.001\n", RecipeError, r"keep_macs: 0\.001 cannot be reached"),
        (
            HEAD.replace(MODEL, CNN) + PRUNE + "score = 'bn_scale'\n",
            ModelError,
            "'bn_scale' needs a batch norm",
        ),
        (
            HEAD.replace(MODEL, CNN) + "bn_penalty = 0.1\n",
            TrainingError,
            "bn_penalty: it penalises batch-norm scales",
        ),
        (
            HEAD + PRUNE + STEPS.replace("epochs = 2", "epochs = 2, image_sizes = [[99, 1]]"),
            TrainingError,
            r"finetune\.image_sizes: got sides of 99 pixels",
        ),
        (
            HEAD + PRUNE + "keep_macs = 0.5\n" + PRUNE + "name = 'again'\nkeep_macs = 0.8\n",
            RecipeError,
            r"keep_macs: got 0\.8, but the model has 0\.[45].* of the dense network.s multiply-adds",
        ),
    ],
)
def test_what_cannot_work_is_found_before_the_run(text, error, says):
    with pytest.raises(error, match=says):
        checked(text)


def test_a_quantized_model_is_refused():
    recipe = recipes.load(HEAD, ())
    state = first_state(recipe, load_data(recipe))
    rounded = state.spec.model_copy(
        update={
            "quantized": {
                "head": QuantizationScheme(weights=WeightQuantization(kind="int", bits=8))
            }
        }
    )
    with pytest.raises(RecipeError, match="quantized already; put this stage before"):
        prune().check(replace(state, spec=rounded))


@pytest.mark.recipe
def test_what_a_second_cut_cannot_reach_is_told_in_shares_of_the_dense_network():
    again = PRUNE.replace('kind = "prune"', 'kind = "prune"\nname = "again"')
    with pytest.raises(RecipeError, match=r"keep_params: 0\.001 cannot be reached"):
        checked(HEAD + PRUNE + "keep_params = 0.6\n" + again + "keep_params = 0.001\n")
