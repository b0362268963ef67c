"""Private statistics over a network: clients answer the query from their own tables."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedpress.api.approving import approve, asked_for
from fedpress.core.examples import Arrays
from fedpress.data import Preparation, statistics
from fedpress.network.data import ClientData
from fedpress.network.gate import NoPolicy
from fedpress.network.ledger import DataKey, OwnerLedger
from fedpress.network.owner import OwnerGate
from fedpress.network.policy import Policy, PrivacyRules
from fedpress.network.sessions import Sessions
from fedpress.network.status import status
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.deployed import offer_of
from fedpress.stages.federate.offer import Offer
from fedpress.workspace.folder import RunFolder
from tests.harness import finish
from tests.network.deployment import Machines
from tests.stages.statistics import texts
from tests.stages.statistics.hospitals import FIRST, TRAINING, lines_of, written


class Elsewhere(Machines):
    """Clients that prepare their rows as each offer says."""

    readers: dict

    def start(self) -> None:
        self.sessions = {
            name: Sessions(name, self.folder / name, self.readers[name], gate)
            for name, gate in self.gates.items()
        }


def deployed(text: str, folder: Path, readers: dict) -> dict:
    """Runs a recipe over a network, and returns its result."""
    recipe = recipes.load(text)
    Elsewhere.readers = readers
    network = Elsewhere(folder / "machines", {name: NoPolicy() for name in readers}, text)
    network.labels = ("outcome",)
    run = RunFolder.create(folder / "run", text, settings_of(recipe))
    for _ in runs.execute(recipe, run, load_data(recipe).without_clients(), network=network):
        pass
    return json.loads((folder / "run" / "result.json").read_text())


@pytest.mark.recipe
def test_clients_answer_from_their_own_tables(tmp_path):
    text = written(tmp_path / "clients")
    own = tmp_path / "server.csv"
    own.write_text("\n".join(lines_of(1, 60, seed=9)["c0"]))
    readers = {
        path.stem: ClientData(path).arrays for path in sorted((tmp_path / "clients").iterdir())
    }
    text = text.replace(f"{tmp_path}/clients/*.csv", str(own)).replace("client_column", "# ")
    found = deployed(text + FIRST + TRAINING, tmp_path, readers)
    age = found["stages"][0]["columns"]["age"]
    assert age["mean"] == pytest.approx(49.8, abs=4 * age["error"])
    assert found["stages"][0]["words"] == {"job": ["cook", "nurse"]}
    assert found["finished"]


def machines(place: Path, text: str, rules: Policy) -> Elsewhere:
    """Two clients, of which the first has an owner with rules."""
    Elsewhere.readers = {
        path.stem: ClientData(path).arrays for path in sorted((place / "clients").iterdir())
    }
    book = OwnerLedger(place / "ledger.sqlite")
    gates = {name: NoPolicy() for name in Elsewhere.readers}
    gates["c0"] = OwnerGate(rules, book, book.data(DataKey("/own", "digest of own")))
    found = Elsewhere(place / "machines", gates, text)
    found.labels = ("outcome",)
    found.reading = found.recipe.data.reading
    return found


def executed(network: Elsewhere, text: str, place: Path) -> dict:
    run = RunFolder.create(place, text, settings_of(network.recipe))
    data = network.data.without_clients()
    for _ in runs.execute(network.recipe, run, data, network=network):
        pass
    return json.loads((place / "result.json").read_text())


VARIANTS = {
    "moments": {},
    "quantiles": {"stage.0.method": "quantiles"},
    "without gaps": {"data.missing": "drop"},
    "the noise of all clients": {"stage.0.privacy.trust": "distributed"},
    "clients": {"stage.0.privacy.unit": "client"},
}


@pytest.mark.recipe
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recipe_alone_gives_the_fingerprint_of_the_query_that_is_offered(tmp_path, variant):
    text = written(tmp_path / "clients") + FIRST + TRAINING
    keys = [f"{key}={value}" for key, value in VARIANTS[variant].items()]
    recipe = recipes.load(text, keys)
    state = first_state(recipe, load_data(recipe))
    query = recipe.stage[0].query(state)
    offer = offered(recipe, *recipe.stage[0].as_round(state, query))
    assert asked_for(tomllib.loads(text), keys)[0].fingerprint == offer.fingerprint
    others = {
        asked_for(tomllib.loads(text), [f"{key}={value}" for key, value in other.items()])[
            0
        ].fingerprint
        for name, other in VARIANTS.items()
        if name != variant
    }
    assert offer.fingerprint not in others


def offered(recipe, asking, stage, **spec) -> Offer:
    """Returns an offer as a client reads it; `spec` replaces fields of the model's spec."""
    network = SimpleNamespace(labels=recipe.data.label_columns, reading=recipe.data.reading)
    changed = replace(asking, spec=asking.spec.model_copy(update=spec))
    offer = offer_of(stage, changed, network)
    return Offer.from_message(offer.to_message({"stage": "statistics"}))


HARMFUL = {
    "other bounds": {"numbers": [[0, 30.0, 31.0, 0], [1, 0.0, 2e5, 0]]},
    "columns in the place of others": {"numbers": [[1, 0.0, 110.0, 0], [0, 0.0, 2e5, 0]]},
    "squares of words": {"numbers": [[0, 0.0, 110.0, 0], [2, 0.0, 2e5, 0]]},
    "one column twice": {"numbers": [[0, 0.0, 110.0, 0], [0, 0.0, 2e5, 0]]},
    "counts of another column": {"flags": [[0, 1]]},
    "counts of a part of a column": {"flags": [[2, 1]]},
    "a position that is none": {"flags": [[99, 1]]},
    "counts without gaps": {"gaps": False},
}


@pytest.mark.parametrize("case", HARMFUL)
def test_a_query_that_asks_for_something_else_is_another_one(tmp_path, case):
    text = written(tmp_path / "clients") + FIRST + TRAINING
    recipe = recipes.load(text)
    state = first_state(recipe, load_data(recipe))
    asking, stage = recipe.stage[0].as_round(state, recipe.stage[0].query(state))
    approved = asked_for(tomllib.loads(text))[0].fingerprint
    assert offered(recipe, asking, stage).fingerprint == approved
    arguments = {**asking.spec.arguments, **HARMFUL[case]}
    assert offered(recipe, asking, stage, arguments=arguments).fingerprint != approved


@pytest.mark.recipe
def test_an_owner_approves_the_query_before_it_is_asked_and_it_is_charged_once(tmp_path):
    text = written(tmp_path / "clients") + FIRST + TRAINING
    rules = Policy(require_approval=True, privacy=PrivacyRules(secure_noise=False, delta=1e-3))
    network = machines(tmp_path, text, rules)
    executed(network, text, tmp_path / "refused")
    # Once for the query and once for the training.
    refused = {one for one in network.sentences if "require_approval" in one}
    assert len(refused) == 2
    assert all(one.startswith("client 'c0' does not take part") for one in refused)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    query, training = approve(recipe, ledger=tmp_path / "ledger.sqlite")
    assert "age (0 to 110), income (0 to 200000)" in " ".join(query.words)
    found = executed(network, text, tmp_path / "run")
    assert found["stages"][0]["clients"] == 3
    rows = {row.stage: row for row in status(network.gates["c0"].ledger, rules)}
    assert rows["statistics"].epsilon == pytest.approx(2.0, rel=1e-3)
    assert rows["statistics"].answered == 1
    assert rows["federate"].recipe == training.fingerprint


@pytest.mark.recipe
def test_an_approved_query_finds_the_vocabulary_of_texts_elsewhere(tmp_path):
    private = "privacy = { unit"
    text = (texts.written(tmp_path / "clients") + texts.ASKING + texts.TRAINING).replace(
        private, "\n" + private
    )
    rules = Policy(
        require_approval=True,
        privacy=PrivacyRules(secure_noise=False, delta=1e-3),
        families=("column-sums",),
        code=("tests.stages.statistics.texts:Keyboard",),
    )
    network = machines(tmp_path, text, rules)
    network.labels = network.recipe.data.label_columns
    # The server's own texts have no clients.
    network.data = replace(network.data, public=network.data.clients["c0"].take(torch.arange(9)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    query, _ = approve(recipe, ledger=tmp_path / "ledger.sqlite")
    assert "in how many parts of the texts each token of a list is" in " ".join(query.words)
    found = executed(network, text, tmp_path / "run")
    first, second = found["stages"]
    assert (first["clients"], second["clients"]) == (3, 3)
    assert set(first["words"]["vocabulary"]) == set(texts.LETTERS[: texts.KEPT])
    rows = {row.stage: row for row in status(network.gates["c0"].ledger, rules)}
    assert rows["statistics"].epsilon == pytest.approx(first["epsilon"], rel=1e-3)


@pytest.mark.recipe
def test_the_bits_are_those_of_a_simulation(tmp_path):
    text = written(tmp_path / "clients") + FIRST + TRAINING
    data = load_data(recipes.load(text))

    def reader(name: str):
        def read(offer: Offer) -> Arrays:
            about = Preparation.from_json(offer.inputs)
            if about.mean == data.preparation.mean:
                return data.clients[name]
            return statistics.settled(data, about).clients[name]

        return read

    (tmp_path / "run elsewhere").mkdir()
    found = deployed(
        text, tmp_path / "run elsewhere", {name: reader(name) for name in data.clients}
    )
    expected = finish(text, tmp_path / "run")
    assert found["stages"][0]["columns"] == expected["stages"][0]["columns"]
    assert found["stages"][1]["accuracy"] == expected["stages"][1]["accuracy"]
    last = "stages/1-federate/model.safetensors"
    there = tmp_path / "run elsewhere" / "run" / last
    assert there.read_bytes() == (tmp_path / "run" / last).read_bytes()
