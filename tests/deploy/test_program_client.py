"""A client that trains with an exported program, over a real network, beside clients that train in torch."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("executorch.extension.training")
pytest.importorskip("flwr")

from fedpress.deploy.ondevice import export_training
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from tests.deploy.fleet import NAMES, RECIPE, Fleet, port

pytestmark = pytest.mark.deploy
TEXT = RECIPE + "momentum = 0.5\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The recipe's network as a program that trains."""
    loaded = recipes.load(TEXT)
    state = first_state(loaded, load_data(loaded))
    path = tmp_path_factory.mktemp("program") / "train.pte"
    export_training(state.model, path, input_shape=(1, 8, 8), task=state.data.task, batch_size=4)
    return path


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path, port(20))
    yield made
    made.close()


def ended(fleet, out):
    """Returns the rounds, and the model, of a finished run."""
    lines = (fleet.folder / out / "records.jsonl").read_text().splitlines()
    rounds = [line for line in map(json.loads, lines) if "round" in line]
    return rounds, load_file(fleet.folder / out / "stages" / "0-federate" / "model.safetensors")


def test_a_run_with_a_client_that_trains_a_program_ends_in_the_model_of_torch(fleet, program):
    for name in NAMES:
        fleet.client(name, program=program if name == "c1" else None)
    server = fleet.server(TEXT, "run")
    assert server.ended() == 0, server.said
    twin = fleet.command(
        "run", str(fleet.folder / "run.toml"), "--out", str(fleet.folder / "twin"), log="twin.log"
    )
    assert twin.ended() == 0, twin.said
    rounds, model = ended(fleet, "run")
    expected_rounds, expected = ended(fleet, "twin")
    assert len(rounds) == len(expected_rounds) == 4
    assert not any(one["refused"] for one in rounds)
    assert model.keys() == expected.keys()
    torch.testing.assert_close(model, expected, rtol=1e-4, atol=1e-5)
    # Not in the same bits: then no program would have trained.
    assert any(not torch.equal(model[name], expected[name]) for name in model)


def test_a_program_that_is_none_is_told_before_the_client_connects(fleet, tmp_path):
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(b"no program")
    client = fleet.client("c0", program=damaged)
    assert client.ended() == 2
    assert "write one with export_training" in client.said
