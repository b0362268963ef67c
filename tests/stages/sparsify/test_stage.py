import copy

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedpress.compress import restore_batch_norm_
from fedpress.compress.sparse import find_weights
from fedpress.core.examples import Arrays
from fedpress.errors import DataError, FedpressError, RecipeError
from fedpress.models import load_model
from fedpress.pipeline.recipe import load
from fedpress.pipeline.start import load_data
from fedpress.stages.sparsify.stage import SparsifyStage
from fedpress.training.fit import Fit, Step
from fedpress.training.settings import TrainSettings
from tests.harness import Killed, begun, checked, finish, tiered, told
from tests.stages.recipes import HEAD, TRAIN, zeros

SPARSIFY = '[[stage]]\nkind = "sparsify"\nkeep_first = false\nkeep_last = false\nbatch_size = 32\nlr = 0.05\n'
PRUNE = '[[stage]]\nkind = "prune"\nkeep_params = 0.5\ncalibration = 64\n'
SCHEDULES = {
    "one-shot": "epochs = 2\n",
    "gradual": "epochs = 3\nevery = 3\n",
    "rewind": "epochs = 2\nrounds = 2\nrewind_to = 1\n",
    "rigl": "epochs = 3\nevery = 3\nscope = 'erk'\n",
}


def settings(**changes):
    return SparsifyStage(**{"kind": "sparsify", "density": 0.1, **changes})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_ends_at_the_exact_density_and_trains_on(tmp_path, schedule):
    text = (
        HEAD + TRAIN + SPARSIFY + f"density = 0.1\nschedule = '{schedule}'\n" + SCHEDULES[schedule]
    )
    result = finish(text, tmp_path / "run")["stages"][1]
    entries, kept = zeros(tmp_path / "run" / "stages" / "1-sparsify")
    assert kept == round(0.1 * entries)
    assert result["density"] == kept / entries
    assert result["nonzero_parameters"] == result["parameters"] - entries + kept
    assert result["loss"] < 2.35


@pytest.mark.recipe
@pytest.mark.parametrize("schedule", tiered(SCHEDULES, quick=("rewind", "rigl")))
def test_a_killed_stage_goes_on_to_the_same_bits(tmp_path, left, schedule):
    score = "movement" if schedule in ("gradual", "rewind") else "magnitude"
    text = (
        HEAD
        + SPARSIFY
        + f"density = 0.2\nschedule = '{schedule}'\nscore = '{score}'\n"
        + SCHEDULES[schedule]
    )
    finish(text, tmp_path / "whole")
    events = sum(1 for _ in begun(text, tmp_path / "counted"))
    for share in (0.4, 0.8):
        path = tmp_path / f"killed{share}"
        run = begun(text, path)
        for _ in range(int(share * events)):
            next(run)
        with pytest.raises(Killed):
            run.throw(Killed())
        finish(text, path, resume=True)
        assert left(path) == left(tmp_path / "whole")


def test_the_density_falls_as_the_cubic_says(tmp_path):
    text = (
        HEAD
        + SPARSIFY
        + "density = 0.1\nschedule = 'gradual'\nepochs = 4\nevery = 1\nuntil = 0.75\n"
    )
    finish(text, tmp_path / "run")
    path = [r["density"] for r in told(tmp_path / "run") if "density" in r]
    assert path == pytest.approx(
        [0.1 + 0.9 * (1 - min(1, e / 3)) ** 3 for e in (1, 2, 3, 4)], abs=2e-3
    )


@pytest.mark.recipe
def test_averaged_weights_have_statistics_of_their_own(tmp_path):
    how = "density = 0.1\nschedule = 'gradual'\nepochs = 3\nevery = 1\nema = 0.98\n"
    text = (
        HEAD.replace('"mlp"', '"resnet-small"').replace(
            "in_features = 64, hidden = [48, 30]", "in_channels = 1, width = 4"
        )
        + SPARSIFY
        + how
    )
    recipe = load(text, ())
    data = load_data(recipe)
    finish(text, tmp_path / "run")
    _, model = load_model(tmp_path / "run" / "stages" / "0-sparsify")
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    twin = copy.deepcopy(model)
    public = data.public.x[torch.randperm(len(data.public))]
    restore_batch_norm_(twin, (data.preprocess(x) for x in public.split(len(public))))
    for (name, mine), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        if name.endswith("running_mean"):
            torch.testing.assert_close(
                mine, other, atol=0.05 * other.abs().max().item() + 1e-3, rtol=0.05
            )


def test_later_stages_keep_the_zeros(tmp_path):
    text = (
        HEAD
        + SPARSIFY
        + "density = 0.1\n"
        + TRAIN
        + PRUNE
        + TRAIN.replace("epochs = 1", "epochs = 2")
    )
    finish(text, tmp_path / "run")
    spec, model = load_model(tmp_path / "run" / "stages" / "0-sparsify")
    _, trained = load_model(tmp_path / "run" / "stages" / "1-train")
    for name in spec.sparse:
        one, two = (dict(m.named_parameters())[name] for m in (model, trained))
        assert torch.equal(one == 0, two == 0)
    assert not torch.equal(torch.cat([p.flatten() for p in model.parameters()]),
                           torch.cat([p.flatten() for p in trained.parameters()]))  # fmt: skip
    pruned, last = (zeros(tmp_path / "run" / "stages" / name) for name in ("2-prune", "3-train-2"))
    assert pruned == last
    assert pruned[1] < 0.5 * pruned[0]


def test_a_second_cut_keeps_the_zeros_of_the_first(tmp_path):
    text = (
        HEAD
        + SPARSIFY
        + "density = 0.5\n"
        + SPARSIFY
        + "density = 0.2\nscore = 'random'\nscope = 'uniform'\n"
    )
    finish(text, tmp_path / "run")
    one, two = (
        load_model(tmp_path / "run" / "stages" / name) for name in ("0-sparsify", "1-sparsify-2")
    )
    for name in one[0].sparse:
        a, b = (dict(m.named_parameters())[name] for _, m in (one, two))
        assert not ((a == 0) & (b != 0)).any()
    entries, kept = zeros(tmp_path / "run" / "stages" / "1-sparsify-2")
    assert kept == round(0.2 * entries)


def test_two_of_four_holds_in_every_group_and_the_rest_is_told(tmp_path):
    text = HEAD + SPARSIFY + "pattern = '2:4'\nepochs = 2\nschedule = 'gradual'\nevery = 2\n"
    line = finish(text, tmp_path / "run")["stages"][0]
    spec, model = load_model(tmp_path / "run" / "stages" / "0-sparsify")
    for name in spec.sparse:
        weight = dict(model.named_parameters())[name]
        assert (weight != 0).movedim(1, -1).reshape(-1, 4).sum(1).eq(2).all()
    assert line["density"] == 0.5
    assert "30 inputs" in next(iter(line["dense_weights"].values()))


@pytest.mark.parametrize("score", ["lamp", "taylor", "fisher", "snip", "grasp", "random"])
def test_every_score_cuts_a_fresh_network(tmp_path, score):
    text = HEAD + SPARSIFY + f"density = 0.3\nscore = '{score}'\ncalibration = 32\n"
    finish(text, tmp_path / "run")
    entries, kept = zeros(tmp_path / "run" / "stages" / "0-sparsify")
    assert kept == round(0.3 * entries)


@pytest.mark.recipe
def test_densities_come_from_the_sensitivity_of_each_layer(tmp_path, left):
    text = (
        HEAD
        + TRAIN
        + SPARSIFY
        + "density = 0.3\nscope = 'sensitivity'\nepochs = 2\nschedule = 'gradual'\nevery = 2\n"
    )
    finish(text, tmp_path / "run")
    points = [r["sensitivity"] for r in told(tmp_path / "run") if "sensitivity" in r]
    layers = {p["layer"] for p in points}
    assert len(points) == len(layers) * (1 + len({p["density"] for p in points} - {1.0}))
    assert min(p["density"] for p in points) < 0.3 / 2
    kept = {
        r["name"]: r["kept"] / r["entries"]
        for line in told(tmp_path / "run")
        for r in line.get("layers", ())
    }
    assert len({round(share, 2) for share in kept.values()}) > 1
    entries, count = zeros(tmp_path / "run" / "stages" / "1-sparsify")
    assert count == round(0.3 * entries)
    run = begun(text, tmp_path / "killed")
    for _ in range(14):
        next(run)
    with pytest.raises(Killed):
        run.throw(Killed())
    finish(text, tmp_path / "killed", resume=True)
    assert left(tmp_path / "killed") == left(tmp_path / "run")


def test_checking_tells_the_density_and_gives_the_model_on_with_its_zeros():
    line = checked(HEAD + SPARSIFY + "density = 0.1\n" + TRAIN)[0]
    assert line["density"] == pytest.approx(0.1, abs=1e-4)
    assert line["nonzero_parameters"] < line["parameters"]


def test_checking_counts_the_epochs_of_every_training(tmp_path):
    text = HEAD + SPARSIFY + "density = 0.1\nschedule = 'rewind'\n" + SCHEDULES["rewind"]
    finish(text, tmp_path / "run")
    trained = [line for line in told(tmp_path / "run") if "epoch" in line]
    assert checked(text)[0]["epochs"] == len(trained) == 2 + 1 + 1


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("density = 0.5\npattern = '2:4096'\n", RecipeError, "no multiple of 4096|keeps"),
        ("pattern = '2:4096'\n", RecipeError, "no multiple of 4096"),
        ("density = 0.003\npattern = 'filter'\n", RecipeError, "cannot be reached"),
        ("density = 0.1\nkeep = ['nothing.*']\n", RecipeError, "no weight matches"),
        ("density = 0.5\n" + SPARSIFY + "density = 0.6\n", RecipeError, "are left"),
        ("densities = { x = 0.5 }\n", RecipeError, "no weight 'x' is pruned here"),
    ],
)
def test_what_cannot_be_is_found_before_the_run(text, kind, said):
    with pytest.raises(kind, match=said) as found:
        checked(HEAD + SPARSIFY + text)
    assert "recipe.stage" in str(found.value)


def test_scores_need_public_examples():
    text = HEAD.replace("public_share = 0.3", "public_share = 0.0").replace(
        "validation = 60", "validation = 0"
    )
    with pytest.raises(DataError, match="public part of the data is empty"):
        checked(text + SPARSIFY + "density = 0.1\nscore = 'snip'\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"density": None}, "needs the share of the weights"),
        ({"pattern": "2:4"}, "leave density out"),
        ({"pattern": "3"}, "expected 'unstructured'"),
        ({"score": "movement"}, 'score: .* give schedule="gradual"'),
        ({"schedule": "rigl"}, "epochs: .* give epochs=10"),
        (
            {"schedule": "rigl", "epochs": 2, "density": None, "pattern": "2:4"},
            'schedule: .* give schedule="gradual"',
        ),
        ({"schedule": "gradual", "epochs": 2, "patience": 1}, "patience"),
        (
            {"schedule": "gradual", "epochs": 2, "begin": 0.8},
            "begin: got 0.8, expected less than until",
        ),
        (
            {"schedule": "rewind", "epochs": 2, "rewind_to": 2},
            "rewind_to: got 2, expected less than epochs",
        ),
        ({"density": 0.0}, "greater than 0"),
        ({"density": 1.5}, "less than or equal"),
        ({"score": "size"}, "magnitude"),
    ],
)
def test_settings_that_do_not_fit_together_say_so(changes, said):
    with pytest.raises(ValidationError, match=said):
        settings(**changes)


def test_settings_are_a_row_of_the_recipe():
    made = TypeAdapter(SparsifyStage).validate_json(
        '{"kind": "sparsify", "pattern": "4x1", "density": 0.25}'
    )
    assert made.epochs == 0


@pytest.mark.parametrize(
    ("optimizer", "memory"),
    [
        ("sgd", "momentum_buffer"),
        ("muon", "momentum_buffer"),
        ("adamw", "exp_avg"),
        ("adamw", "exp_avg_sq"),
    ],
)
def test_training_forgets_the_momentum_of_given_entries(optimizer, memory):
    from fedpress.core.examples import Arrays, Preprocess
    from fedpress.models.resnet import resnet_small
    from fedpress.tasks import Classification

    torch.manual_seed(0)
    model = resnet_small(width=4)
    fit = Fit(
        model,
        TrainSettings(epochs=1, batch_size=8, lr=0.01, optimizer=optimizer, precision="float32"),
        seed=0,
        task=Classification(tuple("0123456789")),
    )
    train = Arrays(torch.zeros(16, 3, 8, 8, dtype=torch.uint8) + 9, torch.arange(16) % 10)
    steps = (
        e
        for e in fit.epochs(train, Arrays(train.x[:0], train.y[:0]), Preprocess((0.5,), (0.25,)))
        if isinstance(e, Step)
    )
    next(steps)
    weight = [p for p in model.parameters() if p.dim() == 4][3]
    where = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5

    def momentum():
        view = next((v for p, v in fit.optimizers.views if p is weight), weight)
        found = next(o.state[view][memory] for o in fit.optimizers.each if view in o.state)
        shape = weight.permute(0, 2, 3, 1).shape
        channels_last = view is not weight and weight.is_contiguous(
            memory_format=torch.channels_last
        )
        return (
            found.view(shape).permute(0, 3, 1, 2).clone()
            if channels_last
            else found.view(weight.shape).clone()
        )

    before = momentum()
    fit.optimizers.forget_(weight, where)
    assert before[where].abs().sum() > 0
    assert torch.equal(momentum(), before.masked_fill(where, 0))


def test_an_error_of_the_stage_is_one_that_a_user_can_act_on():
    with pytest.raises(FedpressError):
        checked(HEAD + SPARSIFY + "density = 0.1\nepochs = 1\nimage_sizes = [[64, 1]]\n")


FEDERATE = '[[stage]]\nkind = "federate"\nnum_rounds = 2\nbatch_size = 30\nlr = 0.1\n'
WAYS = {
    "plain": "",
    "momentum": "momentum = 0.9\nserver = { kind = 'adam' }\n",
    "secure": "sum = 'secure'\nuplink = [{ kind = 'clip', clip_norm = 1.0 }, { kind = 'discretize', bits = 18 }]\n",
    "sample privacy": "privacy = { unit = 'sample', epsilon = 8.0, delta = 1e-3 }\n",
    "client privacy": "privacy = { unit = 'client', noise_multiplier = 1.0, clip_norm = 0.5 }\n",
}


@pytest.mark.recipe
@pytest.mark.parametrize("way", tiered(WAYS, quick=("momentum", "sample privacy")))
def test_federated_rounds_keep_the_zeros_and_send_only_the_rest(tmp_path, left, way):
    dense, sparse = (
        HEAD + FEDERATE + WAYS[way],
        HEAD + SPARSIFY + "density = 0.1\n" + FEDERATE + WAYS[way],
    )
    one, two = (
        finish(dense, tmp_path / "dense")["stages"][0],
        finish(sparse, tmp_path / "sparse")["stages"][1],
    )
    _, cut = load_model(tmp_path / "sparse" / "stages" / "0-sparsify")
    spec, model = load_model(tmp_path / "sparse" / "stages" / "1-federate")
    before, after = dict(cut.named_parameters()), dict(model.named_parameters())
    assert list(before) == list(after)
    for name in spec.sparse:
        assert torch.equal(before[name] == 0, after[name] == 0)
        assert not torch.equal(before[name], after[name])
    assert two["bytes_up"] < 0.35 * one["bytes_up"]
    assert two["bytes_down"] < 0.35 * one["bytes_down"]
    for promise in ("epsilon", "noise_multiplier"):
        assert one.get(promise) == two.get(promise)
    run = begun(sparse, tmp_path / "killed")
    for _ in range(8):
        next(run)
    with pytest.raises(Killed):
        run.throw(Killed())
    finish(sparse, tmp_path / "killed", resume=True)
    assert left(tmp_path / "killed") == left(tmp_path / "sparse")


def test_a_weight_that_a_hook_computes_stays_dense_and_is_listed():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[1])
    weights = find_weights(model, keep_first=False, keep_last=False)
    assert [w.name for w in weights.chosen] == ["0.weight", "2.weight"]
    assert set(weights.dense) == {"1.weight_g", "1.weight_v"}


@pytest.mark.parametrize("n", [0, 1, 5, 128, 129, 257])
def test_batches_are_of_nearly_equal_size_and_leave_nobody_alone(n):
    sizes = [
        len(x) for x, _ in Arrays(torch.zeros(n, 2), torch.zeros(n, dtype=torch.int64)).batches(128)
    ]
    assert sum(sizes) == n
    assert n <= 1 or min(sizes, default=2) > 1
    assert max(sizes, default=0) <= 128
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


DIGITS = """
name = "shares"
seed = {seed}
[data]
source = "digits"
num_clients = 1
examples_per_client = 1
validation = 100
[model]
architecture = "resnet-small"
arguments = {{ in_channels = 1, width = 8 }}
[[stage]]
kind = "train"
epochs = 10
batch_size = 64
lr = 0.1
[[stage]]
kind = "sparsify"
density = {density}
epochs = 8
batch_size = 64
lr = 0.05
"""


@pytest.mark.recipe
def test_shares_by_sensitivity_beat_uniform_and_random_ones_over_three_seeds(tmp_path):
    found = {}
    for more in ("scope = 'sensitivity'", "scope = 'uniform'", "score = 'random'"):
        accuracy = [
            finish(
                DIGITS.format(seed=seed, density=density) + more,
                tmp_path / f"{len(found)}-{density}-{seed}",
            )
            for density in (0.1, 0.05, 0.03)
            for seed in (0, 1, 2)
        ]
        found[more] = sum(result["final"]["accuracy"] for result in accuracy) / len(accuracy)
    best, *others = found.values()
    assert best > max(others), found
    assert best > 0.955
