import json
from dataclasses import replace

import pytest
import torch

from fedpress import storage
from fedpress.core.examples import Preprocess
from fedpress.errors import ModelError, RecipeError, TrainingError
from fedpress.models import load_model, save_model
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.keys import settings_of, stage_keys
from fedpress.pipeline.start import first_state, load_data, with_parent
from fedpress.stages.teaching import restandardize
from fedpress.stages.train import TrainStage
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import StageStarted, Tick
from tests.harness import Killed, begun, finish

RECIPE = """
[data]
source = "digits"
num_clients = 3
examples_per_client = 60
public_share = 0.2
validation = 60
[model]
architecture = "resnet-small"
arguments = { in_channels = 1, width = 4 }
[[stage]]
kind = "train"
epochs = 1
batch_size = 64
[[stage]]
kind = "prune"
keep_params = 0.5
calibration = 64
round_to = 1
[[stage]]
kind = "train"
name = "tune"
epochs = 2
batch_size = 64
lr = 0.02
teacher = "dense"
[stage.distill]
features = ["stages.0", "stages.2"]
attention = ["stages.1"]
"""
PLAIN = (*(f"stage.tune.distill.{key}=[]" for key in ("features", "attention")),)


def tuned(path, *overrides, **how):
    """Runs the recipe and returns the weights after its last stage."""
    finish(RECIPE, path, *overrides, **how)
    return load_model(path / "stages" / "2-tune")[1].state_dict()


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("distill") / "whole"
    finish(RECIPE, path)
    return path


@pytest.fixture
def state(whole):
    """The state before the last stage."""
    recipe = recipes.load(RECIPE)
    spec, model = load_model(whole / "stages" / "1-prune")
    state = first_state(recipe, load_data(recipe))
    return replace(
        state, spec=spec, model=model, parent=lambda: load_model(whole / "stages" / "0-train")
    )


def stage(**changes):
    return TrainStage(
        **{"kind": "train", "epochs": 1, "batch_size": 64, "teacher": "dense", **changes}
    )


@pytest.mark.recipe
def test_a_run_checks_and_distils_from_its_dense_parent(whole):
    recipe = recipes.load(RECIPE)
    assert [line["kind"] for line in check_recipe(recipe, load_data(recipe))] == [
        "train",
        "prune",
        "train",
    ]
    result = json.loads((whole / "result.json").read_text())
    assert result["finished"]
    names = load_model(whole / "stages" / "2-tune")[1].state_dict().keys()
    assert names == load_model(whole / "stages" / "1-prune")[1].state_dict().keys()


@pytest.mark.recipe
def test_the_teacher_is_the_model_before_the_cut(whole, tmp_path):
    told = tuned(
        tmp_path / "told", f"stage.tune.teacher={whole / 'stages' / '0-train'}", reuse=whole
    )
    assert_same(told, load_model(whole / "stages" / "2-tune")[1].state_dict())
    other = tuned(
        tmp_path / "other",
        f"stage.tune.teacher={whole / 'stages' / '1-prune'}",
        *PLAIN,
        reuse=whole,
    )
    assert not torch.equal(other["head.weight"], told["head.weight"])


@pytest.mark.recipe
@pytest.mark.parametrize("ticks", [1, 6])
def test_killed_and_resumed_gives_the_same_bits(whole, tmp_path, ticks):
    path = tmp_path / "run"
    events = begun(RECIPE, path)
    next(event for event in events if isinstance(event, StageStarted) and event.name == "tune")
    for _ in range(ticks):
        assert isinstance(next(events), Tick)
    with pytest.raises(Killed):
        events.throw(Killed())
    assert_same(tuned(path, resume=True), load_model(whole / "stages" / "2-tune")[1].state_dict())


@pytest.mark.recipe
def test_a_checkpoint_that_is_cut_at_once_is_the_dense_parent(whole, tmp_path):
    checkpoint = f"model={{checkpoint = '{whole / 'stages' / '0-train'}'}}"
    text = RECIPE.split("[[stage]]")
    recipe = recipes.load("[[stage]]".join([text[0], *text[2:]]), (checkpoint,))
    check_recipe(recipe, load_data(recipe))
    folder = RunFolder.create(tmp_path / "run", RECIPE, settings_of(recipe))
    for _ in runs.execute(recipe, folder, load_data(recipe)):
        pass
    assert json.loads((tmp_path / "run" / "result.json").read_text())["finished"]


def test_training_a_checkpoint_on_is_no_cut(whole, tmp_path):
    recipe = recipes.load(RECIPE, (f"model={{checkpoint = '{whole / 'stages' / '0-train'}'}}",))
    state = first_state(recipe, load_data(recipe))
    save_model(tmp_path, state.spec, state.model)
    after = replace(state, spec=load_model(tmp_path)[0])
    assert with_parent(after, state, lambda: None).parent is None


def test_fresh_weights_are_no_dense_parent():
    text = RECIPE.split("[[stage]]")
    recipe = recipes.load("[[stage]]".join([text[0], *text[2:]]))
    with pytest.raises(
        RecipeError, match=r"recipe.stage\[1\].teacher: got 'dense', but no stage before"
    ):
        check_recipe(recipe, load_data(recipe))


@pytest.mark.recipe
def test_the_first_cut_decides_the_dense_parent(whole):
    more = '[[stage]]\nkind = "prune"\nname = "again"\nkeep_params = 0.3\ncalibration = 64\nround_to = 1\n'
    before, _, after = RECIPE.rpartition("[[stage]]")
    recipe = recipes.load(f"{before}{more}[[stage]]{after}")
    lines = check_recipe(recipe, load_data(recipe))  # the hints fit the widths of the dense network
    assert len(lines) == 4


def test_a_student_of_another_architecture_learns_from_a_packed_file(whole, tmp_path):
    file = tmp_path / "teacher.safetensors"
    storage.pack(*storage.load(whole), file)
    changes = (
        'model.architecture="mlp"',
        "model.arguments={in_features=64, hidden=[8]}",
        f"stage.tune.teacher={file}",
    )
    recipe = recipes.load(RECIPE, ("stage.tune.kind=distill", *changes, *PLAIN))
    only = recipe.model_copy(update={"stage": recipe.stage[2:]})
    assert check_recipe(only, load_data(only))[0]["kind"] == "distill"
    for _ in runs.execute(only, RunFolder.create(tmp_path / "run", RECIPE, {}), load_data(only)):
        pass


def test_a_teacher_counts_by_its_content(whole, tmp_path):
    spec, model = load_model(whole / "stages" / "0-train")
    save_model(tmp_path / "a", spec, model)
    save_model(tmp_path / "b", spec, model)
    keys = [
        stage_keys(recipes.load(RECIPE, (f"stage.tune.teacher={tmp_path / n}",)))[2] for n in "ab"
    ]
    with torch.no_grad():
        model.head.bias.add_(1)
    save_model(tmp_path / "b", spec, model)
    keys.append(stage_keys(recipes.load(RECIPE, (f"stage.tune.teacher={tmp_path / 'b'}",)))[2])
    assert keys[0] == keys[1] != keys[2]


def test_distill_without_a_teacher_is_refused():
    with pytest.raises(
        RecipeError,
        match=r"recipe.stage\[2\].distill: it needs a teacher; give the path of a saved model",
    ):
        recipes.load(RECIPE, ("stage.tune.kind=distill", "stage.tune.teacher=none"))
    with pytest.raises(
        RecipeError,
        match=r"recipe.stage\[2\].distill: it needs a teacher; give the path of .*leave distill out",
    ):
        recipes.load(RECIPE, ("stage.tune.teacher=none",))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"class_names": ("a", "b")},
            TrainingError,
            r"teacher: '.*' has other classes than the data",
        ),
        (
            {"input_shape": (3, 8, 8)},
            TrainingError,
            r"takes examples of shape \[3, 8, 8\], but the data have shape \[1, 8, 8\]",
        ),
    ],
)
def test_a_teacher_of_other_data_is_refused(state, tmp_path, change, error, message):
    spec, model = state.parent()
    save_model(tmp_path / "teacher", spec.model_copy(update=change), model)
    with pytest.raises(error, match=message):
        stage(teacher=str(tmp_path / "teacher")).check(state)


def test_a_missing_teacher_is_named(state, tmp_path):
    with pytest.raises(ModelError, match="is an empty folder"):
        stage(teacher=str(tmp_path)).check(state)


def test_a_broken_teacher_is_refused(state):
    spec, model = state.parent()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(TrainingError, match="NaN or infinity"):
        stage().check(replace(state, parent=lambda: (spec, model)))


def test_the_teacher_in_memory_is_left_as_it_is(state):
    spec, model = state.parent()
    stage().check(replace(state, parent=lambda: (spec, model.train())))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("theirs", [Preprocess((0.1,), (0.7,)), Preprocess()])
@pytest.mark.parametrize("mine", [Preprocess((0.4,), (0.3,)), Preprocess()])
def test_a_teacher_of_other_statistics_sees_what_it_is_used_to(mine, theirs):
    raw = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    torch.testing.assert_close(
        restandardize(mine(raw), mine, theirs), theirs(raw), atol=1e-5, rtol=1e-5
    )


def test_a_teacher_of_other_statistics_gives_the_same_answers(state):
    spec, model = state.parent()
    moved = spec.model_copy(update={"mean": (0.0,), "std": (1.0,)})
    mine = stage().objective(replace(state, parent=lambda: (spec, model)), 0)
    other = stage().objective(replace(state, parent=lambda: (moved, model)), 0)
    raw = state.data.public.x[:4]
    model.eval()
    torch.testing.assert_close(
        mine.run_teacher(state.data.preprocess(raw))[1], model(state.data.preprocess(raw))
    )
    torch.testing.assert_close(
        other.run_teacher(state.data.preprocess(raw))[1], model(Preprocess((0.0,), (1.0,))(raw))
    )
