"""Algorithms and aggregators from a recipe: new keys, the old ones that mean the same, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from fedpress.errors import FedpressError
from fedpress.federation import Adam, FedAdam, FedAvg, FedProx, Median, Momentum, Scaffold
from fedpress.models import load_model
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.contract import algorithm_of
from fedpress.stages.federate.settings import FederateSettings
from fedpress.workspace.state import Tick
from tests.harness import begun, checked, finish

HEAD = """
name = "algorithms"
[data]
source = "digits"
num_clients = 4
examples_per_client = 60
public_share = 0.3
validation = 60
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [16] }
[[stage]]
kind = "federate"
num_rounds = 3
lr = 0.2
batch_size = 20
"""
CLIENT = 'privacy = { unit = "client", noise_multiplier = 2.0, delta = 1e-3%s }'
SAMPLE = 'privacy = { unit = "sample", noise_multiplier = 1.0, delta = 1e-4%s }'


def text(*lines: str) -> str:
    return "\n".join([HEAD, *lines])


def model_of(path) -> dict[str, torch.Tensor]:
    """Returns the tensors of the model that a run left."""
    (place,) = (path / "stages").iterdir()
    return load_model(place)[1].state_dict()


def stage(**keys) -> FederateSettings:
    return FederateSettings(kind="federate", **keys)


def test_old_keys_and_new_ones_name_the_same_algorithm():
    adam = {"kind": "adam", "lr": 0.1}
    pairs = [
        (stage(), FedAvg()),
        (stage(server=adam), FedAvg(server=Adam(lr=0.1))),
        (stage(proximal_mu=0.3), FedProx(proximal_mu=0.3)),
        (stage(proximal_mu=0.3, server=adam), FedProx(proximal_mu=0.3, server=Adam(lr=0.1))),
        (stage(algorithm="fedadam"), FedAdam()),
        (
            stage(algorithm={"kind": "scaffold", "server": {"kind": "momentum"}}),
            Scaffold(server=Momentum()),
        ),
    ]
    for settings, expected in pairs:
        assert algorithm_of(settings) == expected


def test_what_says_the_same_thing_twice_is_refused():
    with pytest.raises(ValidationError, match="server: it is given together with algorithm"):
        stage(algorithm="scaffold", server={"kind": "adam"})
    with pytest.raises(ValidationError, match="proximal_mu: it is given together with algorithm"):
        stage(algorithm="fedprox", proximal_mu=0.3)
    with pytest.raises(ValidationError, match="leave out sum"):
        stage(aggregator="median", sum="secure")


def test_settings_of_older_runs_stay_what_they_were():
    settings = settings_of(recipes.load(HEAD, ()))["stage"][0]
    assert not {"algorithm", "aggregator"} & settings.keys()


def test_scaffold_on_a_recipe_runs_is_killed_and_goes_on_to_the_same_bits(tmp_path):
    recipe = text('algorithm = "scaffold"', "cohort = 3")
    finish(recipe, tmp_path / "whole")
    going = begun(recipe, tmp_path / "killed")
    next(event for event in going if isinstance(event, Tick) and event.done == 2)
    going.close()
    result = finish(recipe, tmp_path / "killed", resume=True)
    one, two = (model_of(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(t, two[n]) for n, t in one.items())
    assert result["final"]["accuracy"] > 0.3


def test_losses_weigh_ends_are_trimmed_and_powers_travel_in_one_recipe(tmp_path):
    recipe = text(
        'algorithm = { kind = "qfedavg", q = 0.5 }',
        'aggregator = { kind = "trimmed", beta = 0.25 }',
        'uplink = [{ kind = "powers", k = 7 }]',
        "error_feedback = true",
    )
    assert finish(recipe, tmp_path)["final"]["accuracy"] > 0.3


def test_check_counts_the_bytes_of_both_vectors():
    plain, scaffold = (
        checked(text(*lines))[0] for lines in ((), ('algorithm = "scaffold"', 'weights = "equal"'))
    )
    for way in ("bytes_up_per_round", "bytes_down_per_round"):
        assert scaffold[way] == pytest.approx(2 * plain[way], rel=0.02)
    coded = checked(
        text('algorithm = { kind = "scaffold", uplink = [{ kind = "quantize", bits = 4 }] }')
    )[0]
    assert coded["bytes_up_per_round"] < 0.6 * scaffold["bytes_up_per_round"]


def test_the_promise_is_the_same_with_a_second_vector_and_its_noise_is_not():
    algorithm = 'algorithm = { kind = "scaffold", clip_norm = 0.5 }'
    one, two = (checked(text(CLIENT % "", *lines))[0] for lines in ((), (algorithm,)))
    assert two["epsilon"] == one["epsilon"]
    loaded = recipes.load(text(CLIENT % "", algorithm), ())
    uplink = bind(loaded.stage[0], first_state(loaded, load_data(loaded))).server.uplink
    noises = [codec.noise.plan for codec in uplink.vector_codecs]
    assert [n.noise_multiplier for n in noises] == [pytest.approx(2.0 * 2**0.5)] * 2
    assert [n.clip_norm for n in noises] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("lines", "cure"),
    [
        (['algorithm = "scaffold"', CLIENT % ""], "give it a clip_norm"),
        (['algorithm = "scaffold"', 'sum = "secure"'], "adds one vector per client"),
        (['algorithm = "scaffold"', 'weights = "examples"'], 'set weights = "equal"'),
        (['algorithm = "scaffold"', "momentum = 0.9"], "set momentum = 0"),
        (
            ['algorithm = "scaffold"', SAMPLE % ', trust = "central"'],
            "take one step together|beside the update",
        ),
        (
            ['algorithm = { kind = "fedprox" }', SAMPLE % ', trust = "central"'],
            "take one step together",
        ),
        (['aggregator = "median"', CLIENT % ""], "one client can change without limit"),
        (
            ['aggregator = "median"', SAMPLE % ', trust = "central"'],
            "one sample can change without limit",
        ),
        (['aggregator = "median"', CLIENT % ', trust = "distributed"'], "leave aggregator out"),
        (['aggregator = "median"', 'weights = "examples"'], 'set weights = "equal"'),
        (['algorithm = "qfedavg"', CLIENT % ""], "'curvature' has no clip_norm"),
        (['algorithm = "qfedavg"', SAMPLE % ', trust = "local"'], "which gets no noise"),
        (['algorithm = "qfedavg"', 'sum = "secure"'], "adds one vector per client"),
        (['aggregator = "trimmed"', CLIENT % ""], "one client can change without limit"),
        (['aggregator = "trimmed"', 'weights = "examples"'], 'set weights = "equal"'),
        (['sum = "secure"', 'uplink = [{ kind = "powers" }]'], "cannot decode a sum of 'powers'"),
        (['aggregator = "average"'], "mean"),
        (['algorithm = "fedsgd"'], "fedavg"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure_before_the_run(lines, cure):
    with pytest.raises(FedpressError, match=cure):
        checked(text(*lines))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [CLIENT % ', trust = "local"'],
        [SAMPLE % ""],
    ],
    ids=["open", "client", "sample"],
)
def test_the_median_runs_where_every_update_is_private_before(lines, tmp_path):
    result = finish(text('aggregator = "median"', *lines), tmp_path / "run")
    assert result["final"]["rounds"] == 3
    assert Median().kind == "median"


@pytest.mark.recipe
def test_fedprox_and_scaffold_run_under_sample_privacy_at_no_further_cost(tmp_path):
    spent = []
    for name in ("fedavg", "fedprox", "scaffold"):
        lines = (f'algorithm = "{name}"', 'weights = "equal"', SAMPLE % "")
        spent.append(finish(text(*lines), tmp_path / name)["final"]["epsilon"])
    assert len(set(spent)) == 1


@pytest.mark.parametrize("word", ["distributed", "secure"])
def test_noise_of_all_clients_together_has_a_new_word_and_the_old_one(word, tmp_path):
    result = finish(
        text(CLIENT % f', trust = "{word}", clip_norm = 0.5', "num_rounds = 1").replace(
            "num_rounds = 3\n", ""
        ),
        tmp_path / "run",
    )
    assert result["final"]["trust"] == "distributed"
