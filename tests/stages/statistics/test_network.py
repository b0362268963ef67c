"""Private statistics over a network: clients answer the query from their own tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedpress.core.examples import Arrays
from fedpress.data import Preparation, statistics
from fedpress.network.data import ClientData
from fedpress.network.gate import NoPolicy
from fedpress.network.sessions import Sessions
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.stages.federate.offer import Offer
from fedpress.workspace.folder import RunFolder
from tests.harness import finish
from tests.network.deployment import Machines
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
