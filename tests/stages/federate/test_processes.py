"""Every client in a process of its own with only its own examples gives the bits of all of them in one process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpress.core import parameters
from fedpress.federation import Start
from fedpress.models import save_model
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind

pytestmark = pytest.mark.recipe  # four processes, each of which loads torch

RECIPE = """
[data]
source = "digits"
num_clients = 3
examples_per_client = 20
validation = 20
[model]
architecture = "cnn"
arguments = { in_channels = 1, image_size = 8 }
[[stage]]
kind = "federate"
num_rounds = 2
batch_size = 10
trainable = ["head.*"]
"""
CASES = {
    "plain": 'uplink = [{ kind = "topk", density = 0.2 }, { kind = "quantize", bits = 8 }]\n'
    'error_feedback = true\ndownlink = [{ kind = "quantize", bits = 8 }]\n',
    "sample": 'privacy = { unit = "sample", noise_multiplier = 1.0, delta = 1e-3 }\n',
    # Every client draws its own keys: the sum does not hang on them.
    "secure": 'secure_keys = true\nprivacy = { unit = "client", trust = "distributed", '
    "noise_multiplier = 2.0, delta = 1e-3 }\n",
}
PARTY = Path(__file__).with_name("party.py")


@pytest.fixture(scope="module")
def apart():
    """What a server in one process and three clients in three others left, by case; and the states they began from."""
    with tempfile.TemporaryDirectory() as name:  # the path of a socket must be short
        folder, loaded = Path(name), recipes.load(RECIPE)
        data = load_data(loaded)
        state = first_state(loaded, data)
        save_model(folder / "model", state.spec, state.model)
        for case, more in CASES.items():
            (folder / f"{case}.toml").write_text(RECIPE + more)
        for client, arrays in data.clients.items():
            save_file({"x": arrays.x, "y": arrays.y}, folder / f"{client}.examples")
        threads = str(torch.get_num_threads())
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, str(PARTY)]
        words = [["server", name, *data.clients], *(["client", name, one] for one in data.clients)]
        parties = [
            subprocess.Popen([*command, *one], env=environment, stderr=subprocess.PIPE, text=True)
            for one in words
        ]
        try:
            said = [party.communicate(timeout=240)[1] for party in parties]
        finally:
            for party in parties:
                party.kill()
        assert [party.returncode for party in parties] == [0] * 4, "\n".join(said)
        left = {
            case: (
                load_file(folder / f"{case}.params")["params"],
                json.loads((folder / f"{case}.json").read_text()),
            )
            for case in CASES
        }
        return state, left


@pytest.mark.parametrize("case", CASES)
def test_processes_with_only_their_own_data_give_the_bits_of_one_process(case, apart):
    state, left = apart
    together = bind(recipes.load(RECIPE + CASES[case]).stage[0], state)
    start = parameters.flatten(together.server.model)
    *_, last = together.server.rounds(Start(start))
    params, told = left[case]
    assert torch.equal(params, last.params)
    assert not torch.equal(params, start)
    assert told["refused"] == [{}, {}]
    assert told["accuracy"] == together.server.client_scores(last.params)
    assert (told["accuracy"] != {}) == (case == "plain")


@pytest.mark.parametrize("case", CASES)
def test_the_server_has_no_examples_and_knows_counts_only_where_they_are_public(case, apart):
    _, told = apart[1][case]
    assert told["examples in this process"] == 0
    assert (told["examples"] is None) == (case == "secure")
