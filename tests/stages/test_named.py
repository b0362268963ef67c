"""Examples that are dictionaries of tensors go through every stage, by name."""

import json

import pytest
import torch

from fedpress import deploy
from fedpress.codecs import Key
from fedpress.core.examples import Arrays
from fedpress.errors import FedpressError, ModelError, RecipeError
from fedpress.federation.local import LocalWork
from fedpress.federation.private import inputs_fingerprint
from fedpress.models import load_model
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.start import first_state, load_data
from fedpress.reports.html import write_report
from fedpress.stages.federate.binding import bind
from fedpress.storage import load
from tests import named
from tests.harness import Killed, begun, finish, tiered, told

SAMPLE = 'privacy = { unit = "sample", epsilon = 8.0, delta = 1e-3, clip_norm = 1.0 }'
CLIENT = 'privacy = { unit = "client", trust = "central", noise_multiplier = 0.3, delta = 1e-3 }'
EXPORT = '[[stage]]\nkind = "export"\n'


def weights(path, stage: str) -> dict[str, torch.Tensor]:
    folder = next(path.glob(f"stages/*{stage}*"))
    return load_model(folder)[1].state_dict()


@pytest.mark.parametrize("model", ["Notes", "Packed"])
def test_a_recipe_trains_federates_and_tells(model, tmp_path):
    text = named.recipe(named.TRAIN, named.federate(), model=model)
    train, federate = finish(text, tmp_path)["stages"]
    assert train["accuracy"] > 0.7
    assert federate["accuracy"] > 0.7
    assert federate["clients"] == 3
    assert federate["client_accuracy"]
    assert 0 <= federate["auc"] <= 1
    spec, _ = load(tmp_path)
    assert spec.input_shape == {"tokens": (6,), "lengths": (), "sensors": (3,)}
    assert spec.input_dtype == {"tokens": "int64", "lengths": "int64", "sensors": "float32"}


@pytest.mark.recipe
@pytest.mark.parametrize("privacy", [SAMPLE, CLIENT])
def test_privacy_of_examples_and_of_clients(privacy, tmp_path):
    text = named.recipe(named.federate(privacy))
    (federate,) = finish(text, tmp_path)["stages"]
    assert federate["epsilon"] > 0
    assert not federate["client_accuracy"]
    assert not federate.get("failed_examples")


@pytest.mark.parametrize(
    "stages",
    [
        (named.TRAIN,),
        (named.federate(),),
        (named.federate(CLIENT),),
    ],
)
def test_one_input_by_name_gives_the_bits_of_one_tensor(stages, tmp_path):
    # Floats by name are taken as they are, so the tensor is, too.
    plain = "mean = [0.0]\nstd = [1.0]"
    alone = named.recipe(*stages, data="sensors_alone", model="One", more=plain)
    by_name = named.recipe(*stages, data="sensors_by_name", model="One")
    finish(alone, tmp_path / "alone")
    finish(by_name, tmp_path / "named")
    stage = "train" if named.TRAIN in stages else "federate"
    one, other = (weights(tmp_path / which, stage) for which in ("alone", "named"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.recipe
@pytest.mark.parametrize("privacy", tiered(["", SAMPLE], quick=[SAMPLE]))
def test_a_killed_run_goes_on_to_the_same_bits(privacy, tmp_path):
    text = named.recipe(named.TRAIN, named.federate(privacy))
    finish(text, tmp_path / "whole")
    for at in (3, 9, 14):
        run = begun(text, tmp_path / f"killed{at}")
        for _ in range(at):
            next(run)
        with pytest.raises(Killed):
            run.throw(Killed())
        finish(text, tmp_path / f"killed{at}", resume=True)
        for stage in ("train", "federate"):
            whole, after = (weights(tmp_path / p, stage) for p in ("whole", f"killed{at}"))
            assert all(torch.equal(whole[key], after[key]) for key in whole)


@pytest.mark.recipe
def test_other_tasks_learn_from_dictionaries(tmp_path):
    regression = named.recipe(named.TRAIN, data="priced", model="Notes", more='task = "regression"')
    with pytest.raises(RecipeError, match="gives outputs"):
        finish(regression, tmp_path / "wrong")
    fitting = regression.replace("Notes", "Price") + named.federate(SAMPLE)
    train, federate = finish(fitting, tmp_path / "price")["stages"]
    assert train["mae"] < train["mae_of_mean"]
    assert federate["epsilon"] > 0
    tags = named.recipe(
        named.TRAIN,
        named.federate(SAMPLE),
        data="tagged",
        model="Tags",
        more='task = "classification"',
    )
    train, federate = finish(tags, tmp_path / "tags")["stages"]
    assert train["accuracy"] > 0.7
    assert federate["epsilon"] > 0


@pytest.mark.recipe
def test_the_file_takes_inputs_by_name_and_says_what_the_model_says(tmp_path):
    train, export = finish(named.recipe(named.TRAIN, EXPORT), tmp_path)["stages"]
    assert export["accuracy"] == train["accuracy"]
    assert export["parity"]["max_abs_error"] < 1e-4
    path = tmp_path / export["artifact"]
    session = deploy.open_file(path)
    assert {port.name for port in session.inputs} == {"tokens", "lengths", "sensors"}
    data = load_data(recipes.load(named.recipe(named.TRAIN), ()))
    _, network = load(tmp_path)
    rows = data.test.x[:5]
    expected = network.eval()(**dict(rows)).detach()
    found = session(**{name: rows[name].numpy() for name in rows})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(FedpressError, match="the call lacks lengths"):
        session(tokens=rows["tokens"].numpy(), sensors=rows["sensors"].numpy())


@pytest.mark.recipe
def test_integers_take_their_ranges_from_all_inputs(tmp_path):
    text = named.recipe(named.TRAIN, EXPORT + "int8 = true\n")
    train, export = finish(text, tmp_path)["stages"]
    assert export["int8"]
    assert abs(export["accuracy"] - train["accuracy"]) < 0.05


PRUNE = '[[stage]]\nkind = "prune"\nkeep_params = 0.6\nround_to = 1\n{more}\n'


@pytest.mark.parametrize(
    "more",
    [
        'score = "taylor"',
        pytest.param("", marks=pytest.mark.recipe),
        pytest.param('score = "l2"', marks=pytest.mark.recipe),
    ],
)
def test_channels_are_cut_through_all_inputs(more, tmp_path):
    text = named.recipe(named.TRAIN, PRUNE.format(more=more), named.federate(), EXPORT)
    train, prune, federate, export = finish(text, tmp_path)["stages"]
    assert prune["parameters"] < 0.62 * train["parameters"]
    assert federate["accuracy"] > 0.7
    assert export["accuracy"] == federate["accuracy"]


def test_a_forward_that_begins_with_other_arguments_is_not_pruned(tmp_path):
    text = named.recipe(PRUNE.format(more=""), model="Packed")
    with pytest.raises(ModelError, match="forward begins with 'sensors', the examples have"):
        check_recipe(recipes.load(text, ()), load_data(recipes.load(text, ())))


@pytest.mark.recipe
@pytest.mark.usefixtures("memory_unmeasured")
@pytest.mark.parametrize(
    "stage",
    [
        'kind = "quantize"',
        'kind = "quantize"\nbits = 4\nepochs = 1\nlr = 0.05',
        'kind = "sparsify"\ndensity = 0.5\nepochs = 1\nlr = 0.05',
        'kind = "sparsify"\ndensity = 0.5\nepochs = 0\nscore = "fisher"',
        'kind = "l0"\ndensity = 0.6\nepochs = 2\nlr = 0.05',
        'kind = "train"\nepochs = 1\nteacher = "before"\nlr = 0.05',
        'kind = "pack"',
        'kind = "measure"\nbatches = [1]\nthreads = [1]\nseconds = 0.01',
    ],
)
def test_other_stages_take_dictionaries(stage, tmp_path):
    text = named.recipe(named.TRAIN, f"[[stage]]\n{stage}\n")
    train, last = finish(text, tmp_path)["stages"]
    assert last["accuracy"] > train["accuracy"] - 0.15
    assert told(tmp_path)


def test_names_that_the_model_does_not_take_are_told_before_the_run():
    text = named.recipe(named.TRAIN, data="tagged", model="Notes", more='task = "classification"')
    recipe = recipes.load(text, ())
    with pytest.raises(RecipeError, match="the model also needs 'sensors'"):
        first_state(recipe, load_data(recipe))


def test_the_name_of_the_noise_sees_every_value_of_every_input():
    """One noise on two different gradients would uncover both: their difference has none."""
    text = named.recipe(named.federate(SAMPLE))
    recipe = recipes.load(text, ())
    data = load_data(recipe)
    name, arrays = next(iter(data.clients.items()))
    asked = []
    for change in ("", "", "tokens", "lengths", "sensors"):
        x = {key: arrays.x[key].clone() for key in arrays.x}
        if change:
            x[change].view(-1)[0] += 1
        together = bind(recipe.stage[0], first_state(recipe, data))
        client = together.clients[name].client
        key = Key(client.terms.seed, 1, client.name)
        work = LocalWork(Arrays(x, arrays.y), key, client.plan.local)
        asked.append(inputs_fingerprint(client.model, work))
    assert asked[0] == asked[1]
    assert len(set(asked)) == 4


def test_the_report_and_the_check_tell_shapes_by_name(tmp_path):
    text = named.recipe(named.TRAIN)
    recipe = recipes.load(text, ())
    lines = check_recipe(recipe, load_data(recipe))
    assert lines[0]["macs"] > 0
    finish(text, tmp_path)
    described = json.loads((tmp_path / "result.json").read_text())
    assert described["stages"][0]["latency_ms"] > 0


@pytest.mark.recipe
def test_the_page_of_the_run_is_written(tmp_path):
    finish(named.recipe(named.TRAIN, named.federate(SAMPLE), EXPORT), tmp_path)
    page = write_report(tmp_path).read_text()
    assert "accuracy" in page
    assert "epsilon" in page.lower() or "ε" in page


@pytest.mark.recipe
def test_a_classifier_of_transformers_is_trained_protected_and_written(tmp_path):
    pytest.importorskip("transformers")
    text = named.recipe(
        named.TRAIN.replace("epochs = 3", "epochs = 8"),
        named.federate(SAMPLE),
        EXPORT,
        data="masked",
        model="Bert",
    )
    train, federate, export = finish(text, tmp_path)["stages"]
    assert train["accuracy"] > 0.6
    assert federate["epsilon"] > 0
    assert export["accuracy"] == federate["accuracy"]
    session = deploy.open_file(tmp_path / export["artifact"])
    assert [port.name for port in session.inputs] == ["input_ids", "attention_mask"]
