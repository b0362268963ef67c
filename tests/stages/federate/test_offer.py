"""The offer: it says all that an agreement depends on, and a hostile one builds and imports nothing."""

import json
from dataclasses import replace

import pytest
import torch

from fedpress.core import random
from fedpress.data.population import Population
from fedpress.errors import WireError
from fedpress.federation.protocol import text_tensor
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.offer import Offer
from fedpress.wire.message import Message, pack, unpack

RECIPE = """
[data]
source = "digits"
num_clients = 3
examples_per_client = 20
validation = 20
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [8] }
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 10
"""
STAGES = {
    "plain": "",
    "coded": 'uplink = [{ kind = "topk", density = 0.2 }, { kind = "quantize", bits = 8 }]\n'
    "error_feedback = true\n",
    "private": 'privacy = { unit = "sample", noise_multiplier = 1.0, delta = 1e-3 }\n',
    "buffered": 'schedule = { kind = "buffered", buffer = 2, concurrency = 3 }\n',
    "deadline": 'cohort = 2\nschedule = { kind = "synchronous", deadline = "5m" }\n',
    "some": 'trainable = ["*.bias"]\nweights = "equal"\n',
}
POPULATION = Population(("a", "b", "c"), {"a": 20, "b": 21, "c": 22})


def made(rest):
    """Returns the server's inputs and its offer for a recipe."""
    recipe = recipes.load(RECIPE + rest)
    data = load_data(recipe)
    state = first_state(recipe, data)
    given = {"preprocess": data.preprocess, "task": data.task, "seed": 7}
    common = CommonInputs.of(recipe.stage[0], state.spec, state.model, **given)
    return common, Offer.of(recipe.stage[0], state.spec, state.model, **given)


@pytest.fixture(scope="module")
def offer():
    return made("")[1]


def over_the_wire(message):
    return unpack(pack(message))


@pytest.mark.parametrize("rest", STAGES.values(), ids=STAGES)
def test_both_sides_compute_the_same_agreement(rest):
    common, offer = made(rest)
    read = Offer.from_message(over_the_wire(offer.to_message({"stage": "federate"})))
    server = common.contract(POPULATION).terms.agreement
    client = read.common().contract(POPULATION).terms.agreement
    assert client.to_json() == server.to_json()


@pytest.mark.parametrize("rest", STAGES.values(), ids=STAGES)
def test_an_offer_that_was_read_makes_the_same_message(rest):
    message = made(rest)[1].to_message({"stage": "federate"})
    again = Offer.from_message(message).to_message({"stage": "federate"})
    assert pack(again) == pack(message)


def test_the_model_and_the_seed_of_the_stage_are_the_servers():
    common, offer = made("")
    read = Offer.from_message(offer.to_message({}))
    built = read.common()
    wanted = common.model.state_dict()
    found = built.model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert built.seed == common.seed
    assert read.seed == random.derive(7, "federate", "federate")


def test_the_fingerprint_follows_from_the_terms_and_not_from_the_weights(offer):
    recipe = recipes.load(RECIPE)
    other = made("")[1]
    other.tensors["0.weight" if "0.weight" in other.tensors else next(iter(other.tensors))] += 1
    assert other.fingerprint == offer.fingerprint
    assert made("lr = 0.07\n")[1].fingerprint != offer.fingerprint
    assert recipe.stage[0].num_rounds == 3


def with_text(offer, name, change):
    """Returns the message with one of its texts changed."""
    message = offer.to_message({})
    content = json.loads(bytes(message.tensors[name].tolist()))
    text = change(content)
    if not isinstance(text, str):
        text = json.dumps(content)
    return Message("offer", {}, {**message.tensors, name: text_tensor(text)})


HOSTILE = {
    "no JSON": ("facts", lambda c: "{"),
    "a list": ("settings", lambda c: "[]"),
    "deep": ("facts", lambda c: "[" * 100_000),
    "deep inputs": ("facts", lambda c: '{"inputs": ' + '{"a":' * 50_000),
    "another key": ("facts", lambda c: c.update(more=1)),
    "a missing key": ("facts", lambda c: c.pop("seed") and None),
    "a seed that is none": ("facts", lambda c: c.update(seed="seven")),
    "a seed of a million digits": ("facts", lambda c: c.update(seed="9" * 1_000_000)),
    "a mean of words": ("facts", lambda c: c.update(mean=["a"])),
    "a task that is none": ("facts", lambda c: c.update(task={"kind": "os:system"})),
    "an algorithm that is none": ("settings", lambda c: c.update(algorithm={"kind": "os:system"})),
    "an unknown setting": ("settings", lambda c: c.update(code="os:system")),
    "minus one round": ("settings", lambda c: c.update(num_rounds=-1)),
    "no spec": ("spec", lambda c: "null"),
    "own code": ("spec", lambda c: c.update(architecture="fedpress.nothing:make")),
    "an unknown architecture": ("spec", lambda c: c.update(architecture="nothing")),
}


@pytest.mark.parametrize(("name", "change"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_is_a_wire_error(offer, name, change):
    with pytest.raises(WireError) as caught:
        Offer.from_message(with_text(offer, name, change)).common()
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_features": 64, "hidden": [10**9, 10**9]},
        {"in_features": 64, "hidden": [8] * 10**6},
        {"in_features": 10**15, "hidden": [8]},
        {"in_features": -1, "hidden": [8]},
        {"in_features": "64; rm", "hidden": [8]},
        {"nothing": 3},
    ],
    ids=["wide", "deep", "long", "negative", "text", "unknown"],
)
def test_a_model_beyond_all_limits_is_not_built(offer, arguments):
    message = with_text(offer, "spec", lambda c: c.update(arguments=arguments))
    with pytest.raises(WireError, match="offer"):
        Offer.from_message(message).common()


@pytest.mark.parametrize("case", ["missing", "type", "shape", "fewer", "more", "other", "nan"])
def test_tensors_that_do_not_fit_are_a_wire_error(offer, case):
    message = offer.to_message({})
    vector = message.tensors["model.F32"]
    given = {
        "type": vector.double(),
        "shape": vector.reshape(1, -1),
        "fewer": vector[1:],
        "more": torch.cat([vector, vector[:1]]),
        "nan": torch.full_like(vector, torch.nan),
    }
    rest = {key: value for key, value in message.tensors.items() if key != "model.F32"}
    if case in given:
        rest["model.F32"] = given[case]
    elif case == "other":
        # As many values, under the names of another model.
        rest = {**replace(offer, tensors={"w": vector}).to_message({}).tensors}
    message = Message("offer", {}, rest)
    if case == "nan":
        # A diverged model is no attack; it is found where it is trained.
        Offer.from_message(message).common()
        return
    with pytest.raises(WireError, match=r"offer\.model"):
        Offer.from_message(message).common()


def test_floats_of_the_model_are_sent_as_they_are(offer):
    sent = pack(offer.to_message({}))
    for tensor in offer.tensors.values():
        assert tensor.numpy().tobytes() in sent


@pytest.mark.parametrize("name", ["settings", "spec", "facts"])
def test_a_text_that_is_missing_or_no_text_is_a_wire_error(offer, name):
    message = offer.to_message({})
    rest = {key: value for key, value in message.tensors.items() if key != name}
    for tensors in (
        rest,
        {**rest, name: torch.zeros(3)},
        {**rest, name: torch.tensor([255]).byte()},
    ):
        with pytest.raises(WireError):
            Offer.from_message(Message("offer", {}, tensors))


def test_another_version_of_the_random_streams_is_told_with_both_versions(offer):
    message = with_text(offer, "facts", lambda c: c.update(streams=99, fedpress="9.9"))
    with pytest.raises(WireError, match="99") as caught:
        Offer.from_message(message).common()
    assert "9.9" in caught.value.cure
